"""What is special to the Triton backend: its larger tiles, bad indices found on the device, offsets beyond 2^31, its launches.
"""

import inspect

import pytest
import torch
from far import assert_far

import internlm2_kernels as ik
from internlm2_kernels._device_errors import CODES, error_word
from internlm2_kernels._registry import _C, OPS
from internlm2_kernels.testing import Draw, assert_ladder, draw_upstream, run
from internlm2_kernels.workloads import Case

pytest.importorskip("triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def triton_module(name):
    return __import__(f"internlm2_kernels._triton.{name}", fromlist=[name])


@pytest.fixture
def launched(monkeypatch):
    """A list that collects the kernel launches of the test, which are recorded instead of run."""
    calls = []
    monkeypatch.setattr(triton_module("common"), "record", lambda *call: calls.append(call))
    return calls


# ------------------------------------------------------------------------------------------------- rows of any length
def check_rms_norm(dims, dtype, device, generator):
    op = OPS["rms_norm"]
    sample = op.workload.sample(Case("edge", dims), dtype, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    assert_ladder(op, [Draw(sample, run(op, sample, "triton", upstream), upstream)], str(dims))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dims", ({"rows": 5, "cols": 300}, {"rows": 35, "cols": 257, "residual": True, "rounding": "hf"},
                                  {"rows": 7, "cols": 65, "residual": True, "weight": "float32"}), ids=str)
def test_rms_norm_rows_beyond_the_largest_tile(dims, dtype, device, generator, monkeypatch):
    """The kernels for rows wider than the largest tile are right. The tile limits are lowered, so that small rows use these
    kernels, with several tiles a row.
    """
    module = triton_module("rms_norm")
    monkeypatch.setattr(module, "LARGEST_TILE", 64)
    monkeypatch.setattr(module, "LARGEST_BACKWARD_TILE", 64)
    check_rms_norm(dims, dtype, device, generator)


@pytest.mark.parametrize("cols", (16385, pytest.param(65537, marks=pytest.mark.slow)))
def test_rms_norm_long_rows(cols, device, generator):
    check_rms_norm({"rows": 2, "cols": cols, "residual": True}, torch.bfloat16, device, generator)


def test_rms_norm_wide_forward_and_narrow_agree(device, generator, monkeypatch):
    """The kernels for wide and for narrow rows give the same result, up to the rounding of sums in another order."""
    x, w = torch.randn(3, 500, generator=generator, device=device), torch.ones(500, device=device)
    narrow = ik.rms_norm(x, w, backend="triton")
    monkeypatch.setattr(triton_module("rms_norm"), "LARGEST_TILE", 128)
    torch.testing.assert_close(ik.rms_norm(x, w, backend="triton"), narrow, rtol=3e-7, atol=0)


@pytest.mark.parametrize("far", (200_000, 2**31 - 1, 2**40))
def test_rope_table_of_far_positions(far, device):
    positions = torch.tensor([0, 1, far - 1, far], device=device)
    got = ik.rope_table(positions, 64, backend="triton")
    want = ik.rope_table(positions, 64, backend="reference")
    for table, gold in zip(got, want, strict=True):
        torch.testing.assert_close(table, gold, rtol=0, atol=6e-8)


def test_dweight_partial_sums_depend_on_the_number_of_rows_alone(launched):
    """How the rows are divided into partial sums of dweight depends on their number alone, not on the device or the rows'
    strides, so that the order of summation, and with it the bits, are the same everywhere.
    """
    fwd, bwd = triton_module("rms_norm").rms_norm_fwd, triton_module("rms_norm").rms_norm_bwd
    for rows, cols in ((5, 64), (8192, 4096), (8192, 32768), (100_000, 128)):
        weight, rstd = torch.empty(cols, device="meta"), torch.empty(rows, device="meta")
        seen = set()
        for h in (torch.empty(rows, cols, device="meta"), torch.empty(cols, device="meta").expand(rows, cols),
                  torch.empty(rows, 2, cols, device="meta")[:, 0]):
            launched.clear()
            fwd(h, weight, 1e-5, False)
            bwd(h, None, h, weight, rstd, False, True)
            (sums,) = [arguments for kernel, arguments, _ in launched if kernel.__name__ == "rms_norm_dweight_kernel"]
            seen.add((tuple(sums["partial_ptr"].shape), sums["PARTIALS"], sums["BLOCK"]))
        assert len(seen) == 1 and next(iter(seen))[0][0] <= 264


