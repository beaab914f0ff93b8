"""The launches whose kernels the static audit compiles: one function for each operator, named like it.

Each yields (label, call). A call runs a launcher of the package on tensors without storage, which `meta(*shape, dtype=...)`
makes, while the audit records the launches. Together they cover every tile and every option for at least one size.
"""

import torch

from internlm2_kernels._triton.adamw import adamw_step_
from internlm2_kernels._triton.apply_rope import apply_rope_fwd
from internlm2_kernels._triton.cross_entropy import (
    cross_entropy_bwd,
    cross_entropy_fwd,
    cross_entropy_grad_fwd,
    cross_entropy_scale_bwd,
)
from internlm2_kernels._triton.flash_attention import flash_attention_bwd, flash_attention_fwd
from internlm2_kernels._triton.focal_ranking_loss import focal_ranking_loss_bwd, focal_ranking_loss_fwd
from internlm2_kernels._triton.gae import gae_fwd
from internlm2_kernels._triton.kl_penalty import kl_penalty_bwd, kl_penalty_fwd
from internlm2_kernels._triton.linear import linear_bwd, linear_fwd
from internlm2_kernels._triton.linear_cross_entropy import (
    linear_cross_entropy_bwd,
    linear_cross_entropy_fwd,
    linear_cross_entropy_grad_fwd,
    linear_cross_entropy_scale_bwd,
)
from internlm2_kernels._triton.linear_logprobs import linear_logprobs_bwd, linear_logprobs_fwd
from internlm2_kernels._triton.log_barrier_penalty import log_barrier_penalty_bwd, log_barrier_penalty_fwd
from internlm2_kernels._triton.paged_attention import paged_attention_fwd
from internlm2_kernels._triton.ppo_policy_loss import ppo_policy_loss_bwd, ppo_policy_loss_fwd
from internlm2_kernels._triton.ppo_value_loss import ppo_value_loss_bwd, ppo_value_loss_fwd
from internlm2_kernels._triton.qkv_rope import qkv_rope_bwd, qkv_rope_cache_fwd, qkv_rope_fwd
from internlm2_kernels._triton.reward_loss import reward_loss_bwd, reward_loss_fwd
from internlm2_kernels._triton.reward_loss_from_last import reward_loss_from_last_bwd, reward_loss_from_last_fwd
from internlm2_kernels._triton.rms_norm import rms_norm_add_fwd, rms_norm_bwd, rms_norm_fwd
from internlm2_kernels._triton.rope_table import rope_table_fwd
from internlm2_kernels._triton.sample import sample_fwd
from internlm2_kernels._triton.squared_norm import squared_norm_fwd
from internlm2_kernels._triton.swiglu import swiglu_bwd, swiglu_fwd


def adamw(dtype, meta):
    """Launches of the AdamW step: with master weights, with stochastic rounding, and with moments in float32 and in
    bfloat16."""
    lists = lambda dtype: [meta(1 << 20, dtype=dtype) for _ in range(300)]
    params, full, low = lists(dtype), lists(torch.float32), lists(torch.bfloat16)
    steps = [meta(dtype=torch.float32) for _ in params]
    one, skipped = meta(dtype=torch.float32), meta(dtype=torch.int64)
    settings = one, 0.9, 0.95, 1e-8, 0.1, 1.0
    for label, masters, moments, random in (("masters", full, full, False), ("no masters", [], full, False),
                                            ("random rounding", [], full, True), ("random, low moments", [], low, True)):
        if dtype == torch.bfloat16 or not masters:
            yield label, lambda masters=masters, moments=moments, random=random: adamw_step_(
                params, params, masters, moments, moments, steps, skipped, one, one, one, *settings, random, False, 2**40,
                list(range(300)))


