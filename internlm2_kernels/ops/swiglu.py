"""SwiGLU: the gated activation of the feed-forward block."""

import torch

from .._autocast import promoted
from .._autograd import distinct, once_differentiable
from .._checks import as_rows, check_float, check_same, check_shape, fail
from .._registry import Op


def reference(gate, up=None):
    if up is None:
        gate, up = gate.chunk(2, -1)
    acc = torch.promote_types(gate.dtype, torch.float32)
    g = gate.to(acc)
    return (g * torch.sigmoid(g) * up.to(acc)).to(gate.dtype)


def _fake_fwd(gate, up):
    return gate.new_empty(gate.shape)


def _fake_bwd(dy, gate, up, packed):
    if packed:
        return gate.new_empty((*gate.shape[:-1], 2 * gate.shape[-1])), gate.new_empty((0,))
    return gate.new_empty(gate.shape), gate.new_empty(gate.shape)


SWIGLU = Op(
    name="swiglu",
    source="arXiv:2002.05202 section 2",
    summary="silu(gate) * up, on two tensors or one packed one",
    reference=reference,
    schemas={
        "fwd": "(Tensor gate, Tensor up) -> Tensor",
        "bwd": "(Tensor dy, Tensor gate, Tensor up, bool packed) -> (Tensor dgate, Tensor dup)",
    },
    fakes={"fwd": _fake_fwd, "bwd": _fake_bwd},
    outputs=("y",),
)
_FWD, _BWD = SWIGLU.overloads["fwd"], SWIGLU.overloads["bwd"]


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate, up, backend):
        ctx.save_for_backward(gate, up)
        ctx.backend = backend
        return _FWD[backend](gate, up)

    @staticmethod
    @once_differentiable("swiglu")
    def backward(ctx, dy):
        gate, up = ctx.saved_tensors
        dgate, dup = _BWD[ctx.backend](as_rows(dy), gate, up, False)
        return dgate, dup, None


class _PackedSwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, backend):
        ctx.save_for_backward(packed)
        ctx.backend = backend
        half = packed.shape[-1] // 2
        return _FWD[backend](packed[..., :half], packed[..., half:])

    @staticmethod
    @once_differentiable("swiglu")
    def backward(ctx, dy):
        (packed,) = ctx.saved_tensors
        half = packed.shape[-1] // 2
        dpacked, _ = _BWD[ctx.backend](as_rows(dy), packed[..., :half], packed[..., half:], True)
        return dpacked, None


def _as_packed_rows(x):
    """A packed [..., 2F] as rows that the kernels can read, with at most three dimensions: kernels do not take the strides of
    more, and the gate and up halves are not contiguous."""
    return as_rows(x) if x.dim() <= 3 else as_rows(x.flatten(0, -3))


def swiglu(gate, up=None, *, backend=None):
    """Gated activation: y = silu(gate) * up, with silu(g) = g / (1 + exp(-g)).

    Shapes:   gate [..., F], up [..., F] -> y [..., F]. Without `up`, gate is packed: [..., 2F], with the gate half first
    Dtypes:   float32 | bfloat16 | float16 | float64, both equal (under autocast they are promoted). It is computed in float32
              (float64 for float64) and rounded once
    Backward: saves its inputs and recomputes silu; it never writes to the inputs. A packed input gets one gradient tensor
              [..., 2F]. Deterministic: yes
    Errors:   ValueError for a wrong shape or device, or an odd packed size; TypeError for a wrong dtype
    Cost:     memory-bound: the forward reads two tensors and writes one, the backward reads three and writes two.
              Source: arXiv:2002.05202 section 2
    """
    if up is not None:
        gate, up = promoted(gate, up)
    check_float("swiglu", "gate", gate)
    if gate.dim() == 0:
        fail(ValueError, "swiglu", "gate", "at least one dimension", list(gate.shape))
    if up is None:
        if gate.shape[-1] % 2:
            fail(ValueError, "swiglu", "gate", "an even last dimension (packed gate and up)", gate.shape[-1])
    else:
        check_same("swiglu", "up", up, gate, "gate")
        check_shape("swiglu", "up", up, gate.shape, "the shape of gate")
    chosen = SWIGLU.select(gate, backend)
    if chosen == "reference":
        return reference(gate, up)
    if up is not None:
        gate, up = as_rows(gate), as_rows(up)
        if torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad):
            return _SwiGLU.apply(*distinct(gate, up), chosen)
        return _FWD[chosen](gate, up)
    packed = _as_packed_rows(gate)
    half = packed.shape[-1] // 2
    if torch.is_grad_enabled() and gate.requires_grad:
        y = _PackedSwiGLU.apply(packed, chosen)
    else:
        y = _FWD[chosen](packed[..., :half], packed[..., half:])
    return y if gate.dim() <= 3 else y.view(*gate.shape[:-1], half)
