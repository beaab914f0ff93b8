"""Rotary position embedding applied to queries and keys."""

import torch

from .._autocast import promoted
from .._autograd import distinct, once_differentiable
from .._checks import check_choice, check_float, check_same, check_values, fail, last_stride_1
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._rope import check_tables, rotate, rows_of_table


def reference(q, k, cos, sin, positions=None, *, interleaved=False):
    acc = torch.promote_types(q.dtype, torch.float32)
    cos, sin = rows_of_table(cos, sin, positions, acc)
    turn = lambda x: rotate(_as_heads(x), cos, sin, interleaved).view(x.shape)
    return turn(q), turn(k)


def _as_heads(x):
    """`x` as [T, H, d] with a last stride of 1; it is copied only if no view can have that shape."""
    if x.dim() != 3:
        x = x.flatten(0, -3) if x.dim() > 3 else x[None]
    return last_stride_1(x)


def _fake_fwd(q, k, cos, sin, positions, interleaved, inverse):
    return q.new_empty(q.shape), k.new_empty(k.shape)


APPLY_ROPE = Op(
    name="apply_rope",
    source="arXiv:2104.09864",
    summary="rotary embedding of q and k",
    reference=reference,
    schemas={"fwd": "(Tensor q, Tensor k, Tensor cos, Tensor sin, Tensor? positions, bool interleaved, bool inverse)"
                    " -> (Tensor q_out, Tensor k_out)"},
    fakes={"fwd": _fake_fwd},
    outputs=("q", "k"),
    indices={"positions": Index(1 << 0, "values from 0 to the rows of cos minus 1",
                                "the outputs of those tokens are NaN and were not cached")},
)
_FWD = APPLY_ROPE.overloads["fwd"]


class _ApplyRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, cos, sin, positions, interleaved, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.interleaved, ctx.backend = interleaved, backend
        return native(_FWD[backend], q, k, cos, sin, positions, interleaved, False)

    @staticmethod
    @once_differentiable("apply_rope")
    def backward(ctx, dq, dk):
        cos, sin, positions = ctx.saved_tensors
        dq, dk = _FWD[ctx.backend](_as_heads(dq), _as_heads(dk), cos, sin, positions, ctx.interleaved, True)
        return dq, dk, None, None, None, None, None


def apply_rope(q, k, cos, sin, positions=None, *, interleaved=False, backend=None):
    """Rotary embedding of q and k: (a, b) -> (a cos - b sin, b cos + a sin), where a = x[i] and b = x[i + d/2] for i < d/2.

    Shapes:   q [..., H, d], k [..., G, d]; cos, sin [P, d/2] from `rope_table`; positions int32 or int64 [...], one for each
              token, which restart at every packed sequence -> q, k with the same shapes. Without positions the tables have one
              row for each token
    Options:  interleaved=True pairs x[2i] with x[2i + 1], as some InternEvo checkpoints do
    Dtypes:   q and k float32 | bfloat16 | float16 | float64, both equal (under autocast they are promoted); tables float32.
              It is computed in float32 and rounded once
    Backward: saves cos, sin and positions, and rotates by the negative angle. Deterministic: yes
    Errors:   ValueError and TypeError. On CUDA a position outside the table makes its token NaN, and `check()` reports it
    Cost:     memory-bound: reads and writes q and k once.   Source: arXiv:2104.09864 eq. 34
    """
    q, k = promoted(q, k)
    check_float("apply_rope", "q", q)
    check_same("apply_rope", "k", k, q, "q")
    if q.dim() < 2 or q.shape[-1] % 2 or q.shape[-1] == 0:
        fail(ValueError, "apply_rope", "q", "shape [..., heads, head_dim] with an even head_dim", list(q.shape))
    if k.dim() != q.dim() or k.shape[:-2] != q.shape[:-2] or k.shape[-1] != q.shape[-1]:
        fail(ValueError, "apply_rope", "k", f"the shape of q, {list(q.shape)}, but for the number of heads", list(k.shape))
    check_choice("apply_rope", "interleaved", interleaved, (False, True))
    head_dim = q.shape[-1]
    tokens = q.shape[:-2].numel()
    check_tables("apply_rope", q, cos, sin, positions, tokens, head_dim, "q")
    chosen = APPLY_ROPE.select(q, backend)
    if chosen == "reference":
        check_values("apply_rope", "positions", positions, 0, cos.shape[0])
        return reference(q, k, cos, sin, positions, interleaved=interleaved)
    flat_q, flat_k = _as_heads(q), _as_heads(k)
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.reshape(-1).contiguous()
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        out_q, out_k = _ApplyRope.apply(*distinct(flat_q, flat_k), cos, sin, positions, interleaved, chosen)
    else:
        out_q, out_k = native(_FWD[chosen], flat_q, flat_k, cos, sin, positions, interleaved, False)
    return (out_q, out_k) if q.dim() == 3 else (out_q.view(q.shape), out_k.view(k.shape))
