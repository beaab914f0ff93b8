"""The part of a parameter that lies in this process: of a DTensor its shard, of any other tensor all of it."""

import functools


def is_dtensor(tensor):
    return hasattr(tensor, "to_local")  # the class itself takes half a second to import


def local_of(tensor):
    return tensor.to_local() if is_dtensor(tensor) else tensor


def offset_of(p):
    """What random bits count p's elements from: how many elements of the whole tensor lie before this shard's.

    Shards are ordered by the first dimension that is split (as it lies in memory), then the next. Rows that follow each
    other (FSDP2's) so have the places that they have in the whole tensor. A part that is no contiguous range of it
    (Shard(d), d > 0) has a range of numbers of its own: no bits are shared, but they are not those of the whole tensor.
    """
    if not is_dtensor(p) or not p.to_local().numel():
        return 0
    local = p.to_local()
    order = tuple(sorted(range(local.dim()), key=lambda d: -local.stride(d)))
    return _elements_before(p.shape, p.device_mesh, p.placements, order)


@functools.lru_cache(maxsize=1024)
def _elements_before(shape, mesh, placements, order):
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # half a second to import

    local, first = compute_local_shape_and_global_offset(shape, mesh, placements)
    before, inner = 0, shape.numel()
    for d in order:
        inner //= shape[d]
        before, inner = before + first[d] * inner, inner * local[d]
    return before
