"""What is special to Triton's attention: splits along the keys and their merge, equal bits in prefill and decode, every tile,
bad indices.
"""

import math
import os
import subprocess
import sys

import pytest
import torch
from far import assert_far

import internlm2_kernels as ik
from internlm2_kernels._device_errors import CODES, error_word
from internlm2_kernels._registry import OPS
from internlm2_kernels.testing import Draw, assert_ladder, draw_upstream, run
from internlm2_kernels.workloads import Case

pytest.importorskip("triton")
attention, flash, flash_bwd, paged, common = (
    __import__(f"internlm2_kernels._triton.{name}", fromlist=[name])
    for name in ("attention", "flash_attention", "flash_attention_bwd", "paged_attention", "common"))
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
FLASH, PAGED = OPS["flash_attention"], OPS["paged_attention"]
ARCHITECTURES = (80, 86, 90, 100)


def ends(lengths, device):
    return torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32).to(device)


@pytest.fixture(autouse=True)
def interpreted_in_two_dtypes(request, device):
    """Skips bfloat16 in the interpreter, which computes in float32 for every dtype and takes seconds a call. On a GPU each
    dtype has a kernel of its own, so all run there.
    """
    chosen = getattr(request.node, "callspec", None)
    if device.type == "cpu" and chosen is not None and chosen.params.get("dtype") == torch.bfloat16:
        pytest.skip("float32 and float16 are enough in the interpreter")


@pytest.fixture
def randn(device, generator):
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator, device=device).to(dtype)


@pytest.fixture
def short_splits(monkeypatch):
    """Sets the splits along the keys to 128 keys, so that short sequences have several splits."""
    for module in (flash, paged):
        monkeypatch.setattr(module, "SPLIT", 128)


@pytest.fixture
def clean_word(device):
    word = error_word(torch.device(device.type, 0) if device.type == "cuda" else device)
    word.zero_()
    yield word
    word.zero_()


# ------------------------------------------------------------------------------------------------- tables and options
def test_tables_keep_what_decides_bits():
    """The order in which a row is summed must be the same for few query rows (decode) and many (prefill): their tiles may
    differ in rows and warps only. Splits of the keys are whole blocks, and every head size has a tile.
    """
    for arch in ARCHITECTURES:
        for size in (2, 4):
            for head_dim in range(32, 257, 8):
                few, many = (attention.tile_config(head_dim, size, arch, flag) for flag in (True, False))
                assert few[1:3] == many[1:3] and few.num_stages == many.num_stages
                assert attention.SPLIT % many.keys == 0 and many.values >= min(head_dim, 64)
                if size == 2 and arch in (80, 86, 90):  # every warp computes 16 whole rows of scores
                    assert all(tile.rows == 16 * tile.num_warps for tile in (few, many))
                    assert arch == 90 or few.rows >= few.values
                else:
                    assert few == many
                assert flash_bwd.dq_tile(head_dim, size, arch).own in (32, 64, 128)
                sums = [(dk, dv) for dk, dv, _ in flash_bwd.dkdv_tiles(head_dim, size, arch)]
                assert sums in ([(True, True)], [(True, False), (False, True)])


LAYOUTS = """
import re
import torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from tools import compile_kernels as audit
wanted = {"flash_attention": ("d 128, packed", "d 64, packed, at most 64"),
          "paged_attention": ("decode, d 128", "decode, d 64")}
for op, labels in wanted.items():
    for arch in ("80", "90"):
        for x in audit.launches(op, "bfloat16", arch):
            if x.label in labels and x.kernel.__name__ == f"{op}_fwd_kernel":
                source = ASTSource(x.kernel, x.signature, x.constants, x.attributes)
                code = triton.compile(source, target=GPUTarget("cuda", int(arch), 32), options=x.options).asm["ttgir"]
                warps = re.findall(r"nvidia_mma<.*?warpsPerCTA = \\[(\\d+), (\\d+)\\]", code)
                assert warps and set(warps) == {(str(x.options["num_warps"]), "1")}, (x.key, arch, warps)
                print(x.key, arch)
"""


