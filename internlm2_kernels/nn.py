"""The operators as torch modules, with the parameter names of the usual checkpoints."""

import math
import numbers

import torch

from ._autocast import enabled as autocast_enabled
from ._checks import check_device, check_factory, check_flag, check_float, check_tensor, fail
from .ops._attention import check_options
from .ops.apply_rope import apply_rope
from .ops.flash_attention import flash_attention
from .ops.linear import linear
from .ops.rms_norm import rms_norm
from .ops.rope_table import rope_table
from .ops.swiglu import swiglu

MOST_ELEMENTS = 2**32  # of one weight: far above those of any model, so that a mistyped size cannot request all memory


def _whole(value):
    return isinstance(value, numbers.Integral) and not isinstance(value, bool) and value >= 1


class RMSNorm(torch.nn.Module):
    """`rms_norm` as a module, with the arguments, defaults and parameter of `torch.nn.RMSNorm`.

    normalized_shape    the size of the last dimension, or the sizes of the last dimensions, over which the mean is taken
    eps                 None: the machine epsilon of the dtype that is computed in, float32 (float64 for float64)
    elementwise_affine  whether there is a weight, of the shape normalized_shape
    rounding            "once", or "hf" for the order of rounding of Hugging Face's RMSNorm classes (see `rms_norm`)

    `forward(x)` -> y; `forward(x, residual)` -> (y, x + residual). Errors: those of `internlm2_kernels.rms_norm`.
    """

    def __init__(self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, rounding="once"):
        super().__init__()
        sizes = (normalized_shape,) if isinstance(normalized_shape, numbers.Integral) else normalized_shape
        if not isinstance(sizes, tuple | list) or not sizes or not all(map(_whole, sizes)) or math.prod(sizes) > MOST_ELEMENTS:
            fail(ValueError, "RMSNorm", "normalized_shape", f"a size from 1 to {MOST_ELEMENTS}, or several with such a product",
                 repr(normalized_shape))
        check_flag("RMSNorm", "elementwise_affine", elementwise_affine)
        check_factory("RMSNorm", device, dtype)
        sizes = tuple(map(int, sizes))
        self.normalized_shape, self.eps, self.elementwise_affine, self.rounding = sizes, eps, elementwise_affine, rounding
        weight = torch.nn.Parameter(torch.empty(sizes, device=device, dtype=dtype)) if elementwise_affine else None
        self.register_parameter("weight", weight)
        self.reset_parameters()

    def reset_parameters(self):
        """Sets the weight to 1."""
        if self.weight is not None:
            torch.nn.init.ones_(self.weight)

    def forward(self, x, residual=None):
        check_float("RMSNorm", "x", x)
        sizes, count = self.normalized_shape, len(self.normalized_shape)
        if tuple(x.shape[-count:]) != sizes:
            fail(ValueError, "RMSNorm", "x", f"last dimensions {list(sizes)}", list(x.shape))
        eps = torch.finfo(torch.promote_types(x.dtype, torch.float32)).eps if self.eps is None else self.eps
        weight = x.new_ones(sizes) if self.weight is None else self.weight
        if count == 1:
            return rms_norm(x, weight, eps, residual, rounding=self.rounding)
        one = lambda t: t.flatten(-count) if isinstance(t, torch.Tensor) and t.dim() >= count else t
        result = rms_norm(one(x), weight.flatten(), eps, one(residual), rounding=self.rounding)
        return result.view(x.shape) if residual is None else tuple(t.view(x.shape) for t in result)

    def extra_repr(self):
        return (f"{self.normalized_shape}, eps={self.eps}, elementwise_affine={self.elementwise_affine}, "
                f"rounding={self.rounding!r}")


class Linear(torch.nn.Linear):
    """`torch.nn.Linear` with the same arguments, parameters and initialisation, computed by `linear`.

    A float32 weight beside a 16-bit input is rounded as it is read. `forward(x, residual)` adds the residual before it rounds.
    """

    def forward(self, x, residual=None):
        return linear(x, self.weight, self.bias, residual=residual)


class SwiGLU(torch.nn.Module):
    """The feed-forward block w2(silu(w1 x) * w3 x), without biases: w1 is the gate, w3 the up and w2 the down projection."""

    def __init__(self, hidden_size, intermediate_size, *, device=None, dtype=None):
        super().__init__()
        for name, size in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
            if not _whole(size):
                fail(ValueError, "SwiGLU", name, "an int of at least 1", repr(size))
        if hidden_size * intermediate_size > MOST_ELEMENTS:
            fail(ValueError, "SwiGLU", "intermediate_size", f"at most {MOST_ELEMENTS} elements a weight",
                 f"{hidden_size} x {intermediate_size}")
        check_factory("SwiGLU", device, dtype)
        options = {"bias": False, "device": device, "dtype": dtype}
        self.w1 = Linear(hidden_size, intermediate_size, **options)
        self.w3 = Linear(hidden_size, intermediate_size, **options)
        self.w2 = Linear(intermediate_size, hidden_size, **options)

    def forward(self, x):
        check_float("SwiGLU", "x", x)
        if type(self.w1) is Linear and type(self.w1.weight) is torch.nn.Parameter:  # otherwise its class decides
            weight = self.w1.weight
            if x.dim() < 1 or x.shape[-1] != weight.shape[1]:
                fail(ValueError, "SwiGLU", "x", f"shape [..., {weight.shape[1]}]", list(x.shape))
            rounded = weight.dtype == torch.float32 and x.dtype in (torch.bfloat16, torch.float16)
            if x.dtype != weight.dtype and not rounded and not autocast_enabled(x.device.type):
                fail(TypeError, "SwiGLU", "x", f"the dtype of the weights, {weight.dtype}", x.dtype)
            check_device("SwiGLU", "x", x, weight, "the weights")
        return self.w2(swiglu(self.w1(x), self.w3(x)))


