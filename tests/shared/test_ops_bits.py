"""The shared checks of equal bits, of memory and of strides: for every operator x backend of the registry, as in
test_ops.py.
"""

import subprocess
import sys
from pathlib import Path

import parameters
import pytest
import torch
from shared import (
    OPS,
    Recorder,
    assert_bitwise,
    forward_backward,
    replaced,
    row_count,
    rows_between,
    sample_of,
    smoke_cases,
    strided_copies,
    widened,
)

from internlm2_kernels.testing import draw_upstream, flat, run, with_leaves
from internlm2_kernels.workloads import Case

backend, native, pytest_generate_tests = parameters.backend, parameters.native, parameters.pytest_generate_tests


# --------------------------------------------------------------------------------- deterministic, batch-invariant
def skip_without(op, variant, dtype):
    if dtype not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    if variant[1] == "interpreted" and dtype != torch.float32:
        pytest.skip("the same kernel; its interpreter takes up to seconds a call")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bitwise_repeatable(op, variant, backend, native, dtype, device, generator):
    """Repeats, and runs with 1 and 2 threads, give equal bits at a size that is distributed over threads."""
    skip_without(op, variant, dtype)
    case = max(smoke_cases(op), key=row_count)
    if variant[1] != "interpreted":
        case = widened(case)
    sample = sample_of(op, case, dtype, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    want = run(op, sample, backend, upstream)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads) if variant[1] != "interpreted" else (1,):
            torch.set_num_threads(count)
            assert_bitwise(run(op, sample, backend, upstream), want, f"{count} threads")
    finally:
        torch.set_num_threads(threads)


_DIGEST = """
import hashlib, sys, torch
sys.path.insert(0, sys.argv[1])
import shared
torch.set_num_threads(int(sys.argv[2]))
for op in shared.OPS.values():
    for case in shared.smoke_cases(op):
        generator = torch.Generator().manual_seed(11)
        sample = shared.sample_of(op, case, torch.float32, "cpu", generator)
        result = shared.forward_backward(op, sample, "cpp", generator)
        bits = b"".join(t.flatten().contiguous().view(torch.uint8).numpy().tobytes() for t in result.values())
        print(op.name, case, hashlib.sha256(bits).hexdigest())
"""


