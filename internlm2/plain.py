"""The model's operators written with PyTorch's own, without fused kernels: the baseline that the kernels are compared with.

Names and signatures are those of internlm2_kernels, so `InternLM2(config, operators=internlm2.plain)` computes the same model.
"""

import torch
import torch.nn.functional as F
from torch.utils.weak import WeakIdKeyDictionary

from internlm2_kernels import rope_table

__all__ = ["flash_attention", "linear", "linear_cross_entropy", "qkv_rope", "rms_norm", "rope_table", "swiglu"]


def rms_norm(x, weight, eps=1e-5, residual=None):
    """y = h * rsqrt(mean(h^2) + eps) * weight over the last dimension, with h = x, or h = x + residual where one is given.

    Returns y, and h too where a residual is given.
    """
    h = x if residual is None else x + residual
    if h.dtype in (torch.bfloat16, torch.float16):
        # In these dtypes this is faster on a CPU than F.rms_norm, and it is what Hugging Face's models run.
        x_hat = h.float()
        x_hat = x_hat * torch.rsqrt(x_hat.square().mean(-1, keepdim=True) + eps)
        y = weight.to(h.dtype) * x_hat.to(h.dtype)
    else:
        y = F.rms_norm(h, weight.shape, weight, eps)
    return y if residual is None else (y, h)


def swiglu(gate, up=None):
    """silu(gate) * up. Without `up`, gate is one tensor [..., 2F] that holds both, the gate first."""
    if up is None:
        gate, up = gate.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear(x, weight):
    """x @ weight^T, with the weight cast to x's dtype."""
    return F.linear(x, weight.to(x.dtype))


def qkv_rope(qkv, cos, sin, positions=None, *, num_heads, num_kv_heads):
    """Splits packed projections [T, G * (H/G + 2) * d] into q [T, H, d], k and v [T, G, d]; rotates dimensions i and i + d/2
    of q and k together."""
    tokens, per_group = qkv.shape[0], num_heads // num_kv_heads
    qkv = qkv.view(tokens, num_kv_heads, per_group + 2, -1)
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    # The two halves of a head have the same angles. Products over the full width are faster than separate ones of the halves.
    cos, sin = (torch.cat((t, t), dim=-1).to(qkv.dtype).unsqueeze(1) for t in (cos, sin))
    q, k = qkv[:, :, :per_group].reshape(tokens, num_heads, -1), qkv[:, :, per_group]
    return q * cos + _rotate_half(q) * sin, k * cos + _rotate_half(k) * sin, qkv[:, :, per_group + 1]


def _rotate_half(x):
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def flash_attention(q, k, v, *, causal, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None):
    """softmax(q k^T / sqrt(d)) v within each sequence: q [T, H, d], k and v [T, G, d] -> [T, H, d]; one call of PyTorch's
    scaled_dot_product_attention for each sequence.

    Only self-attention: both cu_seqlens must be the same.
    """
    lengths = [n for n in _lengths(cu_seqlens_q) if n]
    if not lengths:
        return q * 1
    outputs = []
    for one in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_HSd, k_GSd, v_GSd = (t.transpose(0, 1).unsqueeze(0) for t in one)
        out = F.scaled_dot_product_attention(q_HSd, k_GSd, v_GSd, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])
        outputs.append(out.squeeze(0).transpose(0, 1))
    return torch.cat(outputs)


def linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, reduction="mean"):
    """Cross-entropy of the logits hidden weight^T, in float32; 0 where every label is ignore_index."""
    logits = F.linear(hidden, weight)
    wide = torch.promote_types(logits.dtype, torch.float32)
    total = F.cross_entropy(logits.to(wide), labels, ignore_index=ignore_index, reduction="sum")
    return total if reduction == "sum" else total / (labels != ignore_index).sum().clamp(min=1)


_known = WeakIdKeyDictionary()


def _lengths(cu_seqlens):
    """The lengths of the sequences as numbers. All layers of a model pass the same tensor, so the result is kept: the tensor is
    read from its device only once."""
    if cu_seqlens not in _known:
        bounds = cu_seqlens.tolist()
        _known[cu_seqlens] = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    return _known[cu_seqlens]
