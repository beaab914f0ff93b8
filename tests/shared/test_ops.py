"""The shared checks: every operator x backend x dtype x direction keeps docs/contract.md. Operators come from the registry."""

import itertools

import gold
import parameters
import pytest
import torch
from cells import name as cell_name
from cells import variants
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from shared import (
    DTYPES,
    Recorder,
    assert_bitwise,
    counted,
    instruction_set,
    row_count,
    sample_of,
    small_cases,
    smoke_cases,
    strided_copies,
)

from internlm2_kernels.testing import Draw, assert_ladder, draw_upstream, flat, ladder, run, standard, with_leaves
from internlm2_kernels.workloads import Case

backend, native, pytest_generate_tests = parameters.backend, parameters.native, parameters.pytest_generate_tests
INTERPRETED_EXAMPLES = 3  # of test_property: Triton's interpreter takes up to seconds for each
FURTHER_DRAWS = 7  # of test_property


# --------------------------------------------------------------------------------------------------- right values
@pytest.mark.parametrize("direction", ("forward", "backward"))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_ladder(op, variant, backend, dtype, direction, device, seed, record_property):
    if dtype not in op.dtypes or direction not in op.directions:
        pytest.skip(f"{op.name} has no {direction} in {dtype}")
    found = gold.problems(op.name, dtype, direction, device, seed)
    for problem in gold.interpreted(found, dtype) if variant[1] == "interpreted" else found:
        draws = [Draw(x.sample, run(op, x.sample, backend, x.upstream), x.upstream, x.by) for x in problem.inputs]
        assert_ladder(op, draws, f"{problem.case} upstream {problem.scale} {backend}")
        if op.workload.counters and backend != "reference":  # which registers nothing: the optimizer's tests count its steps
            sample = problem.inputs[0].sample
            assert counted(op, sample, backend) == op.workload.counters(sample), problem.case
    record_property("cell", cell_name(op, backend, direction, dtype, variant[1]))