# ------------------------------------------------------------------------------------------------- launches
def test_every_pass_has_a_launcher_of_its_schema():
    for name, op in OPS.items():
        if "triton" not in op.backends:
            continue
        for pass_name in op.schemas:
            launcher = getattr(triton_module(name), f"{name}_{pass_name}")
            schema = op.overloads[pass_name]["triton"]._schema
            assert len(inspect.signature(launcher).parameters) == len(schema.arguments), launcher


EMPTY = ("rows", "tokens", "batch", "sequences")  # dimensions that are 0 in an empty case
NUMBERS = {"adamw", "ppo_policy_loss", "ppo_value_loss", "reward_loss", "reward_loss_from_last", "squared_norm"}


@pytest.mark.parametrize("op", [op for op in OPS.values() if "triton" in op.backends], ids=lambda op: op.name)
def test_nothing_is_launched_for_nothing(op, device, generator, launched):
    empty = [case for case in op.workload.cases if 0 in map(case.dims.get, EMPTY) or case.dims.get("new") == ()]
    if op.name in NUMBERS:
        pytest.skip("a loss, a sum or a count of steps is written even so")
    assert empty, "an operator's edge cases hold an empty one"
    for case in empty:
        sample = op.workload.sample(case, torch.float32, device, generator)
        run(op, sample, "triton", draw_upstream(op, sample, 1.0, generator) if sample.grad else {})
    assert not launched


def test_launches_pin_contraction_and_use_one_grid_axis(launched, device, generator):
    for op in OPS.values():
        if "triton" in op.backends:
            sample = op.workload.sample(op.workload.cases[0], torch.float32, device, generator)
            op.public(**sample.inputs, backend="triton")
    assert len(launched) >= 5 and all(options["enable_fp_fusion"] is False for _, _, options in launched)
    source = inspect.getsource(triton_module("common").launch)
    assert "kernel[(programs,)]" in source
    for name in OPS:
        assert "program_id(1)" not in inspect.getsource(triton_module(name))


# ------------------------------------------------------------------------------------------------- indices on the device
@pytest.fixture
def clean_word(device):
    word = error_word(torch.device(device.type, 0) if device.type == "cuda" else device)
    word.zero_()
    yield word
    word.zero_()


def tables(rows, half, device):
    return ik.rope_table(rows, 2 * half, device=device, backend="reference")


@pytest.mark.parametrize("bad", (-1, 9, 2**40, -(2**40)))
@pytest.mark.parametrize("interleaved", (False, True))
def test_apply_rope_position_out_of_range(bad, interleaved, device, generator, clean_word):
    q, k = torch.randn(5, 3, 12, generator=generator, device=device), torch.randn(5, 1, 12, generator=generator, device=device)
    cos, sin = tables(9, 6, device)
    good = torch.tensor([8, 0, 3, 1, 2], device=device)
    run_it = torch.ops.internlm2.apply_rope_fwd.triton
    want = run_it(q, k, cos, sin, good, interleaved, False)
    ik.check()
    positions = good.clone()
    positions[3] = bad
    got = run_it(q, k, cos, sin, positions, interleaved, False)
    for out, expected in zip(got, want, strict=True):
        assert out[3].isnan().all()
        assert torch.equal(out[[0, 1, 2, 4]], expected[[0, 1, 2, 4]])
    with pytest.raises(ValueError, match=r"^apply_rope: positions: expected values from 0 to the rows of cos minus 1, got"):
        ik.check()
    ik.check()  # an error is reported once


