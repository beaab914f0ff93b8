"""Checks of the state that `FusedAdamW` loads, and the agreement of loaded master weights with their parameters."""

import warnings

import torch

from ._checks import check_number, fail
from ._shards import local_of
from .ops.adamw import MOST_STEPS

LOW = (torch.bfloat16, torch.float16)
STATE = ("exp_avg", "exp_avg_sq", "master")


def _value(tensor):
    """The number in a tensor of one element; None if it is not on the CPU, because reading it would wait for the device."""
    return local_of(tensor).item() if tensor.device.type == "cpu" else None


def _check_count(argument, count, most, expected):
    if isinstance(count, torch.Tensor):
        if count.numel() != 1:
            fail(ValueError, "FusedAdamW", argument, f"one number, {expected}", f"{list(count.shape)}")
        if count.is_complex() or count.dtype == torch.bool:
            fail(TypeError, "FusedAdamW", argument, f"a real number, {expected}", count.dtype)
        count = _value(count)
    if count is not None:
        check_number("FusedAdamW", argument, count, expected, lambda v: 0 <= v <= most and v == int(v))


def check_saved(p, saved):
    """Raises if the saved state does not fit parameter p. The values of tensors are checked only if these are on the CPU:
    reading them from another device would wait for it."""
    if not {"step", *STATE[:2]} <= set(saved):
        fail(ValueError, "FusedAdamW", "state_dict", "step, exp_avg and exp_avg_sq of a parameter", ", ".join(saved))
    _check_count("state_dict: step", saved["step"], MOST_STEPS, "a whole number from 0 to 2^24")
    for name in STATE:
        if name not in saved:
            continue
        tensor, argument = saved[name], f"state_dict: {name}"
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            fail(TypeError, "FusedAdamW", argument, "a tensor of real numbers", getattr(tensor, "dtype", type(tensor).__name__))
        if tensor.shape != p.shape:
            fail(ValueError, "FusedAdamW", argument, f"shape {list(p.shape)}", list(tensor.shape))
        local = local_of(tensor.detach())
        if name == "master" or local.device.type != "cpu" or not local.numel():
            continue
        least = local.min().item()  # NaN if any element is NaN
        if least != least or (name == "exp_avg_sq" and least < 0):
            fail(ValueError, "FusedAdamW", argument, "numbers >= 0" if name == "exp_avg_sq" else "numbers", least)


def loaded_count(state_dict):
    """The number of skipped steps in a state dictionary, at its top level or in a group; None if it is in neither."""
    groups = (group["skipped"] for group in state_dict["param_groups"] if "skipped" in group)
    count = state_dict["skipped"] if state_dict.get("skipped") is not None else next(groups, None)
    if count is not None:
        _check_count("state_dict: skipped", count, 2**53, "a whole number >= 0")
    return count


def settle_masters(pairs):
    """For pairs (parameter, master): an element of a master that does not round to the parameter's element is replaced by it,
    because the parameter must have been changed since the master was saved. A warning says how many masters were affected."""
    stale = []
    for p, master in pairs:
        p, master = local_of(p).detach(), local_of(master)
        right = (master.to(p.dtype) == p) | (master.isnan() & p.isnan())
        master.copy_(torch.where(right, master, p.to(master.dtype)))
        stale.append(~right.all())
    if not torch.compiler.is_compiling():  # counting waits for the device, once after a state was loaded
        warn_of_masters(sum(map(int, stale)), "do not round to their parameters, which were written to since")


def warn_of_masters(count, why):
    if count:
        warnings.warn(f"FusedAdamW: state_dict: master: the masters of {count} parameters {why}; the parameters' values are "
                      "used", stacklevel=4)
