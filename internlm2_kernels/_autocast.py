"""Autocast for operators whose overloads are called outside PyTorch's own autocast lists."""

import functools
from collections.abc import Callable
from typing import Any

import torch


def autocast(*tensors):
    """The tensors in autocast's dtype where autocast is on for the device of the first; float64 stays as it is."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
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
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return reference(*args, **kwargs)
        with torch.autocast(device, enabled=False):
            return reference(*args, **kwargs)

    return wrapper
