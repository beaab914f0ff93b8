"""What tests and benchmarks share: running an operator by name, and the error ladder.

Error ladder (`ladder`): a check of an implementation's errors against those of PyTorch.
- gold is the result of `op.reference` in float64.
- The baseline is PyTorch's own composition, the first of the operator's eager forms, in the dtype of the implementation.
- The errors of every output and gradient against gold are pooled over all draws of the inputs (three in the shared checks).
  Their root mean square must be at most 1.25 times that of the baseline plus 2 eps x scale, and their maximum at most 2 times
  that of the baseline plus 2 eps x scale.
- scale is max |gold|, or the magnitude of cancelling terms that the workload declares, where that is larger.

A maximum over few elements varies from draw to draw, a root mean square hardly; therefore its bound is tighter. No tolerance
is set by hand.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ._registry import Op
from .workloads import Sample

RMS_SLACK = 1.25  # the allowed root mean square error, as a multiple of the baseline's
MAX_SLACK = 2.0  # the allowed largest error, as a multiple of the baseline's
EPS_TERMS = 2  # both errors may be larger by this multiple of eps x scale


@dataclass(frozen=True)
class Rung:
    """One line of the error ladder: the errors of one output or gradient, those of the baseline, and the bounds."""

    name: str
    max_err: float
    max_base: float
    max_bound: float
    rms_err: float
    rms_base: float
    rms_bound: float
    problem: str = ""

    @property
    def ratio(self) -> float:
        """error / bound of the maximum or of the root mean square, whichever is larger. The rung passes if it is at most 1."""
        pairs = ((self.max_err, self.max_bound), (self.rms_err, self.rms_bound))
        return math.inf if self.problem else max(0.0 if e == 0 else e / b if b else math.inf for e, b in pairs)

    @property
    def ok(self) -> bool:
        return self.ratio <= 1


def flat(result: torch.Tensor | tuple) -> tuple[torch.Tensor, ...]:
    """The result of a public function as a tuple of tensors. A dictionary of statistics contributes its values."""
    parts = (result,) if isinstance(result, torch.Tensor) else tuple(result)
    return tuple(tensor for part in parts for tensor in (part.values() if isinstance(part, dict) else (part,)))


def call(op: Op, sample: Sample, backend: str | Callable | None) -> dict[str, torch.Tensor]:
    """The outputs by name. `backend` is the name of a backend, None for the automatic choice, or a function to call instead."""
    if callable(backend):
        result = backend(**sample.inputs)
    else:
        result = op.public(**sample.inputs, backend=backend)
    return dict(zip(op.outputs, flat(result), strict=False))


def with_leaves(sample: Sample) -> Sample:
    """The sample in which the tensors that `sample.grad` names are replaced by new leaves of autograd, with the same strides,
    that require a gradient."""
    inputs = {name: value.detach().requires_grad_() if name in sample.grad else value
              for name, value in sample.inputs.items()}
    return Sample(inputs, sample.grad)


def run(op: Op, sample: Sample, backend: str | Callable | None,
        upstream: dict[str, torch.Tensor] | None = None) -> dict[str, torch.Tensor]:
    """The outputs by name. If `upstream` holds gradients, by the names of outputs, the result also has the gradients of the
    inputs, named `d_<argument>`."""
    if not upstream:
        with torch.no_grad():
            return call(op, sample, backend)
    leaves = with_leaves(sample)
    outputs = call(op, leaves, backend)
    used = [name for name in upstream if outputs[name].requires_grad]
    if not used:
        raise AssertionError(f"{op.name}: no output requires a gradient, though {', '.join(sample.grad)} do")
    grads = torch.autograd.grad([outputs[name] for name in used], [leaves.inputs[name] for name in sample.grad],
                                [upstream[name] for name in used], allow_unused=True, materialize_grads=True)
    named = {f"d_{name}": grad for name, grad in zip(sample.grad, grads, strict=True)}
    return {name: value.detach() for name, value in outputs.items()} | named


def draw_upstream(op: Op, sample: Sample, scale: float, generator: torch.Generator,
                  forward: Callable | None = None) -> dict[str, torch.Tensor]:
    """Normally distributed gradients of size `scale` for every differentiable output; an empty dictionary if there is none.

    `forward` (default: the reference) shows which outputs there are; at large sizes the reference needs too much memory.
    """
    if not sample.grad or "backward" not in op.directions:
        return {}
    with torch.enable_grad():
        outputs = call(op, with_leaves(sample), forward or op.reference)
    shapes = {name: value for name, value in outputs.items() if value.requires_grad}
    return {name: (torch.randn(value.shape, generator=generator, device=value.device) * scale).to(value.dtype)
            for name, value in shapes.items()}


def _errors(got: torch.Tensor, gold: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(|got - gold| in float64, which is infinite where the two differ and one of them is not finite; mask of the finite
    elements of `got`)."""
    wide = got.double()
    error = (wide - gold).abs()
    error = torch.where(wide == gold, 0.0, torch.where(error.isfinite(), error, math.inf))
    return error, wide.isfinite()


def _max_rms(errors: list[torch.Tensor]) -> tuple[float, float]:
    """The largest and the root mean square of all errors together."""
    errors = [e for e in errors if e.numel()]
    if not errors:
        return 0.0, 0.0
    count = sum(e.numel() for e in errors)
    return max(float(e.max()) for e in errors), math.sqrt(sum(float(e.square().sum()) for e in errors) / count)


