"""What the kernels and launches of PPO's two losses share.

Sums over the tokens: one program up to SINGLE tokens, beyond that programs of a fixed share each and a second launch that
adds theirs in order.
"""

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch, launch_elements

SHARE = 4096  # tokens that a program has at least, beyond SINGLE
SINGLE = 16384  # tokens up to which one program does all
PROGRAMS = 264  # at most: two for each of an H100's 132 multiprocessors


@triton.jit
def _counted(x_ptr, index, known, counts):
    """Elements in float32; 0 for what does not count: afterwards, because loads under that mask would go one by one."""
    return tl.where(counts, tl.load(x_ptr + index, mask=known, other=0.0).to(tl.float32), 0.0)


@triton.jit
def _mean(total, count):
    """A sum over its number of terms; of none it is itself."""
    return tl.div_rn(total, tl.where(count == 0.0, 1.0, count))


@triton.jit
def _sum_of(partial_ptr, known):
    """What the programs' rows have in one column."""
    return tl.sum(tl.load(partial_ptr, mask=known, other=0.0), axis=0)


@triton.jit
def _store_results(loss, clipped, statistic, count, loss_ptr, clip_fraction_ptr, statistic_ptr, count_ptr):
    tl.store(loss_ptr, loss)
    tl.store(clip_fraction_ptr, _mean(clipped, count))
    tl.store(statistic_ptr, statistic)
    tl.store(count_ptr, count)


def arguments_of(op, mask, clip, **vectors):
    """The kernels' arguments from the vectors by name, the first of which takes the gradient."""
    for name, x in vectors.items():
        check_dtype(op, name, x)
    pointers = {f"{name}_ptr": x for name, x in vectors.items()}
    return dict(pointers, mask_ptr=mask.view(torch.int8), size=mask.numel(), clip=clip)


def split(size: int) -> int:
    """Programs that share `size` tokens."""
    return 1 if size <= SINGLE else min(PROGRAMS, triton.cdiv(size, SHARE))


def forward(kernel, merge_kernel, sums, arguments, block):
    """(loss, clip_fraction, statistic, count): by `kernel` alone, or by `merge_kernel` from `sums` numbers of each program."""
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
    """The gradient of x, the first of the vectors."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    launch_elements(kernel, x, 1024, dict(arguments, dloss_ptr=dloss, count_ptr=count, dx_ptr=dx))
    return dx
