"""The matrix product of a linear layer, with one order of sums whatever the number of rows."""

import torch

from .._autocast import autocast, enabled, without_autocast
from .._autograd import distinct, once_differentiable
from .._checks import check_device, check_float, check_shape, fail, last_stride_1
from .._registry import Op
from ._head import as_matrix
from ._losses import accumulator

PIECES = (1, 2, 4, 8)


def pieces_of(inner):
    """Into how many pieces a sum of `inner` terms is cut: 8 from 4096 terms on, fewer below, so that none is shorter than 512.
    The heads over a vocabulary hold the same rule (csrc/linear.h)."""
    return 8 if inner >= 4096 else 4 if inner >= 2048 else 2 if inner >= 1024 else 1


@without_autocast
def reference(x, weight, bias=None, *, residual=None, out_dtype=None, pieces=None):
    acc = accumulator(x.dtype)
    if weight.dtype != x.dtype:  # rounded, with a gradient that is not
        weight = weight + (weight.to(x.dtype).to(weight.dtype) - weight).detach()
    y = x.to(acc) @ weight.to(acc).T
    y = y if bias is None else y + bias.to(acc)
    y = y if residual is None else y + residual.to(acc)
    return y.to(out_dtype or x.dtype)


def _fake_fwd(x, weight, bias, residual, pieces, wide):
    return x.new_empty((x.shape[0], weight.shape[0]), dtype=accumulator(x.dtype) if wide else x.dtype)


def _fake_bwd(dy, x, weight, pieces, wide, needs_dbias):
    acc = accumulator(dy.dtype)
    dx = dy.new_empty((0,)) if weight is None else dy.new_empty((dy.shape[0], weight.shape[1]))
    dweight = dy.new_empty((0,)) if x is None else dy.new_empty((dy.shape[1], x.shape[1]), dtype=acc if wide else dy.dtype)
    return dx, dweight, dy.new_empty((dy.shape[1] if needs_dbias else 0,), dtype=acc)


LINEAR = Op(
    name="linear",
    source="torch.nn.functional.linear; fixed pieces of the sum: arXiv:2511.17826",
    summary="x weight^T + bias + residual, one order of sums for any number of rows",
    reference=reference,
    schemas={
        "fwd": "(Tensor x, Tensor weight, Tensor? bias, Tensor? residual, int pieces, bool wide) -> Tensor",
        "bwd": "(Tensor dy, Tensor? x, Tensor? weight, int pieces, bool wide, bool needs_dbias)"
               " -> (Tensor dx, Tensor dweight, Tensor dbias)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    outputs=("y",),
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
)
_FWD, _BWD = LINEAR.overloads["fwd"], LINEAR.overloads["bwd"]


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, residual, pieces, wide, backend):
        needs_x, needs_weight = ctx.needs_input_grad[:2]
        ctx.save_for_backward(x if needs_weight else None, weight if needs_x else None)
        ctx.dtypes = x.dtype, weight.dtype, None if bias is None else bias.dtype
        ctx.backend = backend
        return _FWD[backend](x, weight, bias, residual, pieces, wide)

    @staticmethod
    @once_differentiable("linear")
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias, needs_residual = ctx.needs_input_grad[:4]
        dtype, weight_dtype, bias_dtype = ctx.dtypes
        dx = dweight = dbias = None
        if needs_x or needs_weight or needs_bias:
            dx, dweight, dbias = _BWD[ctx.backend](last_stride_1(dy.to(dtype)), x, weight, pieces_of(dy.shape[1]),
                                                   weight_dtype != dtype, needs_bias)
        return (dx if needs_x else None, dweight if needs_weight else None, dbias.to(bias_dtype) if needs_bias else None,
                dy if needs_residual else None, None, None, None)


def _check_like(argument, tensor, dtypes, x):
    """Checks the dtype of an operand beside x, one of `dtypes`, and its device."""
    check_float("linear", argument, tensor)
    if tensor.dtype not in dtypes:
        fail(TypeError, "linear", argument, " or ".join(str(d) for d in dict.fromkeys(dtypes)), tensor.dtype)
    check_device("linear", argument, tensor, x, "x")