def qkv_case(device, generator, dtype=torch.float32):
    qkv = torch.randn(5, (4 + 2 * 2) * 8, generator=generator, device=device).to(dtype)
    return qkv, *tables(9, 4, device)


def test_qkv_rope_position_out_of_range(device, generator, clean_word):
    qkv, cos, sin = qkv_case(device, generator)
    positions = torch.tensor([8, 0, 9, 1, -2], dtype=torch.int32, device=device)
    outputs = torch.ops.internlm2.qkv_rope_fwd.triton(qkv, cos, sin, positions, 4, 2)
    grads = torch.ops.internlm2.qkv_rope_bwd.triton(*outputs, cos, sin, positions)
    for out in (*outputs, grads):
        assert out[[2, 4]].isnan().all() and not out[[0, 1, 3]].isnan().any()
    assert int(clean_word) == CODES["qkv_rope", "positions"]
    with pytest.raises(ValueError, match=r"qkv_rope: positions: "):
        ik.check()


@pytest.mark.parametrize("quantized", (False, True))
def test_qkv_rope_slot_out_of_range(quantized, device, generator, clean_word):
    """A token whose slot is out of range is not written to the cache, but its q, k and v are right. A token whose position is
    out of range is not written either.
    """
    qkv, cos, sin = qkv_case(device, generator)
    positions = torch.tensor([8, 0, 1, 100, 2], device=device)
    slots = torch.tensor([0, 12, -2, 3, 11], device=device)

    def caches():
        dtype = torch.int8 if quantized else qkv.dtype
        k, v = (torch.full((3, 4, 2, 8), 7, dtype=dtype, device=device) for _ in range(2))
        scales = [torch.full((3, 4, 2), 7.0, device=device) for _ in range(2)] if quantized else [None, None]
        return [k, v, *scales]

    got = caches()
    q, k, v = torch.ops.internlm2.qkv_rope_cache_fwd.triton(qkv, cos, sin, positions, 4, 2, *got, slots)
    assert q[3].isnan().all() and not q[[0, 1, 2, 4]].isnan().any() and v[3].isnan().all()
    for cache in filter(lambda t: t is not None, got):
        rows = cache.view(12, 2, -1)
        changed = (rows != 7).flatten(1).any(1)
        assert changed.nonzero().flatten().tolist() == [0, 11]
    assert int(clean_word) == CODES["qkv_rope", "positions"] | CODES["qkv_rope", "cache.slots"]
    with pytest.raises(ValueError, match=r"qkv_rope: positions: .*; qkv_rope: cache\.slots: expected values from -1"):
        ik.check()


def test_a_quantised_row_with_nan_reads_back_as_nan(device, generator, clean_word):
    qkv, cos, sin = qkv_case(device, generator)
    qkv[1, -3] = float("nan")  # in the value head of the last group
    k, v = (torch.zeros(2, 4, 2, 8, dtype=torch.int8, device=device) for _ in range(2))
    k_scale, v_scale = (torch.zeros(2, 4, 2, device=device) for _ in range(2))
    torch.ops.internlm2.qkv_rope_cache_fwd.triton(qkv, cos[:5], sin[:5], None, 4, 2, k, v, k_scale, v_scale,
                                                  torch.arange(5, device=device))
    read = (v.float() * v_scale[..., None]).view(8, 2, 8)
    assert read[1, 1].isnan().all() and not read[1, 0].isnan().any() and not read[[0, 2, 3, 4]].isnan().any()


def test_validate(device, generator, clean_word):
    q, (cos, sin) = torch.randn(2, 1, 4, generator=generator, device=device), tables(2, 2, device)
    bad = torch.tensor([0, 5], device=device)
    with pytest.raises(ValueError, match="apply_rope: positions"), ik.validate():
        torch.ops.internlm2.apply_rope_fwd.triton(q, q, cos, sin, bad, False, False)
    with pytest.raises(KeyError, match="mine"), ik.validate():  # the block's own exception is raised
        torch.ops.internlm2.apply_rope_fwd.triton(q, q, cos, sin, bad, False, False)
        raise KeyError("mine")
    with pytest.raises(ValueError, match="apply_rope: positions"), ik.validate():  # from before the block
        raise AssertionError("the block must not begin")
    with ik.validate():
        torch.ops.internlm2.apply_rope_fwd.triton(q, q, cos, sin, torch.tensor([1, 0], device=device), False, False)


