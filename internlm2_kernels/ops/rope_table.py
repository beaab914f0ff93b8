"""The cosine and sine tables of rotary position embedding, with the context-length scalings in use."""

import math

import torch

from .._checks import check_choice, fail
from .._registry import Op


def reference(length_or_positions, head_dim, *, base=1e6, scaling=None, angles="float64", device=None):
    positions, inv_freq, divisor, magnitude = _resolve(length_or_positions, head_dim, base, scaling, angles, device)
    angle = (positions.to(inv_freq.dtype) / divisor)[:, None] * inv_freq
    return (angle.cos() * magnitude).float(), (angle.sin() * magnitude).float()


def _resolve(length_or_positions, head_dim, base, scaling, angles, device):
    """Positions as a tensor, the inverse frequencies [d/2] in the dtype of the angles, what divides positions, the factor on
    cos and sin."""
    if isinstance(length_or_positions, torch.Tensor):
        positions = length_or_positions
    else:
        positions = torch.arange(length_or_positions, dtype=torch.int64, device=device)
    dtype = torch.float32 if angles == "float32" else torch.float64
    inv_freq, divisor, magnitude = inverse_frequencies(head_dim, base, scaling, dtype)
    return positions, inv_freq.to(positions.device), divisor, magnitude


def inverse_frequencies(head_dim, base, scaling, dtype):
    """Inverse frequencies [d/2] on the CPU, the divisor of positions and the magnitude factor, for Hugging Face's `scaling`.

    Every step rounds to `dtype`, in the order of the released code: in float32, the last bit of a frequency moves an angle at
    position 200,000 by up to 0.01 rad.
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
    """base^(2i/d), the wavelengths over 2 pi."""
    return base ** (torch.arange(0, head_dim, 2, dtype=dtype, device="cpu") / head_dim)


def _dynamic_base(head_dim, base, factor, scaling):
    """base' = base * (factor * s / M - (factor - 1))^(d / (d - 2)) for s > M, where s is fixed when a sequence is admitted."""
    trained, length = _positive(scaling, "max_position_embeddings"), _positive(scaling, "seq_len")
    if length <= trained:
        return base
    return base * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))


def _llama3(plain, factor, scaling):
    """Long wavelengths are divided by factor, short ones kept, those between interpolated (Llama 3.1 model card)."""
    low, high = _positive(scaling, "low_freq_factor"), _positive(scaling, "high_freq_factor")
    if high <= low:
        fail(ValueError, "rope_table", "scaling['high_freq_factor']", f"more than low_freq_factor, {low}", high)
    periods = _positive(scaling, "original_max_position_embeddings") / (2 * math.pi / plain)
    keep = ((periods - low) / (high - low)).clamp(0, 1)
    return (1 - keep) * plain / factor + keep * plain


def _yarn(wavelengths, head_dim, base, factor, scaling):
    """YaRN (arXiv:2309.00071): a ramp over dimensions between interpolated and kept; cos and sin times 0.1 ln(factor) + 1."""
    trained = _positive(scaling, "original_max_position_embeddings")
    scaling = {"beta_fast": 32, "beta_slow": 1, **scaling}
    fast, slow = _positive(scaling, "beta_fast"), _positive(scaling, "beta_slow")
    if base <= 1:
        fail(ValueError, "rope_table", "base", "more than 1 for yarn scaling", base)

    def dimension(periods):  # whose wavelength fits `periods` times into the trained length
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
    value = scaling.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        fail(ValueError, "rope_table", f"scaling[{key!r}]", "a positive number", repr(value))
    return value


def _fake_fwd(positions, inv_freq, divisor, magnitude, float32_angles):
    shape = (positions.shape[0], inv_freq.shape[0])
    return (positions.new_empty(shape, dtype=torch.float32), positions.new_empty(shape, dtype=torch.float32))


ROPE_TABLE = Op(
    name="rope_table",
    source="arXiv:2104.09864; scalings: arXiv:2306.15595, arXiv:2309.00071",
    summary="cos and sin of rotary angles, from float64 angles",
    reference=reference,
    schemas={"fwd": "(Tensor positions, Tensor inv_freq, float divisor, float magnitude, bool float32_angles)"
                    " -> (Tensor cos, Tensor sin)"},
    fakes={"fwd": _fake_fwd},
    outputs=("cos", "sin"),
    dtypes=(torch.float32,),
    directions=("forward",),
)
_FWD = ROPE_TABLE.overloads["fwd"]


def rope_table(length_or_positions, head_dim, *, base=1e6, scaling=None, angles="float64", device=None, backend=None):
    """Rotary tables: cos(p * f_i) * m and sin(p * f_i) * m, f_i = base^(-2i/d), m = 1 except for YaRN.

    Shapes:   a length P, or positions int32 | int64 [P] -> cos, sin [P, head_dim / 2] float32
    Angles:   "float64": exact to float32's rounding at any position. "float32" is the released model's table to float32's
              rounding: frequencies and products are formed in float32, off by up to 0.0144 rad at position 200,000
    Scaling:  Hugging Face's dictionary, key `rope_type` or `type`: linear, dynamic (NTK; needs max_position_embeddings
              and seq_len, the length fixed when the sequence was admitted), yarn (its magnitude folded into cos and
              sin), llama3. Nothing is cached or mutated: a long prompt never changes a later short one
    Backward: none (integer input). Deterministic: yes
    Errors:   ValueError for a value, TypeError for a type, naming the argument or the key of `scaling`
    Cost:     two transcendental functions an output pair; made once a model, or once a step for packed positions.
              Source: arXiv:2104.09864 eq. 15
    """
    if isinstance(length_or_positions, torch.Tensor):
        if length_or_positions.dtype not in (torch.int32, torch.int64):
            fail(TypeError, "rope_table", "length_or_positions", "int32 or int64 positions", length_or_positions.dtype)
        if length_or_positions.dim() != 1:
            fail(ValueError, "rope_table", "length_or_positions", "one dimension", list(length_or_positions.shape))
    elif isinstance(length_or_positions, bool) or not isinstance(length_or_positions, int | torch.SymInt):
        fail(TypeError, "rope_table", "length_or_positions", "an int or a tensor", type(length_or_positions).__name__)
    elif length_or_positions < 0:
        fail(ValueError, "rope_table", "length_or_positions", "a length >= 0", length_or_positions)
    if not isinstance(head_dim, int) or head_dim < 2 or head_dim % 2:
        fail(ValueError, "rope_table", "head_dim", "an even int >= 2", head_dim)
    if isinstance(base, bool) or not isinstance(base, int | float) or not 0 < base < float("inf"):
        fail(ValueError, "rope_table", "base", "a positive number", repr(base))
    check_choice("rope_table", "angles", angles, ("float64", "float32"))
    _check_scaling(head_dim, scaling)
    positions, inv_freq, divisor, magnitude = _resolve(length_or_positions, head_dim, base, scaling, angles, device)
    chosen = ROPE_TABLE.select(positions, backend)
    if chosen == "reference":
        return reference(positions, head_dim, base=base, scaling=scaling, angles=angles)
    return _FWD[chosen](positions.contiguous(), inv_freq.double(), divisor, magnitude, angles == "float32")


_KEYS = {"default": set(), "linear": set(), "dynamic": set(), "llama3": {"low_freq_factor", "high_freq_factor"},
         "yarn": {"beta_fast", "beta_slow", "attention_factor", "truncate"}}


def _check_scaling(head_dim, scaling):
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
