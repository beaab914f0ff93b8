"""Cross-entropy of a linear head without its logits in memory."""

import torch
import torch.nn.functional as F

from .._autograd import distinct, once_differentiable
from .._checks import check_device, check_float, check_same, fail, last_stride_1
from .._registry import Case, Op, Sample, without_autocast
from ._attention import autocast
from ._losses import REDUCTIONS, accumulator, check_label_values, check_labels, check_reduction, losses_of, reduced
from .apply_rope import native
from .cross_entropy import check_ignore_index, check_loss_options, gives_away, is_one


@without_autocast
def reference(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
              token_weights=None, reduction="mean"):
    acc = accumulator(hidden.dtype)
    logits = hidden.to(acc) @ weight.to(acc).T
    losses, valid = losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced(losses, valid, reduction, token_weights)


def _eager(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, token_weights=None,
           reduction="mean"):
    logits = F.linear(hidden, weight).to(accumulator(hidden.dtype))
    if token_weights is None and not z_loss and not softcap and labels.numel():
        loss = F.cross_entropy(logits.view(-1, logits.shape[-1]), labels.view(-1).long(), ignore_index=ignore_index,
                               label_smoothing=label_smoothing, reduction=reduction)
        return loss.view(labels.shape if reduction == "none" else ()).nan_to_num(0.0)
    losses, valid = losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap)
    return reduced(losses, valid, reduction, token_weights)


def _torch_linear(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                  token_weights=None, reduction="mean"):
    """PyTorch's own chunked form (torch 2.13 on)."""
    if not hasattr(F, "linear_cross_entropy") or token_weights is not None or z_loss or softcap or not labels.numel():
        return _eager(hidden, weight, labels, ignore_index=ignore_index, label_smoothing=label_smoothing, z_loss=z_loss,
                      softcap=softcap, token_weights=token_weights, reduction=reduction)
    loss = F.linear_cross_entropy(hidden.view(-1, hidden.shape[-1]), weight, labels.view(-1).long(), ignore_index=ignore_index,
                                  label_smoothing=label_smoothing, reduction=reduction)
    return loss.view(labels.shape if reduction == "none" else ()).to(accumulator(hidden.dtype)).nan_to_num(0.0)


def _fake_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction):
    acc = accumulator(hidden.dtype)
    loss = hidden.new_empty(labels.shape if reduction == 0 else (), dtype=acc)
    return loss, hidden.new_empty((*labels.shape, 2), dtype=acc)  # lse, and what rounding cut off it


def gradient_shapes(hidden, weight, needs_dhidden, needs_dweight):
    return ((hidden.shape[0] if needs_dhidden else 0, hidden.shape[1]),
            (weight.shape[0] if needs_dweight else 0, weight.shape[1]))


def _fake_grad_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction,
                   needs_dhidden, needs_dweight):
    acc = accumulator(hidden.dtype)
    shape_h, shape_w = gradient_shapes(hidden, weight, needs_dhidden, needs_dweight)
    wide = acc if hidden.dtype == torch.float16 else hidden.dtype
    return hidden.new_empty((), dtype=acc), hidden.new_empty(shape_h, dtype=wide), weight.new_empty(shape_w, dtype=acc)


def _fake_bwd(dloss, hidden, weight, labels, token_weights, lse, ignore_index, label_smoothing, z_loss, softcap, reduction,
              needs_dhidden, needs_dweight):
    shape_h, shape_w = gradient_shapes(hidden, weight, needs_dhidden, needs_dweight)
    return hidden.new_empty(shape_h), weight.new_empty(shape_w)


def _fake_scale_bwd(dloss, dhidden, dweight, hidden, weight):
    return hidden.new_empty(dhidden.shape), weight.new_empty(dweight.shape)


def head_sample(case, dtype, device, generator):
    """hidden, weight and labels with logits of the size that trained models have."""
    dims = case.dims
    rows, cols, vocab = dims.get("rows", dims.get("targets")), dims["cols"], dims["vocab"]
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
    hidden, weight = draw(rows, cols).to(dtype), (2 * draw(vocab, cols) * cols**-0.5).to(dtype)
    labels = torch.randint(vocab, (rows,), generator=generator, device=device)
    if rows > 2:  # a label's row has the large gradients: the first and the last one must not be missed
        labels[0], labels[2] = vocab - 1, 0
    return hidden, weight, labels


