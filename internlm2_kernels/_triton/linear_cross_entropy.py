"""Cross-entropy of hidden @ weight.T. Contract: ops/linear_cross_entropy.py; products: linear_head.py, linear_head_bwd.py."""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from . import linear_head as head
from .common import check_dtype, launch
from .linear_head import _merged
from .linear_head_bwd import COEFFICIENTS, Gradients, backward, chunk_buffer, gradient_of_stored, peak_of
from .losses import NONE, _label, _load_lse, _share, _store_lse, count_rows, reduce_losses, scaled

MERGE_TILES, MERGE_ROWS = 32, 32


@triton.jit
def _write_coefficients(coefficients_ptr, row, stride, mask, share, lse, ignored, bad, smoothing, z_loss, vocab):
    """Writes, for each row, the four coefficients a, b, c, s (see the top of linear_head_bwd.py) that describe the gradient
    d loss / d logit_j = share (p_j (1 + 2 z lse) - (1 - e) [j = label] - e / V). share is the factor of the row (`_share`),
    e the label smoothing, z the factor of the z-loss and V the size of the vocabulary."""
    share = tl.where(bad, float("nan"), tl.where(ignored, 0.0, share))
    drift = tl.where(share == 0.0, 0.0, 2.0 * z_loss * lse)  # the lse of an ignored row may be infinite
    tl.store(coefficients_ptr + row, share * (1.0 + drift), mask=mask)
    tl.store(coefficients_ptr + stride + row, share * 0.0, mask=mask)
    tl.store(coefficients_ptr + 2 * stride + row, -share * tl.div_rn(smoothing, vocab * 1.0), mask=mask)
    tl.store(coefficients_ptr + 3 * stride + row, share * (drift + smoothing), mask=mask)


@triton.jit(do_not_specialize=["rows", "ignore_index", "coefficient_stride"])
def linear_cross_entropy_merge_kernel(top_ptr, sum_ptr, total_ptr, label_ptr, labels_ptr, weights_ptr, count_ptr, loss_ptr,
                                      z_loss_ptr, lse_ptr, coefficients_ptr, error_ptr, rows, tiles, vocab, stride,
                                      coefficient_stride, ignore_index, smoothing, z_loss,
                                      ERROR: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    top, log_z, total, _, _ = _merged(top_ptr, sum_ptr, total_ptr, None, None, row, mask, tiles, stride, TILES, BLOCK)
    lse = top + log_z
    label, ignored, bad = _label(labels_ptr, row, mask, ignore_index, vocab, error_ptr, ERROR)
    own = tl.load(label_ptr + row, mask=mask & ((ignored | bad) == 0), other=0.0)
    z = z_loss * lse * lse
    loss = (1.0 - smoothing) * (top - own + log_z) + z
    if total_ptr is not None:
        loss += smoothing * (top - tl.div_rn(total, vocab * 1.0) + log_z)
    if weights_ptr is not None:
        weight = tl.load(weights_ptr + row, mask=mask, other=0.0)
        loss = tl.where(weight == 0.0, 0.0, loss * weight)  # weight 0 removes an infinite loss as well
        z = tl.where(weight == 0.0, 0.0, z * weight)
    tl.store(loss_ptr + row, tl.where(bad, float("nan"), tl.where(ignored, 0.0, loss)), mask=mask)
    if z_loss_ptr is not None:
        tl.store(z_loss_ptr + row, tl.where(bad, float("nan"), tl.where(ignored, 0.0, z)), mask=mask)
    _store_lse(lse_ptr, row, top, log_z, mask)
    if coefficients_ptr is not None:
        share = _share(None, row, 0, weights_ptr, count_ptr, mask)
        _write_coefficients(coefficients_ptr, row, coefficient_stride, mask, share, lse, ignored, bad, smoothing, z_loss,
                            vocab)


@triton.jit(do_not_specialize=["rows", "ignore_index", "dloss_step", "coefficient_stride"])
def linear_cross_entropy_coefficients_kernel(dloss_ptr, labels_ptr, lse_ptr, weights_ptr, count_ptr, coefficients_ptr,
                                             error_ptr, rows, vocab, dloss_step, coefficient_stride, ignore_index,
                                             smoothing, z_loss, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    label, ignored, bad = _label(labels_ptr, row, mask, ignore_index, vocab, error_ptr, ERROR)
    top, log_z = _load_lse(lse_ptr, row, mask)
    share = _share(dloss_ptr, row, dloss_step, weights_ptr, count_ptr, mask)
    _write_coefficients(coefficients_ptr, row, coefficient_stride, mask, share, top + log_z, ignored, bad, smoothing, z_loss,
                        vocab)


def _merge(blocks, labels, weights, count, losses, lse, coefficients, vocab, ignore_index, smoothing, z_loss):
    rows = labels.shape[0]
    launch(linear_cross_entropy_merge_kernel, triton.cdiv(rows, MERGE_ROWS), labels.device,
           dict(top_ptr=blocks.top, sum_ptr=blocks.sum, total_ptr=blocks.total, label_ptr=blocks.label, labels_ptr=labels,
                weights_ptr=weights, count_ptr=count, loss_ptr=losses[0], z_loss_ptr=losses[1], lse_ptr=lse,
                coefficients_ptr=coefficients, error_ptr=error_word(labels.device), rows=rows, tiles=blocks.top.shape[0],
                vocab=vocab, stride=blocks.top.shape[1], ignore_index=ignore_index, smoothing=smoothing, z_loss=z_loss,
                coefficient_stride=0 if coefficients is None else coefficients.stride(0),
                ERROR=CODES["linear_cross_entropy", "labels"], TILES=MERGE_TILES, BLOCK=MERGE_ROWS), num_warps=4)


def _part(x, begin, end):
    return None if x is None else x[begin:end]


def _losses(rows, device, return_z_loss):
    """New tensors for the losses of the rows, their z-losses (None where they are not wanted), and their lse [rows, 2]."""
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=device)
    return new(rows), new(rows) if return_z_loss else None, new(rows, 2)


def linear_cross_entropy_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap, reduction,
                             return_z_loss):
    check_dtype("linear_cross_entropy", "hidden", hidden)
    rows, vocab = hidden.shape[0], weight.shape[0]
    *losses, lse = _losses(rows, hidden.device, return_z_loss)
    for begin, end in head.chunks(rows, head.FORWARD_ROWS):
        blocks = head.forward(hidden[begin:end], weight, labels[begin:end], None, softcap, needs_sum=label_smoothing > 0)
        _merge(blocks, labels[begin:end], _part(token_weights, begin, end), None, [_part(x, begin, end) for x in losses],
               lse[begin:end], None, vocab, ignore_index, label_smoothing, z_loss)
    return *reduce_losses(*losses, labels, token_weights, ignore_index, reduction), lse


