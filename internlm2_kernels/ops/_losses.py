"""What the loss operators share: reductions, labels, masks, and the log-probability statistics of the references."""

import torch

from .._checks import check_number, fail

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def accumulator(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def soft_capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap):
    """The loss of every row of float32 or float64 logits [T, V]; 0 where it is ignored.

    lse = top + log_z is kept as two numbers: the rounding of their sum would be a relative error of exp(l - lse).
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


def check_loss_options(op, label_smoothing, z_loss, softcap):
    return (check_number(op, "label_smoothing", label_smoothing, "a number from 0 to 1", lambda v: 0 <= v <= 1),
            check_number(op, "z_loss", z_loss, "a finite number >= 0", lambda v: v >= 0),
            check_number(op, "softcap", softcap, "0 (none) or a finite number > 0", lambda v: v == 0 or 1e-30 < v < 1e30))


def check_ignore_index(op, ignore_index):
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not -2**31 <= ignore_index < 2**31:
        fail(ValueError, op, "ignore_index", "an integer of 32 bits", repr(ignore_index))
    return ignore_index


def flattened(tensor):
    """[n], contiguous."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.contiguous().view(-1)


def target(tensor):
    """`flattened`, and no part of a gradient's way."""
    return flattened(tensor.detach() if tensor.requires_grad else tensor)


def masked_mean(values, mask):
    """Over the mask; 0 where nothing counts. What is masked may be NaN."""
    count = mask.sum()
    return torch.where(mask, values, 0).sum() / torch.where(count == 0, 1, count)