def _rung(name: str, gots: list[torch.Tensor | None], bases: list[torch.Tensor], golds: list[torch.Tensor],
          size: float) -> Rung:
    scale, errors, base_errors, problem = size, [], [], ""
    for got, base, gold in zip(gots, bases, golds, strict=True):
        finite = gold.isfinite()
        scale = max(scale, float(gold[finite].abs().max()) if finite.any() else 0.0)
        # Only finite elements of the baseline count: with an infinite error of the baseline, any error would pass.
        base_error, base_finite = _errors(base, gold)
        base_errors.append(base_error[base_finite & finite])
        problem = problem or ("missing" if got is None else
                              f"shape {list(got.shape)} for {list(gold.shape)}" if got.shape != gold.shape else
                              f"{got.dtype} for {base.dtype}" if got.dtype != base.dtype else "")
        if not problem:
            errors.append(_errors(got, gold)[0])
    max_base, rms_base = _max_rms(base_errors)
    floor = EPS_TERMS * (torch.finfo(bases[0].dtype).eps if bases[0].is_floating_point() else 0.0) * scale
    max_err, rms_err = (math.inf, math.inf) if problem else _max_rms(errors)
    return Rung(name, max_err, max_base, MAX_SLACK * max_base + floor, rms_err, rms_base, RMS_SLACK * rms_base + floor, problem)


@dataclass(frozen=True)
class Standard:
    """What the ladder compares an implementation with: the outputs and gradients of gold and of the baseline, and `sizes`, the
    magnitudes of cancelling terms that the workload declares, all by name."""

    gold: dict[str, torch.Tensor]
    base: dict[str, torch.Tensor]
    sizes: dict[str, float]


def standard(op: Op, sample: Sample, upstream: dict[str, torch.Tensor] | None = None) -> Standard:
    """Computes the `Standard` of a sample. It is the costly part of `ladder`, so several implementations should share it."""
    wide = sample.to(torch.float64)
    wide_upstream = {name: value.double() for name, value in (upstream or {}).items()}
    gold = run(op, wide, op.reference, wide_upstream)
    base = run(op, sample, next(iter(op.workload.eager.values())), upstream)
    sizes = op.workload.magnitude(wide, wide_upstream) if op.workload.magnitude and (wide_upstream or not sample.grad) else {}
    return Standard(gold, base, sizes)


@dataclass(frozen=True)
class Draw:
    """One draw of the inputs, and the results `got` that `run(op, sample, backend, upstream)` returned for it.

    `by` is `standard(op, sample, upstream)`; the ladder computes it where it is not given.
    """

    sample: Sample
    got: dict[str, torch.Tensor]
    upstream: dict[str, torch.Tensor] | None = None
    by: Standard | None = None


def ladder(op: Op, draws: Sequence[Draw]) -> list[Rung]:
    """One `Rung` for every output and gradient, with its errors pooled over `draws`.

    A tensor fails if it is missing, has another shape or dtype than the baseline's, or is not finite where gold is finite.
    The dtypes are float32 and lower: for float64 nothing is more exact, and gradcheck is the test.
    """
    standards = [draw.by or standard(op, draw.sample, draw.upstream) for draw in draws]
    rungs = []
    for name in dict.fromkeys(name for draw, by in zip(draws, standards, strict=True) for name in (*by.gold, *draw.got)):
        if any(name not in by.gold for by in standards):
            rungs.append(Rung(name, *[math.inf] * 6, problem="unexpected"))
            continue
        argument = name.removeprefix("d_")  # workloads may declare the magnitude of the gradient d_x as "x"
        keys = (name,) if name == argument or argument in op.outputs else (name, argument)
        size = max(by.sizes.get(key, 0.0) for by in standards for key in keys)
        rungs.append(_rung(name, [draw.got.get(name) for draw in draws], [by.base[name] for by in standards],
                           [by.gold[name] for by in standards], size))
    return rungs


def ladder_table(rungs: list[Rung]) -> str:
    """The rungs as a table with a line for each tensor: error, error of the baseline and bound, first for the maximum and then
    for the root mean square."""
    head = f"{'tensor':<16}{'max error':>11}{'eager':>11}{'bound':>11}   {'rms error':>11}{'eager':>11}{'bound':>11}"
    lines = [head + f"{'error/bound':>13}"]
    for r in rungs:
        numbers = [f"{v:11.3g}" for v in (r.max_err, r.max_base, r.max_bound, r.rms_err, r.rms_base, r.rms_bound)]
        verdict = "" if r.ok else f"  RED {r.problem}"
        lines.append(f"{r.name:<16}{''.join(numbers[:3])}   {''.join(numbers[3:])}{r.ratio:13.3f}{verdict}")
    return "\n".join(lines)


def assert_ladder(op: Op, draws: Sequence[Draw], label: str = "") -> list[Rung]:
    """Like `ladder`, but raises `AssertionError` with the table if a rung fails."""
    rungs = ladder(op, draws)
    if not all(r.ok for r in rungs):
        raise AssertionError(f"error ladder of {op.name} {label}\n{ladder_table(rungs)}")
    return rungs
