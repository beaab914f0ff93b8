"""The peers besides eager and compiled PyTorch: other libraries' kernels, and PyTorch forms that have a gate of their own.

Each peer is a function with the operator's own arguments. A peer that is not installed, or whose result fails the operator's
error check, is left out, and the run says so. Liger is called with `in_place=False`, because its in-place backward overwrites
the incoming gradient, which the benchmark uses again. Liger's swiglu backward overwrites its saved inputs in any case, so every
peer gets its own copies of the inputs.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from internlm2_kernels import FusedAdamW
from internlm2_kernels.ops._attention import allowed_keys
from internlm2_kernels.ops.paged_attention import paged_attention
from internlm2_kernels.workloads import Case
from internlm2_kernels.workloads.paged_attention import Contiguous

CPU, CUDA, ANY = ("cpu",), ("cuda",), ("cpu", "cuda")
SDPA = {"flash": "FLASH_ATTENTION", "cudnn": "CUDNN_ATTENTION", "efficient": "EFFICIENT_ATTENTION"}
MASK_TOKENS = 4096  # SDPA with a mask over more tokens takes too long to be timed
MASK_PAIRS = 2**31  # queries x keys; beyond this product FlexAttention's block mask is built by a compiled function


@dataclass(frozen=True)
class Peer:
    """One peer: `run(**prepare(**inputs))` is the call, of which only `run` is timed. `prepare` makes what a user of the peer
    would have already: another layout, a compiled mask.

    devices   where the peer runs; trains: where it has a backward
    fits      whether the peer is timed at these dims
    """

    run: Callable
    devices: tuple[str, ...]
    prepare: Callable[..., dict[str, Any]] | None = None
    trains: tuple[str, ...] = ("cpu", "cuda")
    fits: Callable[[dict[str, Any]], bool] = lambda dims: True

    def __call__(self, **inputs: Any) -> Any:
        return self.run(**(self.prepare(**inputs) if self.prepare else inputs))


def _rms_norm(x, weight, eps=1e-5, residual=None, *, rounding="once"):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    casting = "llama" if rounding == "hf" else "gemma"  # "gemma" computes in float32 and rounds once
    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, casting, False)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, casting, False)


def _swiglu(gate, up=None):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if up is None:
        gate, up = gate.chunk(2, -1)
    return LigerSiLUMulFunction.apply(gate, up)


def _cross_entropy(logits, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0, reduction="mean",
                   return_z_loss=False):
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    # Liger's forward overwrites the logits with their gradient. A user who needs the logits must copy them before; that copy
    # is not counted in Liger's time.
    loss, z_loss, *_ = LigerCrossEntropyFunction.apply(logits, labels, None, ignore_index, z_loss, label_smoothing, reduction,
                                                       softcap or None, return_z_loss)
    return (loss, z_loss) if return_z_loss else loss


def _linear_cross_entropy(hidden, weight, labels, *, ignore_index=-100, label_smoothing=0.0, z_loss=0.0, softcap=0.0,
                          token_weights=None, reduction="mean", return_z_loss=False):
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    if token_weights is not None:
        raise NotImplementedError("no token weights")
    loss, z_loss, *_ = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, labels, None, None, ignore_index, z_loss,
                                                                  label_smoothing, reduction, softcap or None, return_z_loss)
    return (loss, z_loss) if return_z_loss else loss


def _dense_inputs(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, cu_seqlens_q=None, return_lse=False, **_):
    if cu_seqlens_q is not None or window or softcap or return_lse or q.shape[1] != k.shape[1]:
        raise NotImplementedError("dense, equal lengths, no further option")
    return dict(zip(("q", "k", "v"), (t.transpose(1, 2) for t in (q, k, v)), strict=True), causal=causal, scale=scale)


def _sdpa(name):
    """SDPA restricted to one of its backends. The memory-efficient backend has no grouped-query attention, so its keys and
    values are expanded to the query heads."""
    def run(q, k, v, causal, scale):
        from torch.nn.attention import SDPBackend, sdpa_kernel

        group = q.shape[1] // k.shape[1]
        if name == "EFFICIENT_ATTENTION" and group > 1:
            k, v = (t.repeat_interleave(group, 1) for t in (k, v))
        with sdpa_kernel(getattr(SDPBackend, name)):
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale,
                                                                   enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def _varlen_inputs(q, k, v, *, causal=False, scale=None, window=None, softcap=0.0, cu_seqlens_q=None, cu_seqlens_k=None,
                   max_seqlen_q=None, max_seqlen_k=None, return_lse=False):
    if cu_seqlens_q is None or window or softcap or return_lse or scale is not None:
        raise NotImplementedError("packed, no further option")
    group = q.shape[1] // k.shape[1]
    longest = [int((cu[1:] - cu[:-1]).max()) for cu in (cu_seqlens_q, cu_seqlens_k)]
    return dict(q=q, k=k, v=v, group=group, cu=(cu_seqlens_q, cu_seqlens_k), longest=longest, causal=causal)


def _varlen(q, k, v, group, cu, longest, causal):
    """torch's FlashAttention 2 for packed sequences. Keys and values are expanded to the query heads where this torch does not
    support grouped-query attention (2.10 and 2.11)."""
    from torch.nn.attention.varlen import varlen_attn

    known = inspect.signature(varlen_attn).parameters
    options = {"is_causal": causal} if "is_causal" in known else {"window_size": (-1, 0 if causal else -1)}
    if "enable_gqa" in known:
        options["enable_gqa"] = group > 1
    elif group > 1:
        k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    return varlen_attn(q, k, v, *cu, *longest, **options)


def _flex_inputs(q, k, v, *, causal=False, window=None, softcap=0.0, scale=None, cu_seqlens_q=None, cu_seqlens_k=None,
                 return_lse=False):
    """FlexAttention's inputs: a block mask made of the packed sequences and the options, and q, k, v as [B, H, S, d]."""
    from torch.nn.attention.flex_attention import create_block_mask

    if return_lse or softcap:
        raise NotImplementedError("not compared with these options")
    if cu_seqlens_q is not None:
        q, k, v = (t[None] for t in (q, k, v))
    left, right = window or (-1, -1)
    right = 0 if causal else right
    queries, keys = q.shape[1], k.shape[1]
    document = torch.zeros(queries, dtype=torch.int64, device=q.device)
    if cu_seqlens_q is not None:
        if not torch.equal(cu_seqlens_q, cu_seqlens_k):
            raise NotImplementedError("documents of queries and keys differ")
        document = torch.bucketize(torch.arange(queries, device=q.device), cu_seqlens_q[1:].long(), right=True)

    def mask(b, h, i, j):
        allowed = j >= 0
        if cu_seqlens_q is not None:
            allowed = document[i] == document[j]
        if left >= 0:
            allowed = allowed & (j >= i + keys - queries - left)
        if right >= 0:
            allowed = allowed & (j <= i + keys - queries + right)
        return allowed

    # Without compilation the mask of 128k tokens would be a tensor of 16 GiB, and its intermediates several times that.
    block_mask = create_block_mask(mask, None, None, queries, keys, device=q.device, _compile=queries * keys > MASK_PAIRS)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return dict(q=q, k=k, v=v, block_mask=block_mask, scale=scale, packed=cu_seqlens_q is not None)