def test_bitwise_in_another_process(device):
    if device.type != "cpu":
        pytest.skip("the digest runs the cpp backend")
    support = str(Path(parameters.__file__).parent)
    digests = {subprocess.run([sys.executable, "-c", _DIGEST, support, threads], capture_output=True, text=True,
                              check=True).stdout for threads in ("1", "2")}
    assert len(digests) == 1 and len(digests.pop().splitlines()) >= len(OPS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_batch_invariant(op, variant, backend, native, dtype, device, generator):
    """A row has the same bits alone, and at the front, in the middle and at the end of a batch."""
    skip_without(op, variant, dtype)
    for case in smoke_cases(op)[: 2 if variant[1] == "interpreted" else None]:
        count = row_count(case)
        if count == 0:  # packed sequences have tests of their own
            continue
        sample = sample_of(op, case, dtype, device, generator)
        whole = run(op, sample, backend)
        parts = (0, 1), (count - 1, count), (1, count - 1), (count // 2, count // 2 + 2)
        for begin, end in parts[:2] if variant[1] == "interpreted" else parts:
            part = run(op, rows_between(op, sample, count, begin, end), backend)
            assert_bitwise(part, {n: v[begin:end] for n, v in whole.items()}, f"{case} rows {begin}:{end}")


# ------------------------------------------------------------------------------------------------ memory and strides
def test_fresh_memory_is_poisoned():
    assert torch.empty(1000).isnan().all() and torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def test_strides(op, variant, backend, native, device, generator):
    """Inputs and upstream gradients that are sliced, transposed or expanded give the bits of contiguous ones."""
    if variant[1] == "interpreted":
        pytest.skip("test_strides_of_all_at_once: the interpreter takes up to seconds a call")
    for case in smoke_cases(op)[:2]:
        sample = sample_of(op, case, torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        want = run(op, sample, backend, upstream)
        for argument, value in may_be_strided(op, sample):
            for what, strided in strided_copies(value):
                assert_bitwise(run(op, replaced(sample, **{argument: strided}), backend, upstream), want, f"{argument} {what}")
            if value.dim() > 1 and value.is_floating_point():
                expanded = value[:1].expand_as(value)
                got, flat = (run(op, replaced(sample, **{argument: e}), backend, upstream)
                             for e in (expanded, expanded.contiguous()))
                assert_bitwise(got, flat, f"{argument} expanded")
        for output, gradient in upstream.items():
            for what, strided in strided_copies(gradient) if gradient.dim() else ():
                assert_bitwise(run(op, sample, backend, {**upstream, output: strided}), want, f"d {output} {what}")
            ones = torch.ones((), device=device).expand_as(gradient)
            assert_bitwise(run(op, sample, backend, {**upstream, output: ones}),
                           run(op, sample, backend, {**upstream, output: ones.contiguous()}), f"d {output} expanded")


def may_be_strided(op, sample):
    return [(name, value) for name, value in sample.inputs.items()
            if isinstance(value, torch.Tensor) and value.dim() and name not in op.workload.contiguous]


def test_strides_of_all_at_once(op, variant, backend, native, device, generator):
    """As test_strides, but every argument and upstream gradient is strided in the same call. That makes few calls, so it runs
    in Triton's interpreter too.
    """
    sample = sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    want = run(op, sample, backend, upstream)
    kinds = {name: dict(strided_copies(value)) for name, value in may_be_strided(op, sample)}
    gradients = {name: dict(strided_copies(value)) for name, value in upstream.items() if value.dim()}
    for what in dict.fromkeys(what for found in (*kinds.values(), *gradients.values()) for what in found):
        inputs, up = ({name: found[what] for name, found in each.items() if what in found} for each in (kinds, gradients))
        assert_bitwise(run(op, replaced(sample, **inputs), backend, {**upstream, **up}), want, what)


def test_leading_dimensions(op, variant, backend, native, device, generator):
    """Inputs whose rows are split over three leading dimensions give the rows of the flat call."""
    case = smoke_cases(op)[0]
    if op.name == "rope_table" or not op.workload.rowwise:
        pytest.skip(f"the dimensions of {op.name} are fixed")
    if variant[1] == "interpreted" and "backward" in op.directions:
        pytest.skip("test_leading_dimensions_backward compares the results too")
    case = Case("lead", {**case.dims, "rows" if "rows" in case.dims else "tokens": 12, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    want = run(op, sample, backend)
    lead = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in sample.inputs.items()
            if n in op.workload.batched and isinstance(v, torch.Tensor) and v.shape[0] == 12}
    got = run(op, replaced(sample, **lead), backend)
    assert_bitwise({n: v.flatten(0, 2) for n, v in got.items()}, want)


def test_leading_dimensions_backward(op, variant, backend, native, device, generator):
    """As test_leading_dimensions, for gradients: rows split over three leading dimensions, contiguous and transposed, give the
    gradients of the flat call.
    """
    if "backward" not in op.directions or not op.workload.rowwise:
        pytest.skip("no backward, or fixed dimensions")
    case = smoke_cases(op)[0]
    case = Case("lead", {**case.dims, "rows" if "rows" in case.dims else "tokens": 12, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    want = run(op, sample, backend, upstream)
    shaped = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in sample.inputs.items()
              if n in op.workload.batched and isinstance(v, torch.Tensor) and v.shape[0] == 12}
    up = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in upstream.items()}
    turned = {n: v.transpose(0, 1).contiguous().transpose(0, 1) for n, v in shaped.items()}
    for inputs in (shaped, turned):
        got = run(op, replaced(sample, **inputs), backend, up)
        for name, value in got.items():
            value = value.flatten(0, 2) if value.dim() > want[name].dim() else value
            assert_bitwise({name: value}, {name: want[name]}, name)


@pytest.mark.parametrize("shape", ((0,), (0, 3), (2, 0, 3), (2, 3, 0)), ids=str)
def test_nothing_in_any_dimension(op, backend, native, shape, device, generator):
    """Inputs with a leading dimension of 0, at each place, give empty results and gradients. The upstream gradient is expanded,
    as it is in `.sum().backward()`.
    """
    if not op.workload.rowwise:
        pytest.skip(f"the dimensions of {op.name} are fixed")
    case = smoke_cases(op)[0]
    case = Case("empty", {**case.dims, "rows" if "rows" in case.dims else "tokens": 0, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    if op.name == "rope_table" and len(shape) > 1:
        pytest.skip("positions have one dimension")
    empty = {n: v.reshape(*shape, *v.shape[1:]) for n, v in sample.inputs.items()
             if n in op.workload.batched and isinstance(v, torch.Tensor) and v.shape[0] == 0}
    sample = with_leaves(replaced(sample, **empty))
    outputs = flat(op.public(**sample.inputs, backend=backend))
    assert all(o.shape[: len(shape)] == shape for o in outputs)
    if sample.grad:
        sum(o.sum() for o in outputs).backward()
        for name in sample.grad:
            grad = sample.inputs[name].grad
            assert grad.shape == sample.inputs[name].shape and not grad.any()


def test_inputs_are_never_written(op, variant, backend, native, device, generator):
    sample = sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)
    before = {n: v.clone() for n, v in sample.inputs.items() if isinstance(v, torch.Tensor)}
    forward_backward(op, sample, backend, generator)
    assert_bitwise({n: sample.inputs[n] for n in before}, before)


def test_native_calls_run_no_aten_compute(op, backend, device, generator):
    """A cpp call computes everything itself: apart from our operators only allocations and views are dispatched."""
    if backend != "cpp":
        pytest.skip("the rule is cpp's")
    allowed = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "slice", "detach", "alias", "reshape", "arange",
               "scalar_tensor", "lift_fresh", "_to_copy", "empty_strided", "_local_scalar_dense"}
    for case in smoke_cases(op):
        sample = sample_of(op, case, torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        with Recorder() as recorder:
            run(op, sample, backend, upstream)
        names = [call[0]._schema.name for call in recorder.calls]
        assert any(n.startswith("internlm2::") for n in names)
        foreign = {n for n in names if not n.startswith("internlm2::")
                   and n.removeprefix("aten::") not in allowed | set(op.workload.copies)}
        assert not foreign, f"{case}: {foreign}"
