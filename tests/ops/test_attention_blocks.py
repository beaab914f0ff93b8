"""Attention over several blocks of queries and of keys, under every mask and option: results and gradients against gold."""

import pytest
import torch
from cells import variants
from memory import peak_extra
from shared import DTYPES, OPS, instruction_set, replaced

from internlm2_kernels.testing import Draw, assert_ladder, draw_upstream, run, standard
from internlm2_kernels.workloads import Case

FLASH, PAGED = OPS["flash_attention"], OPS["paged_attention"]
SETS = [isa for name, isa in variants("cpu", FLASH) if name == "cpp"]
CPU = torch.device("cpu")


def dense(queries, keys, heads, kv_heads, head_dim, **options):
    return Case("blocks", {"batch": 1, "queries": queries, "keys": keys, "heads": heads, "kv_heads": kv_heads,
                           "head_dim": head_dim, **options})


def packed(lengths, key_lengths, heads, kv_heads, head_dim, **options):
    return Case("blocks", {"lengths": lengths, "key_lengths": key_lengths, "heads": heads, "kv_heads": kv_heads,
                           "head_dim": head_dim, **options})


def on_every_set(op, sample, generator, label):
    """The error ladder (testing.py) on each instruction set; the expensive float64 gold is computed once for all of them."""
    if not SETS:
        pytest.skip("no cpp backend on this system")
    upstream = draw_upstream(op, sample, 1.0, generator)
    by = standard(op, sample, upstream)
    for isa in SETS:
        with instruction_set(isa):
            got = run(op, sample, "cpp", upstream)
        assert_ladder(op, [Draw(sample, got, upstream, by)], f"{label} {isa}")


# The backward in C++ walks blocks of 144 queries and 192 keys. The cases have three or more of each, and the last is not full.
CASES = (
    dense(300, 450, 2, 1, 64, causal=True),
    dense(450, 300, 1, 1, 64, causal=True),  # the first 150 rows, more than a block, are fully masked
    dense(300, 450, 6, 1, 64),
    dense(450, 300, 1, 1, 128, return_lse=True),
    dense(500, 500, 1, 1, 128, causal=True, window=(200, 0)),
    dense(500, 500, 2, 2, 64, window=(100, 50)),
    dense(300, 450, 2, 1, 64, window=(-1, 60)),
    dense(500, 500, 2, 1, 64, causal=True, softcap=5.0),
    dense(300, 450, 1, 1, 128, softcap=5.0, return_lse=True),
    dense(200, 250, 2, 1, 64, causal=True, softcap=50.0),
    dense(300, 450, 2, 1, 128, causal=True, window=(200, 0), softcap=5.0),
    packed((300, 1, 450), (450, 200, 300), 2, 1, 64, causal=True),
    packed((300, 1, 450), (200, 300, 460), 2, 1, 64, window=(100, 50), return_lse=True),
    packed((300, 1, 450), (230, 450, 210), 1, 1, 64, softcap=5.0),
)


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", CASES, ids=str)
def test_blocks_in_cpp(case, dtype, generator):
    on_every_set(FLASH, FLASH.workload.sample(case, dtype, CPU, generator), generator, case)


# Triton's blocks have 64 to 128 queries and keys.
TRITON = (dense(140, 200, 2, 1, 32, window=(90, 20), softcap=5.0),
          packed((1, 135), (140, 150), 2, 1, 32, causal=True, return_lse=True))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
@pytest.mark.parametrize("case", TRITON, ids=str)
def test_blocks_in_triton(case, dtype, generator):
    pytest.importorskip("triton")
    sample = FLASH.workload.sample(case, dtype, CPU, generator)
    upstream = draw_upstream(FLASH, sample, 1.0, generator)
    assert_ladder(FLASH, [Draw(sample, run(FLASH, sample, "triton", upstream), upstream)], str(case))


# ------------------------------------------------------------------------------------------------ almost equal weights
def with_small_scores(sample):
    """The sample with scores close to 0. Every key then has almost the same weight, which rounds in the same direction, so that
    float32 sums could drift with the number of keys. The batch pools several draws, because the largest error of a single draw
    varies by a factor of two.
    """
    return replaced(sample, **{name: value * 1e-3 for name, value in sample.inputs.items() if name in ("q", "k", "k_cache")})


@pytest.mark.parametrize("queries,options", ((40, {"causal": True}), (300, {})), ids=str)
def test_weights_that_are_almost_equal(queries, options, generator):
    dims = {"batch": 6, "queries": queries, "keys": 300, "heads": 2, "kv_heads": 1, "head_dim": 32, **options}
    case = Case("blocks", dims)
    on_every_set(FLASH, with_small_scores(FLASH.workload.sample(case, torch.float32, CPU, generator)), generator, case)


@pytest.mark.parametrize("new,draws", ((1, 24), (40, 6)))
def test_weights_that_are_almost_equal_over_a_cache(new, draws, generator):
    case = Case("blocks", {"new": (new,) * draws, "cached": (300 - new,) * draws, "heads": 4, "kv_heads": 1, "head_dim": 32,
                           "block_size": 64})
    on_every_set(PAGED, with_small_scores(PAGED.workload.sample(case, torch.float32, CPU, generator)), generator, case)


def test_no_more_states_than_the_threads_need(as_it_comes, generator):
    """Split-K keeps partial results (states) only for the tiles in progress. Here are 15 tiles with 16 splits of the keys each,
    for two threads: keeping the state of every split would take 30 MiB.
    """
    if "cpp" not in FLASH.usable["cpu"]:
        pytest.skip("no cpp backend on this system")
    draw = lambda tokens: torch.randn(1, tokens, 1, 128, generator=generator).bfloat16()
    q, keys, values = draw(3840), draw(65536), draw(65536)
    call = lambda: FLASH.public(q, keys, values, causal=True, backend="cpp")
    call()
    _, extra = peak_extra(call)
    assert extra < 16 << 20, extra