def apply_rope(dtype, meta):
    """The numbers of heads of the three InternLM2 models, and each option once."""
    cos, positions = meta(32768, 64, dtype=torch.float32), meta(4096, dtype=torch.int64)
    for heads in (16, 32, 48):
        q, k = meta(4096, heads, 128, dtype=dtype), meta(4096, 8, 128, dtype=dtype)
        yield f"{heads} and 8 heads of 128", lambda q=q, k=k: apply_rope_fwd(q, k, cos, cos, positions, False, False)
        if heads == 32:
            yield f"{heads} and 8 heads of 128, inverse, no positions", (
                lambda q=q, k=k: apply_rope_fwd(q, k, cos, cos, None, False, True))
            yield f"{heads} and 8 heads of 128, interleaved", (
                lambda q=q, k=k: apply_rope_fwd(q, k, cos, cos, positions, True, False))
    q, cos2 = meta(4096, 1, 2, dtype=dtype), meta(32768, 1, dtype=torch.float32)
    yield "1 head of 2", lambda: apply_rope_fwd(q, q, cos2, cos2, positions, False, False)


def cross_entropy(dtype, meta):
    """Launches for InternLM2's vocabulary and for a small one, with each option once."""
    one = meta(dtype=torch.float32)
    for vocab in (512, 92544):
        logits, labels = meta(4096, vocab, dtype=dtype), meta(4096, dtype=torch.int64)
        rows, lse = meta(4096, dtype=torch.float32), meta(4096, 2, dtype=torch.float32)
        for label, e, c in (("", 0.0, 0.0), (", smoothing", 0.1, 0.0), (", soft-cap", 0.0, 30.0)):
            o = -100, e, 0.0, c
            yield f"vocabulary {vocab}{label}", lambda x=logits, y=labels, o=o: cross_entropy_fwd(x, y, *o, 1, False)
            yield f"vocabulary {vocab}{label}, gradient", (
                lambda x=logits, y=labels, o=o: cross_entropy_grad_fwd(x, y, *o, 1, False))
            yield f"vocabulary {vocab}{label}", (
                lambda x=logits, y=labels, r=rows, s=lse, o=o: cross_entropy_bwd(r, x, y, s, *o, 0))
        if vocab == 512:
            yield "mean", lambda x=logits, y=labels, s=lse: cross_entropy_bwd(one, x, y, s, -100, 0.0, 0.0, 0.0, 1)
            yield "scale", lambda x=logits: cross_entropy_scale_bwd(one, x)


def flash_attention(dtype, meta):
    """Launches with every tile that the package has, and with each option for at least one size."""
    cu, length = meta(9, dtype=torch.int32), 8192
    for label, head_dim, packed, left, softcap, longest in (
            ("d 128", 128, False, -1, 0.0, length), ("d 128, packed", 128, True, -1, 0.0, length),
            ("d 128, packed, window", 128, True, 4096, 0.0, length), ("d 128, soft-cap", 128, False, -1, 30.0, length),
            ("d 128, packed, at most 512", 128, True, -1, 0.0, 512), ("d 64, packed, at most 64", 64, True, -1, 0.0, 64),
            ("d 64, packed", 64, True, -1, 0.0, length), ("d 96, packed", 96, True, -1, 0.0, length),
            ("d 256, packed", 256, True, -1, 0.0, length)):
        lead = (length,) if packed else (2, length)
        q, k = meta(*lead, 32, head_dim, dtype=dtype), meta(*lead, 8, head_dim, dtype=dtype)
        lse = meta(*lead[:-1], 32, length, dtype=torch.float32)
        cu_q = cu if packed else None
        options = cu_q, cu_q, longest, longest, left, 0, head_dim**-0.5, softcap
        yield label, lambda q=q, k=k, o=options: flash_attention_fwd(q, k, k, *o)
        if longest == length:
            yield label, lambda q=q, k=k, lse=lse, o=options: flash_attention_bwd(q, q, k, k, q, lse, None, *o)


def focal_ranking_loss(dtype, meta):
    x, d = meta(4096, dtype=dtype), meta(4096, dtype=torch.float32)
    yield "pairs 4096", lambda: focal_ranking_loss_fwd(x, x, 2.0)
    yield "pairs 4096", lambda: focal_ranking_loss_bwd(d, x, x, 2.0)