def linear(x, weight, bias=None, *, residual=None, out_dtype=None, pieces=None, backend=None):
    """y = x weight^T + bias + residual, rounded once, with an order of sums that depends on K alone.

    Shapes:   x [..., K], weight [N, K], bias [N], residual [..., N] -> y [..., N]
    Dtypes:   x float32 | bfloat16 | float16 | float64. weight and bias have the dtype of x or float32; a float32 weight is
              rounded to the dtype of x as it is read, without a copy in memory. out_dtype: that of x (None), or float32 for
              unrounded sums. residual has the dtype of y. Autocast casts all operands, the weight by a copy. Products of
              bfloat16 take subnormal numbers as 0
    Order:    the sum over K is cut into `pieces` of equal length, a multiple of 64 (32 on CPU) except at the end: 8 from
              K = 4096 on, 4 from 2048, 2 from 1024, otherwise 1, or as given (1, 2, 4 or 8). Each is summed in float32 in
              rising order, and they are added in a balanced tree. A row of y has the same bits in every batch. Where
              64 * pieces divides K, R ranks that hold K / R columns each and call it with pieces / R and out_dtype float32
              get the bits of one rank by adding their results in the same tree
    Backward: saves x if weight needs a gradient and weight if x does. dx is summed over N in pieces like y; dweight over
              the rows in blocks of 512, in rising order, and dbias in blocks too, both in float32; dweight of a float32
              weight is not rounded. The upstream gradient is rounded to the dtype of x. Deterministic: yes; y and dx are
              batch-invariant
    Errors:   ValueError for a wrong shape, device or option; TypeError for a wrong dtype
    Cost:     2 M N K flops forward, 4 M N K backward. A weight whose last stride is not 1 is copied.
              Source: torch.nn.functional.linear; arXiv:2511.17826 for the tree
    """
    check_float("linear", "x", x)
    check_float("linear", "weight", weight)
    if x.dim() == 0:
        fail(ValueError, "linear", "x", "at least one dimension", list(x.shape))
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        fail(ValueError, "linear", "weight", f"shape [N, {x.shape[-1]}]", list(weight.shape))
    if pieces is None:
        pieces = pieces_of(x.shape[-1])
    if not isinstance(pieces, int) or isinstance(pieces, bool) or pieces not in PIECES:
        fail(ValueError, "linear", "pieces", "1, 2, 4 or 8", repr(pieces))
    x, weight, *others = autocast(*(t for t in (x, weight, bias) if isinstance(t, torch.Tensor)))
    bias = others[0] if others else bias
    acc = accumulator(x.dtype)
    _check_like("weight", weight, (x.dtype, acc), x)
    if bias is not None:
        _check_like("bias", bias, (x.dtype, acc), x)
        check_shape("linear", "bias", bias, weight.shape[:1], "the rows of weight")
    out_dtype = x.dtype if out_dtype is None else out_dtype
    if not isinstance(out_dtype, torch.dtype):
        fail(TypeError, "linear", "out_dtype", "a torch.dtype or None", repr(out_dtype))
    if out_dtype not in (x.dtype, acc):
        fail(ValueError, "linear", "out_dtype", " or ".join(dict.fromkeys(map(str, (x.dtype, acc)))), out_dtype)
    shape = (*x.shape[:-1], weight.shape[0])
    if residual is not None:
        if isinstance(residual, torch.Tensor) and residual.is_floating_point() and enabled(x.device.type):
            residual = residual.to(out_dtype)
        _check_like("residual", residual, (out_dtype,), x)
        check_shape("linear", "residual", residual, shape, "the shape of y")
    chosen = LINEAR.select(x, backend)
    if chosen == "reference":
        return reference(x, weight, bias, residual=residual, out_dtype=out_dtype, pieces=pieces)
    flat, weight = as_matrix(x), last_stride_1(weight)
    bias = None if bias is None else bias.contiguous()
    added = None if residual is None else as_matrix(residual)
    wide = out_dtype != x.dtype
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (flat, weight, bias, added)):
        y = _Linear.apply(*_distinct(flat, weight, bias, added), pieces, wide, chosen)
    else:
        y = _FWD[chosen](flat, weight, bias, added, pieces, wide)
    return y if x.dim() == 2 else y.view(shape)


def _distinct(*tensors):
    given = iter(distinct(*(t for t in tensors if t is not None)))
    return [None if t is None else next(given) for t in tensors]
