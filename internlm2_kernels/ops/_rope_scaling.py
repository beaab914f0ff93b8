"""Rotary frequencies under the scalings for longer contexts that are in use, which Hugging Face's dictionaries describe."""

import math

import torch

from .._checks import check_choice, check_number, fail

_KEYS = {"default": set(), "linear": set(), "dynamic": set(), "llama3": {"low_freq_factor", "high_freq_factor"},
         "yarn": {"beta_fast", "beta_slow", "attention_factor", "truncate"}}


def inverse_frequencies(head_dim, base, scaling, dtype):
    """(inverse frequencies [d/2] on the CPU, divisor of the positions, factor of cos and sin), for a dictionary `scaling` in
    the form of Hugging Face.

    Every step rounds to `dtype`, in the order of the released code. Another order could change the last bit of a float32
    frequency, which moves an angle at position 200,000 by up to 0.01 rad.
    """
    kind = "none" if scaling is None else scaling.get("rope_type", scaling.get("type"))
    if kind in ("none", "default"):
        return 1 / _wavelengths(head_dim, base, dtype), 1.0, 1.0
    factor = _positive(scaling, "factor")
    if kind == "linear":  # the released code divides positions, not frequencies
        return 1 / _wavelengths(head_dim, base, dtype), float(factor), 1.0
    if kind == "dynamic":
        return 1 / _wavelengths(head_dim, _dynamic_base(head_dim, base, factor, scaling), dtype), 1.0, 1.0
    if kind == "llama3":
        return _llama3(1 / _wavelengths(head_dim, base, dtype), factor, scaling), 1.0, 1.0
    inv_freq, magnitude = _yarn(_wavelengths(head_dim, base, dtype), head_dim, base, factor, scaling)
    return inv_freq, 1.0, magnitude


def _wavelengths(head_dim, base, dtype):
    """base^(2i/d) for each pair i of dimensions: the wavelength of its rotation, in positions, divided by 2 pi."""
    return base ** (torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim)


def _dynamic_base(head_dim, base, factor, scaling):
    """The base of dynamic NTK scaling: base * (factor * s / M - (factor - 1))^(d / (d - 2)) if s > M, otherwise base. s is
    seq_len, the length fixed when a sequence is admitted; M is max_position_embeddings, the trained length."""
    trained, length = _positive(scaling, "max_position_embeddings"), _positive(scaling, "seq_len")
    if length <= trained:
        return base
    try:
        return base * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    except OverflowError:
        fail(ValueError, "rope_table", "scaling['seq_len']", "a length that keeps the base finite", length)


def _llama3(plain, factor, scaling):
    """Llama 3.1: long wavelengths are divided by factor, short ones are kept, and those between are interpolated."""
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if high <= low:
        fail(ValueError, "rope_table", "scaling['high_freq_factor']", f"more than low_freq_factor, {low}", high)
    periods = _positive(scaling, "original_max_position_embeddings") / (2 * math.pi / plain)
    keep = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / factor + keep * plain


def _yarn(wavelengths, head_dim, base, factor, scaling):
    """YaRN (arXiv:2309.00071): high frequencies are kept, low ones are divided by factor, with a ramp between them. cos and sin
    are multiplied by 0.1 ln(factor) + 1.
    """
    trained = _positive(scaling, "original_max_position_embeddings")
    scaling = {"beta_fast": 32, "beta_slow": 1, **scaling}
    fast, slow = _positive(scaling, "beta_fast"), _positive(scaling, "beta_slow")
    if base <= 1:
        fail(ValueError, "rope_table", "base", "more than 1 for yarn scaling", base)

    def dimension(periods):  # the dimension (a real number) whose wavelength fits `periods` times into the trained length
        return head_dim * math.log(trained / (periods * 2 * math.pi)) / (2 * math.log(base))

    first, last = dimension(fast), dimension(slow)
    if scaling.get("truncate", True):
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    last = last + 0.001 if first == last else last
    index = torch.arange(head_dim // 2, dtype=wavelengths.dtype, device="cpu")
    keep = 1 - ((index - first) / (last - first)).clamp(0, 1)
    inv_freq = 1 / (factor * wavelengths) * (1 - keep) + 1 / wavelengths * keep
    if scaling.get("attention_factor") is not None:
        return inv_freq, float(_positive(scaling, "attention_factor"))
    return inv_freq, 0.1 * math.log(factor) + 1.0 if factor > 1 else 1.0


def _positive(scaling, key):
    return check_number("rope_table", f"scaling[{key!r}]", scaling.get(key), "a positive number", lambda v: v > 0)


def check_scaling(head_dim, scaling):
    if scaling is None:
        return
    if not isinstance(scaling, dict):
        fail(TypeError, "rope_table", "scaling", "a dictionary or None", type(scaling).__name__)
    kind = scaling.get("rope_type", scaling.get("type"))
    check_choice("rope_table", "scaling['rope_type']", kind, ("default", "linear", "dynamic", "yarn", "llama3"))
    known = _KEYS[kind] | {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
                           "max_position_embeddings", "seq_len"}
    for key in scaling:
        if key not in known:
            fail(ValueError, "rope_table", "scaling", f"keys among {', '.join(sorted(known))}", repr(key))
    if kind == "dynamic" and head_dim < 4:
        fail(ValueError, "rope_table", "head_dim", "at least 4 for dynamic scaling", head_dim)
