"""What the operators do under `torch.autocast`: one rule for all of them.

- Attention, `linear` and the operators on a linear head cast their floating-point inputs to autocast's dtype, except float64
  tensors and paged caches (`autocast`).
- All others keep their inputs' dtype. Where two floating-point dtypes meet, both are converted to `torch.promote_types` of the
  two, as PyTorch's own operators do, and the output has that dtype (`promoted`).
- Losses, log-probabilities and statistics are float32, or float64 for float64 inputs.

Outside autocast two floating-point dtypes in one call are an error, but for float32 weights of a norm or of `linear`.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch

from ._checks import fail

# The device types with autocast. Computed once, because torch.compile of PyTorch 2.10 cannot trace is_autocast_available.
_DEVICES = frozenset(d for d in ("cpu", "cuda", "xpu", "mps") if torch.amp.is_autocast_available(d))


def enabled(device: str) -> bool:
    return device in _DEVICES and torch.is_autocast_enabled(device)


def promoted(*tensors):
    """Under autocast, the floating-point tensors converted to the one dtype that they promote to. Otherwise unchanged."""
    first = getattr(tensors[0], "dtype", None)
    for tensor in tensors:  # a loop, because a set of the dtypes would take twice the time
        if getattr(tensor, "dtype", None) != first:
            break
    else:
        return tensors
    floats = [t for t in tensors if isinstance(t, torch.Tensor) and t.is_floating_point()]
    if not floats or not enabled(floats[0].device.type):
        return tensors
    common = functools.reduce(torch.promote_types, [t.dtype for t in floats])
    return tuple(t.to(common) if isinstance(t, torch.Tensor) and t.is_floating_point() else t for t in tensors)


def cast_weight(op, weight, x):
    """For the weight of a norm, whose dtype is neither float32 nor that of `x`. Under autocast it returns the weight in the
    dtype of `x`, or in float32 if the dtype of `x` would round it. Without autocast it raises."""
    if not weight.is_floating_point() or not enabled(x.device.type):
        fail(TypeError, op, "weight", f"float32 or the dtype of x, {x.dtype}", weight.dtype)
    return weight.to(x.dtype if torch.promote_types(weight.dtype, x.dtype) == x.dtype else torch.float32)


def autocast(*tensors):
    """The tensors in autocast's dtype if autocast is on for the device of the first one. float64 tensors are not cast."""
    device = tensors[0].device.type
    if not enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)


def without_autocast(reference: Callable) -> Callable:
    """Decorates a function that multiplies matrices in a dtype of its own choice: inside it autocast, which would change that
    dtype, is off."""
    @functools.wraps(reference)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        for argument in (*args, *kwargs.values()):
            if isinstance(argument, torch.Tensor):
                device = argument.device.type
                break
        if not enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return wrapper
