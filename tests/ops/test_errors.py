"""Wrong inputs: each raises an error that names operator, argument, what is expected and what was given, on every backend."""

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels import KVCache

X, W = torch.randn(4, 8), torch.ones(8)
NAN = float("nan")
Q, K = torch.randn(6, 4, 8), torch.randn(6, 2, 8)
COS, SIN = ik.rope_table(6, 8)
COS32, _ = ik.rope_table(6, 32)
QKV = torch.randn(6, 64)
POSITIONS = torch.arange(6)
HEADS = {"num_heads": 4, "num_kv_heads": 2}
AQ, AK = torch.randn(2, 6, 4, 32), torch.randn(2, 6, 2, 32)  # dense attention
PQ, PK = AQ[0], AK[0]


def cache(dtype=torch.float32, **changes):
    blocks = {"k": torch.zeros(2, 4, 2, 8, dtype=dtype), "v": torch.zeros(2, 4, 2, 8, dtype=dtype),
              "slots": torch.arange(6)}
    return KVCache(**{**blocks, **changes})


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def flash(q=AQ, k=AK, v=None, **options):
    return lambda: ik.flash_attention(q, k, k if v is None else v, **options)


def packed(cu_q, cu_k=None, **options):
    return flash(PQ, PK, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, **options)


def decode(**changes):
    """One new token for each of two sequences with 3 and 5 keys, in blocks of 2."""
    arguments = {"q": PQ[:2], "k_cache": torch.randn(6, 2, 2, 32), "v_cache": torch.randn(6, 2, 2, 32),
                 "block_table": torch.tensor([[0, 1, -9], [5, 4, 3]], dtype=torch.int32), "seq_lens": int32(3, 5), **changes}
    return lambda: ik.paged_attention(**arguments)


def qkv(*args, **kwargs):
    return lambda: ik.qkv_rope(*args, **{**HEADS, **kwargs})


