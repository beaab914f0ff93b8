"""What the kernels and launches of PPO's two losses share.

Up to SINGLE tokens one program computes all sums over the tokens. For more tokens several programs compute partial sums, and
a second launch adds them in order.
"""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch, launch_elements

SHARE = 4096  # the fewest tokens for one program, where there are several programs
SINGLE = 16384  # the most tokens that one program processes alone
PROGRAMS = 264  # the largest number of programs: two for each of an H100's 132 multiprocessors


@triton.jit
def _counted(x_ptr, index, known, counts):
    """The elements of `x` in float32, with 0 for tokens that do not count. The load itself is masked by `known` only: under the
    mask of the tokens it could not use 16-byte accesses."""
    return tl.where(counts, tl.load(x_ptr + index, mask=known, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _mean(total, count):
    """total / count, or total where count is 0."""
    return tl.div_rn(total, tl.where(count == 0.0, 1.0, count))


@triton.jit
def _sum_of(partial_ptr, known):
    """The total of one of the sums, from the partial sums of all programs."""
    return tl.sum(tl.load(partial_ptr, mask=known, other=0.0), axis=0)


@triton.jit
def _store_results(loss, clipped, statistic, count, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr):
    tl.store(loss_ptr, loss)
    tl.store(clip_fraction_ptr, _mean(clipped, count))
    tl.store(statistic_ptr, statistic)
    tl.store(count_ptr, count)


def arguments_of(op, mask, clip, **vectors):
    """The arguments that forward and backward kernels share, by name: the vectors [tokens], after a check of their dtypes, the
    mask, its size and the clip. A loss is differentiated with respect to its first vector only; see `backward`."""
    for name, x in vectors.items():
        check_dtype(op, name, x)
    pointers = {f"{name}_ptr": x for name, x in vectors.items()}
    return dict(pointers, mask_ptr=mask.view(torch.int8), size=mask.numel(), clip=clip)


def split(size: int) -> int:
    """The number of programs for `size` tokens."""
    return 1 if size <= SINGLE else min(PROGRAMS, triton.cdiv(size, SHARE))


def forward(kernel, merge_kernel, sums, arguments, block):
    """(loss, clip_fraction, statistic, count). With one program `kernel` computes them itself. With several, each stores `sums`
    partial sums, from which `merge_kernel` computes them."""
    size, device = arguments["size"], arguments["mask_ptr"].device
    names = "loss_ptr", "clip_fraction_ptr", "statistic_ptr", "count_ptr"
    results = {name: torch.empty((), dtype=torch.float32, device=device) for name in names}
    programs = split(size)
    partial = torch.empty((programs, sums), dtype=torch.float32, device=device) if programs > 1 else None
    launch(kernel, programs, device, dict(arguments, **results, partial_ptr=partial, BLOCK=block), num_warps=16)
    if partial is not None:
        launch(merge_kernel, 1, device, dict(partial_ptr=partial, **results, programs=programs, BLOCK=512), num_warps=4)
    return tuple(results.values())


def backward(kernel, dloss, x, count, arguments):
    """The gradient of the loss with respect to `x`, the first vector: logprobs of the policy loss, values of the value loss."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_elements(kernel, x, 1024, dict(arguments, dloss_ptr=dloss, count_ptr=count, dx_ptr=dx))
    return dx
