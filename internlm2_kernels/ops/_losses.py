"""What the losses share: the checks of their options, reductions, masked means, and the reference of the loss over labels."""

import torch

from .._checks import check_flag, check_number, fail

REDUCTIONS = {"none": 0, "mean": 1, "sum": 2}


def accumulator(dtype):
    return dtype if dtype == torch.float64 else torch.float32


def soft_capped(logits, softcap):
    return softcap * torch.tanh(logits / softcap) if softcap > 0 else logits


def losses_of(logits, labels, ignore_index, label_smoothing, z_loss, softcap):
    """(losses, their z-loss terms, valid rows) of float32 or float64 logits [T, V]; ignored rows have loss 0.

    The log-sum-exp is kept as two numbers, the largest logit `top` and log_z, the log of the sum of exp(logit - top). Their sum
    would be rounded, which would be a relative error of the probabilities exp(logit - lse).
    """
    valid = labels != ignore_index
    logits = soft_capped(torch.where(valid[..., None], logits, 0), softcap)  # an ignored row may hold NaN
    top = logits.detach().amax(-1, keepdim=True)
    logits = logits - top.masked_fill(top.isinf(), 0)
    log_z = logits.logsumexp(-1)
    label = logits.gather(-1, labels.masked_fill(~valid, 0).long()[..., None])[..., 0]
    lse = top[..., 0] + log_z
    z_losses = z_loss * lse.square() if z_loss else torch.zeros_like(lse)  # the square may be infinite
    loss = (1 - label_smoothing) * (log_z - label) + z_losses
    if label_smoothing:
        loss = loss + label_smoothing * (log_z - logits.mean(-1))
    return torch.where(valid, loss, 0), torch.where(valid, z_losses, 0).detach(), valid


def reduced_losses(losses, z_losses, valid, reduction, token_weights=None, return_z_loss=False):
    """What a loss over labels returns, the loss or (loss, z_loss), from the results of `losses_of`."""
    loss = reduced(losses, valid, reduction, token_weights)
    return (loss, reduced(z_losses, valid, reduction, token_weights)) if return_z_loss else loss


def shaped_losses(loss, z_loss, rows, reduction, return_z_loss):
    """What a loss over labels returns, the loss or (loss, z_loss), from the flat tensors that a registered function returns.
    `rows` is the shape of the labels."""
    if reduction == "none":
        loss, z_loss = loss.view(rows), z_loss.view(rows) if return_z_loss else z_loss
    return (loss, z_loss) if return_z_loss else loss


def reduced(losses, valid, reduction, token_weights=None):
    """The losses times their weights, for reduction "none"; their sum, for "sum"; or this sum divided by the sum of the weights
    of the valid rows (by 1 if that is 0), for "mean". Without token_weights every weight is 1."""
    weights = valid.to(losses.dtype) if token_weights is None else torch.where(valid, token_weights.to(losses.dtype), 0)
    losses = torch.where(weights != 0, losses, 0) * weights
    if reduction == "none":
        return losses
    total = weights.sum()
    return losses.sum() if reduction == "sum" else losses.sum() / torch.where(total == 0, 1, total)


def fake_losses(x, labels, reduction, return_z_loss):
    """For the fake implementation of a registered function: tensors of the shapes and dtypes of loss and z-loss."""
    acc, shape = accumulator(x.dtype), labels.shape if reduction == 0 else ()
    return x.new_empty(shape, dtype=acc), x.new_empty(shape if return_z_loss else (0,), dtype=acc)


def check_loss_options(op, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    """Checks the options of a loss over labels. Returns those that the registered functions take, in their order, with the
    reduction as a number."""
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool) or not -2**31 <= ignore_index < 2**31:
        fail(ValueError, op, "ignore_index", "an integer of 32 bits", repr(ignore_index))
    numbers = (check_number(op, "label_smoothing", label_smoothing, "a number from 0 to 1", lambda v: 0 <= v <= 1),
               check_number(op, "z_loss", z_loss, "a finite number >= 0", lambda v: v >= 0),
               check_number(op, "softcap", softcap, "0 (none) or a number between 1e-30 and 1e30",
                            lambda v: v == 0 or 1e-30 < v < 1e30))
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        fail(ValueError, op, "reduction", "'mean', 'sum' or 'none'", repr(reduction))
    check_flag(op, "return_z_loss", return_z_loss)
    return ignore_index, *numbers, REDUCTIONS[reduction]


def flattened(tensor):
    """The tensor as a contiguous one with one dimension; copied only if necessary."""
    return tensor if tensor.dim() == 1 and tensor.is_contiguous() else tensor.contiguous().view(-1)


def target(tensor):
    """`flattened`, for an input to which no gradient is propagated."""
    return flattened(tensor.detach() if tensor.requires_grad else tensor)


def masked_mean(values, mask):
    """The mean of the unmasked values, 0 where all are masked. Masked values may be NaN."""
    count = mask.sum()
    return torch.where(mask, values, 0).sum() / torch.where(count == 0, 1, count)
