"""The part of a parameter that this process holds: the local shard of a DTensor, and all of any other tensor."""

import functools
import math

from ._checks import fail


def is_dtensor(tensor):
    return hasattr(tensor, "to_local")  # importing the DTensor class to ask isinstance takes half a second


def local_of(tensor):
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_placements(op, p):
    """Raises if p has a partial placement: its elements would be sums over processes, which no process holds."""
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        fail(ValueError, op, "params", "DTensors that are sharded or replicated (redistribute them)", p.placements)


def split_dimensions(p):
    """The mesh dimensions over which the elements of p are divided: all but those with the placement Replicate.

    The test is not isinstance(placement, Shard), because FSDP2 over tensor parallelism has a placement class of its own.
    """
    return tuple(k for k, placement in enumerate(p.placements) if not placement.is_replicate())


def offset_of(p):
    """How many elements of the whole tensor come before the first one of this shard. The random bits of stochastic rounding are
    numbered by the position in the whole tensor.

    A shard of consecutive rows (FSDP2's, with or without tensor parallelism) thus draws the bits that the same elements draw
    in the whole tensor. A shard along a later dimension (Shard(d), d > 0) is not a contiguous range of the whole tensor. It
    gets a range of numbers that no other shard has, but its bits differ from those of the whole tensor.
    """
    if not is_dtensor(p) or not p.to_local().numel():
        return 0
    local = p.to_local()
    order = tuple(sorted(range(local.dim()), key=lambda d: -local.stride(d)))
    return _elements_before(p.shape, local.shape, p.device_mesh, p.placements, order)


@functools.lru_cache(maxsize=1024)
def _elements_before(shape, local, mesh, placements, order):
    before, inner = 0, math.prod(shape)
    for d in order:
        first, size = 0, shape[d]
        for parts, mine in _splits(d, mesh, placements):
            most = -(-size // parts)  # torch.chunk's rule: the last parts may be smaller or empty
            first, size = first + most * mine, max(0, min(most, size - most * mine))
        if size != local[d]:  # the rows of the shard are not consecutive rows of the whole tensor
            fail(ValueError, "FusedAdamW", "params", "shards of consecutive rows, as fully_shard over parallelize_module has"
                 " them, where random bits are drawn (redistribute them, or keep masters and float32 moments)", placements)
        inner //= shape[d]
        before, inner = before + first * inner, inner * size
    return before


def _splits(d, mesh, placements):
    """(number of parts, index of this process's part) for each split of tensor dimension d, in the order of the splits.

    Mesh dimensions split in their own order, with one exception: FSDP2's dimension comes first in the mesh, but it splits
    what tensor parallelism has split already. Such a placement has a `split_factor`, the number of those earlier parts. For any
    other order the list is empty; the caller then sees that the local size does not fit, and raises.
    """
    splits = []
    for k in reversed(range(len(placements))):
        if placements[k].is_replicate() or placements[k].dim != d:
            continue
        split, factor = (mesh.size(k), mesh.get_coordinate()[k]), getattr(placements[k], "split_factor", 1)
        if factor == 1:
            splits.insert(0, split)
        elif factor == math.prod(parts for parts, _ in splits):
            splits.append(split)
        else:
            return []
    return splits