def gae(dtype, meta):
    x, cu = meta(65536, dtype=dtype), meta(65, dtype=torch.int32)
    mask, bootstrap = meta(65536, dtype=torch.bool), meta(64, dtype=torch.float32)
    yield "64 sequences", lambda: gae_fwd(x, x, cu, None, None, 1.0, 0.95)
    yield "64 sequences, mask, bootstrap", lambda: gae_fwd(x, x, cu, mask, bootstrap, 0.99, 0.95)


def kl_penalty(dtype, meta):
    x, d, mask = meta(8192, dtype=dtype), meta(8192, dtype=torch.float32), meta(8192, dtype=torch.bool)
    for estimator in (1, 2, 3):
        yield f"k{estimator}", lambda e=estimator: kl_penalty_fwd(x, x, None, e)
        yield f"k{estimator}", lambda e=estimator: kl_penalty_bwd(d, x, x, None, e, True)
    yield "k3, mask", lambda: kl_penalty_fwd(x, x, mask, 3)
    yield "k3, mask, no reference", lambda: kl_penalty_bwd(d, x, x, mask, 3, False)


def linear(dtype, meta):
    """Launches of InternLM2-7B's output projection, of one of odd sizes, and of float32 weights; many rows and few."""
    x, weight, bias = meta(8192, 4096, dtype=dtype), meta(6144, 4096, dtype=dtype), meta(6144, dtype=dtype)
    dy, full = meta(8192, 6144, dtype=dtype), meta(6144, 4096, dtype=torch.float32)
    yield "7B", lambda: linear_fwd(x, weight, None, None, 8, False)
    yield "7B, bias and residual", lambda: linear_fwd(x, weight, bias, dy, 8, False)
    yield "7B, one row", lambda: linear_fwd(x[:1], weight, None, None, 8, False)
    yield "7B, dx", lambda: linear_bwd(dy, None, weight, 8, False, True)
    yield "7B, dweight", lambda: linear_bwd(dy, x, None, 8, False, False)
    odd, odd_weight = meta(8192, 333, dtype=dtype), meta(77, 333, dtype=dtype)
    yield "odd", lambda: linear_fwd(odd, odd_weight, None, None, 8, False)
    yield "odd, dx", lambda: linear_bwd(meta(8192, 77, dtype=dtype), None, odd_weight, 1, False, True)
    yield "odd, dweight", lambda: linear_bwd(meta(8192, 77, dtype=dtype), odd, None, 1, False, False)
    if dtype != torch.float32:
        yield "7B, float32 weight", lambda: linear_fwd(x, full, None, None, 8, True)
        yield "7B, dx, float32 weight", lambda: linear_bwd(dy, None, full, 8, True, False)
        yield "7B, dweight in float32", lambda: linear_bwd(dy, x, None, 8, True, False)


def linear_cross_entropy(dtype, meta):
    """Launches for the head of InternLM2-7B with each option, and for a head with an odd vocabulary."""
    one = meta(dtype=torch.float32)
    for vocab, depth, label in ((92544, 4096, "7B"), (1003, 96, "odd")):
        hidden, weight = meta(8192, depth, dtype=dtype), meta(vocab, depth, dtype=dtype)
        labels, rows = meta(8192, dtype=torch.int64), meta(8192, dtype=torch.float32)
        lse = meta(8192, 2, dtype=torch.float32)
        plain, rich = (None, -100, 0.0, 0.0, 0.0), (rows, -100, 0.1, 1e-4, 30.0)
        for name, o in (("", plain), (", all options", rich))[: 2 if label == "7B" else 1]:
            x = hidden, weight, labels
            yield f"{label}{name}", lambda x=x, o=o: linear_cross_entropy_fwd(*x, *o, 1, False)
            yield f"{label}{name}, gradient", lambda x=x, o=o: linear_cross_entropy_grad_fwd(*x, *o, 1, False, True, True)
            yield f"{label}{name}", (
                lambda x=x, o=o, rows=rows, lse=lse: linear_cross_entropy_bwd(rows, *x, o[0], lse, *o[1:], 0, True, True))
        if label == "odd":
            yield "mean", (
                lambda x=x, lse=lse, o=plain: linear_cross_entropy_bwd(one, *x, None, lse, *o[1:], 1, True, True))
            if dtype == torch.bfloat16:  # float16 has kernels of its own: it divides by the largest coefficient
                halves = meta(8192, depth, dtype=torch.float16), meta(vocab, depth, dtype=torch.float16), labels
                yield "odd, float16", (
                    lambda x=halves, rows=rows, lse=lse, o=plain[1:]: linear_cross_entropy_bwd(
                        rows, *x, None, lse, *o, 0, True, True))
            grads = meta(8192, depth, dtype=dtype), meta(vocab, depth, dtype=torch.float32)
            yield "scale", lambda x=x, g=grads: linear_cross_entropy_scale_bwd(one, *g, *x[:2])