def _sample(case, dtype, device, generator):
    dims = case.dims
    hidden, weight, labels = head_sample(case, dtype, device, generator)
    options = {key: dims[key] for key in ("label_smoothing", "z_loss", "softcap") if dims.get(key)}
    if dims.get("ignored"):
        labels[1:: 3] = -100
    if dims.get("weighted"):
        weights = torch.rand(labels.shape, generator=generator, device=device)
        options["token_weights"] = weights.to(accumulator(dtype))
    reduction = dims.get("reduction", "mean" if "targets" in dims else "none")
    return Sample({"hidden": hidden, "weight": weight, "labels": labels, "reduction": reduction, **options},
                  ("hidden", "weight"))


def logit_error(hidden, weight):
    """How many roundings a logit is off, typically: what the probabilities in a gradient are off by, relatively."""
    return float((hidden.square() @ weight.square().T).max().sqrt())


def _magnitude(sample, upstream):
    """Logits are sums over D, gradients sums over the vocabulary or the tokens, with terms of both signs."""
    hidden, weight, labels = (sample.inputs[name] for name in ("hidden", "weight", "labels"))
    if not labels.numel():
        return {}
    size = float((hidden.abs() @ weight.abs().T).max())
    mean = sample.inputs["reduction"] == "mean"
    rows = max(int((labels != -100).sum()), 1) if mean else 1
    total = labels.numel() if sample.inputs["reduction"] == "sum" else 1
    sizes = {"loss": size * total}
    if upstream:
        each = float(upstream["loss"].abs().max()) / rows * (1 + logit_error(hidden, weight))
        sizes |= {"d_hidden": each * float(weight.abs().max()), "d_weight": each * float(hidden.abs().max())}
    return sizes


def head_bytes(dims, size, direction):
    rows, cols, vocab = dims.get("rows", dims.get("targets")), dims["cols"], dims["vocab"]
    return (rows * cols + vocab * cols) * size * (1 if direction == "forward" else 2)


def head_flops(dims, direction):
    products = 1 if direction == "forward" else 2
    return 2 * products * dims.get("rows", dims.get("targets")) * dims["cols"] * dims["vocab"]


HEAD_CASES = (
    Case("edge", {"rows": 0, "cols": 16, "vocab": 40}),
    Case("edge", {"rows": 1, "cols": 1, "vocab": 1}),
    Case("edge", {"rows": 7, "cols": 33, "vocab": 1031}),
    Case("edge", {"rows": 3, "cols": 130, "vocab": 17}),
)

