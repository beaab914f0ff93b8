"""Split of InternLM2's packed projection, rotary embedding and the write to the paged cache, in one pass."""

from typing import NamedTuple

import torch

from .._autograd import once_differentiable
from .._checks import as_rows, check_device, check_float, check_tensor, check_values, fail
from .._device_errors import Index
from .._native import native
from .._registry import Op
from ._cache import check_cache
from ._rope import check_tables, rotate, rows_of_table


class KVCache(NamedTuple):
    """The paged cache that `qkv_rope` writes new keys and values to, and the slot of every token in it.

    k, v              [blocks, block_size, G, d] in the dtype of the activations, or int8
    slots             int64 [T]: block * block_size + offset, or -1 for a token that is not written. No slot may occur twice
    k_scale, v_scale  float32 [blocks, block_size, G], only with int8. The scale of a token and head is max |x| / 127; the
                      stored value is x / scale, rounded half to even
    """

    k: torch.Tensor
    v: torch.Tensor
    slots: torch.Tensor
    k_scale: torch.Tensor | None = None
    v_scale: torch.Tensor | None = None


def split_heads(qkv, num_heads, num_kv_heads):
    """(q [T, H, d], k [T, G, d], v [T, G, d]) of a packed projection. Its columns form G groups, each of H/G query heads, one
    key head and one value head."""
    from einops import rearrange

    group = num_heads // num_kv_heads
    x = rearrange(qkv, "... (g n d) -> (...) g n d", g=num_kv_heads, n=group + 2)
    return rearrange(x[:, :, :group], "t g h d -> t (g h) d"), x[:, :, group], x[:, :, group + 1].clone()


def reference(qkv, cos, sin, positions=None, *, num_heads, num_kv_heads, cache=None):
    q, k, v = split_heads(qkv, num_heads, num_kv_heads)
    cos, sin = rows_of_table(cos, sin, positions, torch.promote_types(qkv.dtype, torch.float32))
    q, k = rotate(q, cos, sin), rotate(k, cos, sin)
    if cache is not None:
        _write(cache.k, cache.k_scale, cache.slots, k)
        _write(cache.v, cache.v_scale, cache.slots, v)
    lead = qkv.shape[:-1]
    return tuple(t.view(*lead, *t.shape[1:]) for t in (q, k, v))


def _write(target, scale, slots, x):
    slots = slots.flatten()
    written = (slots >= 0) & (slots < target.shape[0] * target.shape[1])
    x, slots = x.detach()[written], slots[written]
    if scale is not None:
        size = x.float().abs().amax(-1) / 127
        scale.view(-1, scale.shape[-1])[slots] = size
        x = (x.float() / torch.where(size == 0, 1, size)[..., None]).round().clamp(-127, 127).to(torch.int8)
    target.view(-1, *target.shape[2:])[slots] = x


def _fake_fwd(qkv, cos, sin, positions, num_heads, num_kv_heads):
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    tokens = qkv.shape[0]
    return (qkv.new_empty((tokens, num_heads, head_dim)), qkv.new_empty((tokens, num_kv_heads, head_dim)),
            qkv.new_empty((tokens, num_kv_heads, head_dim)))


def _fake_cache_fwd(qkv, cos, sin, positions, num_heads, num_kv_heads, k_cache, v_cache, k_scale, v_scale, slots):
    return _fake_fwd(qkv, cos, sin, positions, num_heads, num_kv_heads)


def _fake_bwd(dq, dk, dv, cos, sin, positions):
    return dq.new_empty((dq.shape[0], (dq.shape[1] + 2 * dk.shape[1]) * dq.shape[2]))