def _spoilt(x):
    """Pairs (what is wrong, wrong version of x): results as a kernel would return them that mishandles an edge of a tensor."""
    if x.any():
        yield "zeros", torch.zeros_like(x)
    if not x.is_floating_point():  # tokens: every wrong one counts
        wrong = x.clone().flatten()
        wrong[x.numel() // 2] += 1
        yield "one wrong token", wrong.view(x.shape)
        return
    yield "NaN", torch.full_like(x, float("nan"))
    if x.numel() < 33:  # a loss or a statistic
        return
    for what, index in (("last row", (-1,)), ("last column", (..., -1)), ("first row", (0,))):
        wrong = x.clone()
        if x.dim() > 1 and x[index].abs().max() > x.abs().max() / 2:
            wrong[index] = 0
        else:  # small or 0 in x already: setting it to 0 might be no fault
            wrong[index] = -torch.where(x[index] < 0, -1, 1) * x.abs().max()
        yield f"{what} lost", wrong
    wrong = x.clone().flatten()
    wrong[-16:] = wrong[-32:-16]
    if (wrong - x.flatten()).abs().max() > x.abs().max() / 4:  # otherwise the shift might change too little to be a fault
        yield "last tile shifted", wrong.view(x.shape)
    wrong = x.clone().flatten()
    wrong[x.numel() // 2] = float("nan")
    yield "one NaN", wrong.view(x.shape)


@pytest.mark.parametrize("scale", (1.0, 1e-4))
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES.keys())
def test_the_ladder_turns_red(op, dtype, scale, device, generator):
    """The error ladder can fail: it rejects results that are zeros, or whose last row, column or tile is wrong, in every
    dtype.
    """
    if dtype not in op.dtypes:
        pytest.skip(f"{op.name} has no {dtype}")
    case = max(smoke_cases(op), key=row_count)
    sample = sample_of(op, case, dtype, device, generator)
    upstream = draw_upstream(op, sample, scale, generator)
    right, by = run(op, sample, "reference", upstream), standard(op, sample, upstream)
    red = lambda got: [rung.name for rung in ladder(op, [Draw(sample, got, upstream, by)]) if not rung.ok]
    assert not red(right)
    for tensor, value in right.items():
        for what, wrong in _spoilt(value):
            assert red({**right, tensor: wrong}) == [tensor], f"{op.name} {tensor} {what}"


def test_gradcheck(op, variant, backend, device, generator):
    """The gradients agree with finite differences in float64, which only `reference` and `cpp` compute in."""
    if backend not in ("reference", "cpp") or "backward" not in op.directions:
        pytest.skip(f"{backend} of {op.name} has no float64 backward")
    for case in small_cases(op):
        sample = with_leaves(sample_of(op, case, torch.float64, device, generator))
        leaves = [sample.inputs[n] for n in sample.grad]
        if not 0 < sum(leaf.numel() for leaf in leaves) < 3000:
            continue
        if not all(v.isfinite().all() for v in run(op, sample, backend).values()):
            continue  # finite differences of infinities are not numbers

        def function(*tensors, sample=sample):
            return flat(op.public(**{**sample.inputs, **dict(zip(sample.grad, tensors, strict=True))}, backend=backend))

        assert torch.autograd.gradcheck(function, leaves, fast_mode=sum(leaf.numel() for leaf in leaves) > 300)


def _dims(op):
    """A Hypothesis strategy for the dimensions of a case: sizes around the edges of vectors and tiles, with every combination
    of the options in the operator's cases.
    """
    cases = small_cases(op)
    limits = {"rows": (0, 40, 1), "tokens": (0, 40, 1), "cols": (1, 150, 1), "kv_heads": (1, 3, 1), "heads": (1, 6, 1),
              "head_dim": (2, 140, 2), **op.workload.domain}
    options = {key: sorted({case.dims.get(key) for case in cases}, key=str) for case in cases for key in case.dims
               if key not in limits and not isinstance(case.dims[key], tuple)}

    def around(case):
        sizes = {key: st.integers(low // step, high // step).map(lambda n, step=step: n * step)
                 for key, (low, high, step) in limits.items() if key in case.dims}
        chosen = {key: st.sampled_from(values) for key, values in options.items()}
        fixed = {key: st.just(value) for key, value in case.dims.items() if key not in sizes and key not in chosen}
        return st.fixed_dictionaries(sizes | chosen | fixed)

    return st.sampled_from(cases).flatmap(around).map(
        lambda d: {**d, "heads": d["heads"] * d["kv_heads"]} if "kv_heads" in d else d)


def test_property(op, device, request, monkeypatch):
    """At every shape that Hypothesis draws, forward and backward pass the error ladder on every backend.

    The errors of one small draw may all come from one rounding, for example that of the only two scores. Where they are red,
    FURTHER_DRAWS more decide with it, their errors pooled as in test_ladder.
    """
    parameters.small_tiles(monkeypatch)
    count = itertools.count()

    @settings(max_examples=request.config.getoption("--examples"), deadline=None, derandomize=True, database=None,
              suppress_health_check=list(HealthCheck))
    @given(dims=_dims(op), dtype=st.sampled_from(op.dtypes), seed=st.integers(0, 2**31))
    def check(dims, dtype, seed):
        generator = torch.Generator(device=device).manual_seed(seed)
        case = Case("drawn", {k: v for k, v in dims.items() if v is not None})

        def inputs():
            sample = sample_of(op, case, dtype, device, generator)
            upstream = draw_upstream(op, sample, 1.0, generator)
            return gold.Input(sample, upstream, standard(op, sample, upstream))

        first, early = inputs(), next(count) < INTERPRETED_EXAMPLES
        for backend, isa in variants(device.type, op):
            if backend in op.backends and (isa != "interpreted" or early):
                draw = lambda x, backend=backend: Draw(x.sample, run(op, x.sample, backend, x.upstream), x.upstream, x.by)
                with instruction_set(isa):
                    draws = [draw(first)]
                    if not all(rung.ok for rung in ladder(op, draws)):
                        draws += [draw(inputs()) for _ in range(FURTHER_DRAWS)]
                assert_ladder(op, draws, f"{dims} {dtype} {backend} {isa}")

    check()


# ------------------------------------------------------------------------------- registered, compiled, exported
def _passes(op, sample, backend, generator):
    """The registered calls (overload, arguments) that one forward and backward of the public function make."""
    with Recorder() as recorder:
        run(op, sample, backend, draw_upstream(op, sample, 1.0, generator))
    return [call for call in recorder.calls if call[0].namespace == "internlm2"]


def test_opcheck(op, backend, native, device, generator):
    """torch.library.opcheck accepts every registered pass: its schema, its fake implementation and the strides of its results.
    The arguments are those that the public function passes.
    """
    seen = set()
    for case in smoke_cases(op):
        for overload, args in _passes(op, sample_of(op, case, torch.float32, device, generator), backend, generator):
            seen.add(overload._schema.name.removeprefix(f"internlm2::{op.name}_"))
            torch.library.opcheck(overload, args, test_utils=("test_schema", "test_faketensor", "test_aot_dispatch_dynamic"))
            plain = isinstance(args[0], list) or args[0].dim() < 2 or not args[0].is_floating_point()
            strided = args if plain else (next(strided_copies(args[0]))[1], *args[1:])
            torch.library.opcheck(overload, strided, test_utils=("test_schema", "test_faketensor"))
    assert seen >= set(op.schemas) - {"cache_fwd", "bwd_"}, seen


def test_fakes_of_triton(op, device, generator, monkeypatch):
    """Triton's launchers return the shapes, dtypes and strides that the fake implementations promise. The other parts of
    opcheck concern code that all backends share, so test_opcheck covers them.
    """
    if "triton" not in op.backends or "triton" not in op.usable[device.type]:
        pytest.skip("no Triton here")
    parameters.small_tiles(monkeypatch)
    for overload, args in _passes(op, sample_of(op, smoke_cases(op)[0], torch.float32, device, generator), "triton", generator):
        torch.library.opcheck(overload, args, test_utils="test_faketensor")


def _compiled_equals_eager(op, sample, backend, upstream, compiler):
    torch._dynamo.reset()
    public = op.public  # the property imports at its first use, which torch.compile cannot trace
    compiled = torch.compile(lambda **inputs: public(**inputs, backend=backend), fullgraph=True, backend=compiler)
    assert_bitwise(run(op, sample, lambda **inputs: compiled(**inputs), upstream), run(op, sample, backend, upstream), compiler)


def test_fullgraph(op, backend, native, device, generator):
    """The compiled function has no graph break and equals eager bit for bit: all cases under aot_eager, one under inductor."""
    for case in smoke_cases(op):
        sample = sample_of(op, case, torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32, device, generator)
        upstream = draw_upstream(op, sample, 1.0, generator)
        _compiled_equals_eager(op, sample, backend, upstream, "aot_eager")
    _compiled_equals_eager(op, sample, backend, upstream, "inductor")


def test_export(op, backend, native, device, generator):
    """torch.export gives a program that contains our operator and returns the same bits."""
    sample = sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)
    tensors = {n: v for n, v in sample.inputs.items() if isinstance(v, torch.Tensor)}
    fixed = {n: v for n, v in sample.inputs.items() if n not in tensors}

    public = op.public

    class Module(torch.nn.Module):
        def forward(self, **inputs):
            return public(**inputs, **fixed, backend=backend)

    with torch.no_grad():
        program = torch.export.export(Module(), (), tensors)
        assert any("internlm2" in str(node.target) for node in program.graph.nodes)
        got, want = program.module()(**tensors), op.public(**sample.inputs, backend=backend)
    assert_bitwise(dict(enumerate(flat(got))), dict(enumerate(flat(want))), "export")


def test_switching_the_backend_recompiles(op, device, generator):
    """A compiled function follows `use_backend`; it must not keep an earlier choice silently."""
    from internlm2_kernels import use_backend

    called = []

    def compiler(graph, example_inputs):
        overloads = [str(node.target) for node in graph.graph.nodes if "internlm2" in str(node.target)]
        return lambda *args: (called.append(overloads), graph(*args))[1]

    sample = sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)
    torch._dynamo.reset()
    public = op.public
    compiled = torch.compile(lambda **inputs: public(**inputs), backend=compiler)
    native = "cpp" if device.type == "cpu" else "triton"
    seen = []
    for backend in (native, "reference", native):
        with use_backend(backend), torch.no_grad():
            compiled(**sample.inputs)
        seen.append([name.rsplit(".", 1)[-1] for names in called for name in names])
        called.clear()
    assert seen == [[native], [], [native]]


# ----------------------------------------------------------------------------------------------------- choice of backend
def test_unusable_backends_say_why(op, device, generator):
    from internlm2_kernels import use_backend

    sample = sample_of(op, smoke_cases(op)[0], torch.float32, device, generator)
    with pytest.raises(ValueError, match=rf"{op.name}: backend='metal' cannot run here: there is no such backend"):
        op.public(**sample.inputs, backend="metal")
    wrong = "cuda" if device.type == "cpu" else "cpp"
    with pytest.raises(ValueError, match=rf"{op.name}: backend='{wrong}' cannot run here: "):
        op.public(**sample.inputs, backend=wrong)
    with pytest.raises(ValueError, match="backend: expected one of"), use_backend("metal"):
        pass
