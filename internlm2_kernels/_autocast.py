"""What the operators do under `torch.autocast`, one rule for all of them.

- Attention and the operators on a linear head cast their floating-point inputs to autocast's dtype, but for float64 and for
  paged caches (`autocast`).
- All others keep their inputs' dtype. Where two floating-point dtypes meet, both become `torch.promote_types` of the two, as
  with PyTorch's own operators (`promoted`), and an output has that dtype.
- Losses, log-probabilities and statistics are float32, or float64 for float64 inputs.

Outside autocast two floating-point dtypes in one call are an error.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

# Asked once: torch.compile of PyTorch 2.10 cannot trace the question. Other devices, such as meta, have no autocast.
_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))


def _enabled(device: str) -> bool:
    return device in _DEVICES and torch.is_autocast_enabled(device)


def promoted(*tensors):
    """Under autocast the floating-point tensors in the one dtype that they promote to; anything else as it is."""
    if len({getattr(t, "dtype", None) for t in tensors}) == 1:  # the usual call
        return tensors
    floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not floats or not _enabled(floats[0].device.type):
        return tensors
    common = functools.reduce(torch.promote_types, [t.dtype for t in floats])
    return tuple(t.to(common) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def weight_under_autocast(weight, x):
    """Under autocast a norm's weight in the dtype of `x`, or in float32 where that would round it; it never changes x's."""
    if weight.dtype in (x.dtype, torch.float32) and x.dtype != torch.float64 or not weight.is_floating_point():
        return weight
    if weight.dtype == x.dtype or not _enabled(x.device.type):
        return weight
    return weight.to(x.dtype if torch.promote_types(weight.dtype, x.dtype) == x.dtype else torch.float32)


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on for the device of the first; float64 stays as it is."""
    device = tensors[0].device.type
    if not _enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(reference: Callable) -> Callable:
    """Decorates a function that multiplies matrices in a dtype of its own choice: autocast would round the factors."""
    @functools.wraps(reference)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor):
                device = argument.device.type
                break
        if not _enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return wrapper
