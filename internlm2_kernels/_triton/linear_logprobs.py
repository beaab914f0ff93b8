"""Log-probabilities of tokens under the softmax of hidden @ weight.T. Contract: ops/linear_logprobs.py; matrix products:
linear_head.py, linear_head_bwd.py."""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from . import linear_head as head
from .common import check_dtype, launch
from .linear_head import _merged
from .linear_head_bwd import COEFFICIENTS, backward
from .losses import _label, _store_lse

MERGE_TILES, MERGE_ROWS = 32, 32
NO_TOKEN = -(2**62)  # the ignore_index for `_label`: no token equals it, so none is ignored


@triton.jit(do_not_specialize=["rows", "first_token", "vocab_size"])
def linear_logprobs_merge_kernel(top_ptr, sum_ptr, total_ptr, moment_ptr, index_ptr, label_ptr, tokens_ptr, logprobs_ptr,
                                 lse_ptr, entropy_ptr, hits_ptr, total_out_ptr, error_ptr,
                                 rows, tiles, vocab, stride, first_token, vocab_size,
                                 NO_TOKEN: tl.constexpr, ERROR: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    top, log_z, total, mean, index = _merged(top_ptr, sum_ptr, total_ptr, moment_ptr, index_ptr, row, mask, tiles, stride,
                                             TILES, BLOCK)
    token, _, bad = _label(tokens_ptr, row, mask, NO_TOKEN, vocab_size, error_ptr, ERROR)
    local = token - first_token
    own = tl.load(label_ptr + row, mask=mask & (local >= 0) & (local < vocab), other=0.0)
    tl.store(logprobs_ptr + row, tl.where(bad, float("nan"), own - top - log_z), mask=mask)
    _store_lse(lse_ptr, row, top, log_z, mask)
    if hits_ptr is not None:
        z = top + log_z
        tl.store(hits_ptr + row, (index.to(tl.int64) == local) & (z == z), mask=mask)
    if entropy_ptr is not None:
        tl.store(entropy_ptr + row, log_z - mean, mask=mask)
    if total_out_ptr is not None:
        tl.store(total_out_ptr + row, total, mask=mask)


@triton.jit(do_not_specialize=["rows", "vocab_size", "stride"])
def linear_logprobs_coefficients_kernel(dlogprobs_ptr, dentropy_ptr, dlse_ptr, dsum_ptr, tokens_ptr, entropy_ptr,
                                        coefficients_ptr, error_ptr, rows, vocab_size, stride,
                                        NO_TOKEN: tl.constexpr, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """Writes, for each row, the four coefficients a, b, c, s (see the top of linear_head_bwd.py) that describe the gradient
    d logit_j = dlogprob ([j = token] - p_j) - dentropy p_j (x_j + entropy) + dlse p_j + dsum, where x_j = logit_j - lse."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < rows
    a = tl.zeros((BLOCK,), tl.float32)
    b = tl.zeros((BLOCK,), tl.float32)
    c = tl.zeros((BLOCK,), tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    if dlse_ptr is not None:
        s += tl.load(dlse_ptr + row, mask=mask, other=0.0)
    if dentropy_ptr is not None:
        b += tl.load(dentropy_ptr + row, mask=mask, other=0.0)
        s -= tl.where(b == 0.0, 0.0, b * tl.load(entropy_ptr + row, mask=mask, other=0.0))
    if dsum_ptr is not None:
        c += tl.load(dsum_ptr + row, mask=mask, other=0.0)
    a += s
    if dlogprobs_ptr is not None:
        a -= tl.load(dlogprobs_ptr + row, mask=mask, other=0.0)
    _, _, bad = _label(tokens_ptr, row, mask, NO_TOKEN, vocab_size, error_ptr, ERROR)
    tl.store(coefficients_ptr + row, tl.where(bad, float("nan"), a), mask=mask)
    tl.store(coefficients_ptr + stride + row, b, mask=mask)
    tl.store(coefficients_ptr + 2 * stride + row, c, mask=mask)
    tl.store(coefficients_ptr + 3 * stride + row, s, mask=mask)


def linear_logprobs_fwd(hidden, weight, tokens, inv_temperature, softcap, vocab_start, vocab_size, needs_entropy, needs_sum,
                        needs_hits):
    check_dtype("linear_logprobs", "hidden", hidden)
    rows, vocab = hidden.shape[0], weight.shape[0]
    new = lambda wanted=True, dtype=torch.float32: torch.empty(rows if wanted else 0, dtype=dtype, device=hidden.device)
    lse = torch.empty((rows, 2), dtype=torch.float32, device=hidden.device)
    logprobs, entropy, hits, total = new(), new(needs_entropy), new(needs_hits, torch.bool), new(needs_sum)
    scale = None if inv_temperature == 1.0 else inv_temperature
    for begin, end in head.chunks(rows, head.FORWARD_ROWS):
        own = tokens[begin:end]
        blocks = head.forward(hidden[begin:end], weight, own, scale, softcap, first_token=vocab_start, needs_sum=needs_sum,
                              needs_moment=needs_entropy, needs_index=needs_hits)
        launch(linear_logprobs_merge_kernel, triton.cdiv(end - begin, MERGE_ROWS), hidden.device,
               dict(top_ptr=blocks.top, sum_ptr=blocks.sum, total_ptr=blocks.total, moment_ptr=blocks.moment,
                    index_ptr=blocks.index, label_ptr=blocks.label, tokens_ptr=own, logprobs_ptr=logprobs[begin:end],
                    lse_ptr=lse[begin:end], entropy_ptr=entropy[begin:end] if needs_entropy else None,
                    hits_ptr=hits[begin:end] if needs_hits else None,
                    total_out_ptr=total[begin:end] if needs_sum else None, error_ptr=error_word(hidden.device),
                    rows=end - begin, tiles=blocks.top.shape[0], vocab=vocab, stride=blocks.top.shape[1],
                    first_token=vocab_start, vocab_size=vocab_size, NO_TOKEN=NO_TOKEN,
                    ERROR=CODES["linear_logprobs", "tokens"], TILES=MERGE_TILES, BLOCK=MERGE_ROWS), num_warps=8)
    return logprobs, lse, entropy, hits, total


def linear_logprobs_bwd(dlogprobs, dentropy, dlse, dsum, hidden, weight, tokens, lse, entropy, inv_temperature, softcap,
                        vocab_start, vocab_size, needs_dhidden, needs_dweight):
    check_dtype("linear_logprobs", "hidden", hidden)
    dhidden = torch.empty((hidden.shape[0] if needs_dhidden else 0, hidden.shape[1]), dtype=hidden.dtype, device=hidden.device)
    make = torch.empty if hidden.shape[0] else torch.zeros
    dweight = make((weight.shape[0] if needs_dweight else 0, hidden.shape[1]), dtype=weight.dtype, device=hidden.device)
    rows = hidden.shape[0]
    if rows == 0 or not (needs_dhidden or needs_dweight):
        return dhidden, dweight
    coefficients = torch.empty((COEFFICIENTS, rows), dtype=torch.float32, device=hidden.device)
    launch(linear_logprobs_coefficients_kernel, triton.cdiv(rows, 256), hidden.device,
           dict(dlogprobs_ptr=dlogprobs, dentropy_ptr=dentropy, dlse_ptr=dlse, dsum_ptr=dsum, tokens_ptr=tokens,
                entropy_ptr=entropy, coefficients_ptr=coefficients, error_ptr=error_word(hidden.device), rows=rows,
                vocab_size=vocab_size, stride=rows, NO_TOKEN=NO_TOKEN, ERROR=CODES["linear_logprobs", "tokens"],
                BLOCK=256), num_warps=4)
    backward(hidden, weight, tokens, lse, coefficients, dhidden if needs_dhidden else None,
             dweight if needs_dweight else None, None if inv_temperature == 1.0 else inv_temperature, softcap, vocab_start,
             dentropy is not None)
    return dhidden, dweight