def linear_logprobs(dtype, meta):
    """Launches for the head of InternLM2-7B, without options and with all of them."""
    hidden, weight = meta(8192, 4096, dtype=dtype), meta(92544, 4096, dtype=dtype)
    tokens, rows = meta(8192, dtype=torch.int64), meta(8192, dtype=torch.float32)
    x, lse = (hidden, weight, tokens), meta(8192, 2, dtype=torch.float32)
    plain, rich = (1.0, 0.0, 0, 92544), (1.25, 30.0, 0, 92544)
    yield "7B", lambda: linear_logprobs_fwd(*x, *plain, False, False, False)
    yield "7B, entropy", lambda: linear_logprobs_fwd(*x, *plain, True, False, False)
    yield "7B, all options", lambda: linear_logprobs_fwd(*x, *rich, True, True, True)
    yield "7B", lambda: linear_logprobs_bwd(rows, None, None, None, *x, lse, None, *plain, True, True)
    yield "7B, entropy", lambda: linear_logprobs_bwd(rows, rows, None, None, *x, lse, rows, 1.25, *plain[1:], True, True)
    yield "7B, all options", lambda: linear_logprobs_bwd(rows, rows, rows, rows, *x, lse, rows, *rich, True, True)


def log_barrier_penalty(dtype, meta):
    x, d = meta(4096, dtype=dtype), meta(4096, dtype=torch.float32)
    for label, clamp in (("linear", False), ("clamp", True)):
        yield label, lambda c=clamp: log_barrier_penalty_fwd(x, 5.0, 1e-3, c)
        yield label, lambda c=clamp: log_barrier_penalty_bwd(d, x, 5.0, 1e-3, c)


def paged_attention(dtype, meta):
    """Launches of decode and of chunked prefill, for each head size and each dtype of the cache."""
    def run(head_dim, tokens, cache_dtype=dtype, block_size=64, left=-1):
        cache = meta(4096, block_size, 8, head_dim, dtype=cache_dtype)
        scale = meta(4096, block_size, 8, dtype=torch.float32) if cache_dtype == torch.int8 else None
        table, lengths = meta(8, 512, dtype=torch.int32), meta(8, dtype=torch.int32)
        cu = meta(9, dtype=torch.int32) if tokens > 8 else None
        paged_attention_fwd(meta(tokens, 32, head_dim, dtype=dtype), cache, cache, table, lengths, cu, tokens // 8, scale,
                            scale, left, head_dim**-0.5, 0.0)

    yield "decode, d 128", lambda: run(128, 8)
    yield "decode, d 64", lambda: run(64, 8)
    yield "decode, d 256", lambda: run(256, 8)
    yield "decode, d 128, blocks of 1, window", lambda: run(128, 8, block_size=1, left=4096)
    yield "decode, d 128, int8", lambda: run(128, 8, torch.int8)
    yield "chunks of 2, d 128", lambda: run(128, 16)
    yield "chunks of 1024, d 128", lambda: run(128, 8192)


