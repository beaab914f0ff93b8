"""What is special to the rotary operators: exact angles, scalings, layouts, writes to a paged cache."""

import math

import pytest
import torch
from shared import assert_bitwise

from internlm2_kernels import KVCache, apply_rope, nn, qkv_rope, rope_table

BACKENDS = ("reference", "cpp", "triton")


@pytest.mark.parametrize("backend", BACKENDS)
def test_angles_are_exact_at_200k(backend):
    """Tables at positions up to 200,000 agree with Python's float64. There the released model's angles, a product in float32,
    are off by up to 0.0144 rad.
    """
    positions = torch.tensor([0, 1, 199_999, 200_000])
    cos, sin = rope_table(positions, 128, backend=backend)
    coarse_cos, coarse_sin = rope_table(positions, 128, angles="float32", backend=backend)
    worst = coarse = 0.0
    for row, p in enumerate(positions.tolist()):
        for i in range(64):
            angle = p * 1e6 ** (-2 * i / 128)
            worst = max(worst, abs(float(cos[row, i]) - math.cos(angle)), abs(float(sin[row, i]) - math.sin(angle)))
            coarse = max(coarse, abs(float(coarse_cos[row, i]) - math.cos(angle)),
                         abs(float(coarse_sin[row, i]) - math.sin(angle)))
    assert worst <= 2**-24 and 1e-3 < coarse < 0.0144


def released_tables(positions, head_dim, base, scaling=None):
    """The released model's computation in float32: frequencies, positions, and their product."""
    kind, factor = (None, 1.0) if scaling is None else (scaling["type"], scaling["factor"])
    if kind == "dynamic":
        trained, length = scaling["max_position_embeddings"], scaling["seq_len"]
        base = base * (factor * length / trained - (factor - 1)) ** (head_dim / (head_dim - 2))
    inv_freq = 1.0 / (base ** (torch.arange(0, head_dim, 2).float() / head_dim))
    angle = torch.outer(positions.float() / (factor if kind == "linear" else 1.0), inv_freq)
    return angle.cos(), angle.sin()