def test_error_word_of_inference_mode_can_be_reset(monkeypatch):
    from internlm2_kernels import _device_errors

    monkeypatch.setattr(_device_errors, "_words", {})
    with torch.inference_mode():
        word = error_word(torch.device("cpu"))
    word.fill_(1)
    with pytest.raises(ValueError, match="apply_rope: positions"):
        ik.check()
    assert int(word) == 0


def test_compiled_kernels_set_the_same_bits():
    if _C is None:
        pytest.skip("no compiled library")
    bits = _C.device_errors()
    assert bits and all(CODES[tuple(name.split(": "))] == bit for name, bit in bits.items())


# ------------------------------------------------------------------------------------------------- beyond 2^31
FAR = """
from internlm2_kernels._triton import rms_norm as module
from internlm2_kernels.ops.qkv_rope import KVCache
# 4 GiB of address space each, of which few pages are touched; two, for autograd counts the writes to a saved tensor's base
base, upstream = (torch.empty(2**31 + 2**16, dtype=torch.bfloat16) for _ in range(2))
def far(*shape, base=base):
    x = base.as_strided(shape, (2**30, *torch.empty(shape).stride()[1:]))
    return x.copy_(torch.randn(shape))
def agree(function, *inputs):
    for got, want in zip(function(*inputs, "triton"), function(*[x.contiguous() for x in inputs], "reference")):
        torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)
def grads(function):
    up = lambda i, y: upstream.as_strided(y.shape, (2**30, *y.stride()[1:]), 4096 * i)
    return lambda *inputs: results(lambda *leaves: function(*leaves, inputs[-1]), inputs[:-1], up)
far(3, 2**14, base=upstream)  # the same upstream gradients for every operator
w = torch.randn(64).bfloat16()
cos, sin = ik.rope_table(3, 32, backend="reference")
agree(grads(lambda x, w, b: ik.rms_norm(x, w, backend=b)), far(3, 64), w)
agree(grads(lambda x, b: ik.rms_norm(w.expand(3, 64), w, residual=x, backend=b)), far(3, 64))
module.LARGEST_TILE = module.LARGEST_BACKWARD_TILE = 32  # the kernels of long rows
agree(grads(lambda x, w, b: ik.rms_norm(x, w, backend=b)), far(3, 64), w)
agree(grads(lambda x, b: ik.rms_norm(w.expand(3, 64), w, residual=x, backend=b)), far(3, 64))
agree(grads(lambda x, b: ik.swiglu(x, backend=b)), far(3, 128))
agree(grads(lambda x, b: ik.apply_rope(x, x[:, :1], cos, sin, backend=b)), far(3, 4, 32))
agree(grads(lambda x, b: ik.qkv_rope(x, cos, sin, num_heads=4, num_kv_heads=2, backend=b)), far(3, 8 * 32))
cache = base[: 2**31 + 2**13].view(-1, 16, 2, 32)
slots = torch.tensor([0, 2**25 - 7, cache.shape[0] * 16 - 1])
x = torch.randn(3, 8 * 32).bfloat16()
q, k, v = ik.qkv_rope(x, cos, sin, num_heads=4, num_kv_heads=2, cache=KVCache(cache, cache, slots),
                      backend="triton")
flat = cache.view(-1, 2, 32)
assert torch.equal(flat[slots], v), "cache"
"""


def test_offsets_beyond_two_to_the_31(device):
    """Kernels read and write the right elements of tensors whose rows are 2^30 elements apart, so that offsets exceed 32
    bits.
    """
    assert_far(FAR, device)