def ppo_policy_loss(dtype, meta):
    one = meta(dtype=torch.float32)
    for tokens in (8192, 1 << 20):
        x, mask = meta(tokens, dtype=dtype), meta(tokens, dtype=torch.bool)
        yield f"{tokens} tokens", lambda x=x, m=mask: ppo_policy_loss_fwd(x, x, x, m, 0.2)
    yield f"{tokens} tokens", lambda: ppo_policy_loss_bwd(one, x, x, x, mask, one, 0.2)


def ppo_value_loss(dtype, meta):
    """Launches for 8192 and for a million tokens, with and without clipping of the values."""
    one = meta(dtype=torch.float32)
    for tokens, clip in ((8192, 0.2), (8192, -1.0), (1 << 20, 0.2)):
        x, mask = meta(tokens, dtype=dtype), meta(tokens, dtype=torch.bool)
        label = f"{tokens} tokens{', clip' if clip > 0 else ''}"
        yield label, lambda x=x, m=mask, c=clip: ppo_value_loss_fwd(x, x, x, m, c)
        yield label, lambda x=x, m=mask, c=clip: ppo_value_loss_bwd(one, x, x, x, m, one, c)


def qkv_rope(dtype, meta):
    """Calls with the numbers of heads of the three InternLM2 models, without a cache and with each dtype of cache."""
    cos, positions, slots = meta(32768, 64, dtype=torch.float32), meta(4096, dtype=torch.int64), meta(4096, dtype=torch.int64)
    cache, cache8 = meta(512, 64, 8, 128, dtype=dtype), meta(512, 64, 8, 128, dtype=torch.int8)
    scale = meta(512, 64, 8, dtype=torch.float32)
    for heads in (16, 32, 48):
        qkv = meta(4096, (heads + 16) * 128, dtype=dtype)
        dq, dk = meta(4096, heads, 128, dtype=dtype), meta(4096, 8, 128, dtype=dtype)
        label = f"{heads} and 8 heads of 128"
        yield label, lambda x=qkv, h=heads: qkv_rope_fwd(x, cos, cos, positions, h, 8)
        yield label, lambda dq=dq, dk=dk: qkv_rope_bwd(dq, dk, dk, cos, cos, positions)
        yield f"{label}, cache", (
            lambda x=qkv, h=heads: qkv_rope_cache_fwd(x, cos, cos, positions, h, 8, cache, cache, None, None, slots))
        yield f"{label}, int8 cache", (
            lambda x=qkv, h=heads: qkv_rope_cache_fwd(x, cos, cos, positions, h, 8, cache8, cache8, scale, scale, slots))
    small, cos2 = meta(4096, 6, dtype=dtype), meta(32768, 1, dtype=torch.float32)
    yield "1 and 1 heads of 2", lambda: qkv_rope_fwd(small, cos2, cos2, positions, 1, 1)


def reward_loss(dtype, meta):
    """Launches of a forward that needs one kernel and of one that needs two, and of the backward with each option."""
    hidden, weight = meta(32768, 4096, dtype=dtype), meta(4096, dtype=dtype)
    one = meta(dtype=torch.float32)
    for pairs in (8, 64):
        cu, rewards = meta(2 * pairs + 1, dtype=torch.int32), meta(2 * pairs, dtype=torch.float32)
        yield f"{pairs} pairs", lambda cu=cu: reward_loss_fwd(hidden, weight, cu, 2.0, 0.02, 5.0, 1e-3)
    yield "64 pairs", lambda: reward_loss_bwd(one, None, hidden, weight, cu, rewards, True, True)
    yield "64 pairs, rewards too", lambda: reward_loss_bwd(one, rewards, hidden, weight, cu, rewards, True, True)


def reward_loss_from_last(dtype, meta):
    weight, one = meta(4096, dtype=dtype), meta(dtype=torch.float32)
    for pairs in (8, 64):
        last, rewards = meta(2 * pairs, 4096, dtype=dtype), meta(2 * pairs, dtype=torch.float32)
        yield f"{pairs} pairs", lambda x=last: reward_loss_from_last_fwd(x, weight, 2.0, 0.02, 5.0, 1e-3)
    yield "64 pairs", lambda: reward_loss_from_last_bwd(one, rewards, last, weight, rewards, True, True)