class RotaryEmbedding(torch.nn.Module):
    """Rotary tables for `max_length` positions, applied to queries and keys: `forward(q, k, positions)` -> q, k.

    The tables are float32 buffers that the state dictionary does not contain. `.to(bfloat16)` and `.half()` leave them in
    float32, because rounding them would be an error of every rotation. Options and errors: `rope_table` and `apply_rope`.
    """

    def __init__(self, head_dim, max_length, *, base=1e6, scaling=None, angles="float64", interleaved=False, device=None):
        super().__init__()
        self.max_length, self.head_dim, self.options = max_length, head_dim, dict(base=base, scaling=scaling, angles=angles)
        cos, sin = self._tables(device)
        self.register_buffer("cos", cos, persistent=False)
        self.register_buffer("sin", sin, persistent=False)
        self.interleaved = interleaved

    @torch.inference_mode(False)  # autograd cannot save inference tensors for a backward
    def _tables(self, device):
        return rope_table(self.max_length, self.head_dim, device=device, **self.options)

    def _apply(self, fn, recurse=True):
        tables = self.cos, self.sin
        super()._apply(fn, recurse)
        device = self.cos.device  # only the device of the tables changes, not their dtype; from meta they are computed
        self.cos, self.sin = self._tables(device) if tables[0].is_meta else (table.to(device) for table in tables)
        return self

    def forward(self, q, k, positions=None):
        """Rotates q [..., S, H, d] and k [..., S, G, d]. Without `positions` every sequence counts from 0 along S."""
        for name, x in (("q", q), ("k", k)):
            check_float("RotaryEmbedding", name, x)
            if x.dim() < 3:
                fail(ValueError, "RotaryEmbedding", name, "shape [..., S, heads, head_dim]", list(x.shape))
        if positions is None:
            positions = torch.arange(q.shape[-3], device=q.device).expand(q.shape[:-2])
        return apply_rope(q, k, self.cos, self.sin, positions, interleaved=self.interleaved)


class FlashAttention(torch.nn.Module):
    """`flash_attention` as a module without weights: the options are given once.

    `forward(q, k, v)` takes dense tensors [B, S, heads, d], or packed ones [T, heads, d] with `cu_seqlens_q` (and
    `cu_seqlens_k`, `max_seqlen_q`, `max_seqlen_k`). `forward(qkv)` takes one tensor [..., 3, H, d]. Options and errors:
    `internlm2_kernels.flash_attention`.

    It computes what flash_attn's FlashSelfAttention and FlashCrossAttention compute at dropout 0, under other names:
    softmax_scale is `scale`, window_size is `window`, cu_seqlens is `cu_seqlens_q`, and a packed kv is passed as
    kv[..., 0, :, :] and kv[..., 1, :, :].
    """

    def __init__(self, *, causal=False, scale=None, window=None, softcap=0.0):
        super().__init__()
        check_flag("FlashAttention", "causal", causal)
        check_options("FlashAttention", None, scale, window, softcap)
        self.causal, self.scale, self.window, self.softcap = causal, scale, window, softcap

    def forward(self, q, k=None, v=None, *, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=None, max_seqlen_k=None,
                return_lse=False):
        if (k is None) != (v is None):
            raise ValueError("FlashAttention: v: expected a tensor where k is given, and None otherwise")
        check_tensor("FlashAttention", "q", q)
        if k is None:
            if q.dim() < 4 or q.shape[-3] != 3:
                raise ValueError(f"FlashAttention: q: expected [..., 3, heads, head_dim] without k and v, got {list(q.shape)}")
            q, k, v = q.unbind(-3)
        return flash_attention(q, k, v, causal=self.causal, scale=self.scale, window=self.window, softcap=self.softcap,
                               cu_seqlens_q=cu_seqlens_q, cu_seqlens_k=cu_seqlens_k, max_seqlen_q=max_seqlen_q,
                               max_seqlen_k=max_seqlen_k, return_lse=return_lse)

    def extra_repr(self):
        return f"causal={self.causal}, scale={self.scale}, window={self.window}, softcap={self.softcap}"
