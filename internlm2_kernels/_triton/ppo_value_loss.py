"""PPO's value loss and its statistics. Contract: ops/ppo_value_loss.py; launches as in ppo_policy_loss.py.

Variances: a block's mean and sum of squares about it, both from registers, join the total by Chan's formula (T. Chan et al.,
Updating formulae for computing sample variances, 1979), so nothing cancels where the mean is far from 0.
"""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch
from .ppo_policy_loss import split

BLOCK = 2048  # tokens at a time


@triton.jit
def _terms(values_ptr, old_ptr, returns_ptr, mask_ptr, index, size, clip, CLIP: tl.constexpr):
    """(counts, value, return, free term, clipped term); what does not count is 0."""
    known = index < size
    counts = tl.load(mask_ptr + index, mask=known, other=0) != 0
    value = tl.where(counts, tl.load(values_ptr + index, mask=known, other=0.0).to(tl.float32), 0.0)
    target = tl.where(counts, tl.load(returns_ptr + index, mask=known, other=0.0).to(tl.float32), 0.0)
    free = (value - target) * (value - target)
    clipped = free
    if CLIP:
        old = tl.where(counts, tl.load(old_ptr + index, mask=known, other=0.0).to(tl.float32), 0.0)
        away = value - old
        near = tl.where(away > 0.0, old + clip, old - clip) - target
        clipped = tl.where(tl.abs(away) > clip, near * near, free)
    return counts, value, target, free, clipped


@triton.jit
def _moments(x, counts, count):
    """(mean, sum of squares about it) of the x that count."""
    mean = tl.div_rn(tl.sum(tl.where(counts, x, 0.0), axis=0), tl.where(count == 0.0, 1.0, count))
    away = tl.where(counts, x - mean, 0.0)
    return mean, tl.sum(away * away, axis=0)


@triton.jit
def _join(n, mean, squares, n_more, mean_more, squares_more):
    """Count, mean and sum of squares about it of both together."""
    total = n + n_more
    part = tl.div_rn(n_more, tl.where(total == 0.0, 1.0, total))
    away = mean_more - mean
    return mean + away * part, squares + squares_more + away * away * n * part


@triton.jit
def _finish(loss, clipped, errors, squares, count, loss_ptr, clip_fraction_ptr, explained_ptr, count_ptr):
    """The results from the sums; `errors` and `squares` are those of R - v and of R about their means."""
    over = tl.where(count == 0.0, 1.0, count)
    tl.store(loss_ptr, 0.5 * tl.div_rn(loss, over))
    tl.store(clip_fraction_ptr, tl.div_rn(clipped, over))
    explained = 1.0 - tl.div_rn(errors, tl.where(squares == 0.0, 1.0, squares))
    tl.store(explained_ptr, tl.where(squares == 0.0, 0.0, explained))
    tl.store(count_ptr, count)