def rms_norm(dtype, meta):
    """Launches with every tile that the package has, and with each option for at least one size."""
    for cols in (1, 128, 2048, 4096, 6144, 16384, 65536):
        x, weight, rstd = meta(4096, cols, dtype=dtype), meta(cols, dtype=dtype), meta(4096, dtype=torch.float32)
        yield f"cols {cols}", lambda x=x, w=weight: rms_norm_fwd(x, w, 1e-5, False)
        yield f"cols {cols}, residual", lambda x=x, w=weight: rms_norm_add_fwd(x, x, w, 1e-5, False)
        yield f"cols {cols}", lambda x=x, w=weight, r=rstd: rms_norm_bwd(x, None, x, w, r, False, True)
        yield f"cols {cols}, residual", lambda x=x, w=weight, r=rstd: rms_norm_bwd(x, x, x, w, r, False, True)
        if cols == 4096:
            full = meta(cols, dtype=torch.float32)
            yield f"cols {cols}, hf, float32 weight", lambda x=x, w=full: rms_norm_fwd(x, w, 1e-5, True)
            yield f"cols {cols}, hf, residual", lambda x=x, w=weight, r=rstd: rms_norm_bwd(x, x, x, w, r, True, True)
            yield f"cols {cols}, no dweight", lambda x=x, w=weight, r=rstd: rms_norm_bwd(x, None, x, w, r, False, False)


def rope_table(dtype, meta):
    if dtype != torch.float32:
        return
    positions, inv_freq = meta(4096, dtype=torch.int64), meta(64, dtype=torch.float64)
    yield "float64 angles", lambda: rope_table_fwd(positions, inv_freq, 1.0, 1.0, False)
    yield "float32 angles", lambda: rope_table_fwd(positions, inv_freq, 1.0, 1.0, True)


def sample(dtype, meta):
    """Launches for InternLM2's vocabulary with options as numbers and as tensors, and with every list and mask."""
    rows, vocab = 64, 92544
    logits, each, whole = meta(rows, vocab, dtype=dtype), meta(rows, dtype=torch.float32), meta(rows, dtype=torch.int64)
    seeds, ids = (whole, whole), meta(rows, 4096, dtype=torch.int32)
    numbers = None, 0.8, None, 50, None, 0.9, None, 0.05, None, 1.1, None, 0.1, None, 0.1
    tensors = each, 0.0, whole, 0, each, 0.0, each, 0.0, each, 0.0, each, 0.0, each, 0.0
    biases = meta(rows, 300, dtype=torch.int32), meta(rows, 300, dtype=torch.float32)
    packed, mask = meta(rows, vocab // 32, dtype=torch.int32), meta(rows, vocab, dtype=torch.bool)
    yield "numbers", lambda: sample_fwd(logits, *seeds, *numbers, None, None, None, None, None, 0, False)
    yield "tensors, top 5", lambda: sample_fwd(logits, *seeds, *tensors, None, None, None, None, None, 5, True)
    yield "lists, packed mask", lambda: sample_fwd(logits, *seeds, *numbers, ids, whole, *biases, packed, 0, True)
    yield "tokens, mask", lambda: sample_fwd(logits, *seeds, *tensors, ids, None, None, None, mask, 0, False)


def squared_norm(dtype, meta):
    yield "300 tensors", lambda: squared_norm_fwd([meta(1 << 20, dtype=dtype) for _ in range(300)])


def swiglu(dtype, meta):
    for cols in (1, 64, 8192, 14336):  # Triton compiles a size of 1 as a constant, into a separate kernel
        x = meta(4096, cols, dtype=dtype)
        yield f"cols {cols}", lambda x=x: swiglu_fwd(x, x)
        yield f"cols {cols}", lambda x=x: swiglu_bwd(x, x, x, False)
    packed = meta(4096, 2 * 8192, dtype=dtype)
    dy = meta(4096, 8192, dtype=dtype)
    yield "cols 8192, packed", lambda: swiglu_bwd(dy, packed[:, :8192], packed[:, 8192:], True)