_compiled: dict[str, Callable] = {}


def _flex(q, k, v, block_mask, scale, packed):
    from torch.nn.attention.flex_attention import flex_attention

    if "flex" not in _compiled:
        _compiled["flex"] = torch.compile(flex_attention, dynamic=False)
    out = _compiled["flex"](q, k, v, block_mask=block_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)
    return out[0] if packed else out


def _masked_inputs(q, k, v, *, causal=False, window=None, cu_seqlens_q=None, cu_seqlens_k=None, scale=None, softcap=0.0,
                   return_lse=False):
    """SDPA's inputs with one block-diagonal mask over all packed sequences (documents)."""
    if cu_seqlens_q is None or return_lse or softcap:
        raise NotImplementedError("documents only")
    left, right = window or (-1, -1)
    right = 0 if causal else right
    mask = torch.zeros(q.shape[0], k.shape[0], dtype=torch.bool, device=q.device)
    for a, b, c, d in zip(cu_seqlens_q[:-1], cu_seqlens_q[1:], cu_seqlens_k[:-1], cu_seqlens_k[1:], strict=True):
        mask[a:b, c:d] = allowed_keys(int(b - a), int(d - c), left, right, q.device)
    return dict(q=q, k=k, v=v, mask=mask, scale=scale)


def _masked(q, k, v, mask, scale):
    q, k, v = (t.transpose(0, 1)[None] for t in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1])
    return out[0].transpose(0, 1)


def _flex_decoding_inputs(q, k_cache, v_cache, block_table, seq_lens, **options):
    """FlexAttention's inputs for decode: one new token for each of several sequences of equal length, with the keys of each
    sequence copied from the cache into contiguous memory."""
    held = Contiguous(True).prepare(q, k_cache, v_cache, block_table, seq_lens, **options)
    parts = held["parts"]
    if len(parts) != 1 or parts[0][0].shape[1] != 1 or held["left"] >= 0 or held["softcap"] or held["return_lse"]:
        raise NotImplementedError("one new token, equal lengths, no further option")
    return dict(zip(("q", "k", "v"), (t.transpose(1, 2) for t in parts[0]), strict=True), scale=held["scale"])


def _flex_decoding(q, k, v, scale):
    """FlexAttention's decoding kernel, which splits the keys among blocks as ours does."""
    return _flex(q, k, v, None, scale, False).flatten(0, 1)