QKV_ROPE = Op(
    name="qkv_rope",
    source="arXiv:2403.17297 section 2.2 (layout), arXiv:2104.09864 (rotation)",
    summary="split of the packed qkv projection, rotary embedding, paged cache write",
    reference=reference,
    schemas={
        "fwd": "(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int num_heads, int num_kv_heads)"
               " -> (Tensor q, Tensor k, Tensor v)",
        "bwd": "(Tensor dq, Tensor dk, Tensor dv, Tensor cos, Tensor sin, Tensor? positions) -> Tensor",
        "cache_fwd": "(Tensor qkv, Tensor cos, Tensor sin, Tensor? positions, int num_heads, int num_kv_heads,"
                     " Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor slots)"
                     " -> (Tensor q, Tensor k, Tensor v)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd, "cache_fwd": _fake_cache_fwd},
    outputs=("q", "k", "v"),
    backends=("reference", "cpp", "triton", "cuda"),
    indices={
        "positions": Index(1 << 1, "values from 0 to the rows of cos minus 1",
                           "the outputs of those tokens are NaN and were not cached"),
        "cache.slots": Index(1 << 2, "values from -1 to blocks * block_size - 1", "those tokens were not cached"),
    },
)
_FWD, _BWD, _CACHE_FWD = (QKV_ROPE.overloads[name] for name in ("fwd", "bwd", "cache_fwd"))


class _QKVRope(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, cos, sin, positions, num_heads, num_kv_heads, backend):
        ctx.save_for_backward(cos, sin, positions)
        ctx.backend = backend
        return native(_FWD[backend], qkv, cos, sin, positions, num_heads, num_kv_heads)

    @staticmethod
    @once_differentiable("qkv_rope")
    def backward(ctx, dq, dk, dv):
        cos, sin, positions = ctx.saved_tensors
        dqkv = _BWD[ctx.backend](as_rows(dq), as_rows(dk), as_rows(dv), cos, sin, positions)
        return dqkv, None, None, None, None, None, None


def _check_heads(qkv, num_heads, num_kv_heads):
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            fail(ValueError, "qkv_rope", name, "a positive int", repr(value))
    if num_heads % num_kv_heads:
        fail(ValueError, "qkv_rope", "num_heads", f"a multiple of num_kv_heads, {num_kv_heads}", num_heads)
    parts = num_heads + 2 * num_kv_heads
    if qkv.dim() < 1 or qkv.shape[-1] == 0 or qkv.shape[-1] % (2 * parts):
        fail(ValueError, "qkv_rope", "qkv", f"a last dimension of (num_heads + 2 num_kv_heads) * head_dim = {parts} * d "
             "with an even d", list(qkv.shape))
    return qkv.shape[-1] // parts


def _check_cache(qkv, cache, num_kv_heads, head_dim, tokens):
    if not isinstance(cache, KVCache):
        fail(TypeError, "qkv_rope", "cache", "a KVCache", type(cache).__name__)
    if torch.is_grad_enabled() and qkv.requires_grad:
        fail(ValueError, "qkv_rope", "cache", "None where gradients are recorded (the write is not differentiable)",
             "a cache")
    named = {f"cache.{name}": getattr(cache, name) for name in ("k", "v", "k_scale", "v_scale")}
    check_tensor("qkv_rope", "cache.slots", cache.slots)
    check_cache("qkv_rope", named, qkv, "qkv", (num_kv_heads, head_dim))
    for name, value in named.items():
        if value is not None and value.requires_grad:
            fail(ValueError, "qkv_rope", name, "a tensor that requires no gradient", "requires_grad=True")
    if cache.slots.dtype != torch.int64 or cache.slots.numel() != tokens:
        fail(ValueError, "qkv_rope", "cache.slots", f"int64, one slot a token ({tokens})",
             f"{cache.slots.dtype} {list(cache.slots.shape)}")
    check_device("qkv_rope", "cache.slots", cache.slots, qkv, "qkv")


def qkv_rope(qkv, cos, sin, positions=None, *, num_heads, num_kv_heads, cache=None, backend=None):
    """Splits InternLM2's packed projection into q, k and v, and rotates q and k; at inference it also fills the paged cache.

    Shapes:   qkv [..., G * (H/G + 2) * d]: each of the G = num_kv_heads groups holds its H/G query heads, then its key, then
              its value; cos, sin [P, d/2] and positions as for `apply_rope` -> q [..., H, d], k and v [..., G, d]
    Cache:    cache=KVCache(k, v, slots, k_scale, v_scale) also writes the rotated k, and v, to their slots. An int8 cache gets
              one scale for each token and head. Not differentiable
    Dtypes:   float32 | bfloat16 | float16 | float64, tables float32. It is computed in float32 and rounded once
    Backward: saves cos, sin and positions, and writes one packed gradient. Deterministic: yes
    Errors:   ValueError and TypeError. On CUDA a wrong position or slot makes its token NaN, which is then not cached, and
              `check()` reports it
    Cost:     memory-bound: reads qkv once and writes q, k and v once.
              Source: layout arXiv:2403.17297 section 2.2; rotation arXiv:2104.09864
    """
    check_float("qkv_rope", "qkv", qkv)
    head_dim = _check_heads(qkv, num_heads, num_kv_heads)
    tokens = qkv.shape[:-1].numel()
    check_tables("qkv_rope", qkv, cos, sin, positions, tokens, head_dim, "qkv")
    if cache is not None:
        _check_cache(qkv, cache, num_kv_heads, head_dim, tokens)
    chosen = QKV_ROPE.select(qkv, backend)
    if chosen == "reference":
        check_values("qkv_rope", "positions", positions, 0, cos.shape[0])
        if cache is not None:
            check_values("qkv_rope", "cache.slots", cache.slots, -1, cache.k.shape[0] * cache.k.shape[1])
        return reference(qkv, cos, sin, positions, num_heads=num_heads, num_kv_heads=num_kv_heads, cache=cache)
    lead = qkv.shape[:-1]
    flat = qkv if qkv.dim() == 2 else qkv.reshape(-1, qkv.shape[-1])
    flat = flat if flat.stride(-1) == 1 else flat.contiguous()
    cos, sin = cos.contiguous(), sin.contiguous()
    positions = None if positions is None else positions.reshape(-1).contiguous()
    if cache is not None:
        out = native(_CACHE_FWD[chosen], flat, cos, sin, positions, num_heads, num_kv_heads, cache.k, cache.v,
                     cache.k_scale, cache.v_scale, cache.slots.reshape(-1).contiguous())
    elif torch.is_grad_enabled() and qkv.requires_grad:
        out = _QKVRope.apply(flat, cos, sin, positions, num_heads, num_kv_heads, chosen)
    else:
        out = native(_FWD[chosen], flat, cos, sin, positions, num_heads, num_kv_heads)
    return out if qkv.dim() == 2 else tuple(t.view(*lead, *t.shape[1:]) for t in out)
