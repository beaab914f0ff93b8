"""The cosine and sine tables of rotary position embedding, with the context-length scalings in use."""

import torch

from .._checks import check_choice, check_factory, check_number, check_tensor, fail
from .._registry import Op
from ._rope_scaling import check_scaling, inverse_frequencies


def reference(length_or_positions, head_dim, *, base=1e6, scaling=None, angles="float64", device=None):
    positions, inv_freq, divisor, magnitude = _resolve(length_or_positions, head_dim, base, scaling, angles, device)
    angle = (positions.to(inv_freq.dtype) / divisor)[:, None] * inv_freq
    return (angle.cos() * magnitude).float(), (angle.sin() * magnitude).float()


def _resolve(length_or_positions, head_dim, base, scaling, angles, device):
    """Checks the arguments. Returns (positions as a tensor, inverse frequencies [d/2] in the dtype of the angles, divisor of
    the positions, factor of cos and sin).
    """
    if isinstance(length_or_positions, torch.Tensor):
        positions = length_or_positions
    else:
        positions = torch.arange(length_or_positions, dtype=torch.int64, device=device)
    dtype = torch.float32 if angles == "float32" else torch.float64
    inv_freq, divisor, magnitude = inverse_frequencies(head_dim, base, scaling, dtype)
    return positions, inv_freq.to(positions.device), divisor, magnitude


def _fake_fwd(positions, inv_freq, divisor, magnitude, float32_angles):
    shape = (positions.shape[0], inv_freq.shape[0])
    return (positions.new_empty(shape, dtype=torch.float32), positions.new_empty(shape, dtype=torch.float32))


MAX_HEAD_DIM = 2**16  # far above any head size, so that a mistyped number cannot request all memory

ROPE_TABLE = Op(
    name="rope_table",
    source="arXiv:2104.09864; scalings: arXiv:2306.15595, arXiv:2309.00071",
    summary="cos and sin of rotary angles, from float64 angles or the released code's float32 ones",
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
    Cost:     one cosine and one sine for each pair of outputs; computed once for a model, or once a step for packed positions.
              Source: arXiv:2104.09864 eq. 15
    """
    if isinstance(length_or_positions, torch.Tensor):
        check_tensor("rope_table", "length_or_positions", length_or_positions)
        if length_or_positions.dtype not in (torch.int32, torch.int64):
            fail(TypeError, "rope_table", "length_or_positions", "int32 or int64 positions", length_or_positions.dtype)
        if length_or_positions.dim() != 1:
            fail(ValueError, "rope_table", "length_or_positions", "one dimension", list(length_or_positions.shape))
    elif isinstance(length_or_positions, bool) or not isinstance(length_or_positions, int | torch.SymInt):
        fail(TypeError, "rope_table", "length_or_positions", "an int or a tensor", type(length_or_positions).__name__)
    elif not 0 <= length_or_positions < 2**31:
        fail(ValueError, "rope_table", "length_or_positions", "a length from 0 to 2^31 - 1", length_or_positions)
    if not isinstance(head_dim, int) or not 2 <= head_dim <= MAX_HEAD_DIM or head_dim % 2:
        fail(ValueError, "rope_table", "head_dim", f"an even int from 2 to {MAX_HEAD_DIM}", head_dim)
    base = check_number("rope_table", "base", base, "a number from 1e-30 to 1e30", lambda v: 1e-30 <= v <= 1e30)
    check_choice("rope_table", "angles", angles, ("float64", "float32"))
    check_scaling(head_dim, scaling)
    check_factory("rope_table", device)
    positions, inv_freq, divisor, magnitude = _resolve(length_or_positions, head_dim, base, scaling, angles, device)
    chosen = ROPE_TABLE.select(positions, backend)
    if chosen == "reference":
        return reference(positions, head_dim, base=base, scaling=scaling, angles=angles)
    return _FWD[chosen](positions.contiguous(), inv_freq.double(), divisor, magnitude, angles == "float32")