def _gradients(hidden, weight, needs_dhidden, needs_dweight, dhidden_dtype, dweight_dtype):
    """New tensors (dhidden, dweight), to be filled by the backward. A gradient that is not wanted has no rows. Without tokens
    no kernel runs, and dweight is set to zero here."""
    depth, device, rows = hidden.shape[1], hidden.device, hidden.shape[0]
    dhidden = torch.empty((rows if needs_dhidden else 0, depth), dtype=dhidden_dtype, device=device)
    make = torch.empty if rows else torch.zeros
    return dhidden, make((weight.shape[0] if needs_dweight else 0, depth), dtype=dweight_dtype, device=device)


def linear_cross_entropy_grad_fwd(hidden, weight, labels, token_weights, ignore_index, label_smoothing, z_loss, softcap,
                                  reduction, return_z_loss, needs_dhidden, needs_dweight):
    check_dtype("linear_cross_entropy", "hidden", hidden)
    (rows, _), vocab = hidden.shape, weight.shape[0]
    dhidden, dweight = _gradients(hidden, weight, needs_dhidden, needs_dweight, torch.float32, torch.float32)
    *losses, lse = _losses(rows, hidden.device, return_z_loss)
    count = count_rows(labels, token_weights, ignore_index, reduction)
    ranges = head.gradient_chunks(rows, vocab, hidden.element_size())
    if ranges:
        buffer = chunk_buffer(ranges, weight)
        gradients = Gradients(hidden, weight, dhidden if needs_dhidden else None, dweight if needs_dweight else None, ranges)
    for begin, end in ranges:
        own, stored = labels[begin:end], buffer[: end - begin, :vocab]
        coefficients = torch.empty((COEFFICIENTS, end - begin), dtype=torch.float32, device=hidden.device)
        blocks = head.forward(hidden[begin:end], weight, own, None, softcap, stored=stored, needs_sum=label_smoothing > 0)
        _merge(blocks, own, _part(token_weights, begin, end), count, [_part(x, begin, end) for x in losses], lse[begin:end],
               coefficients, vocab, ignore_index, label_smoothing, z_loss)
        peak = peak_of(coefficients, hidden.dtype)
        gradient_of_stored(stored, own, blocks, lse[begin:end], coefficients, peak, vocab, softcap)
        gradients.add(begin, end, stored, peak)
    return *reduce_losses(*losses, labels, token_weights, ignore_index, reduction), dhidden, dweight


def linear_cross_entropy_bwd(dloss, hidden, weight, labels, token_weights, lse, ignore_index, label_smoothing, z_loss, softcap,
                             reduction, needs_dhidden, needs_dweight):
    check_dtype("linear_cross_entropy", "hidden", hidden)
    rows, vocab = hidden.shape[0], weight.shape[0]
    dhidden, dweight = _gradients(hidden, weight, needs_dhidden, needs_dweight, hidden.dtype, weight.dtype)
    if rows == 0 or not (needs_dhidden or needs_dweight):
        return dhidden, dweight
    coefficients = torch.empty((COEFFICIENTS, rows), dtype=torch.float32, device=hidden.device)
    launch(linear_cross_entropy_coefficients_kernel, triton.cdiv(rows, 256), hidden.device,
           dict(dloss_ptr=dloss, labels_ptr=labels, lse_ptr=lse, weights_ptr=token_weights,
                count_ptr=count_rows(labels, token_weights, ignore_index, reduction), coefficients_ptr=coefficients,
                error_ptr=error_word(hidden.device), rows=rows, vocab=vocab, dloss_step=int(reduction == NONE),
                coefficient_stride=rows, ignore_index=ignore_index, smoothing=label_smoothing, z_loss=z_loss,
                ERROR=CODES["linear_cross_entropy", "labels"], BLOCK=256), num_warps=4)
    backward(hidden, weight, labels, lse, coefficients, dhidden if needs_dhidden else None,
             dweight if needs_dweight else None, None, softcap, 0, False)
    return dhidden, dweight


def linear_cross_entropy_scale_bwd(dloss, dhidden, dweight, hidden, weight):
    return scaled(dhidden, dloss, hidden.dtype), scaled(dweight, dloss, weight.dtype)