@triton.jit
def ppo_value_loss_fwd_kernel(values_ptr, old_ptr, returns_ptr, mask_ptr, loss_ptr, clip_fraction_ptr, explained_ptr,
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
        counts, value, target, free, clipped = _terms(values_ptr, old_ptr, returns_ptr, mask_ptr, index, size, clip, CLIP)
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
        _finish(loss_sum, clip_sum, errors, squares, n, loss_ptr, clip_fraction_ptr, explained_ptr, count_ptr)
    else:
        partial_ptr += tl.program_id(0) * 7
        tl.store(partial_ptr, loss_sum)
        tl.store(partial_ptr + 1, clip_sum)
        tl.store(partial_ptr + 2, n)
        tl.store(partial_ptr + 3, error_mean)
        tl.store(partial_ptr + 4, errors)
        tl.store(partial_ptr + 5, return_mean)
        tl.store(partial_ptr + 6, squares)


@triton.jit
def _pooled(partial_ptr, program, known, count, total):
    """Sum of squares about the common mean, from the programs' means and sums of squares about theirs."""
    mean = tl.load(partial_ptr + program * 7, mask=known, other=0.0)
    squares = tl.load(partial_ptr + program * 7 + 1, mask=known, other=0.0)
    middle = tl.div_rn(tl.sum(mean * count, axis=0), tl.where(total == 0.0, 1.0, total))
    return tl.sum(squares + count * (mean - middle) * (mean - middle), axis=0)


@triton.jit(do_not_specialize=["programs"])
def ppo_value_loss_merge_kernel(partial_ptr, loss_ptr, clip_fraction_ptr, explained_ptr, count_ptr, programs,
                                BLOCK: tl.constexpr):
    program = tl.arange(0, BLOCK)
    known = program < programs
    at = partial_ptr + program * 7
    count = tl.load(at + 2, mask=known, other=0.0)
    total = tl.sum(count, axis=0)
    _finish(tl.sum(tl.load(at, mask=known, other=0.0), axis=0), tl.sum(tl.load(at + 1, mask=known, other=0.0), axis=0),
            _pooled(partial_ptr + 3, program, known, count, total), _pooled(partial_ptr + 5, program, known, count, total),
            total, loss_ptr, clip_fraction_ptr, explained_ptr, count_ptr)


@triton.jit
def ppo_value_loss_bwd_kernel(dloss_ptr, values_ptr, old_ptr, returns_ptr, mask_ptr, count_ptr, dvalues_ptr, size, clip,
                              CLIP: tl.constexpr, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    counts, value, target, free, clipped = _terms(values_ptr, old_ptr, returns_ptr, mask_ptr, index, size, clip, CLIP)
    count = tl.load(count_ptr)
    scale = tl.div_rn(tl.load(dloss_ptr), tl.where(count == 0.0, 1.0, count))
    d = tl.where((clipped > free) | (counts == 0), 0.0, scale * (value - target))
    tl.store(dvalues_ptr + index, d.to(dvalues_ptr.dtype.element_ty), mask=index < size)


def _arguments(values, old_values, returns, mask, clip):
    for name, x in (("values", values), ("old_values", old_values), ("returns", returns)):
        check_dtype("ppo_value_loss", name, x)
    return dict(values_ptr=values, old_ptr=old_values, returns_ptr=returns, mask_ptr=mask.view(torch.int8),
                size=values.numel(), clip=clip, CLIP=clip >= 0)


def ppo_value_loss_fwd(values, old_values, returns, mask, clip):
    arguments = _arguments(values, old_values, returns, mask, clip)
    names = "loss_ptr", "clip_fraction_ptr", "explained_ptr", "count_ptr"
    results = {name: torch.empty((), dtype=torch.float32, device=values.device) for name in names}
    programs = split(values.numel())
    partial = torch.empty((programs, 7), dtype=torch.float32, device=values.device) if programs > 1 else None
    launch(ppo_value_loss_fwd_kernel, programs, values.device,
           dict(arguments, **results, partial_ptr=partial, BLOCK=BLOCK), num_warps=16)
    if partial is not None:
        launch(ppo_value_loss_merge_kernel, 1, values.device,
               dict(partial_ptr=partial, **results, programs=programs, BLOCK=512), num_warps=4)
    return tuple(results.values())


def ppo_value_loss_bwd(dloss, values, old_values, returns, mask, count, clip):
    dvalues = torch.empty(values.shape, dtype=values.dtype, device=values.device)
    if values.numel():
        launch(ppo_value_loss_bwd_kernel, triton.cdiv(values.numel(), 1024), values.device,
               dict(_arguments(values, old_values, returns, mask, clip), dloss_ptr=dloss, count_ptr=count,
                    dvalues_ptr=dvalues, BLOCK=1024), num_warps=4)
    return dvalues


def audit(dtype, meta):
    """Launches whose kernels the static audit compiles: few and many tokens, with and without the clip."""
    one = meta(dtype=torch.float32)
    for tokens, clip in ((8192, 0.2), (8192, -1.0), (1 << 20, 0.2)):
        x, mask = meta(tokens, dtype=dtype), meta(tokens, dtype=torch.bool)
        label = f"{tokens} tokens{', clip' if clip > 0 else ''}"
        yield label, lambda x=x, m=mask, c=clip: ppo_value_loss_fwd(x, x, x, m, c)
        yield label, lambda x=x, m=mask, c=clip: ppo_value_loss_bwd(one, x, x, x, m, one, c)
