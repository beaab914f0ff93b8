"""PPO's value loss and its statistics. Contract: ops/ppo_value_loss.py; launches: ppo.py.

Variances, for the explained variance: the mean of a block of tokens and the sum of squared deviations from it are merged into
the total by the formula of T. Chan et al. (Updating formulae for computing sample variances, 1979). Unlike
mean(x^2) - mean(x)^2, it does not cancel where the mean is far from 0.
"""

import triton
import triton.language as tl

from .ppo import _counted, _mean, _store_results, _sum_of, arguments_of, backward, forward

BLOCK = 2048  # tokens that a program processes in one step of its loop
# The partial sums of a program: loss, clipped tokens, count, mean and squared deviations of the errors R - v, mean and squared
# deviations of the returns R.
SUMS = tl.constexpr(7)


@triton.jit
def _terms(values_ptr, old_values_ptr, returns_ptr, mask_ptr, index, size, clip, CLIP: tl.constexpr):
    """(which tokens count, value, return, unclipped term, clipped term) of each token. value and return are 0 for tokens that
    do not count."""
    known = index < size
    counts = tl.load(mask_ptr + index, mask=known, other=0) != 0
    value = _counted(values_ptr, index, known, counts)
    target = _counted(returns_ptr, index, known, counts)
    free = (value - target) * (value - target)
    clipped = free
    if CLIP:
        old = _counted(old_values_ptr, index, known, counts)
        away = value - old
        near = tl.where(away > 0.0, old + clip, old - clip) - target
        clipped = tl.where(tl.abs(away) > clip, near * near, free)
    return counts, value, target, free, clipped


@triton.jit
def _moments(x, counts, count):
    """(mean, sum of squared deviations from it) of the elements that count."""
    mean = _mean(tl.sum(tl.where(counts, x, 0.0), axis=0), count)
    away = tl.where(counts, x - mean, 0.0)
    return mean, tl.sum(away * away, axis=0)


@triton.jit
def _join(n, mean, squares, n_more, mean_more, squares_more):
    """(count, mean, sum of squared deviations) of the union of two sets, given by their own."""
    total = n + n_more
    part = _mean(n_more, total)
    away = mean_more - mean
    return mean + away * part, squares + squares_more + away * away * n * part


@triton.jit
def _finish(loss, clipped, errors, mean, squares, count, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr):
    """Computes and stores the results. `errors` and `squares` are the sums of squared deviations of R - v and of R from their
    means; `mean` is the mean of R. If all returns are equal, `squares` may hold only the rounding error of their mean: such a
    variance counts as 0 (`flat`)."""
    noise = 8 * 1.1920929e-07 * mean
    flat = squares <= count * noise * noise
    explained = tl.where(flat, 0.0, 1.0 - tl.div_rn(errors, tl.where(flat, 1.0, squares)))
    _store_results(0.5 * _mean(loss, count), clipped, explained, count, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr)


@triton.jit
def ppo_value_loss_fwd_kernel(values_ptr, old_values_ptr, returns_ptr, mask_ptr, loss_ptr, clip_fraction_ptr, statistic_ptr,
                              count_ptr, partial_ptr, size, clip, CLIP: tl.constexpr, BLOCK: tl.constexpr):
    loss = tl.zeros((BLOCK,), tl.float32)
    clips = tl.zeros((BLOCK,), tl.int32)
    n = 0.0
    error_mean = 0.0
    errors = 0.0
    return_mean = 0.0
    squares = 0.0
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        index = start + tl.arange(0, BLOCK)
        counts, value, target, free, clipped = _terms(values_ptr, old_values_ptr, returns_ptr, mask_ptr, index, size, clip,
                                                      CLIP)
        loss += tl.where(clipped > free, clipped, free)
        clips += (clipped > free).to(tl.int32)
        n_more = tl.sum(counts.to(tl.int32), axis=0).to(tl.float32)
        mean_more, more = _moments(target - value, counts, n_more)
        error_mean, errors = _join(n, error_mean, errors, n_more, mean_more, more)
        mean_more, more = _moments(target, counts, n_more)
        return_mean, squares = _join(n, return_mean, squares, n_more, mean_more, more)
        n += n_more
    loss_sum = tl.sum(loss, axis=0)
    clip_sum = tl.sum(clips, axis=0).to(tl.float32)
    if partial_ptr is None:
        _finish(loss_sum, clip_sum, errors, return_mean, squares, n, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr)
    else:
        partial_ptr += tl.program_id(0) * SUMS
        tl.store(partial_ptr, loss_sum)
        tl.store(partial_ptr + 1, clip_sum)
        tl.store(partial_ptr + 2, n)
        tl.store(partial_ptr + 3, error_mean)
        tl.store(partial_ptr + 4, errors)
        tl.store(partial_ptr + 5, return_mean)
        tl.store(partial_ptr + 6, squares)


@triton.jit
def _pooled(partial_ptr, program, known, count, total):
    """(mean of all tokens that count, sum of squared deviations from it), from the mean, the sum of squared deviations and the
    `count` of each program; `total` is the sum of the counts."""
    mean = tl.load(partial_ptr + program * SUMS, mask=known, other=0.0)
    squares = tl.load(partial_ptr + program * SUMS + 1, mask=known, other=0.0)
    middle = _mean(tl.sum(mean * count, axis=0), total)
    return middle, tl.sum(squares + count * (mean - middle) * (mean - middle), axis=0)


@triton.jit(do_not_specialize=["programs"])
def ppo_value_loss_merge_kernel(partial_ptr, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr, programs,
                                BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    known = program < programs
    at = partial_ptr + program * SUMS
    count = tl.load(at + 2, mask=known, other=0.0)
    total = tl.sum(count, axis=0)
    _, errors = _pooled(partial_ptr + 3, program, known, count, total)
    mean, squares = _pooled(partial_ptr + 5, program, known, count, total)
    _finish(_sum_of(at, known), _sum_of(at + 1, known), errors, mean, squares, total, loss_ptr, clip_fraction_ptr,
            statistic_ptr, count_ptr)


@triton.jit
def ppo_value_loss_bwd_kernel(dloss_ptr, values_ptr, old_values_ptr, returns_ptr, mask_ptr, count_ptr, dx_ptr, size, clip,
                              CLIP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, value, target, free, clipped = _terms(values_ptr, old_values_ptr, returns_ptr, mask_ptr, index, size, clip, CLIP)
    scale = _mean(tl.load(dloss_ptr), tl.load(count_ptr))
    d = tl.where((clipped > free) | (counts == 0), 0.0, scale * (value - target))
    tl.store(dx_ptr + index, d.to(dx_ptr.dtype.element_ty), mask=index < size)


def _arguments(values, old_values, returns, mask, clip):
    vectors = dict(values=values, old_values=old_values, returns=returns)
    return dict(arguments_of("ppo_value_loss", mask, clip, **vectors), CLIP=clip >= 0)


def ppo_value_loss_fwd(values, old_values, returns, mask, clip):
    return forward(ppo_value_loss_fwd_kernel, ppo_value_loss_merge_kernel, SUMS.value,
                   _arguments(values, old_values, returns, mask, clip), BLOCK)


def ppo_value_loss_bwd(dloss, values, old_values, returns, mask, count, clip):
    return backward(ppo_value_loss_bwd_kernel, dloss, values, count, _arguments(values, old_values, returns, mask, clip))
