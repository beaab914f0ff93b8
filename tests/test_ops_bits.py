"""The shared checks of bits, memory, strides and autograd's other uses: every operator x backend, as in test_ops.py."""

import subprocess
import sys

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

from internlm2_kernels._registry import Case
from internlm2_kernels.testing import draw_upstream, run, with_leaves

backend, native, pytest_generate_tests = parameters.backend, parameters.native, parameters.pytest_generate_tests


# --------------------------------------------------------------------------------- deterministic, batch-invariant
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_bitwise_repeatable(op, variant, backend, native, dtype, device, generator):
    """Equal bits over repeats and for 1 and 2 threads, at a size that does run in parallel."""
    if dtype not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    case = max(smoke_cases(op), key=row_count)
    if variant[1] != "interpreted":
        case = widened(case)
    sample = sample_of(op, case, dtype, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    want = run(op, sample, backend, upstream)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, threads):
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
        bits = b"".join(t.contiguous().numpy().tobytes() for t in result.values())
        print(op.name, case, hashlib.sha256(bits).hexdigest())
"""


def test_bitwise_in_another_process(device):
    if device.type != "cpu":
        pytest.skip("the digest runs the cpp backend")
    import pathlib

    folder = str(pathlib.Path(__file__).parent)
    digests = {subprocess.run([sys.executable, "-c", _DIGEST, folder, threads], capture_output=True, text=True,
                              check=True).stdout for threads in ("1", "2")}
    assert len(digests) == 1 and len(digests.pop().splitlines()) >= len(OPS)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_batch_invariant(op, variant, backend, native, dtype, device, generator):
    """A row's bits do not change with what else is in the batch: alone, in front, in the middle, at the end."""
    if dtype not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    for case in smoke_cases(op):
        count = row_count(case)
        if count == 0:  # packed: its sequences are their own tests' business
            continue
        sample = sample_of(op, case, dtype, device, generator)
        whole = run(op, sample, backend)
        for begin, end in ((0, 1), (count - 1, count), (1, count - 1), (count // 2, count // 2 + 2)):
            part = run(op, rows_between(op, sample, count, begin, end), backend)
            assert_bitwise(part, {n: v[begin:end] for n, v in whole.items()}, f"{case} rows {begin}:{end}")


# ------------------------------------------------------------------------------------------------ memory and strides
def test_fresh_memory_is_poisoned():
    assert torch.empty(1000).isnan().all() and torch.empty_like(torch.ones(3, dtype=torch.bfloat16)).isnan().all()


def test_strides(op, variant, backend, native, device, generator):
    """Sliced, transposed and expanded inputs and upstream gradients give the contiguous result to the bit."""
    for case in smoke_cases(op)[: 1 if variant[1] == "interpreted" else 2]:  # the interpreter takes a second a call
        sample = sample_of(op, case, torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        want = run(op, sample, backend, upstream)
        for argument, value in sample.inputs.items():
            if not isinstance(value, torch.Tensor) or value.dim() == 0 or argument in op.contiguous:
                continue
            for what, strided in strided_copies(value):
                assert_bitwise(run(op, replaced(sample, **{argument: strided}), backend, upstream), want, f"{argument} {what}")
            if value.dim() > 1 and value.is_floating_point():
                expanded = value[:1].expand_as(value)
                got, flat = (run(op, replaced(sample, **{argument: e}), backend, upstream)
                             for e in (expanded, expanded.contiguous()))
                assert_bitwise(got, flat, f"{argument} expanded")
        for output, gradient in upstream.items():
            for what, strided in strided_copies(gradient):
                assert_bitwise(run(op, sample, backend, {**upstream, output: strided}), want, f"d {output} {what}")
            ones = torch.ones((), device=device).expand_as(gradient)
            assert_bitwise(run(op, sample, backend, {**upstream, output: ones}),
                           run(op, sample, backend, {**upstream, output: ones.contiguous()}), f"d {output} expanded")


def test_leading_dimensions(op, variant, backend, native, device, generator):
    """Four leading dimensions give the rows of the flat call; what the first dimension counts is split in three."""
    case = smoke_cases(op)[0]
    if op.name == "rope_table" or not op.rowwise:
        pytest.skip(f"the dimensions of {op.name} are fixed")
    case = Case("lead", {**case.dims, "rows" if "rows" in case.dims else "tokens": 12, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    want = run(op, sample, backend)
    lead = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in sample.inputs.items()
            if n in op.batched and isinstance(v, torch.Tensor) and v.shape[0] == 12}
    got = run(op, replaced(sample, **lead), backend)
    assert_bitwise({n: v.flatten(0, 2) for n, v in got.items()}, want)


def test_leading_dimensions_backward(op, variant, backend, native, device, generator):
    """Gradients through four leading dimensions, of a contiguous and of a transposed input."""
    if "backward" not in op.directions or not op.rowwise:
        pytest.skip("no backward, or fixed dimensions")
    case = smoke_cases(op)[0]
    case = Case("lead", {**case.dims, "rows" if "rows" in case.dims else "tokens": 12, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    want = run(op, sample, backend, upstream)
    shaped = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in sample.inputs.items()
              if n in op.batched and isinstance(v, torch.Tensor) and v.shape[0] == 12}
    up = {n: v.view(2, 3, 2, *v.shape[1:]) for n, v in upstream.items()}
    turned = {n: v.transpose(0, 1).contiguous().transpose(0, 1) for n, v in shaped.items()}
    for inputs in (shaped, turned):
        got = run(op, replaced(sample, **inputs), backend, up)
        for name, value in got.items():
            value = value.flatten(0, 2) if value.dim() > want[name].dim() else value
            assert_bitwise({name: value}, {name: want[name]}, name)


@pytest.mark.parametrize("shape", ((0,), (0, 3), (2, 0, 3), (2, 3, 0)), ids=str)
def test_nothing_in_any_dimension(op, variant, backend, native, shape, device, generator):
    """Empty leading dimensions of every rank, and the expanded gradient that `.sum().backward()` brings."""
    if not op.rowwise:
        pytest.skip(f"the dimensions of {op.name} are fixed")
    case = smoke_cases(op)[0]
    case = Case("empty", {**case.dims, "rows" if "rows" in case.dims else "tokens": 0, "positions": "int64"})
    sample = sample_of(op, case, torch.float32, device, generator)
    if op.name == "rope_table" and len(shape) > 1:
        pytest.skip("positions have one dimension")
    empty = {n: v.reshape(*shape, *v.shape[1:]) for n, v in sample.inputs.items()
             if n in op.batched and isinstance(v, torch.Tensor) and v.shape[0] == 0}
    sample = with_leaves(replaced(sample, **empty))
    outputs = op.public(**sample.inputs, backend=backend)
    outputs = (outputs,) if isinstance(outputs, torch.Tensor) else outputs
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


def test_native_calls_run_no_aten_compute(op, variant, backend, device, generator):
    """A cpp call does its work itself: besides our operators only allocation and views are dispatched."""
    if backend != "cpp":
        pytest.skip("the rule is cpp's")
    allowed = {"empty", "new_empty", "empty_like", "view", "_unsafe_view", "slice", "detach", "alias", "reshape", "arange",
               "scalar_tensor", "lift_fresh", "_to_copy", "empty_strided"}
    for case in smoke_cases(op):
        sample = sample_of(op, case, torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        with Recorder() as recorder:
            run(op, sample, backend, upstream)
        names = [call[0]._schema.name for call in recorder.calls]
        assert any(n.startswith("internlm2::") for n in names)
        foreign = {n for n in names if not n.startswith("internlm2::") and n.removeprefix("aten::") not in allowed}
        assert not foreign, f"{case}: {foreign}"


# --------------------------------------------------------------------------------------------- autograd's other uses
def _first(op, device, generator):
    return sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)


def test_activation_checkpointing(op, variant, backend, native, device, generator):
    if "backward" not in op.directions:
        pytest.skip("no backward")
    sample = _first(op, device, generator)
    upstream = draw_upstream(op, sample, 1.0, generator)
    again = lambda **inputs: torch.utils.checkpoint.checkpoint(
        lambda: op.public(**inputs, backend=backend), use_reentrant=False)
    assert_bitwise(run(op, sample, again, upstream), run(op, sample, backend, upstream))


def test_only_wanted_gradients(op, variant, backend, native, device, generator):
    """Each differentiable argument alone gets the gradient that it gets among all."""
    if "backward" not in op.directions:
        pytest.skip("no backward")
    for case in smoke_cases(op)[:2]:
        sample = sample_of(op, case, torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        want = run(op, sample, backend, upstream)
        for argument in sample.grad:
            got = run(op, type(sample)(sample.inputs, (argument,)), backend, upstream)
            assert_bitwise({f"d_{argument}": got[f"d_{argument}"]}, {f"d_{argument}": want[f"d_{argument}"]}, argument)


def test_each_output_alone(op, variant, backend, native, device, generator):
    """A loss that uses one output only: the others' gradients are absent, not garbage."""
    if "backward" not in op.directions:
        pytest.skip("no backward")
    for case in smoke_cases(op)[:2]:
        sample = sample_of(op, case, torch.float32, device, generator)
        for output, gradient in draw_upstream(op, sample, 1.0, generator).items():
            got, want = (run(op, sample, b, {output: gradient}) for b in (backend, "reference"))
            for name in want:
                if name.startswith("d_"):
                    torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


def test_double_backward_and_functorch_say_no(op, variant, backend, native, device, generator):
    if "backward" not in op.directions:
        pytest.skip("no backward")
    sample = with_leaves(_first(op, device, generator))
    output = op.public(**sample.inputs, backend=backend)
    output = output if isinstance(output, torch.Tensor) else output[0]
    leaf = sample.inputs[sample.grad[0]]
    (grad,) = torch.autograd.grad(output.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice|once_differentiable"):
        grad.sum().backward()
    one = lambda x: op.public(**{**sample.inputs, sample.grad[0]: x}, backend=backend)
    with pytest.raises(RuntimeError, match="functorch transforms"):
        torch.func.grad(lambda x: (lambda y: y if isinstance(y, torch.Tensor) else y[0])(one(x)).sum())(leaf.detach())


def test_forward_mode_says_no(op, variant, backend, native, device, generator):
    """A dropped tangent would be a wrong derivative without a word."""
    if not (sample := _first(op, device, generator)).grad:
        pytest.skip("nothing to differentiate")
    name = sample.grad[0]
    call = lambda chosen: torch.func.jvp(lambda x: op.public(**{**sample.inputs, name: x}, backend=chosen),
                                         (sample.inputs[name],), (torch.ones_like(sample.inputs[name]),))
    with pytest.raises(RuntimeError, match=f"{op.name}: backend='{backend}' has no forward-mode derivative"):
        call(backend)
    _, tangent = call("reference")
    assert (tangent if isinstance(tangent, torch.Tensor) else tangent[0]).any()


def test_autocast_keeps_the_dtype(op, variant, backend, native, device, generator):
    """Operators keep their inputs' dtype; those that cast, compute in autocast's."""
    sample = _first(op, device, generator)
    want = run(op, sample.to(torch.bfloat16) if op.autocast else sample, backend)
    with torch.autocast(device.type, dtype=torch.bfloat16):
        assert_bitwise(run(op, sample, backend), want)
