"""Cross-entropy of given logits. Contract: ops/cross_entropy.py.

One program computes one row. It reads the row once for the log-sum-exp and, if the gradient is wanted in the same call, a
second time for the gradient. The second read hits the L2 cache if few rows are in flight, so each row gets many warps. Each
thread keeps the running maximum and sum of its own columns. The first read therefore takes one exponential per element, and
no reduction across threads before its end. A row's bits depend only on its own values and on whether the rows are aligned to
16 bytes: the alignment decides the width of a load, and the width decides the order of the sum.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .common import check_dtype, launch
from .functions import _expm1, _fast_exp
from .losses import NONE, _cap_slope, _capped, _label, _load_lse, _share, _store_lse, count_rows, reduce_losses, scaled

INNER = 8  # columns that a thread gets from one load: 16 bytes of a 2-byte dtype
LARGEST_BLOCK = 16384
BLOCK = 4096  # columns that one program of the separate backward writes


def tile_config(vocab: int) -> tuple[int, int]:
    """(groups of INNER columns that one step reads, warps). Each thread gets 16 columns, which are two 16-byte loads of a
    2-byte dtype."""
    block = min(triton.next_power_of_2(max(vocab, INNER)), LARGEST_BLOCK)
    return block // INNER, max(1, block // 512)


@triton.jit
def _entry(p_less_1, lse, smoothing, z_loss, vocab):
    """The gradient with respect to the label's logit. Its argument p_label - 1 comes from expm1, without cancellation."""
    return p_less_1 * (1.0 + 2.0 * z_loss * lse) + 2.0 * z_loss * lse + smoothing - tl.div_rn(smoothing, vocab * 1.0)


