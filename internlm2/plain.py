"""The model's operators as PyTorch eager compositions: what a model without fused kernels runs, the baseline of comparisons.

Names and signatures are those of internlm2_kernels, so `InternLM2(config, operators=internlm2.plain)` is the same model.
"""

import torch
import torch.nn.functional as F

from internlm2_kernels import rope_table

__all__ = ["qkv_rope", "rms_norm", "rope_table", "swiglu"]


def rms_norm(x, weight, eps=1e-5, residual=None):
    """h * rsqrt(mean(h^2) + eps) * weight over the last dimension, h = x (+ residual); returns y, or y and h."""
    h = x if residual is None else x + residual
    y = F.rms_norm(h, weight.shape, weight.to(h.dtype), eps)
    return y if residual is None else (y, h)


def swiglu(gate, up=None):
    """silu(gate) * up; one packed tensor [..., 2F] holds gate, then up."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def qkv_rope(qkv, cos, sin, positions=None, *, num_heads, num_kv_heads):
    """Splits packed projections [T, G * (H/G + 2) * d] into q [T, H, d], k and v [T, G, d], q and k rotated by halves."""
    tokens, per_group = qkv.shape[0], num_heads // num_kv_heads
    qkv = qkv.view(tokens, num_kv_heads, per_group + 2, -1)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.to(qkv.dtype).unsqueeze(1), sin.to(qkv.dtype).unsqueeze(1)
    q = qkv[:, :, :per_group].reshape(tokens, num_heads, -1)
    return _rotate(q, cos, sin), _rotate(qkv[:, :, per_group], cos, sin), qkv[:, :, per_group + 1]


def _rotate(x, cos, sin):
    # Multiplying halves instead of building rotate_half(x) saves a negation, a concatenation and two full-width products.
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