def test_every_warp_owns_whole_rows_of_scores():
    """Each row of scores lies in one warp, in prefill and in decode. Otherwise the number of warps would change the order in
    which a row is summed. The layout is read from the compiled kernels.
    """
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    out = subprocess.run([sys.executable, "-c", LAYOUTS], capture_output=True, text=True, env=environment)
    assert out.returncode == 0 and len(out.stdout.splitlines()) == 8, out.stdout + out.stderr[-3000:]


def test_options():
    assert attention.options(0.5, 0.0, -1, 0) == (0.0, 0.5 * attention.LOG2E, None, 0)
    assert attention.options(0.5, 2.0, 2**40, 3) == (0.25, 2 * attention.LOG2E, None, 3)
    assert attention.options(1e-300, 0.0, 0, -1).outer >= torch.finfo(torch.float32).tiny


@pytest.mark.parametrize("head_dim", (40, 96, 256))
@pytest.mark.parametrize("arch", (80, 90, 100))
def test_every_tile_keeps_the_ladder(arch, head_dim, device, generator, monkeypatch):
    if device.type != "cpu":
        pytest.skip("the GPU has one architecture")
    monkeypatch.setattr(common, "recorded_architecture", arch)
    case = Case("edge", {"lengths": (40, 0, 3), "heads": 2, "kv_heads": 1, "head_dim": head_dim, "causal": True,
                         "return_lse": True})
    for dtype in (torch.float16,) if head_dim > 40 or arch != 90 else (torch.float16, torch.float32):
        sample = FLASH.workload.sample(case, dtype, device, generator)
        upstream = draw_upstream(FLASH, sample, 1.0, generator)
        assert_ladder(FLASH, [Draw(sample, run(FLASH, sample, "triton", upstream), upstream)], f"sm_{arch} {case}")


# ------------------------------------------------------------------------------------------------- splits
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", ({"causal": True}, {"window": (150, 40), "softcap": 3.0}), ids=str)
def test_several_splits(options, dtype, device, generator, short_splits):
    case = Case("edge", {"batch": 1, "queries": 70, "keys": 300, "heads": 2, "kv_heads": 1, "head_dim": 32,
                         "return_lse": True, **options})
    sample = FLASH.workload.sample(case, dtype, device, generator)
    assert_ladder(FLASH, [Draw(sample, run(FLASH, sample, "triton", {}))], str(case))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_bound_on_the_keys_changes_no_bit(dtype, device, randn):
    """A max_seqlen small enough for one split of the keys saves the launch of the merge kernel. The result must have the bits
    of a merge of one split.
    """
    q, k, v = (randn(100, heads, 32, dtype=dtype) for heads in (2, 1, 1))
    cu = ends([30, 70], device)
    call = lambda bound: ik.flash_attention(q, k, v, causal=True, cu_seqlens_q=cu, max_seqlen_q=bound, max_seqlen_k=bound,
                                            return_lse=True, backend="triton")
    for narrow, wide in zip(call(70), call(attention.SPLIT + 1), strict=True):
        assert torch.equal(narrow, wide)


