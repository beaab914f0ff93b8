"""What the loss operators share: reductions, labels, masks, and the log-probability statistics of the references."""

import math
import numbers

import torch

from .._checks import FLOAT_DTYPES, check_device, check_layout, check_shape, fail

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def accumulator(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def soft_capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap):
    """The loss of every row of float32 or float64 logits [T, V]; 0 where it is ignored.

    lse = top + log_z, apart: the gradient's exp(l - lse) would take the rounding of their sum as a relative error.
    """
    valid = labels != ignore_index
    logits = soft_capped(torch.where(valid[..., None], logits, 0), softcap)  # an ignored row may hold NaN
    top = logits.detach().amax(-1, keepdim=True)
    logits = logits - top.masked_fill(top.isinf(), 0)
    log_z = logits.logsumexp(-1)
    label = logits.gather(-1, labels.masked_fill(~valid, 0).long()[..., None])[..., 0]
    loss = (1 - label_smoothing) * (log_z - label) + z_loss * (top[..., 0] + log_z).square()
    if label_smoothing:
        loss = loss + label_smoothing * (log_z - logits.mean(-1))
    return torch.where(valid, loss, 0), valid


def reduced(losses, valid, reduction, token_weights=None):
    """`losses`, their sum or their mean; weights count in numerator and denominator; nothing over nothing is 0."""
    weights = valid.to(losses.dtype) if token_weights is None else torch.where(valid, token_weights.to(losses.dtype), 0)
    losses = torch.where(weights != 0, losses, 0) * weights
    if reduction == "none":
        return losses
    total = weights.sum()
    return losses.sum() if reduction == "sum" else losses.sum() / torch.where(total == 0, 1, total)


def check_reduction(op, reduction):
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        fail(ValueError, op, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    return REDUCTIONS[reduction]


def check_number(op, argument, value, expected, accept):
    """A real number, no tensor and no bool, that `accept` takes; as a float.

    Finite by comparison: torch.compile cannot trace math.isfinite of a number that it holds as a symbol.
    """
    if type(value) is float and -math.inf < value < math.inf and accept(value):  # an abstract class would take a microsecond
        return value
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond float64
        number = math.inf
    if not -math.inf < number < math.inf or not accept(number):
        fail(ValueError, op, argument, expected, repr(value))
    return number


def check_labels(op, argument, labels, rows, like, of):
    """int64 or int32 of shape `rows`, on the device of `like`; contiguous on return. Values are the kernels' business."""
    if not isinstance(labels, torch.Tensor):
        fail(TypeError, op, argument, "an int64 or int32 tensor", type(labels).__name__)
    if labels.dtype not in (torch.int64, torch.int32):
        fail(TypeError, op, argument, "torch.int64 or torch.int32", labels.dtype)
    check_layout(op, argument, labels)
    check_shape(op, argument, labels, rows, f"the leading dimensions of {of}")
    check_device(op, argument, labels, like, of)
    return labels.contiguous()


def check_label_values(op, argument, labels, classes, ignore_index=None):
    """What the compiled kernels check themselves on CPU: labels in [0, classes) or ignore_index."""
    if labels.device.type != "cpu" or torch.compiler.is_compiling() or not labels.numel():
        return
    wrong = (labels < 0) | (labels >= classes)
    if ignore_index is not None:
        wrong &= labels != ignore_index
    if wrong.any():
        fail(ValueError, op, argument,
             f"values from 0 to {classes - 1}" + (" or ignore_index" if ignore_index is not None else ""),
             int(labels[wrong][0]))


def check_vector(op, argument, tensor, shape, like, of):
    """A floating-point tensor of `shape` and of the dtype and device of `like`; contiguous on return."""
    if not isinstance(tensor, torch.Tensor):
        fail(TypeError, op, argument, "a tensor", type(tensor).__name__)
    if tensor.dtype not in FLOAT_DTYPES or tensor.dtype != like.dtype:
        fail(TypeError, op, argument, f"the dtype of {of}, {like.dtype}", tensor.dtype)
    check_layout(op, argument, tensor)
    if tensor.shape != shape:
        check_shape(op, argument, tensor, shape, f"the shape of {of}")
    check_device(op, argument, tensor, like, of)
    return tensor.contiguous()


def flattened(tensor):
    """[n], contiguous."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.contiguous().view(-1)


def target(tensor):
    """`flattened`, and no part of a gradient's way."""
    return flattened(tensor.detach() if tensor.requires_grad else tensor)


def check_mask(op, mask, like, of):
    """bool (or numbers, of which all but 0 count) of the shape of `like`; bool and contiguous on return."""
    if not isinstance(mask, torch.Tensor):
        fail(TypeError, op, "mask", "a tensor", type(mask).__name__)
    check_layout(op, "mask", mask)
    if mask.shape != like.shape:
        check_shape(op, "mask", mask, like.shape, f"the shape of {of}")
    check_device(op, "mask", mask, like, of)
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def masked_mean(values, mask):
    """Over the mask; 0 where nothing counts. What is masked may be NaN."""
    count = mask.sum()
    return torch.where(mask, values, 0).sum() / torch.where(count == 0, 1, count)


def check_lengths(op, cu, total, shortest):
    """What the compiled kernels check themselves on CPU: cu_seqlens rises from 0 to `total` by at least `shortest`."""
    if cu.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds, rising = cu.tolist(), f"rise by at least {shortest}" if shortest else "never fall"
    if bounds[0] != 0:
        fail(ValueError, op, "cu_seqlens", "values that start at 0", bounds[0])
    for before, after in zip(bounds, bounds[1:], strict=False):
        if after - before < shortest:
            fail(ValueError, op, "cu_seqlens", f"values that {rising}", f"{after} after {before}")
    if bounds[-1] != total:
        fail(ValueError, op, "cu_seqlens", f"values that end at {total}", bounds[-1])
