"""PPO's clipped policy loss and its statistics. Contract: ops/ppo_policy_loss.py.

Sums over the tokens: one program up to SINGLE tokens, beyond that programs of a fixed share each and a second launch that
adds theirs in order.
"""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch
from .functions import _expm1_less_x, _exponential

BLOCK = 4096  # tokens at a time
SINGLE = 16384  # tokens up to which one program does all
PROGRAMS = 264  # at most: two for each of an H100's 132 multiprocessors
LARGEST_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def _terms(logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, index, size, clip):
    """(counts, log ratio before the clamp, after, unclipped term, clipped term); what does not count is 0."""
    known = index < size
    counts = tl.load(mask_ptr + index, mask=known, other=0) != 0
    free = tl.load(logprobs_ptr + index, mask=known, other=0.0).to(tl.float32)
    free -= tl.load(old_ptr + index, mask=known, other=0.0).to(tl.float32)
    free = tl.where(counts, free, 0.0)  # afterwards, because loads under the mask would go element by element
    advantage = tl.load(advantages_ptr + index, mask=known, other=0.0).to(tl.float32)
    advantage = tl.where(counts, advantage, 0.0)
    x = tl.where(free > LARGEST_LOG_RATIO, LARGEST_LOG_RATIO, free)
    x = tl.where(x < -LARGEST_LOG_RATIO, -LARGEST_LOG_RATIO, x)
    ratio = _exponential(x)
    near = tl.where(ratio > 1.0 + clip, 1.0 + clip, ratio)
    near = tl.where(near < 1.0 - clip, 1.0 - clip, near)
    return counts, free, x, ratio * advantage, near * advantage


@triton.jit
def _finish(loss, clipped, kl, count, loss_ptr, clip_fraction_ptr, kl_ptr, count_ptr):
    """The results from their sums."""
    over = tl.where(count == 0.0, 1.0, count)
    tl.store(loss_ptr, tl.div_rn(0.0 - loss, over))
    tl.store(clip_fraction_ptr, tl.div_rn(clipped, over))
    tl.store(kl_ptr, tl.div_rn(kl, over))
    tl.store(count_ptr, count)


@triton.jit
def ppo_policy_loss_fwd_kernel(logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, loss_ptr, clip_fraction_ptr, kl_ptr,
                               count_ptr, partial_ptr, size, clip, BLOCK: tl.constexpr):
    loss = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    clipped = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts, _, x, plain, near = _terms(logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, index, size, clip)
        loss += tl.where(plain <= near, plain, tl.where(near < plain, near, float("nan")))
        kl += _expm1_less_x(x)
        clipped += (near < plain).to(tl.int32)
        count += counts.to(tl.int32)
    loss_sum = tl.sum(loss, axis=0)
    kl_sum = tl.sum(kl, axis=0)
    clipped_sum = tl.sum(clipped, axis=0).to(tl.float32)
    count_sum = tl.sum(count, axis=0).to(tl.float32)
    if partial_ptr is None:
        _finish(loss_sum, clipped_sum, kl_sum, count_sum, loss_ptr, clip_fraction_ptr, kl_ptr, count_ptr)
    else:
        partial_ptr += tl.program_id(0) * 4
        tl.store(partial_ptr, loss_sum)
        tl.store(partial_ptr + 1, clipped_sum)
        tl.store(partial_ptr + 2, kl_sum)
        tl.store(partial_ptr + 3, count_sum)


@triton.jit(do_not_specialize=["programs"])
def ppo_policy_loss_merge_kernel(partial_ptr, loss_ptr, clip_fraction_ptr, kl_ptr, count_ptr, programs,
                                 BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    at = partial_ptr + program * 4
    known = program < programs
    _finish(tl.sum(tl.load(at, mask=known, other=0.0), axis=0), tl.sum(tl.load(at + 1, mask=known, other=0.0), axis=0),
            tl.sum(tl.load(at + 2, mask=known, other=0.0), axis=0), tl.sum(tl.load(at + 3, mask=known, other=0.0), axis=0),
            loss_ptr, clip_fraction_ptr, kl_ptr, count_ptr)


@triton.jit
def ppo_policy_loss_bwd_kernel(dloss_ptr, logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, count_ptr, dlogprobs_ptr, size,
                               clip, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, free, _, plain, near = _terms(logprobs_ptr, old_ptr, advantages_ptr, mask_ptr, index, size, clip)
    count = tl.load(count_ptr)
    scale = tl.div_rn(tl.load(dloss_ptr), tl.where(count == 0.0, 1.0, count))
    flat = (near < plain) | (tl.abs(free) > LARGEST_LOG_RATIO) | (counts == 0)
    d = tl.where(flat, 0.0, -scale * plain)
    tl.store(dlogprobs_ptr + index, d.to(dlogprobs_ptr.dtype.element_ty), mask=index < size)


def split(size: int) -> int:
    """Programs that share `size` tokens."""
    return 1 if size <= SINGLE else min(PROGRAMS, triton.cdiv(size, BLOCK))


def _arguments(logprobs, old_logprobs, advantages, mask, clip):
    for name, x in (("logprobs", logprobs), ("old_logprobs", old_logprobs), ("advantages", advantages)):
        check_dtype("ppo_policy_loss", name, x)
    return dict(logprobs_ptr=logprobs, old_ptr=old_logprobs, advantages_ptr=advantages, mask_ptr=mask.view(torch.int8),
                size=logprobs.numel(), clip=clip)


def ppo_policy_loss_fwd(logprobs, old_logprobs, advantages, mask, clip):
    arguments = _arguments(logprobs, old_logprobs, advantages, mask, clip)
    names = "loss_ptr", "clip_fraction_ptr", "kl_ptr", "count_ptr"
    results = {name: torch.empty((), dtype=torch.float32, device=logprobs.device) for name in names}
    programs = split(logprobs.numel())
    partial = torch.empty((programs, 4), dtype=torch.float32, device=logprobs.device) if programs > 1 else None
    launch(ppo_policy_loss_fwd_kernel, programs, logprobs.device,
           dict(arguments, **results, partial_ptr=partial, BLOCK=BLOCK), num_warps=16)
    if partial is not None:
        launch(ppo_policy_loss_merge_kernel, 1, logprobs.device,
               dict(partial_ptr=partial, **results, programs=programs, BLOCK=512), num_warps=4)
    return tuple(results.values())


def ppo_policy_loss_bwd(dloss, logprobs, old_logprobs, advantages, mask, count, clip):
    dlogprobs = torch.empty(logprobs.shape, dtype=logprobs.dtype, device=logprobs.device)
    if logprobs.numel():
        launch(ppo_policy_loss_bwd_kernel, triton.cdiv(logprobs.numel(), 1024), logprobs.device,
               dict(_arguments(logprobs, old_logprobs, advantages, mask, clip), dloss_ptr=dloss, count_ptr=count,
                    dlogprobs_ptr=dlogprobs, BLOCK=1024), num_warps=4)
    return dlogprobs


def audit(dtype, meta):
    one = meta(dtype=torch.float32)
    for tokens in (8192, 1 << 20):
        x, mask = meta(tokens, dtype=dtype), meta(tokens, dtype=torch.bool)
        yield f"{tokens} tokens", lambda x=x, m=mask: ppo_policy_loss_fwd(x, x, x, m, 0.2)
    yield f"{tokens} tokens", lambda: ppo_policy_loss_bwd(one, x, x, x, mask, one, 0.2)