def into_cache(k, v, lengths, block_size, generator):
    """(k_cache, v_cache, block_table) that hold packed k and v [T, G, d] in blocks of random order; unused slots hold NaN."""
    counts = [-(-n // block_size) for n in lengths]
    order = torch.randperm(sum(counts) + 1, generator=generator, device=k.device).int()
    table = torch.full((len(lengths), max(counts) + 1), 2**30, dtype=torch.int32, device=k.device)
    caches = [torch.full((sum(counts) + 1, block_size, *x.shape[1:]), math.nan, dtype=x.dtype, device=x.device)
              for x in (k, v)]
    first = row = 0
    for index, (count, length) in enumerate(zip(counts, lengths, strict=True)):
        table[index, :count] = order[first: first + count]
        slots = torch.arange(length, device=k.device)
        for cache, x in zip(caches, (k, v), strict=True):
            cache[table[index, slots // block_size].long(), slots % block_size] = x[row: row + length]
        first, row = first + count, row + length
    return *caches, table


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk,window,alone", ((1, None, True), (7, (100, 0), True), (64, None, False)), ids=str)
def test_decode_is_prefill_bit_for_bit(dtype, chunk, window, alone, device, generator, randn, short_splits, monkeypatch):
    """The last `chunk` tokens by paged_attention have the bits of a packed prefill, with three splits along the keys. With
    `alone` every split has a program of its own and the results are merged; otherwise one program computes all splits in turn.
    """
    lengths, heads, kv_heads, head_dim = (300, 129), 2, 1, 32
    q, k, v = (randn(sum(lengths), h, head_dim, dtype=dtype) for h in (heads, kv_heads, kv_heads))
    want, want_lse = ik.flash_attention(q, k, v, causal=True, window=window, cu_seqlens_q=ends(lengths, device),
                                        max_seqlen_q=300, max_seqlen_k=300, return_lse=True, backend="triton")
    k_cache, v_cache, table = into_cache(k, v, lengths, 16, generator)
    monkeypatch.setattr(paged, "ENOUGH_PROGRAMS", 10**6 if alone else 0)
    for stop in ((300, 129), (257, 70)):
        seen = [row for start, end in zip((0, 300), stop, strict=True) for row in range(start + end - chunk, start + end)]
        cu = None if chunk == 1 else ends([chunk, chunk], device)
        got, lse = ik.paged_attention(q[seen], k_cache, v_cache, table, torch.tensor(stop, dtype=torch.int32, device=device),
                                      cu_seqlens_q=cu, window=window, return_lse=True, backend="triton")
        assert got.isfinite().all()
        assert torch.equal(got, want[seen]) and torch.equal(lse, want_lse[:, seen])


@pytest.mark.parametrize("most", (1, 8, 10**6))
def test_division_of_the_splits_changes_no_bit(most, device, generator, short_splits, monkeypatch):
    case = Case("edge", {"new": (1, 3), "cached": (400, 0), "heads": 2, "kv_heads": 1, "head_dim": 32, "block_size": 5,
                         "return_lse": True})
    sample = PAGED.workload.sample(case, torch.float16, device, generator)
    call = lambda: ik.paged_attention(**sample.inputs, backend="triton")
    monkeypatch.setattr(paged, "ENOUGH_PROGRAMS", 0)
    want = call()
    monkeypatch.undo()
    monkeypatch.setattr(paged, "SPLIT", 128)
    monkeypatch.setattr(paged, "MOST_PROGRAMS", most)
    for a, b in zip(call(), want, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_forward_is_batch_invariant_over_tiles(dtype, device, randn):
    """A sequence has the same bits in a call of its own, where the tile has few rows, and among longer ones with the large
    tile.
    """
    lengths = (50, 0, 131, 1)
    q, k, v = (randn(sum(lengths), heads, 64, dtype=dtype) for heads in (2, 1, 1))
    together = ik.flash_attention(q, k, v, causal=True, cu_seqlens_q=ends(lengths, device), max_seqlen_q=131,
                                  max_seqlen_k=131, backend="triton")
    for start, stop in ((0, 50), (181, 182)):
        alone = ik.flash_attention(*(x[start:stop] for x in (q, k, v)), causal=True, max_seqlen_q=50, max_seqlen_k=50,
                                   cu_seqlens_q=ends([stop - start], device), backend="triton")
        assert torch.equal(alone, together[start:stop])


# ------------------------------------------------------------------------------------------------- layouts
def test_views_of_a_packed_projection_are_read_in_place(device, randn):
    """Slices for q, k, v and the upstream gradient give the same bits as copies."""
    qkv, upstream = randn(2, 40, 2, 4, 32), randn(2, 40, 4, 64)[..., 16:48]
    views = qkv[:, :, :, :2].flatten(2, 3), qkv[:, :, :, 2], qkv[:, :, :, 3]
    results = []
    for tensors, dout in ((views, upstream), ([x.clone() for x in views], upstream.contiguous())):
        leaves = [x.detach().requires_grad_() for x in tensors]
        out = ik.flash_attention(*leaves, causal=True, backend="triton")
        results.append((out, *torch.autograd.grad(out, leaves, dout)))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


FAR = """
# address space, of which few pages are touched: rows 2^29 elements apart, so that the fifth is beyond 2^31
bases = [torch.empty(5 * 2**29, dtype=torch.float16) for _ in range(4)]
far = [base.as_strided((1, 5, 2, 32), (5 * 2**29, 2**29, 32, 1)).copy_(torch.randn(1, 5, 2, 32)) for base in bases]
attend = lambda q, k, v: ik.flash_attention(q, k, v, causal=True, backend="triton")
both = [results(attend, tensors[:3], lambda i, y: tensors[3]) for tensors in (far, [x.contiguous() for x in far])]
for a, b in zip(*both, strict=True):
    assert torch.equal(a, b)
q = torch.randn(1, 4, 32).half()
cache = bases[0][: (bases[0].numel() // 512) * 512].view(-1, 4, 4, 32)
last = cache.shape[0] - 1
table = torch.tensor([[last, 0]], dtype=torch.int32)
lengths = torch.tensor([6], dtype=torch.int32)
cache[last].copy_(torch.randn(4, 4, 32)), cache[0].copy_(torch.randn(4, 4, 32))
near, near_table = cache[[last, 0]], torch.tensor([[0, 1]], dtype=torch.int32)
want = ik.paged_attention(q, near, near, near_table, lengths, backend="triton")
assert torch.equal(ik.paged_attention(q, cache, cache, table, lengths, backend="triton"), want)
"""


def test_offsets_beyond_two_to_the_31(device):
    assert_far(FAR, device)


# ------------------------------------------------------------------------------------------------- bad indices
BAD = ([1, 4, 9], [0, 5, 4, 9], [0, 4, 8], [0, 4, 10], [0, 2**30, 9], [-3, 4, 9])


@pytest.mark.parametrize("which", ("q", "k"))
@pytest.mark.parametrize("bad", BAD, ids=str)
def test_boundaries_that_cannot_be(bad, which, device, randn, clean_word):
    """With cu_seqlens that do not ascend from 0 to the number of tokens, all results of the call are NaN, nothing outside them
    is written, and the error of `check` names the argument.
    """
    bad = torch.tensor(bad, dtype=torch.int32, device=device)
    good = torch.tensor([0, *range(1, bad.shape[0] - 1), 9], dtype=torch.int32, device=device)
    cu_q, cu_k = (bad, good) if which == "q" else (good, bad)
    q, k, v = randn(9, 2, 32), randn(9, 1, 32), randn(9, 1, 32)
    options = cu_q, cu_k, 9, 9, -1, 0, 0.2, 0.0
    out, lse = torch.ops.internlm2.flash_attention_fwd.triton(q, k, v, *options)
    grads = torch.ops.internlm2.flash_attention_bwd.triton(q, q, k, v, q, torch.zeros_like(lse), None, *options)
    assert all(x.isnan().all() for x in (out, lse, *grads))
    assert int(clean_word) == CODES["flash_attention", f"cu_seqlens_{which}"]
    with pytest.raises(ValueError, match=f"^flash_attention: cu_seqlens_{which}: expected values that start at 0"):
        ik.check()


def paged_call(inputs, backend="triton"):
    cu = inputs.get("cu_seqlens_q")
    return torch.ops.internlm2.paged_attention_fwd.triton(
        inputs["q"], inputs["k_cache"], inputs["v_cache"], inputs["block_table"], inputs["seq_lens"], cu,
        -1 if cu is not None else 1, inputs.get("k_scale"), inputs.get("v_scale"), -1, 0.2, 0.0)


@pytest.mark.parametrize("alone", (True, False))
@pytest.mark.parametrize("wrong", (("block_table", (1, 0), -1), ("block_table", (1, 1), 10**6), ("seq_lens", 1, 0),
                                   ("seq_lens", 1, 2), ("seq_lens", 1, 10**6)), ids=str)
def test_paged_indices_that_cannot_be(wrong, alone, device, generator, clean_word, short_splits, monkeypatch):
    """A sequence with an invalid block-table entry or length has NaN in its rows; the other sequences are unchanged."""
    argument, index, value = wrong
    monkeypatch.setattr(paged, "ENOUGH_PROGRAMS", 10**6 if alone else 0)
    case = Case("edge", {"new": (1, 3, 2), "cached": (20, 140, 7), "heads": 4, "kv_heads": 2, "head_dim": 32,
                         "block_size": 16})
    inputs = PAGED.workload.sample(case, torch.float16, device, generator).inputs
    want, want_lse = paged_call(inputs)
    ik.check()
    inputs[argument][index] = value
    got, lse = paged_call(inputs)
    assert got[1:4].isnan().all() and lse[:, 1:4].isnan().all()
    others = [0, 4, 5]
    assert torch.equal(got[others], want[others]) and torch.equal(lse[:, others], want_lse[:, others])
    assert int(clean_word) == CODES["paged_attention", argument]
    with pytest.raises(ValueError, match=f"^paged_attention: {argument}: expected values from"):
        ik.check()


def test_paged_boundaries_that_cannot_be(device, generator, clean_word):
    case = Case("edge", {"new": (1, 3), "cached": (20, 40), "heads": 4, "kv_heads": 2, "head_dim": 32, "block_size": 16})
    inputs = PAGED.workload.sample(case, torch.float16, device, generator).inputs
    inputs["cu_seqlens_q"][1] = 9
    assert all(x.isnan().all() for x in paged_call(inputs))
    with pytest.raises(ValueError, match="^paged_attention: cu_seqlens_q: expected values that start at 0"):
        ik.check()


def test_int8_scale_of_zero_counts_as_one_and_nan_stays_nan(device, generator):
    case = Case("edge", {"new": (1, 1), "cached": (20, 40), "heads": 2, "kv_heads": 1, "head_dim": 32, "block_size": 8,
                         "int8": True})
    inputs = PAGED.workload.sample(case, torch.float16, device, generator).inputs
    first, last = inputs["block_table"][0, 0].long(), inputs["block_table"][1, 0].long()
    for name in ("k_scale", "v_scale"):
        inputs[name][first, 3] = 1.0
    want, _ = paged_call(inputs)
    for name in ("k_scale", "v_scale"):
        inputs[name][first, 3] = 0.0
    inputs["v_scale"][inputs["block_table"][0, 2].long(), 5:] = math.nan  # past the end of the 21 keys
    assert torch.equal(paged_call(inputs)[0], want) and want.isfinite().all()
    inputs["k_scale"][last, 1] = math.nan
    got, _ = paged_call(inputs)
    assert got[1].isnan().all() and torch.equal(got[0], want[0])


# ------------------------------------------------------------------------------------------------------ rows with one key
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("lengths,options", (((1, 1, 1), {}), ((1, 40, 1), {"causal": True}), ((40,), {"window": (0, 0)}),
                                             ((3, 20), {"causal": True, "softcap": 5.0})), ids=str)
def test_a_row_that_sees_one_key_has_no_gradient_of_the_score(lengths, options, dtype, device, randn):
    """The softmax of one score is 1 whatever the score is, so dq is exactly 0, and so is what the row adds to dk."""
    q, k, v = 8 * randn(sum(lengths), 2, 64), 8 * randn(sum(lengths), 1, 64), randn(sum(lengths), 1, 64)
    leaves = [x.to(dtype).requires_grad_() for x in (q, k, v)]
    cu = ends(lengths, device)
    out = ik.flash_attention(*leaves, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=max(lengths), backend="triton", **options)
    alone = torch.zeros(sum(lengths), dtype=torch.bool, device=device)
    alone[cu[:-1].long()] = "causal" in options or max(lengths) == 1
    alone |= options.get("window") == (0, 0)
    upstream = torch.where(alone[:, None, None], randn(*out.shape), torch.zeros_like(out, dtype=torch.float32)).to(dtype)
    dq, dk, dv = torch.autograd.grad(out, leaves, upstream)
    assert alone.any() and (dtype == torch.float32 or torch.equal(out[alone], leaves[2][alone].expand(-1, 2, -1)))
    assert not dq.any() and not dk.any() and dv.any()
