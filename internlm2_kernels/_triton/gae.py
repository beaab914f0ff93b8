"""Generalised advantage estimation. Contract: ops/gae.py.

One program processes one sequence backwards in blocks. The state at a position is the pair (A, V) of the advantage and the
value of the next position that counts. Each position maps it linearly to A' = a A + b V + c and V' = its own value; a masked
position keeps the state. An associative scan composes the maps of a block. The state that results at the beginning of a block
is the input of the block that precedes it in the sequence.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .attention import _fill, _out_of_order
from .common import check_dtype, launch

BLOCK = 1024


@triton.jit
def _compose(a1, b1, c1, d1, e1, a2, b2, c2, d2, e2):
    """The coefficients (a, b, c, d, e) of the map (A, V) -> (a A + b V + c, d V + e), d = 0 or 1, that applies first the map of
    a1 to e1 and then that of a2 to e2."""
    return (a1 * a2, a2 * b1 + b2 * d1, a2 * c1 + b2 * e1 + c2, d1 * d2, d2 * e1 + e2)


@triton.jit(do_not_specialize=["sequences", "tokens"])
def gae_fwd_kernel(rewards_ptr, values_ptr, cu_ptr, mask_ptr, bootstrap_ptr, advantages_ptr, returns_ptr, error_ptr,
                   sequences, tokens, gamma, decay, ERROR: tl.constexpr, BLOCK: tl.constexpr):
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, sequences + 1, BLOCK):
        wrong |= _out_of_order(cu_ptr, start + tl.arange(0, BLOCK), sequences, tokens)
    if tl.max(wrong, axis=0) != 0:  # the inputs are not read, and all programs fill the results with NaN
        tl.atomic_or(error_ptr, ERROR)
        _fill(advantages_ptr, tokens, BLOCK)
        _fill(returns_ptr, tokens, BLOCK)
        return
    sequence = tl.program_id(0)
    begin = tl.load(cu_ptr + sequence).to(tl.int64)
    end = tl.load(cu_ptr + sequence + 1).to(tl.int64)
    advantage = 0.0
    value = 0.0
    if bootstrap_ptr is not None:
        value = tl.load(bootstrap_ptr + sequence)
    for back in range(0, end - begin, BLOCK):
        offset = tl.arange(0, BLOCK)
        t = end - 1 - back - offset
        here = t >= begin
        counts = here
        if mask_ptr is not None:
            counts = here & (tl.load(mask_ptr + t, mask=here, other=0) != 0)
        r = tl.load(rewards_ptr + t, mask=counts, other=0.0).to(tl.float32)
        v = tl.load(values_ptr + t, mask=here, other=0.0).to(tl.float32)
        own = tl.where(counts, v, 0.0)
        a, b, c, d, e = tl.associative_scan((tl.where(counts, decay, 1.0), tl.where(counts, gamma, 0.0), r - own,
                                             tl.where(counts, 0.0, 1.0), own), 0, _compose)
        at = a * advantage + b * value + c
        next_value = d * value + e
        tl.store(advantages_ptr + t, at, mask=here)
        tl.store(returns_ptr + t, at + v, mask=here)
        final = offset == BLOCK - 1  # the earliest position of a full block; after a partial one the loop ends
        advantage = tl.sum(tl.where(final, at, 0.0), axis=0)
        value = tl.sum(tl.where(final, next_value, 0.0), axis=0)


def gae_fwd(rewards, values, cu_seqlens, mask, bootstrap, gamma, lam):
    check_dtype("gae", "rewards", rewards)
    check_dtype("gae", "values", values)
    advantages, returns = (torch.empty(rewards.shape, dtype=torch.float32, device=rewards.device) for _ in range(2))
    sequences = cu_seqlens.shape[0] - 1
    if sequences or rewards.numel():
        launch(gae_fwd_kernel, max(1, sequences), rewards.device,
               dict(rewards_ptr=rewards, values_ptr=values, cu_ptr=cu_seqlens,
                    mask_ptr=None if mask is None else mask.view(torch.int8), bootstrap_ptr=bootstrap,
                    advantages_ptr=advantages, returns_ptr=returns, error_ptr=error_word(rewards.device),
                    sequences=sequences, tokens=rewards.shape[0], gamma=gamma, decay=gamma * lam,
                    ERROR=CODES["gae", "cu_seqlens"], BLOCK=BLOCK), num_warps=4)
    return advantages, returns
