"""RMS normalization, with an optional residual addition in the same pass."""

import torch

from .._autocast import cast_weight, promoted
from .._autograd import distinct, once_differentiable
from .._checks import (
    as_rows,
    check_choice,
    check_device,
    check_float,
    check_same,
    check_shape,
    check_tensor,
    fail,
)
from .._registry import Op


def reference(x, weight, eps=1e-5, residual=None, *, rounding="once"):
    h = x if residual is None else x + residual
    acc = torch.promote_types(h.dtype, torch.float32)
    x_hat = h.to(acc)
    x_hat = x_hat * torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
    if rounding == "hf":
        x_hat = x_hat.to(h.dtype).to(acc)
    y = (x_hat * weight.to(acc)).to(h.dtype)
    return y if residual is None else (y, h)


def _rstd_like(h):
    return h.new_empty(h.shape[:-1], dtype=torch.promote_types(h.dtype, torch.float32))


def _fake_fwd(x, weight, eps, hf):
    return x.new_empty(x.shape), _rstd_like(x)


def _fake_add_fwd(x, residual, weight, eps, hf):
    return x.new_empty(x.shape), x.new_empty(x.shape), _rstd_like(x)


def _fake_bwd(dy, dresidual, h, weight, rstd, hf, needs_dweight):
    return h.new_empty(h.shape), weight.new_empty(weight.shape if needs_dweight else (0,))


RMS_NORM = Op(
    name="rms_norm",
    source="arXiv:1910.07467 eq. 4",
    summary="RMS normalization, with residual addition in the same pass",
    reference=reference,
    schemas={
        "fwd": "(Tensor x, Tensor weight, float eps, bool hf) -> (Tensor y, Tensor rstd)",
        "add_fwd": "(Tensor x, Tensor residual, Tensor weight, float eps, bool hf) -> (Tensor y, Tensor h, Tensor rstd)",
        "bwd": "(Tensor dy, Tensor? dresidual, Tensor h, Tensor weight, Tensor rstd, bool hf, bool needs_dweight)"
               " -> (Tensor dx, Tensor dweight)",
    },
    fakes={"fwd": _fake_fwd, "add_fwd": _fake_add_fwd, "bwd": _fake_bwd},
    outputs=("y", "new_residual"),
    backends=("reference", "cpp", "triton", "cuda"),
)
_FWD, _ADD_FWD, _BWD = (RMS_NORM.overloads[name] for name in ("fwd", "add_fwd", "bwd"))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps, residual, hf, backend):
        if residual is None:
            y, rstd = _FWD[backend](x, weight, eps, hf)
            h = x
        else:
            y, h, rstd = _ADD_FWD[backend](x, residual, weight, eps, hf)
        ctx.save_for_backward(h, weight, rstd)
        ctx.options = hf, backend, residual is not None
        if residual is None:
            return y
        ctx.set_materialize_grads(False)
        return y, h

    @staticmethod
    @once_differentiable("rms_norm")
    def backward(ctx, dy, dresidual=None):
        h, weight, rstd = ctx.saved_tensors
        hf, backend, has_residual = ctx.options
        needs_x = ctx.needs_input_grad[0] or (has_residual and ctx.needs_input_grad[3])
        if dy is None:  # y was not used: only the residual branch carries a gradient
            return dresidual, None, None, dresidual, None, None
        dx, dweight = _BWD[backend](as_rows(dy), None if dresidual is None else as_rows(dresidual), h, weight, rstd,
                                    hf, ctx.needs_input_grad[1])
        dx = dx if needs_x else None
        return dx, dweight if ctx.needs_input_grad[1] else None, None, dx if has_residual else None, None, None


def rms_norm(x, weight, eps=1e-5, residual=None, *, rounding="once", backend=None):
    """RMS normalization over the last dimension: y = h * rsqrt(mean(h^2) + eps) * weight, with h = x or h = x + residual.

    Shapes:   x [..., D], weight [D], residual like x -> y like x; with a residual (y, new_residual), where new_residual is h
    Dtypes:   x and residual float32 | bfloat16 | float16 | float64, both equal (under autocast they are promoted); weight the
              same or float32. Sums are in float32 (float64 for float64). h is rounded to x's dtype, and y is computed from the
              rounded h and rounded once. rounding="hf" also rounds h * rsqrt(...) before the product with weight, as the
              released model does
    Backward: saves h, weight and one float32 a row. Without a residual h is x itself, so that nothing is copied.
              Deterministic: yes, and a row of y and dx depends on that row only
    Errors:   ValueError for a wrong shape, device, eps or rounding; TypeError for a wrong dtype
    Cost:     memory-bound. The forward reads x (and residual) and writes y (and h); the backward reads dy, h (and the gradient
              of new_residual) and writes dx.   Source: arXiv:1910.07467 eq. 4
    """
    if residual is not None:
        x, residual = promoted(x, residual)
    check_float("rms_norm", "x", x)
    check_tensor("rms_norm", "weight", weight)
    cols = x.shape[-1:]
    if not cols or cols[0] == 0:
        fail(ValueError, "rms_norm", "x", "a last dimension of at least 1", list(x.shape))
    if weight.dtype != x.dtype and (weight.dtype != torch.float32 or x.dtype == torch.float64):
        weight = cast_weight("rms_norm", weight, x)
    if weight.shape != cols:
        check_shape("rms_norm", "weight", weight, cols, "the last dimension of x")
    check_device("rms_norm", "weight", weight, x, "x")
    if not isinstance(eps, float) or not 0.0 <= eps < float("inf"):
        fail(ValueError, "rms_norm", "eps", "a finite float >= 0", repr(eps))
    if residual is not None:
        check_same("rms_norm", "residual", residual, x, "x")
        check_shape("rms_norm", "residual", residual, x.shape, "the shape of x")
    check_choice("rms_norm", "rounding", rounding, ("once", "hf"))
    hf = rounding == "hf"
    chosen = RMS_NORM.select(x, backend)
    if chosen == "reference":
        return reference(x, weight, eps, residual, rounding=rounding)
    x = as_rows(x)
    if not weight.is_contiguous():
        weight = weight.contiguous()
    if residual is not None:
        residual = as_rows(residual)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad
                                    or (residual is not None and residual.requires_grad)):
        if residual is x:
            x, residual = distinct(x, residual)
        return _RMSNorm.apply(x, weight, eps, residual, hf, chosen)
    if residual is None:
        return _FWD[chosen](x, weight, eps, hf)[0]
    return _ADD_FWD[chosen](x, residual, weight, eps, hf)[:2]
