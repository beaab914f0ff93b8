"""What the losses over labels share: soft-capped logits, the number of valid rows, the reduction of the rows' losses.

The count of valid rows is computed from the labels on the device, before the gradients. The gradient kernels can therefore
divide by it, and the host never waits for it. One program sums over all rows, in an order that depends only on the number of
rows, so the result is deterministic.
"""

import torch
import triton
import triton.language as tl

from .common import launch, launch_elements
from .functions import _tanh

NONE, MEAN = 0, 1  # the codes of the reductions "none" and "mean"; that of "sum" is 2


@triton.jit
def _capped(x, softcap, SOFTCAP: tl.constexpr):
    """softcap * tanh(x / softcap) with a soft-cap, x without one."""
    if SOFTCAP:
        return softcap * _tanh(x * tl.div_rn(1.0, softcap))
    else:
        return x


@triton.jit
def _cap_slope(logit, softcap):
    """The derivative of the soft-cap, 1 - tanh^2, from the capped logit."""
    t = logit * tl.div_rn(1.0, softcap)
    return tl.fma(-t, t, 1.0)


@triton.jit
def _store_lse(lse_ptr, row, top, log_sum, mask):
    """Stores lse [rows, 2] as two numbers: the largest logit, and the log of the sum of exp(logit - largest). Their sum would
    be rounded, and that rounding would be a relative error of exp(logit - lse)."""
    tl.store(lse_ptr + 2 * row, top, mask=mask)
    tl.store(lse_ptr + 2 * row + 1, log_sum, mask=mask)


@triton.jit
def _load_lse(lse_ptr, row, mask):
    return tl.load(lse_ptr + 2 * row, mask=mask, other=0.0), tl.load(lse_ptr + 2 * row + 1, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["rows", "ignore_index"])
def reduce_rows_kernel(loss_ptr, labels_ptr, weights_ptr, result_ptr, count_ptr, rows, ignore_index,
                       MEAN: tl.constexpr, BLOCK: tl.constexpr):
    """Stores `count`, the sum of the weights of the valid rows (their number if there are no weights), and `result`, the sum of
    the losses of the rows; with MEAN, this sum is divided by `count`, or by 1 where `count` is 0."""
    number = tl.zeros((BLOCK,), tl.int32)
    weight = tl.zeros((BLOCK,), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK).to(tl.int64)
        valid = row < rows
        if loss_ptr is not None:
            total += tl.load(loss_ptr + row, mask=valid, other=0.0)
        valid = valid & (tl.load(labels_ptr + row, mask=valid, other=0).to(tl.int64) != ignore_index)
        if weights_ptr is not None:
            weight += tl.load(weights_ptr + row, mask=valid, other=0.0)
        else:
            number += valid.to(tl.int32)
    if weights_ptr is not None:
        count = tl.sum(weight, axis=0)
    else:
        count = tl.sum(number.to(tl.int64), axis=0).to(tl.float32)
    if count_ptr is not None:
        tl.store(count_ptr, count)
    if loss_ptr is not None:
        result = tl.sum(total, axis=0)
        if MEAN:
            result = tl.div_rn(result, tl.where(count == 0.0, 1.0, count))
        tl.store(result_ptr, result)


def _reduce_rows(loss, labels, weights, result, count, ignore_index, reduction):
    launch(reduce_rows_kernel, 1, labels.device,
           dict(loss_ptr=loss, labels_ptr=labels, weights_ptr=weights, result_ptr=result, count_ptr=count,
                rows=labels.shape[0], ignore_index=ignore_index, MEAN=reduction == MEAN, BLOCK=4096), num_warps=16)


def count_rows(labels, weights, ignore_index, reduction):
    """The divisor of the mean loss (the number of valid rows, or the sum of their weights), float32 [1]; None if the reduction
    is not the mean."""
    if reduction != MEAN:
        return None
    count = torch.empty(1, dtype=torch.float32, device=labels.device)
    _reduce_rows(None, labels, weights, None, count, ignore_index, reduction)
    return count


def reduce_losses(loss, z_loss, labels, weights, ignore_index, reduction):
    """(loss, z-loss): for reduction none the given tensors, otherwise their mean or sum over the rows, as 0-dimensional
    tensors. Where z_loss is None, the second is an empty tensor."""
    def reduced(rows):
        if reduction == NONE:
            return rows
        result = torch.empty((), dtype=torch.float32, device=labels.device)
        _reduce_rows(rows, labels, weights, result, None, ignore_index, reduction)
        return result

    return reduced(loss), loss.new_empty(0) if z_loss is None else reduced(z_loss)


@triton.jit
def _share(upstream_ptr, row, step, weights_ptr, count_ptr, mask):
    """The factor of the gradient of each row: upstream gradient * weight / count, of which each is 1 if it is None."""
    share = (row * 0 + 1).to(tl.float32)
    if upstream_ptr is not None:
        share = tl.load(upstream_ptr + row * step, mask=mask, other=0.0)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=mask, other=0.0)
        share = tl.where(weight == 0.0, 0.0, share * weight)  # 0 even if the upstream gradient is infinite
    if count_ptr is not None:
        count = tl.load(count_ptr)
        share = tl.div_rn(share, tl.where(count == 0.0, 1.0, count))
    return share


@triton.jit
def _label(labels_ptr, row, mask, ignore_index, vocab, error_ptr, ERROR: tl.constexpr):
    """(label, ignored, bad) of a row. `bad`: the label is neither ignore_index nor in the vocabulary; it sets the bit ERROR of
    the device's error word (_device_errors.py)."""
    label = tl.load(labels_ptr + row, mask=mask, other=0).to(tl.int64)
    ignored = label == ignore_index
    bad = mask & (ignored == 0) & ((label < 0) | (label >= vocab))
    tl.atomic_or(error_ptr + label * 0, ERROR, mask=bad)
    return label, ignored, bad


@triton.jit
def scale_kernel(x_ptr, scale_ptr, out_ptr, size, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0).to(tl.float32) * tl.load(scale_ptr)
    tl.store(out_ptr + index, x.to(out_ptr.dtype.element_ty), mask=index < size)


def scaled(x, scale, dtype):
    """The contiguous tensor x times the 0-dimensional tensor `scale`, rounded once to `dtype`."""
    out = torch.empty(x.shape, dtype=dtype, device=x.device)
    launch_elements(scale_kernel, x, 4096, dict(x_ptr=x, scale_ptr=scale, out_ptr=out), num_warps=8)
    return out
