"""PPO's clipped policy loss and its statistics. Contract: ops/ppo_policy_loss.py; launches: ppo.py."""

import triton
import triton.language as tl

from .functions import _expm1_less_x, _exponential
from .ppo import _counted, _mean, _store_results, _sum_of, arguments_of, backward, forward

BLOCK = 4096  # tokens that a program processes in one step of its loop
SUMS = tl.constexpr(4)  # partial sums of a program: loss, clipped tokens, approximate KL, tokens that count
LARGEST_LOG_RATIO = tl.constexpr(20.0)


@triton.jit
def _terms(logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, index, size, clip):
    """(which tokens count, log ratio, clamped log ratio, unclipped term, clipped term) of each token, all 0 for tokens that do
    not count."""
    known = index < size
    counts = tl.load(mask_ptr + index, mask=known, other=0) != 0
    free = _counted(logprobs_ptr, index, known, counts) - _counted(old_logprobs_ptr, index, known, counts)
    advantage = _counted(advantages_ptr, index, known, counts)
    x = tl.where(free > LARGEST_LOG_RATIO, LARGEST_LOG_RATIO, free)
    x = tl.where(x < -LARGEST_LOG_RATIO, -LARGEST_LOG_RATIO, x)
    ratio = _exponential(x)
    near = tl.where(ratio > 1.0 + clip, 1.0 + clip, ratio)
    near = tl.where(near < 1.0 - clip, 1.0 - clip, near)
    return counts, free, x, ratio * advantage, near * advantage


@triton.jit
def _finish(loss, clipped, kl, count, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr):
    """Computes and stores the results from the sums over the tokens. The statistic is the approximate KL."""
    _store_results(_mean(0.0 - loss, count), clipped, _mean(kl, count), count, loss_ptr, clip_fraction_ptr, statistic_ptr,
                   count_ptr)


@triton.jit
def ppo_policy_loss_fwd_kernel(logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, loss_ptr, clip_fraction_ptr,
                               statistic_ptr, count_ptr, partial_ptr, size, clip, BLOCK: tl.constexpr):
    loss = tl.zeros((BLOCK,), tl.float32)
    kl = tl.zeros((BLOCK,), tl.float32)
    clipped = tl.zeros((BLOCK,), tl.int32)
    count = tl.zeros((BLOCK,), tl.int32)
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts, _, x, plain, near = _terms(logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, index, size, clip)
        loss += tl.where(plain <= near, plain, tl.where(near < plain, near, float("nan")))
        kl += _expm1_less_x(x)
        clipped += (near < plain).to(tl.int32)
        count += counts.to(tl.int32)
    loss_sum = tl.sum(loss, axis=0)
    kl_sum = tl.sum(kl, axis=0)
    clipped_sum = tl.sum(clipped, axis=0).to(tl.float32)
    count_sum = tl.sum(count, axis=0).to(tl.float32)
    if partial_ptr is None:
        _finish(loss_sum, clipped_sum, kl_sum, count_sum, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr)
    else:
        partial_ptr += tl.program_id(0) * SUMS
        tl.store(partial_ptr, loss_sum)
        tl.store(partial_ptr + 1, clipped_sum)
        tl.store(partial_ptr + 2, kl_sum)
        tl.store(partial_ptr + 3, count_sum)


@triton.jit(do_not_specialize=["programs"])
def ppo_policy_loss_merge_kernel(partial_ptr, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr, programs,
                                 BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    at = partial_ptr + program * SUMS
    known = program < programs
    _finish(_sum_of(at, known), _sum_of(at + 1, known), _sum_of(at + 2, known), _sum_of(at + 3, known),
            loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr)


@triton.jit
def ppo_policy_loss_bwd_kernel(dloss_ptr, logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, count_ptr, dx_ptr, size,
                               clip, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, free, _, plain, near = _terms(logprobs_ptr, old_logprobs_ptr, advantages_ptr, mask_ptr, index, size, clip)
    scale = _mean(tl.load(dloss_ptr), tl.load(count_ptr))
    flat = (near < plain) | (tl.abs(free) > LARGEST_LOG_RATIO) | (counts == 0)
    d = tl.where(flat, 0.0, -scale * plain)
    tl.store(dx_ptr + index, d.to(dx_ptr.dtype.element_ty), mask=index < size)


def _arguments(logprobs, old_logprobs, advantages, mask, clip):
    return arguments_of("ppo_policy_loss", mask, clip, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)


def ppo_policy_loss_fwd(logprobs, old_logprobs, advantages, mask, clip):
    return forward(ppo_policy_loss_fwd_kernel, ppo_policy_loss_merge_kernel, SUMS.value,
                   _arguments(logprobs, old_logprobs, advantages, mask, clip), BLOCK)


def ppo_policy_loss_bwd(dloss, logprobs, old_logprobs, advantages, mask, count, clip):
    return backward(ppo_policy_loss_bwd_kernel, dloss, logprobs, count,
                    _arguments(logprobs, old_logprobs, advantages, mask, clip))