LINEAR_CROSS_ENTROPY = Op(
    name="linear_cross_entropy",
    source="logits in chunks, gradients in the same sweep: arXiv:2410.10989 section 3.2; arXiv:2411.09009",
    summary="cross-entropy of a linear head, logits never in memory",
    reference=reference,
    public=lambda *args, **kwargs: linear_cross_entropy(*args, **kwargs),
    schemas={
        "fwd": "(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, int ignore_index, float label_smoothing,"
               " float z_loss, float softcap, int reduction) -> (Tensor loss, Tensor lse)",
        "grad_fwd": "(Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, int ignore_index,"
                    " float label_smoothing, float z_loss, float softcap, int reduction, bool needs_dhidden,"
                    " bool needs_dweight) -> (Tensor loss, Tensor dhidden, Tensor dweight)",
        "bwd": "(Tensor dloss, Tensor hidden, Tensor weight, Tensor labels, Tensor? token_weights, Tensor lse,"
               " int ignore_index, float label_smoothing, float z_loss, float softcap, int reduction, bool needs_dhidden,"
               " bool needs_dweight) -> (Tensor dhidden, Tensor dweight)",
        "scale_bwd": "(Tensor dloss, Tensor dhidden, Tensor dweight, Tensor hidden, Tensor weight)"
                     " -> (Tensor dhidden, Tensor dweight)",
    },
    fakes={"fwd": _fake_fwd, "grad_fwd": _fake_grad_fwd, "bwd": _fake_bwd, "scale_bwd": _fake_scale_bwd},
    outputs=("loss",),
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64, "vocab": 100}),
        Case("smoke", {"targets": 33, "cols": 48, "vocab": 517, "ignored": True, "label_smoothing": 0.1, "z_loss": 1e-3}),
        Case("smoke", {"rows": 20, "cols": 32, "vocab": 129, "softcap": 3.0, "ignored": True, "weighted": True}),
        Case("smoke", {"targets": 9, "cols": 40, "vocab": 257, "weighted": True, "softcap": 20.0}),
        *HEAD_CASES,
        Case("edge", {"targets": 1, "cols": 5, "vocab": 9, "weighted": True, "reduction": "sum"}),
        Case("edge", {"targets": 0, "cols": 8, "vocab": 9}),
        Case("model", {"targets": 2048, "cols": 2048, "vocab": 92544}, ("training",), (torch.bfloat16,)),
        Case("model", {"targets": 512, "cols": 2048, "vocab": 92544}, ("training",), (torch.float32,)),
        Case("gpu", {"targets": 8192, "cols": 4096, "vocab": 92544}, ("training",), (torch.bfloat16,)),
    ),
    eager={"F.cross_entropy(F.linear)": _eager, "F.linear_cross_entropy": _torch_linear},
    batched=("hidden", "labels", "token_weights"),
    bytes=head_bytes,
    flops=head_flops,
    magnitude=_magnitude,
    autocast=True,
    isas=("avx2", "avx512", "avx512_bf16", "amx"),
    domain={"targets": (0, 40, 1), "vocab": (1, 300, 1)},
)
_FWD, _GRAD, _BWD, _SCALE = (LINEAR_CROSS_ENTROPY.overloads[name] for name in ("fwd", "grad_fwd", "bwd", "scale_bwd"))


class _OneSweep(torch.autograd.Function):
    """mean and sum: both gradients are made with the loss, up to the upstream's factor; three products in all."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, options, backend):
        loss, dhidden, dweight = native(_GRAD[backend], hidden, weight, labels, token_weights, *options,
                                        ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        link = hidden.new_empty((0, 1))  # an empty result: what ties the saved gradients to the inputs without keeping them
        ctx.save_for_backward(dhidden, dweight, link)
        ctx.backend = backend
        ctx.set_materialize_grads(False)
        return loss, link

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss, _):
        if dloss is None:
            return (None,) * 6
        dhidden, dweight, like = ctx.saved_tensors
        final = is_one(dloss) and gives_away()
        ready = [final and (t.dtype == like.dtype or not t.numel()) for t in (dhidden, dweight)]
        if not all(ready):
            scaled = _SCALE[ctx.backend](dloss, dhidden[:0] if ready[0] else dhidden, dweight[:0] if ready[1] else dweight,
                                         like, like)
            dhidden, dweight = dhidden if ready[0] else scaled[0], dweight if ready[1] else scaled[1]
        needs = ctx.needs_input_grad
        return dhidden if needs[0] else None, dweight if needs[1] else None, None, None, None, None


class _TwoSweeps(torch.autograd.Function):
    """none: an upstream for every token; the scores are computed again."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, token_weights, options, backend):
        loss, lse = native(_FWD[backend], hidden, weight, labels, token_weights, *options)
        ctx.save_for_backward(hidden, weight, labels, token_weights, lse)
        ctx.options, ctx.backend = options, backend
        return loss

    @staticmethod
    @once_differentiable("linear_cross_entropy")
    def backward(ctx, dloss):
        hidden, weight, labels, token_weights, lse = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dhidden, dweight = _BWD[ctx.backend](dloss.contiguous(), hidden, weight, labels, token_weights, lse, *ctx.options,
                                             needs[0], needs[1])
        return dhidden if needs[0] else None, dweight if needs[1] else None, None, None, None, None