def _bf16_cache(k_cache, v_cache, k_scale=None, v_scale=None, **inputs):
    """Our own operator on the same cache in bfloat16, to show what the int8 cache gains."""
    if k_scale is None:
        raise NotImplementedError("the cache is not int8")
    wide = lambda cache, scale: (cache.float() * scale[..., None]).to(inputs["q"].dtype)
    return dict(inputs, k_cache=wide(k_cache, k_scale), v_cache=wide(v_cache, v_scale))


_TENSORS = 200  # how many parameters the optimizer's elements are divided into


def _optimizer_inputs(make):
    """The `prepare` of an optimizer's peer: it makes parameters with gradients and the optimizer, so that only the step is
    timed."""
    def prepare(param, grad, exp_avg, exp_avg_sq, master, *, step, lr, seed, index):
        parts = [[piece.clone() for piece in t.chunk(_TENSORS)] for t in (param, grad, master)]
        return make(*parts, lr)

    return prepare


def _fused_adamw(params, grads, masters, lr):
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    return {"optimizer": FusedAdamW(params, lr=lr, max_grad_norm=1.0)}


def _step(optimizer, backend=None):
    optimizer.step()


def _torch_adamw(params, grads, masters, lr):
    for master in masters:
        master.grad = torch.zeros_like(master)
    optimizer = torch.optim.AdamW(masters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True,
                                  capturable=masters[0].is_cuda)  # CUDA graphs need the step count on the device
    return {"optimizer": optimizer, "params": params, "grads": grads, "masters": masters}


def _torch_sequence(optimizer, params, grads, masters):
    """A training step as users write it with torch: convert the gradients to float32, clip them, run the fused step on the
    float32 master weights, copy these to the bfloat16 parameters."""
    torch._foreach_copy_([master.grad for master in masters], grads)
    torch.nn.utils.clip_grad_norm_(masters, 1.0)
    optimizer.step()
    torch._foreach_copy_(params, masters)


def _documents(dims):
    return "lengths" in dims and sum(dims["lengths"]) <= MASK_TOKENS


_folded = Contiguous(True, folded=True)

PEERS: dict[str, dict[str, Peer]] = {
    "rms_norm": {"liger": Peer(_rms_norm, CUDA)},
    "swiglu": {"liger": Peer(_swiglu, CUDA)},
    "cross_entropy": {"liger": Peer(_cross_entropy, CUDA)},
    "linear_cross_entropy": {"liger": Peer(_linear_cross_entropy, CUDA)},
    "flash_attention": {
        "flex": Peer(_flex, ANY, _flex_inputs, trains=CUDA),
        "mask": Peer(_masked, CPU, _masked_inputs, fits=_documents, trains=()),
        **{name: Peer(_sdpa(backend), CUDA, _dense_inputs) for name, backend in SDPA.items()},
        "varlen": Peer(_varlen, CUDA, _varlen_inputs),
    },
    "paged_attention": {
        "folded": Peer(_folded.run, ANY, _folded.prepare),
        "flex": Peer(_flex_decoding, CUDA, _flex_decoding_inputs),
        "bf16 cache": Peer(paged_attention, ANY, _bf16_cache, fits=lambda dims: bool(dims.get("int8"))),
    },
    "adamw": {"sequence": Peer(_torch_sequence, ANY, _optimizer_inputs(_torch_adamw))},
}
# Operators that users call through another form (AdamW through its optimizer). That form is timed in place of the public
# function, and the eager forms, which do not match it, are left out.
OURS: dict[str, Callable[..., Any]] = {
    "adamw": Peer(_step, ANY, _optimizer_inputs(_fused_adamw)),
}
# Sizes at which the peers of attention are checked in place of the registry's small cases: the peers refuse most options of
# those, and FlexAttention would compile a kernel for each case that it does not refuse.
CHECKED: dict[str, tuple[Case, ...]] = {
    "flash_attention": (
        Case("peers", {"batch": 1, "queries": 256, "keys": 256, "heads": 8, "kv_heads": 2, "head_dim": 128, "causal": True}),
        Case("peers", {"lengths": (128, 192, 64), "heads": 8, "kv_heads": 2, "head_dim": 128, "causal": True}),
    ),
    "paged_attention": (
        Case("peers", {"new": (1, 1), "cached": (255, 255), "heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 64}),
        Case("peers", {"new": (1, 1), "cached": (255, 255), "heads": 8, "kv_heads": 2, "head_dim": 128, "block_size": 64,
                       "int8": True}),
    ),
}


def peers_of(op: str, device: str, training: bool, dims: dict[str, Any]) -> dict[str, Peer]:
    """The peers of an operator that can run at this size on this device."""
    return {name: peer for name, peer in PEERS.get(op, {}).items()
            if device in peer.devices and (device in peer.trains or not training) and peer.fits(dims)}
