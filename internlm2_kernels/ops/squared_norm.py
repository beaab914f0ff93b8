"""The squared global norm of a list of tensors, in one pass."""

import torch

from .._checks import check_device, check_float, fail
from .._registry import Op


def _listed(tensors):
    return [tensors] if isinstance(tensors, torch.Tensor) else list(tensors)


def reference(tensors):
    tensors = _listed(tensors)
    wide = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
    total = sum((t.detach().double().square().sum() for t in tensors), torch.zeros((), dtype=torch.float64))
    return total.to(wide)


def dense(tensor):
    """Whether the elements of the tensor fill its memory without gaps, in any order of the dimensions. That is all that
    elementwise kernels need."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1):
        if stride != expected:
            return False
        expected *= size
    return True


SQUARED_NORM = Op(
    name="squared_norm",
    source="sum of squares; clipping by it: arXiv:1211.5063 algorithm 1",
    summary="squared global norm of a list of tensors",
    reference=reference,
    schemas={"fwd": "(Tensor[] tensors) -> Tensor"},
    fakes={"fwd": lambda tensors: tensors[0].new_empty(
        (), dtype=torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32)},
    outputs=("total",),
    directions=("forward",),
)
_FWD = SQUARED_NORM.overloads["fwd"]


def squared_norm(tensors, *, backend=None):
    """The sum of the squares of all elements of a tensor or of a list of tensors: the square of the list's global norm.

    Shapes:   tensors: a tensor, or a list of at least one, of any shapes, on one device -> [] total
    Dtypes:   float32 | bfloat16 | float16, in any mixture -> float32, which is infinite for a norm above 1.8e19; with a
              float64 tensor -> float64, where a bfloat16 value above 6e18 may still make it infinite. The order of the sum
              depends on the sizes only
    Backward: none: the norm is measured for clipping. Deterministic: yes
    Errors:   ValueError for an empty list or different devices; TypeError for a wrong dtype
    Cost:     memory-bound: one read.   Source: arXiv:1211.5063 algorithm 1
    """
    if not hasattr(tensors, "__iter__"):
        fail(TypeError, "squared_norm", "tensors", "a tensor or a list of tensors", type(tensors).__name__)
    tensors = _listed(tensors)
    if not tensors:
        fail(ValueError, "squared_norm", "tensors", "at least one tensor", "none")
    for tensor in tensors:
        check_float("squared_norm", "tensors", tensor)
        check_device("squared_norm", "tensors", tensor, tensors[0], "the first")
    chosen = SQUARED_NORM.select(tensors[0], backend)
    if chosen == "reference":
        return reference(tensors)
    return _FWD[chosen]([t.detach() if dense(t) else t.detach().contiguous() for t in tensors])
