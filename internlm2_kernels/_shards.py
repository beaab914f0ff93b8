"""The part of a parameter that lies in this process: of a DTensor its shard, of any other tensor all of it."""

import functools
import math

from ._checks import fail


def is_dtensor(tensor):
    return hasattr(tensor, "to_local")  # the class itself takes half a second to import


def local_of(tensor):
    return tensor.to_local() if is_dtensor(tensor) else tensor


def check_placements(op, p):
    """Every element of p lies in some process as it is: none is a sum over processes."""
    if is_dtensor(p) and any(placement.is_partial() for placement in p.placements):
        fail(ValueError, op, "params", "DTensors that are sharded or replicated (redistribute them)", p.placements)


def split_dimensions(p):
    """The dimensions of p's mesh over which its elements are divided: FSDP2's shards of tensor parallelism's are no Shard."""
    return tuple(k for k, placement in enumerate(p.placements) if not placement.is_replicate())


def offset_of(p):
    """What random bits count p's elements from: how many elements of the whole tensor lie before this shard's.

    Shards are ordered by the first dimension that is split (as it lies in memory), then the next. Rows that follow each
    other (FSDP2's, with tensor parallelism's or without) so have the places that they have in the whole tensor. A part that
    is no contiguous range of it (Shard(d), d > 0) has a range of numbers of its own: no bits are shared, but they are not
    those of the whole tensor.
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
            most = -(-size // parts)  # as torch.chunk divides: the last ones may have less, or nothing
            first, size = first + most * mine, max(0, min(most, size - most * mine))
        if size != local[d]:  # these rows lie in other places
            fail(ValueError, "FusedAdamW", "params", "shards of consecutive rows, as fully_shard over parallelize_module has"
                 " them, where random bits are drawn (redistribute them, or keep masters and float32 moments)", placements)
        inner //= shape[d]
        before, inner = before + first * inner, inner * size
    return before


def _splits(d, mesh, placements):
    """(into how many parts, which one is this process's) for each time that dimension d is split, in that order.

    The mesh's dimensions split from first to last, but for a placement with a split_factor: FSDP2 splits what tensor
    parallelism has split, though its dimension comes first, and gives the number of those parts. What has another order
    counts as whole, which its size is not.
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