@pytest.mark.parametrize("scaling", (
    None, {"type": "linear", "factor": 3.0},
    {"type": "dynamic", "factor": 2.0, "max_position_embeddings": 32768, "seq_len": 200_001},
), ids=lambda s: s["type"] if s else "none")
@pytest.mark.parametrize("head_dim,base", ((128, 1e6), (96, 5e7)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_float32_angles_are_the_released_models(backend, head_dim, base, scaling):
    """With angles="float32" the tables equal those of the released model up to one rounding at every position. If the
    frequencies were computed in float64 and then rounded, they would be off by 0.015 at 200,000.
    """
    positions = torch.tensor([0, 1, 4095, 4096, 32_767, 32_768, 131_071, 199_999, 200_000])
    got = rope_table(positions, head_dim, base=base, scaling=scaling, angles="float32", backend=backend)
    for name, ours, theirs in zip(("cos", "sin"), got, released_tables(positions, head_dim, base, scaling), strict=True):
        assert float((ours - theirs).abs().max()) <= 6e-8, name


def test_dynamic_ntk_values():
    """Dynamic NTK scaling raises the base with the sequence length. From base 1e6, 32768 trained positions and factor 2 it must
    give the published 3.05e6 at 64k and 11.65e6 at 200k; up to 32768 the base is unchanged.
    """
    def base_of(factor, length):
        scaling = {"type": "dynamic", "factor": factor, "max_position_embeddings": 32768, "seq_len": length}
        _, sin = rope_table(torch.tensor([1]), 128, scaling=scaling)
        return math.asin(float(sin[0, 32])) ** (-128 / 64)  # dimension 32 has angle base^(-1/2)

    for factor, length, base in ((2.0, 65536, 3.05e6), (2.0, 131072, 7.22e6), (2.0, 200_000, 11.65e6),
                                 (2.5, 200_000, 14.34e6), (3.0, 200_000, 17.05e6), (3.0, 262_144, 23.1e6)):
        assert abs(base_of(factor, length) / base - 1) < 0.003, (factor, length)
    assert abs(base_of(3.0, 32768) / 1e6 - 1) < 1e-4


@pytest.mark.parametrize("scaling", (
    {"rope_type": "linear", "factor": 4.0},
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
    {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 20, "beta_slow": 2},
    {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
     "original_max_position_embeddings": 8192},
    {"rope_type": "dynamic", "factor": 2.0},
), ids=lambda s: f"{s['rope_type']}{s['factor']}")
def test_scalings_equal_transformers(scaling):
    """Scaled tables have the bits of tables from the inverse frequencies that Hugging Face's transformers computes in float32,
    at far positions too.
    """
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    config = transformers.LlamaConfig(hidden_size=512, num_attention_heads=4, max_position_embeddings=32768)
    config.rope_parameters = {"rope_theta": 1e6, **scaling}
    length = 100_000
    inv_freq, magnitude = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](config, torch.device("cpu"), seq_len=length)
    ours = dict(scaling)
    if scaling["rope_type"] == "dynamic":
        ours.update(max_position_embeddings=32768, seq_len=length)
    for angles, positions, tolerance in (("float64", [1], 1e-6), ("float32", [1, 4096, 200_000], 1.2e-7)):
        positions = torch.tensor(positions)
        cos, sin = rope_table(positions, 128, base=1e6, scaling=ours, angles=angles)
        angle = torch.outer(positions.float(), inv_freq)
        torch.testing.assert_close(cos, angle.cos() * magnitude, rtol=0, atol=tolerance)
        torch.testing.assert_close(sin, angle.sin() * magnitude, rtol=0, atol=tolerance)


def test_a_long_table_changes_no_short_one():
    before = rope_table(64, 32)
    rope_table(64, 32, scaling={"type": "dynamic", "factor": 2.0, "max_position_embeddings": 8, "seq_len": 64})
    assert_bitwise(dict(enumerate(rope_table(64, 32))), dict(enumerate(before)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_rotation_keeps_lengths_and_relative_angles(backend, generator):
    """The rotation keeps the length of a vector, and scores depend only on the distance of positions: q at 5 and k at 2 score
    like q at 105 and k at 102.
    """
    q, k = torch.randn(2, 1, 1, 64, generator=generator)
    cos, sin = rope_table(128, 64)
    at = lambda x, p: apply_rope(x, x, cos, sin, torch.tensor([p]), backend=backend)[0]
    assert torch.allclose(at(q, 77).norm(), q.norm(), rtol=1e-6)
    near, far = (at(q, 5 + s) * at(k, 2 + s) for s in (0, 100))
    assert torch.allclose(near.sum(), far.sum(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_interleaved_is_a_permutation_of_halves(backend, generator):
    q, k = torch.randn(7, 3, 32, generator=generator), torch.randn(7, 1, 32, generator=generator)
    cos, sin = rope_table(7, 32)
    order = torch.cat((torch.arange(0, 32, 2), torch.arange(1, 32, 2)))
    got = apply_rope(q, k, cos, sin, interleaved=True, backend=backend)
    want = apply_rope(q[..., order], k[..., order], cos, sin, backend=backend)
    for a, b in zip(got, want, strict=True):
        assert torch.equal(a[..., order], b)


@pytest.mark.parametrize("heads,kv_heads", ((4, 2), (8, 2), (12, 2), (3, 3)))
@pytest.mark.parametrize("backend", BACKENDS)
def test_packed_layout(backend, heads, kv_heads, generator):
    """In the packed projection each group holds its query heads, its key head and its value head. The result of qkv_rope equals
    splitting these first and then rotating them by apply_rope.
    """
    group, d, tokens = heads // kv_heads, 16, 5
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, generator=generator)
    cos, sin = rope_table(tokens, d)
    q, k, v = qkv_rope(qkv, cos, sin, num_heads=heads, num_kv_heads=kv_heads, backend=backend)
    parts = qkv.view(tokens, kv_heads, group + 2, d)
    want_q, want_k = apply_rope(parts[:, :, :group].reshape(tokens, heads, d), parts[:, :, group].contiguous(), cos, sin,
                                backend=backend)
    assert torch.equal(q, want_q) and torch.equal(k, want_k) and torch.equal(v, parts[:, :, group + 1])


@pytest.mark.parametrize("positions", (True, False))
@pytest.mark.parametrize("kind", ("same", "int8"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16, torch.bfloat16))
@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_cache_write(backend, dtype, kind, positions, generator):
    """The cache equals the reference's bit for bit, values and scales; slots that are not written keep their contents."""
    tokens, heads, kv_heads, d = 9, 6, 2, 32
    qkv = torch.randn(tokens, (heads + 2 * kv_heads) * d, generator=generator).to(dtype)
    qkv[4] = 0
    cos, sin = rope_table(40, d)
    where = torch.randint(0, 40, (tokens,), generator=generator) if positions else None
    cos, sin = (cos, sin) if positions else (cos[:tokens], sin[:tokens])
    slots = torch.randperm(20, generator=generator)[:tokens]
    slots[2] = -1

    def fill(backend):
        values = torch.int8 if kind == "int8" else dtype
        k, v = (torch.full((5, 4, kv_heads, d), 9, dtype=values) for _ in range(2))
        scales = [torch.full((5, 4, kv_heads), 0.5) for _ in range(2)] if kind == "int8" else [None, None]
        outputs = qkv_rope(qkv, cos, sin, where, num_heads=heads, num_kv_heads=kv_heads,
                           cache=KVCache(k, v, slots, *scales), backend=backend)
        return dict(enumerate([*outputs, k, v, *(s for s in scales if s is not None)]))

    got, want = fill(backend), fill("reference")
    assert_bitwise({n: got[n] for n in (2, 4)}, {n: want[n] for n in (2, 4)})  # v, and the cached v
    plain = qkv_rope(qkv, cos, sin, where, num_heads=heads, num_kv_heads=kv_heads, backend=backend)
    assert_bitwise({n: got[n] for n in range(3)}, dict(enumerate(plain)))
    if kind == "same":
        written = slots >= 0
        assert torch.equal(got[3].view(20, kv_heads, d)[slots[written]], got[1][written])
        untouched = torch.ones(20, dtype=torch.bool).index_fill_(0, slots[written], False)
        assert (got[3].view(20, kv_heads, d)[untouched] == 9).all()
    else:
        assert (got[3].int() - want[3].int()).abs().max() <= 1 and torch.allclose(got[5], want[5], rtol=1e-6)
        assert_bitwise({0: got[6]}, {0: want[6]})


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_nan_reaches_the_int8_scale(backend):
    qkv = torch.randn(2, 4 * 8)
    qkv[1, 20] = float("nan")  # inside token 1's key
    cos, sin = rope_table(2, 8)
    k, v = (torch.zeros(1, 2, 1, 8, dtype=torch.int8) for _ in range(2))
    scales = [torch.zeros(1, 2, 1) for _ in range(2)]
    qkv_rope(qkv, cos, sin, num_heads=2, num_kv_heads=1, cache=KVCache(k, v, torch.arange(2), *scales), backend=backend)
    assert scales[0].isnan().flatten().tolist() == [False, True] and not scales[1].isnan().any()


def test_tables_outlive_inference_mode_and_the_meta_device(generator):
    with torch.inference_mode():
        rotary = nn.RotaryEmbedding(8, 16)
        rotary(torch.randn(4, 2, 8), torch.randn(4, 1, 8))
    q = torch.randn(4, 2, 8, generator=generator, requires_grad=True)
    rotary(q, q)[0].sum().backward()
    empty = nn.RotaryEmbedding(8, 16, device="meta").to_empty(device="cpu")
    assert_bitwise({0: empty.cos, 1: empty.sin}, {0: rotary.cos, 1: rotary.sin})


def test_module_counts_along_the_sequence(generator):
    rotary = nn.RotaryEmbedding(16, 64)
    q, k = torch.randn(2, 10, 4, 16, generator=generator), torch.randn(2, 10, 2, 16, generator=generator)
    both = rotary(q, k)
    for row in range(2):
        for got, want in zip(rotary(q[row], k[row]), both, strict=True):
            assert torch.equal(got, want[row])
    assert rotary.bfloat16().cos.dtype == torch.float32 and not rotary.state_dict()