@triton.jit(do_not_specialize=["ignore_index"])
def cross_entropy_fwd_kernel(logits_ptr, labels_ptr, count_ptr, loss_ptr, z_loss_ptr, lse_ptr, dlogits_ptr, error_ptr, vocab,
                             stride, ignore_index, smoothing, z_loss, softcap,
                             SOFTCAP: tl.constexpr, SMOOTHING: tl.constexpr, ERROR: tl.constexpr,
                             LANES: tl.constexpr, INNER: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    tile = tl.arange(0, LANES)[:, None] * INNER + tl.arange(0, INNER)[None, :]
    label, ignored, bad = _label(labels_ptr, row, row >= 0, ignore_index, vocab, error_ptr, ERROR)
    if dlogits_ptr is not None:
        dlogits_ptr += row * vocab
        if ignored | bad:
            value = tl.where(bad, float("nan"), 0.0)
            tl.store(loss_ptr + row, value)
            if z_loss_ptr is not None:
                tl.store(z_loss_ptr + row, value)
            for start in range(0, vocab, LANES * INNER):
                col = start + tile
                d = tl.zeros((LANES, INNER), tl.float32) + value
                tl.store(dlogits_ptr + col, d.to(dlogits_ptr.dtype.element_ty), mask=col < vocab)
            return
    m = tl.full((LANES,), float("-inf"), tl.float32)
    z = tl.zeros((LANES,), tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    for start in range(0, vocab, LANES * INNER):
        col = start + tile
        x = tl.load(logits_ptr + col, mask=col < vocab, other=float("-inf"), eviction_policy="evict_last").to(tl.float32)
        logit = _capped(x, softcap, SOFTCAP)
        if SOFTCAP:
            logit = tl.where(col < vocab, logit, float("-inf"))
        m_new = tl.maximum(m, tl.max(logit, axis=1))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        z = z * _fast_exp(m - m_safe) + tl.sum(_fast_exp(logit - m_safe[:, None]), axis=1)
        m = m_new
        if SMOOTHING:
            total += tl.sum(tl.where(col < vocab, logit, 0.0), axis=1)
    top = tl.max(m, axis=0)
    log_z = tl.log(tl.sum(z * _fast_exp(m - tl.where(top == float("-inf"), 0.0, top)), axis=0))
    lse = top + log_z
    known = (ignored | bad) == 0
    own = _capped(tl.load(logits_ptr + label, mask=known, other=0.0).to(tl.float32), softcap, SOFTCAP)
    z = z_loss * lse * lse
    loss = (1.0 - smoothing) * (top - own + log_z) + z
    if SMOOTHING:
        loss += smoothing * (top - tl.div_rn(tl.sum(total, axis=0), vocab * 1.0) + log_z)
    tl.store(loss_ptr + row, tl.where(bad, float("nan"), tl.where(ignored, 0.0, loss)))
    if z_loss_ptr is not None:
        tl.store(z_loss_ptr + row, tl.where(bad, float("nan"), tl.where(ignored, 0.0, z)))
    if lse_ptr is not None:
        _store_lse(lse_ptr, row, top, log_z, True)
    if dlogits_ptr is not None:
        share = 1.0
        if count_ptr is not None:
            share = tl.div_rn(1.0, tl.load(count_ptr))
        a = share * (1.0 + 2.0 * z_loss * lse)
        base = share * tl.div_rn(smoothing, vocab * 1.0)
        entry = share * _entry(_expm1(own - top - log_z), lse, smoothing, z_loss, vocab)
        for start in range(0, vocab, LANES * INNER):
            col = start + tile
            x = tl.load(logits_ptr + col, mask=col < vocab, other=0.0, eviction_policy="evict_first").to(tl.float32)
            logit = _capped(x, softcap, SOFTCAP)
            d = tl.where(col == label, entry, tl.fma(_fast_exp(logit - top - log_z), a, -base))
            if SOFTCAP:
                d = d * _cap_slope(logit, softcap)
            tl.store(dlogits_ptr + col, d.to(dlogits_ptr.dtype.element_ty), mask=col < vocab)


@triton.jit(do_not_specialize=["ignore_index", "dloss_step"])
def cross_entropy_bwd_kernel(dloss_ptr, logits_ptr, labels_ptr, lse_ptr, count_ptr, dlogits_ptr, error_ptr, vocab, stride,
                             dlogits_stride, dloss_step, ignore_index, smoothing, z_loss, softcap,
                             SOFTCAP: tl.constexpr, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """Computes the gradient of a block of columns of one row. dlogits and logits may be the same tensor, because each program
    reads only the elements that it writes."""
    blocks = tl.cdiv(vocab, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    first = tl.program_id(0) % blocks * BLOCK
    col = first + tl.arange(0, BLOCK)
    logits_ptr += row * stride
    label, ignored, bad = _label(labels_ptr, row, row >= 0, ignore_index, vocab, error_ptr, ERROR)
    share = _share(dloss_ptr, row, dloss_step, None, count_ptr, row >= 0)
    top, log_z = _load_lse(lse_ptr, row, row >= 0)
    lse = top + log_z
    here = ((ignored | bad) == 0) & (label >= first) & (label < first + BLOCK)
    own = _capped(tl.load(logits_ptr + label, mask=here, other=0.0).to(tl.float32), softcap, SOFTCAP)
    entry = share * _entry(_expm1(own - top - log_z), lse, smoothing, z_loss, vocab)
    logit = _capped(tl.load(logits_ptr + col, mask=col < vocab, other=0.0).to(tl.float32), softcap, SOFTCAP)
    a = share * (1.0 + 2.0 * z_loss * lse)
    base = share * tl.div_rn(smoothing, vocab * 1.0)
    d = tl.fma(_fast_exp(logit - top - log_z), a, -base)
    d = tl.where(col == label, entry, d)
    if SOFTCAP:
        d = d * _cap_slope(logit, softcap)
    d = tl.where(bad, float("nan"), tl.where(ignored, 0.0, d))
    tl.store(dlogits_ptr + row * dlogits_stride + col, d.to(dlogits_ptr.dtype.element_ty), mask=col < vocab)


def _sweep(logits, labels, count, losses, lse, dlogits, ignore_index, label_smoothing, z_loss, softcap):
    rows, vocab = logits.shape
    lanes, num_warps = tile_config(vocab)
    if rows:
        launch(cross_entropy_fwd_kernel, rows, logits.device,
               dict(logits_ptr=logits, labels_ptr=labels, count_ptr=count, loss_ptr=losses[0], z_loss_ptr=losses[1],
                    lse_ptr=lse, dlogits_ptr=dlogits, error_ptr=error_word(logits.device), vocab=vocab,
                    stride=logits.stride(0), ignore_index=ignore_index, smoothing=label_smoothing, z_loss=z_loss,
                    softcap=softcap, SOFTCAP=softcap > 0, SMOOTHING=label_smoothing > 0,
                    ERROR=CODES["cross_entropy", "labels"], LANES=lanes, INNER=INNER),
               num_warps=num_warps)


def _losses(logits, return_z_loss):
    """New tensors for the losses of the rows and for their z-losses (None where they are not wanted)."""
    check_dtype("cross_entropy", "logits", logits)
    new = lambda: torch.empty(logits.shape[0], dtype=torch.float32, device=logits.device)
    return new(), new() if return_z_loss else None


def cross_entropy_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    losses = _losses(logits, return_z_loss)
    lse = torch.empty((logits.shape[0], 2), dtype=torch.float32, device=logits.device)
    _sweep(logits, labels, None, losses, lse, None, ignore_index, label_smoothing, z_loss, softcap)
    return *reduce_losses(*losses, labels, None, ignore_index, reduction), lse


def cross_entropy_grad_fwd(logits, labels, ignore_index, label_smoothing, z_loss, softcap, reduction, return_z_loss):
    losses = _losses(logits, return_z_loss)
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    count = count_rows(labels, None, ignore_index, reduction)
    _sweep(logits, labels, count, losses, None, dlogits, ignore_index, label_smoothing, z_loss, softcap)
    return *reduce_losses(*losses, labels, None, ignore_index, reduction), dlogits


def _backward(dloss, logits, labels, lse, dlogits, ignore_index, label_smoothing, z_loss, softcap, reduction):
    check_dtype("cross_entropy", "logits", logits)
    rows, vocab = logits.shape
    if logits.numel() == 0:
        return
    launch(cross_entropy_bwd_kernel, rows * triton.cdiv(vocab, BLOCK), logits.device,
           dict(dloss_ptr=dloss, logits_ptr=logits, labels_ptr=labels, lse_ptr=lse,
                count_ptr=count_rows(labels, None, ignore_index, reduction), dlogits_ptr=dlogits,
                error_ptr=error_word(logits.device), vocab=vocab, stride=logits.stride(0),
                dlogits_stride=dlogits.stride(0), dloss_step=int(reduction == NONE), ignore_index=ignore_index,
                smoothing=label_smoothing, z_loss=z_loss, softcap=softcap, SOFTCAP=softcap > 0,
                ERROR=CODES["cross_entropy", "labels"], BLOCK=BLOCK), num_warps=8)


def cross_entropy_bwd(dloss, logits, labels, lse, ignore_index, label_smoothing, z_loss, softcap, reduction):
    dlogits = torch.empty(logits.shape, dtype=logits.dtype, device=logits.device)
    _backward(dloss, logits, labels, lse, dlogits, ignore_index, label_smoothing, z_loss, softcap, reduction)
    return dlogits


def cross_entropy_bwd_(dloss, logits, labels, lse, ignore_index, label_smoothing, z_loss, softcap, reduction):
    _backward(dloss, logits, labels, lse, logits, ignore_index, label_smoothing, z_loss, softcap, reduction)


def cross_entropy_scale_bwd(dloss, dlogits):
    return scaled(dlogits, dloss, dlogits.dtype)