CASES = [
    (lambda: ik.rms_norm([1.0], W), TypeError, "rms_norm: x: expected a tensor, got list"),
    (lambda: ik.rms_norm(X.long(), W), TypeError,
     "rms_norm: x: expected float32, bfloat16, float16 or float64, got torch.int64"),
    (lambda: ik.rms_norm(X, None), TypeError, "rms_norm: weight: expected a tensor, got NoneType"),
    (lambda: ik.rms_norm(torch.tensor(1.0), W), ValueError, "rms_norm: x: expected a last dimension of at least 1, got []"),
    (lambda: ik.rms_norm(torch.randn(3, 0), torch.ones(0)), ValueError,
     "rms_norm: x: expected a last dimension of at least 1, got [3, 0]"),
    (lambda: ik.rms_norm(X, torch.ones(9)), ValueError,
     "rms_norm: weight: expected shape [8] (the last dimension of x), got [9]"),
    (lambda: ik.rms_norm(X, W.half()), TypeError,
     "rms_norm: weight: expected float32 or the dtype of x, torch.float32, got torch.float16"),
    (lambda: ik.rms_norm(X.double(), W), TypeError,
     "rms_norm: weight: expected float32 or the dtype of x, torch.float64, got torch.float32"),
    (lambda: ik.rms_norm(X, W.to("meta")), ValueError,
     "rms_norm: weight: expected a tensor on the device of x, cpu, got meta"),
    (lambda: ik.rms_norm(X, W, NAN), ValueError, "rms_norm: eps: expected a finite float >= 0, got nan"),
    (lambda: ik.rms_norm(X, W, -1e-5), ValueError, "rms_norm: eps: expected a finite float >= 0, got -1e-05"),
    (lambda: ik.rms_norm(X, W, "small"), ValueError, "rms_norm: eps: expected a finite float >= 0, got 'small'"),
    (lambda: ik.rms_norm(X, W, residual=X.half()), TypeError,
     "rms_norm: residual: expected the dtype of x, torch.float32, got torch.float16"),
    (lambda: ik.rms_norm(X, W, residual=X[:2]), ValueError,
     "rms_norm: residual: expected shape [4, 8] (the shape of x), got [2, 8]"),
    (lambda: ik.rms_norm(X, W, rounding="twice"), ValueError,
     "rms_norm: rounding: expected 'once' or 'hf', got 'twice'"),
    (lambda: ik.linear(3, W), TypeError, "linear: x: expected a tensor, got int"),
    (lambda: ik.linear(X, W), ValueError, "linear: weight: expected shape [N, 8], got [8]"),
    (lambda: ik.linear(X, X[:, :5]), ValueError, "linear: weight: expected shape [N, 8], got [4, 5]"),
    (lambda: ik.linear(X, X.half()), TypeError, "linear: weight: expected torch.float32, got torch.float16"),
    (lambda: ik.linear(X.half(), X.bfloat16()), TypeError,
     "linear: weight: expected torch.float16 or torch.float32, got torch.bfloat16"),
    (lambda: ik.linear(X, X, W), ValueError, "linear: bias: expected shape [4] (the rows of weight), got [8]"),
    (lambda: ik.linear(X, X.to("meta")), ValueError, "linear: weight: expected a tensor on the device of x, cpu, got meta"),
    (lambda: ik.linear(X, X, residual=X), ValueError,
     "linear: residual: expected shape [4, 4] (the shape of y), got [4, 8]"),
    (lambda: ik.linear(X, X, pieces=3), ValueError, "linear: pieces: expected 1, 2, 4 or 8, got 3"),
    (lambda: ik.linear(X, X, out_dtype=torch.float16), ValueError,
     "linear: out_dtype: expected torch.float32, got torch.float16"),
    (lambda: ik.swiglu(X, X[:2]), ValueError, "swiglu: up: expected shape [4, 8] (the shape of gate), got [2, 8]"),
    (lambda: ik.swiglu(X, X.bfloat16()), TypeError,
     "swiglu: up: expected the dtype of gate, torch.float32, got torch.bfloat16"),
    (lambda: ik.swiglu(X[:, :7]), ValueError, "swiglu: gate: expected an even last dimension (packed gate and up), got 7"),
    (lambda: ik.swiglu(torch.tensor(1.0)), ValueError, "swiglu: gate: expected at least one dimension, got []"),
    (lambda: ik.swiglu(X, 3), TypeError, "swiglu: up: expected a tensor, got int"),
    (lambda: ik.rope_table(8, 7), ValueError, "rope_table: head_dim: expected an even int from 2 to 65536, got 7"),
    (lambda: ik.rope_table(-1, 8), ValueError, "rope_table: length_or_positions: expected a length from 0 to 2^31 - 1, got -1"),
    (lambda: ik.rope_table(8.5, 8), TypeError, "rope_table: length_or_positions: expected an int or a tensor, got float"),
    (lambda: ik.rope_table(X, 8), TypeError,
     "rope_table: length_or_positions: expected int32 or int64 positions, got torch.float32"),
    (lambda: ik.rope_table(POSITIONS[None], 8), ValueError,
     "rope_table: length_or_positions: expected one dimension, got [1, 6]"),
    (lambda: ik.rope_table(8, 8, base=0), ValueError, "rope_table: base: expected a number from 1e-30 to 1e30, got 0"),
    (lambda: ik.rope_table(8, 8, angles="bf16"), ValueError,
     "rope_table: angles: expected 'float64' or 'float32', got 'bf16'"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "ntk"}), ValueError,
     "rope_table: scaling['rope_type']: expected 'default' or 'linear' or 'dynamic' or 'yarn' or 'llama3', got 'ntk'"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "linear"}), ValueError,
     "rope_table: scaling['factor']: expected a positive number, got None"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "dynamic", "factor": 2.0, "max_position_embeddings": 4}), ValueError,
     "rope_table: scaling['seq_len']: expected a positive number, got None"),
    (lambda: ik.rope_table(8, 8, scaling=2.0), TypeError, "rope_table: scaling: expected a dictionary or None, got float"),
    (lambda: ik.apply_rope(Q, K[:5], COS, SIN), ValueError,
     "apply_rope: k: expected the shape of q, [6, 4, 8], but for the number of heads, got [5, 2, 8]"),
    (lambda: ik.apply_rope(Q[..., :7], K[..., :7], COS, SIN), ValueError,
     "apply_rope: q: expected shape [..., heads, head_dim] with an even head_dim, got [6, 4, 7]"),
    (lambda: ik.apply_rope(Q, K.half(), COS, SIN), TypeError,
     "apply_rope: k: expected the dtype of q, torch.float32, got torch.float16"),
    (lambda: ik.apply_rope(Q, K, COS.half(), SIN), TypeError, "apply_rope: cos: expected float32, got torch.float16"),
    (lambda: ik.apply_rope(Q, K, COS[:, :3], SIN), ValueError,
     "apply_rope: cos: expected shape [P, 4] (half the head size), got [6, 3]"),
    (lambda: ik.apply_rope(Q, K, COS, SIN[:5]), ValueError,
     "apply_rope: sin: expected shape and dtype of cos, [6, 4] torch.float32, got [5, 4] torch.float32"),
    (lambda: ik.apply_rope(Q, K, COS[:5], SIN[:5]), ValueError,
     "apply_rope: cos: expected one row a token, 6, where positions are not given, got 5"),
    (lambda: ik.apply_rope(Q, K, COS.clone().requires_grad_(), SIN), ValueError,
     "apply_rope: cos: expected a tensor that requires no gradient, got requires_grad=True"),
    (lambda: ik.apply_rope(Q, K, COS, SIN, POSITIONS.float()), TypeError,
     "apply_rope: positions: expected an int32 or int64 tensor, got torch.float32"),
    (lambda: ik.apply_rope(Q, K, COS, SIN, POSITIONS[:5]), ValueError,
     "apply_rope: positions: expected one position a token, the leading shape of q, got [5]"),
    (lambda: ik.apply_rope(Q, K, COS, SIN, POSITIONS + 1), ValueError,
     "apply_rope: positions: expected values from 0 to 5, got 6"),
    (lambda: ik.apply_rope(Q, K, COS, SIN, (POSITIONS - 1).int()), ValueError,
     "apply_rope: positions: expected values from 0 to 5, got -1"),
    (lambda: ik.apply_rope(Q, K, COS[:0], SIN[:0], POSITIONS), ValueError,
     "apply_rope: cos: expected at least one row, got 0"),
    (qkv(QKV, COS, SIN, POSITIONS + 1), ValueError, "qkv_rope: positions: expected values from 0 to 5, got 6"),
    (qkv(QKV, COS, SIN, num_kv_heads=3), ValueError, "qkv_rope: num_heads: expected a multiple of num_kv_heads, 3, got 4"),
    (qkv(QKV, COS, SIN, num_heads=0), ValueError, "qkv_rope: num_heads: expected a positive int, got 0"),
    (qkv(QKV[:, :60], COS, SIN), ValueError,
     "qkv_rope: qkv: expected a last dimension of (num_heads + 2 num_kv_heads) * head_dim = 8 * d with an even d, got [6, 60]"),
    (qkv(QKV, COS, SIN, cache=(1, 2)), TypeError, "qkv_rope: cache: expected a KVCache, got tuple"),
    (qkv(QKV, COS, SIN, cache=cache(torch.float16)), TypeError,
     "qkv_rope: cache.k: expected torch.float32 or int8, cache.k and cache.v alike, got torch.float16"),
    (qkv(QKV, COS, SIN, cache=cache(k=torch.zeros(2, 4, 2, 6))), ValueError,
     "qkv_rope: cache.k: expected shape [blocks, block_size, 2, 8], both alike, got [2, 4, 2, 6]"),
    (qkv(QKV, COS, SIN, cache=cache(torch.int8)), ValueError,
     "qkv_rope: cache.k_scale: expected a tensor with an int8 cache and None otherwise, got None"),
    (qkv(QKV, COS, SIN, cache=cache(k_scale=torch.zeros(2, 4, 2))), ValueError,
     "qkv_rope: cache.k_scale: expected a tensor with an int8 cache and None otherwise, got a tensor"),
    (qkv(QKV, COS, SIN, cache=cache(slots=torch.arange(5))), ValueError,
     "qkv_rope: cache.slots: expected int64, one slot a token (6), got torch.int64 [5]"),
    (qkv(QKV, COS, SIN, cache=cache(slots=torch.arange(6) + 3)), ValueError,
     "qkv_rope: cache.slots: expected values from -1 to 7, got 8"),
    (qkv(QKV, COS, SIN, cache=cache(slots=[0, 1, 2, 3, 4, 5])), TypeError,
     "qkv_rope: cache.slots: expected a tensor, got list"),
    (qkv(QKV, COS, SIN, cache=cache(k=None)), TypeError, "qkv_rope: cache.k: expected a tensor, got NoneType"),
    (qkv(QKV, COS, SIN, cache=cache(k=torch.zeros(2, 4, 2, 8, requires_grad=True))), ValueError,
     "qkv_rope: cache.k: expected a tensor that requires no gradient, got requires_grad=True"),
    (lambda: ik.apply_rope(Q, K, COS, SIN, interleaved="no"), ValueError,
     "apply_rope: interleaved: expected False or True, got 'no'"),
    (lambda: ik.swiglu(X.to_sparse()), TypeError, "swiglu: gate: expected a dense (strided) tensor, got torch.sparse_coo"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "linear", "factor": 2.0, "fcator": 3}), ValueError,
     "rope_table: scaling: expected keys among factor, max_position_embeddings, original_max_position_embeddings, rope_theta,"
     " rope_type, seq_len, type, got 'fcator'"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 8,
                                          "beta_fast": "a"}), ValueError,
     "rope_table: scaling['beta_fast']: expected a positive number, got 'a'"),
    (lambda: ik.rope_table(8, 8, scaling={"type": "llama3", "factor": 2.0, "original_max_position_embeddings": 8,
                                          "low_freq_factor": 4, "high_freq_factor": 4}), ValueError,
     "rope_table: scaling['high_freq_factor']: expected more than low_freq_factor, 4.0, got 4.0"),
    (qkv(QKV.clone().requires_grad_(), COS, SIN, cache=cache()), ValueError,
     "qkv_rope: cache: expected None where gradients are recorded (the write is not differentiable), got a cache"),
    (flash([1.0]), TypeError, "flash_attention: q: expected a tensor, got list"),
    (flash(AQ, AK.half()), TypeError, "flash_attention: k: expected the dtype of q, torch.float32, got torch.float16"),
    (flash(AQ, AK, AK.bfloat16()), TypeError,
     "flash_attention: v: expected the dtype of q, torch.float32, got torch.bfloat16"),
    (flash(PQ, PK), ValueError,
     "flash_attention: q: expected dense (no cu_seqlens_q): [B, S, heads, head_dim], got [6, 4, 32]"),
    (flash(AQ, AK, cu_seqlens_q=int32(0, 6)), ValueError,
     "flash_attention: q: expected packed (with cu_seqlens_q): [T, heads, head_dim], got [2, 6, 4, 32]"),
    (flash(AQ, AK[:1]), ValueError, "flash_attention: k: expected the batch size of q, 2, got 1"),
    (flash(AQ, AK, AK[:, :5]), ValueError,
     "flash_attention: v: expected the shape of k, [2, 6, 2, 32], got [2, 5, 2, 32]"),
    (flash(AQ[:, :, :3]), ValueError, "flash_attention: q: expected a number of heads that is a multiple of k's, 2, got 3"),
    (flash(AQ[..., :24], AK[..., :24]), ValueError,
     "flash_attention: q: expected a head size of 32 to 256 that is a multiple of 8, got 24"),
    (flash(torch.randn(1, 2, 2, 36), torch.randn(1, 2, 2, 36)), ValueError,
     "flash_attention: q: expected a head size of 32 to 256 that is a multiple of 8, got 36"),
    (flash(torch.randn(1, 2, 2, 264), torch.randn(1, 2, 2, 264)), ValueError,
     "flash_attention: q: expected a head size of 32 to 256 that is a multiple of 8, got 264"),
    *((flash(scale=x), ValueError, f"flash_attention: scale: expected None or a number from 1e-37 to 1e37, got {x!r}")
      for x in (0.0, NAN, 1e-60, 1e60, 10**400, True, "1")),
    *((flash(softcap=x), ValueError, f"flash_attention: softcap: expected 0 (none) or a number from 1e-37 to 1e37, got {x!r}")
      for x in (-1.0, NAN, 1e-60, 1e60, 10**400, None)),
    (flash(scale=1e-10, softcap=1e30), ValueError,
     "flash_attention: softcap: expected at most 1e37 times more or less than scale, 1e-10, got 1e+30"),
    (decode(scale=1e-60), ValueError, "paged_attention: scale: expected None or a number from 1e-37 to 1e37, got 1e-60"),
    (decode(softcap=1e60), ValueError, "paged_attention: softcap: expected 0 (none) or a number from 1e-37 to 1e37, got 1e+60"),
    (flash(causal=1), TypeError, "flash_attention: causal: expected True or False, got 1"),
    (flash(causal=None), TypeError, "flash_attention: causal: expected True or False, got None"),
    (flash(causal="no"), TypeError, "flash_attention: causal: expected True or False, got 'no'"),
    (flash(max_seqlen_q=5), ValueError, "flash_attention: max_seqlen_q: expected at least the longest sequence, 6, got 5"),
    (flash(max_seqlen_k=0), ValueError, "flash_attention: max_seqlen_k: expected at least the longest sequence, 6, got 0"),
    (flash(max_seqlen_k=6.0), ValueError, "flash_attention: max_seqlen_k: expected None or an integer >= 0, got 6.0"),
    (flash(max_seqlen_k=True), ValueError, "flash_attention: max_seqlen_k: expected None or an integer >= 0, got True"),
    (flash(window=(True, 0)), ValueError,
     "flash_attention: window: expected None or (left, right), integers >= -1, -1 for no limit, got (True, 0)"),
    (flash(AQ, AK.to_sparse()), TypeError,
     "flash_attention: k: expected a dense (strided) tensor, got torch.sparse_coo"),
    (flash(AQ, AK, AK.to_sparse()), TypeError,
     "flash_attention: v: expected a dense (strided) tensor, got torch.sparse_coo"),
    (packed(int32(0, 6).to_sparse()), TypeError,
     "flash_attention: cu_seqlens_q: expected a dense (strided) tensor, got torch.sparse_coo"),
    (decode(max_seqlen_q=0), ValueError,
     "paged_attention: max_seqlen_q: expected at least the longest sequence, 1, got 0"),
    (decode(k_cache=torch.zeros(6, 2, 2, 32).to_sparse()), TypeError,
     "paged_attention: k_cache: expected a dense (strided) tensor, got torch.sparse_coo"),
    (decode(v_cache=torch.zeros(6, 2, 2, 32).to_sparse()), TypeError,
     "paged_attention: v_cache: expected a dense (strided) tensor, got torch.sparse_coo"),
    (decode(block_table=int32(0, 1)[None].expand(2, 2).to_sparse()), TypeError,
     "paged_attention: block_table: expected a dense (strided) tensor, got torch.sparse_coo"),
    (decode(window=(1, 0), block_table=torch.tensor([[0, 1, 0], [7, 4, 6]], dtype=torch.int32)), ValueError,
     "paged_attention: block_table: expected values from 0 to 5 in the blocks in use, got 6"),
    (qkv(QKV, COS, SIN, cache=cache(k=torch.zeros(2, 4, 2, 8).to_sparse())), TypeError,
     "qkv_rope: cache.k: expected a dense (strided) tensor, got torch.sparse_coo"),
    (lambda: ik.apply_rope(Q, K.to_sparse(), COS, SIN), TypeError,
     "apply_rope: k: expected a dense (strided) tensor, got torch.sparse_coo"),
    (flash(window=3), ValueError,
     "flash_attention: window: expected None or (left, right), integers >= -1, -1 for no limit, got 3"),
    (flash(window=(3, -2)), ValueError,
     "flash_attention: window: expected None or (left, right), integers >= -1, -1 for no limit, got (3, -2)"),
    (flash(cu_seqlens_k=int32(0, 6)), ValueError,
     "flash_attention: cu_seqlens_k: expected None where cu_seqlens_q is None, got a tensor"),
    (packed([0, 6]), TypeError, "flash_attention: cu_seqlens_q: expected an int32 tensor [sequences + 1], got list"),
    (packed(torch.tensor([0, 6])), TypeError, "flash_attention: cu_seqlens_q: expected torch.int32, got torch.int64"),
    (packed(int32()), ValueError, "flash_attention: cu_seqlens_q: expected shape [sequences + 1], got [0]"),
    (packed(int32(0, 3, 6), int32(0, 6)), ValueError,
     "flash_attention: cu_seqlens_k: expected as many entries as cu_seqlens_q, 3, got 2"),
    (packed(int32(0, 4, 3, 6)), ValueError,
     "flash_attention: cu_seqlens_q: expected values that never fall, got 3 after 4"),
    (packed(int32(0, 3, 7)), ValueError,
     "flash_attention: cu_seqlens_q: expected values that end at 6, got 7"),
    (packed(int32(0, 3, 5)), ValueError,
     "flash_attention: cu_seqlens_q: expected values that end at 6, got 5"),
    (packed(int32(1, 3, 6)), ValueError,
     "flash_attention: cu_seqlens_q: expected values that start at 0, got 1"),
    (packed(int32(0, 3, 6), int32(0, 2, 8)), ValueError,
     "flash_attention: cu_seqlens_k: expected values that end at 6, got 8"),
    (packed(int32(0, 2, 6), max_seqlen_q=3), ValueError,
     "flash_attention: max_seqlen_q: expected at least the longest sequence, 4, got 3"),
    (packed(int32(0, 2, 6), max_seqlen_k=-1), ValueError,
     "flash_attention: max_seqlen_k: expected None or an integer >= 0, got -1"),
    (decode(q=PQ[:2].half()), TypeError,
     "paged_attention: k_cache: expected torch.float16 or int8, k_cache and v_cache alike, got torch.float32"),
    (decode(q=PQ[0]), ValueError, "paged_attention: q: expected shape [T, heads, head_dim], got [4, 32]"),
    (decode(v_cache=torch.zeros(6, 2, 2, 32, dtype=torch.int8)), TypeError,
     "paged_attention: v_cache: expected torch.float32 or int8, k_cache and v_cache alike, got torch.int8"),
    (decode(v_cache=torch.zeros(5, 2, 2, 32)), ValueError,
     "paged_attention: v_cache: expected shape [blocks, block_size, kv_heads, head_dim], both alike, got [5, 2, 2, 32]"),
    (decode(k_cache=torch.zeros(6, 2, 2, 64)[..., :32], v_cache=torch.zeros(6, 2, 2, 32)), ValueError,
     "paged_attention: k_cache: expected a contiguous tensor, got strides (256, 128, 64, 1)"),
    (decode(k_scale=torch.zeros(6, 2, 2)), ValueError,
     "paged_attention: k_scale: expected a tensor with an int8 cache and None otherwise, got a tensor"),
    (decode(q=PQ[:2, :3]), ValueError,
     "paged_attention: q: expected a number of heads that is a multiple of k_cache's, 2, got 3"),
    (decode(q=PQ[:3]), ValueError,
     "paged_attention: cu_seqlens_q: expected a tensor, unless q has one token a sequence (2), got None with 3 tokens"),
    (decode(seq_lens=torch.tensor([3, 5])), TypeError, "paged_attention: seq_lens: expected torch.int32, got torch.int64"),
    (decode(block_table=int32(0, 1)), ValueError,
     "paged_attention: block_table: expected shape [2, max_blocks], got [2]"),
    (decode(block_table=torch.tensor([[0, 6, 0], [5, 4, 3]], dtype=torch.int32)), ValueError,
     "paged_attention: block_table: expected values from 0 to 5 in the blocks in use, got 6"),
    (decode(block_table=torch.tensor([[0, 1, 0], [5, -1, 3]], dtype=torch.int32)), ValueError,
     "paged_attention: block_table: expected values from 0 to 5 in the blocks in use, got -1"),
    (decode(seq_lens=int32(3, 7)), ValueError,
     "paged_attention: seq_lens: expected values from the new tokens of a sequence, 1 in sequence 1, to max_blocks * "
     "block_size = 6, got 7"),
    (decode(seq_lens=int32(0, 5)), ValueError,
     "paged_attention: seq_lens: expected values from the new tokens of a sequence, 1 in sequence 0, to max_blocks * "
     "block_size = 6, got 0"),
    (decode(q=PQ, cu_seqlens_q=int32(0, 4, 6)), ValueError,
     "paged_attention: seq_lens: expected values from the new tokens of a sequence, 4 in sequence 0, to max_blocks * "
     "block_size = 6, got 3"),
    (decode(q=PQ, cu_seqlens_q=int32(0, 1, 5)), ValueError,
     "paged_attention: cu_seqlens_q: expected values that end at 6, got 5"),
    (decode(q=PQ, cu_seqlens_q=int32(0, 6)), ValueError,
     "paged_attention: cu_seqlens_q: expected shape [3] (sequences + 1), got [2]"),
    (decode(q=PQ[:2].clone().requires_grad_()), ValueError,
     "paged_attention: q, k_cache, v_cache: expected tensors that require no gradient (there is no backward), got "
     "requires_grad=True"),
    # Tensors without strides (sparse, nested), arrays and tensors in place of numbers, sizes too large for any memory.
    (lambda: ik.rms_norm(X, W.to_sparse()), TypeError,
     "rms_norm: weight: expected a dense (strided) tensor, got torch.sparse_coo"),
    (lambda: ik.rms_norm(X, W, residual=torch.nested.nested_tensor([W, W[:3]])), TypeError,
     "rms_norm: residual: expected a dense (strided) tensor, got a nested one"),
    (lambda: ik.rms_norm(X.to_mkldnn(), W), TypeError, "rms_norm: x: expected a dense (strided) tensor, got torch._mkldnn"),
    (lambda: ik.rms_norm(X, W, rounding=torch.ones(2)), ValueError,
     "rms_norm: rounding: expected 'once' or 'hf', got tensor([1., 1.])"),
    (lambda: ik.apply_rope(PQ, PK, COS32.to_sparse(), COS32), TypeError,
     "apply_rope: cos: expected a dense (strided) tensor, got torch.sparse_coo"),
    (lambda: ik.apply_rope(PQ, PK, COS32, COS32, interleaved=torch.ones(2)), ValueError,
     "apply_rope: interleaved: expected False or True, got tensor([1., 1.])"),
    (flash(return_lse=torch.ones(2)), TypeError, "flash_attention: return_lse: expected True or False, got tensor([1., 1.])"),
    (lambda: ik.rope_table(17, 10**30), ValueError,
     f"rope_table: head_dim: expected an even int from 2 to 65536, got {10**30}"),
    (lambda: ik.rope_table(10**30, 8), ValueError,
     f"rope_table: length_or_positions: expected a length from 0 to 2^31 - 1, got {10**30}"),
    (lambda: ik.nn.RotaryEmbedding(2**31, 16), ValueError,
     "rope_table: head_dim: expected an even int from 2 to 65536, got 2147483648"),
    (lambda: ik.rope_table(8, 8, base=1e-320), ValueError,
     "rope_table: base: expected a number from 1e-30 to 1e30, got 1e-320"),
    (lambda: ik.rope_table(torch.arange(3).to_sparse(), 8), TypeError,
     "rope_table: length_or_positions: expected a dense (strided) tensor, got torch.sparse_coo"),
    (lambda: ik.rope_table(8, 8, device="nope"), ValueError,
     "rope_table: device: expected a device of this machine that PyTorch was built for, got 'nope'"),
    (lambda: ik.rope_table(8, 8, device=1.5), TypeError,
     "rope_table: device: expected a torch.device, its name or None, got 1.5"),
    (lambda: ik.rope_table(8, 8, base=1e300), ValueError,
     "rope_table: base: expected a number from 1e-30 to 1e30, got 1e+300"),
    (lambda: ik.nn.RMSNorm(2**40), ValueError,
     "RMSNorm: normalized_shape: expected a size from 1 to 4294967296, or several with such a product, got 1099511627776"),
    (lambda: ik.nn.RMSNorm(8, dtype=torch.int32), TypeError,
     "RMSNorm: dtype: expected a floating-point torch.dtype or None, got torch.int32"),
    (lambda: ik.nn.SwiGLU("a", 3), ValueError, "SwiGLU: hidden_size: expected an int of at least 1, got 'a'"),
    (lambda: ik.nn.SwiGLU(2**31, 2**31), ValueError,
     "SwiGLU: intermediate_size: expected at most 4294967296 elements a weight, got 2147483648 x 2147483648"),
    (lambda: ik.nn.SwiGLU(8, 3)(X[:, :5]), ValueError, "SwiGLU: x: expected shape [..., 8], got [4, 5]"),
    (lambda: ik.nn.SwiGLU(8, 3)(X.double()), TypeError,
     "SwiGLU: x: expected the dtype of the weights, torch.float32, got torch.float64"),
    (lambda: ik.nn.RotaryEmbedding(8, 16)(None, None), TypeError, "RotaryEmbedding: q: expected a tensor, got NoneType"),
    (lambda: ik.nn.RotaryEmbedding(8, 16)(X, X), ValueError,
     "RotaryEmbedding: q: expected shape [..., S, heads, head_dim], got [4, 8]"),
    (lambda: ik.FusedAdamW(3), TypeError, "FusedAdamW: params: expected parameters, or groups of them, got int"),
]


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("call,kind,message", CASES, ids=[message for *_, message in CASES])
def test_wrong_input(call, kind, message, backend):
    with ik.use_backend(backend), pytest.raises(kind) as caught:
        call()
    assert type(caught.value) is kind and str(caught.value) == message


@pytest.mark.parametrize("backend", ("reference", "cpp"))
def test_nothing_is_written_on_an_error(backend):
    """A bad position or slot raises an error before the cache is written."""
    for bad in ({"positions": torch.tensor([0, 1, 2, 3, 4, 6])}, {"slots": torch.tensor([0, 1, 2, 3, 4, 8])}):
        target = cache(slots=bad.get("slots", torch.arange(6)))
        with pytest.raises(ValueError):
            ik.qkv_rope(QKV, COS, SIN, bad.get("positions"), **HEADS, cache=target, backend=backend)
        assert not target.k.any() and not target.v.any()


def test_float64_is_refused_by_triton():
    with pytest.raises(TypeError, match="float64"):
        ik.rms_norm(X.double(), W.double(), backend="triton")