def check_head(op, hidden, weight):
    """hidden [..., D] and weight [V, D], under autocast in its dtype, of one dtype and device."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_float(op, name, tensor)
    hidden, weight = autocast(hidden, weight)
    check_same(op, "weight", weight, hidden, "hidden")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        fail(ValueError, op, "hidden", "a last dimension of at least 1", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        fail(ValueError, op, "weight", f"shape [V, {hidden.shape[-1]}] with V at least 1", list(weight.shape))
    return hidden, weight


def as_matrix(x):
    return last_stride_1(x if x.dim() == 2 else x.reshape(-1, x.shape[-1]))


def check_weights(op, token_weights, labels, hidden):
    """None, or the weights in the accumulator's dtype; no gradient reaches them."""
    if token_weights is None:
        return None
    check_float(op, "token_weights", token_weights)
    if token_weights.shape != labels.shape:
        fail(ValueError, op, "token_weights", f"the shape of labels, {list(labels.shape)}", list(token_weights.shape))
    check_device(op, "token_weights", token_weights, hidden, "hidden")
    return token_weights.detach().to(accumulator(hidden.dtype)).contiguous()


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                         token_weights=None, reduction="mean", backend=None):
    """Cross-entropy of the logits hidden weight^T, which are never in memory; the loss is `cross_entropy`'s.

    Shapes:   hidden [..., D], weight [V, D], labels [...] int64 or int32, token_weights [...] -> loss [] ("mean", "sum") or
              [...] ("none")
    Options:  those of `cross_entropy`; token_weights multiply each token's loss, and "mean" divides by the sum of the weights
              of the tokens that count (without weights: by their number); nothing counted gives 0. No gradient reaches
              token_weights
    Dtypes:   hidden, weight float32 | bfloat16 | float16 | float64, both equal; under autocast its dtype. Logits, loss and the
              weight's gradient are summed in float32 (float64), the loss stays so
    Backward: mean and sum make both gradients in the forward, three products in all, and hold them: dhidden in hidden's dtype
              (float32 for float16), dweight in float32: 4 V D bytes, the one accumulator. Backward rounds them to the inputs'
              dtypes, times the upstream (dhidden of bfloat16 is rounded a second time where the upstream is not 1; inf or
              NaN reaches ignored rows too). A hidden that is not finite reaches dweight also where its label is ignored.
              "none" saves hidden, weight, labels and lse (8 bytes a token) and computes the logits again: four products. A
              frozen hidden or weight costs no product and no memory. Deterministic: yes; forward is batch-invariant: a token's
              loss has the same bits whatever else is in the batch
    Errors:   ValueError, TypeError; a label outside [0, V) that is not ignore_index raises on CPU before memory is touched;
              on CUDA its loss and gradients are NaN and `internlm2_kernels.check()` reports it
    Cost:     2 T D V flops a product. Extra memory beyond gradients and accumulator: one chunk of scores, independent of T.
              Source: arXiv:2410.10989 section 3.2
    """
    hidden, weight = check_head("linear_cross_entropy", hidden, weight)
    shape = hidden.shape[:-1]
    labels = check_labels("linear_cross_entropy", "labels", labels, shape, hidden, "hidden")
    ignore_index = check_ignore_index("linear_cross_entropy", ignore_index)
    smoothing, z_loss, softcap = check_loss_options("linear_cross_entropy", label_smoothing, z_loss, softcap)
    code = check_reduction("linear_cross_entropy", reduction)
    token_weights = check_weights("linear_cross_entropy", token_weights, labels, hidden)
    chosen = LINEAR_CROSS_ENTROPY.select(hidden, backend)
    if chosen == "reference":
        check_label_values("linear_cross_entropy", "labels", labels, weight.shape[0], ignore_index)
        return reference(hidden, weight, labels, ignore_index=ignore_index, label_smoothing=smoothing, z_loss=z_loss,
                         softcap=softcap, token_weights=token_weights, reduction=reduction)
    flat, weight, labels = as_matrix(hidden), last_stride_1(weight), labels.view(-1)
    token_weights = None if token_weights is None else token_weights.view(-1)
    options = ignore_index, smoothing, z_loss, softcap, code
    if torch.is_grad_enabled() and (flat.requires_grad or weight.requires_grad):
        if code == REDUCTIONS["none"]:
            loss = _TwoSweeps.apply(*distinct(flat, weight), labels, token_weights, options, chosen)
        else:
            loss, _ = _OneSweep.apply(*distinct(flat, weight), labels, token_weights, options, chosen)
    else:
        loss = native(_FWD[chosen], flat, weight, labels, token_weights, *options)[0]
    return loss.view(shape) if code == REDUCTIONS["none"] else loss
