"""From the registry to rows: what is timed, against which peers, and the rows that a timed pass gives.

A pass is one operator at one size and dtype with all contenders interleaved: `forward` without gradients, `training`
(forward and backward one after the other, which gives the rows backward and both), `call` and `call_grad` (host time of
a small call). On the CPU the yardsticks, which measure what the machine allows, are contenders too: copying into memory that
is already mapped, reading, and for operators with many multiplications a loop of multiply-add instructions (registers.py).
"""

import gc
import itertools
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch

from internlm2_kernels import OPS
from internlm2_kernels._registry import Op
from internlm2_kernels.testing import Draw, draw_upstream, flat, ladder, ladder_table, run, with_leaves
from internlm2_kernels.workloads import Case, Sample
from tools.timing import Contender, Paired, Peaks, cold_sets, interleave, quantiles

from .gates import settings
from .names import short, size_of
from .peers import CHECKED, OURS, PEERS, peers_of
from .registers import Loop

PASSES = {"forward": ("forward",), "training": ("backward", "both"), "call": ("call",), "call_grad": ("call_grad",)}
STAGES = {"call": "forward", "call_grad": "forward"}  # which stage of `Paired` holds a direction, where the names differ
SEED = 20240326
LARGEST_YARDSTICK = 2**28  # bytes that one call of a yardstick moves, at most
FLOPS_A_BYTE = 4  # a pass with fewer operations for each byte that it moves is limited by memory, never by arithmetic


@dataclass(frozen=True)
class Pass:
    op: Op
    case: Case
    dtype: torch.dtype
    kind: str

    @property
    def training(self) -> bool:
        return self.kind in ("training", "call_grad")

    @property
    def small(self) -> bool:
        return self.kind in ("call", "call_grad")

    def __str__(self) -> str:
        return f"{self.op.name} {size_of(self.case.dims)} {short(self.dtype)} {self.kind}"


@dataclass(frozen=True)
class Row:
    """One line of the result: our backend's time at one size, dtype and direction, and the ratios to each peer.

    Times in seconds as [median, 20 % quantile, 80 % quantile]; `against` maps a family of peers to its fastest `form`
    and the paired `ratio`. `copy_fraction` is bytes / time divided by the rate of copying into memory that is already
    mapped, `read_fraction` is bytes / time divided by the read rate, and `product_fraction` is flops / time divided by the
    register peak (CUDA: by the rate of torch's matrix product); each is None where it was not measured. `limit_fraction` is
    the larger of the memory fraction (read for `only_reads`, copy otherwise) and `product_fraction`: how close the row runs
    to what the machine allows for this work.
    """

    op: str
    dims: dict[str, Any]
    dtype: str
    direction: str
    device: str
    backend: str
    chosen: bool  # whether this is the backend that the operator chooses by itself
    method: str
    rounds: int
    seconds: tuple[float, float, float] | None = None
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    bytes_per_s: float = 0.0
    copy_fraction: float | None = None
    read_fraction: float | None = None
    product_fraction: float | None = None
    limit_fraction: float | None = None
    red: str = ""


def only_reads(op: str, direction: str) -> bool:
    """Whether this row reads its bytes and writes almost none, so that the read rate is its limit."""
    listed = settings()["only_reads"]
    return op in listed or f"{op} {direction}" in listed


@dataclass(frozen=True)
class Settings:
    """How long to measure. `quick` only shows whether everything works: its few rounds give noise instead of numbers."""

    seconds: float = 1.0
    rounds: tuple[int, int] = (11, 101)
    longest: float = 25.0  # seconds; a pass that takes longer ends as soon as it has three rounds
    compiled: bool = True
    quick: bool = False


QUICK = Settings(seconds=0.2, rounds=(3, 11), quick=True)


def plan(ops: list[str], directions: list[str], dtypes: list[torch.dtype], quick: bool, device: str = "cpu") -> list[Pass]:
    """Every pass that `directions` (forward, backward, both, call) needs; `quick` takes an operator's first model size."""
    passes = []
    for name in ops:
        op = OPS[name]
        trains = "backward" in op.directions
        kinds = ["forward"] if "forward" in directions else []
        kinds += ["training"] if trains and {"backward", "both"} & set(directions) else []
        kind = "gpu" if device == "cuda" and any(case.kind == "gpu" for case in op.workload.cases) else "model"
        cases = [case for case in op.workload.cases if case.kind == kind][:1 if quick else None]
        chosen = [dtype for dtype in dtypes if dtype in op.dtypes]
        passes += [Pass(op, case, dtype, kind) for case in cases for dtype in chosen for kind in kinds
                   if kind in (case.passes or kinds) and dtype in (case.dtypes or chosen)]
        if "call" in directions:
            smoke = next(case for case in op.workload.cases if case.kind == "smoke")
            passes += [Pass(op, smoke, dtype, kind) for dtype in chosen for kind in ["call", "call_grad"][:1 + trains]]
    return passes


# Dimensions of InternLM2-7B. Cases with one of these sets of dimensions are measured before an operator's other cases.
SHAPES_7B = ({"heads": 32, "head_dim": 128}, {"cols": 4096}, {"cols": 14336})
LONGEST_FIRST = 2**16  # tokens; a pass of attention over more comes last, because it takes as long as all the others together


def by_importance(passes: list[Pass]) -> list[Pass]:
    """The passes in the order in which to time them: bfloat16 before other dtypes, small calls last. Within each of these
    groups every operator contributes one pass in turn, in the order of gates.toml, and starts with its 7B shapes."""
    places = {name: place for place, name in enumerate(settings()["order"])}
    seen: dict[tuple, int] = {}

    def tier(job: Pass) -> tuple[bool, bool, bool, bool]:
        dims = job.case.dims
        ours = any(all(dims.get(key) == value for key, value in shape.items()) for shape in SHAPES_7B)
        return job.small, job.dtype != torch.bfloat16, dims.get("queries", 0) > LONGEST_FIRST, not ours

    ranked = []
    for job in sorted(passes, key=tier):  # stable: sizes stay in the registry's order
        turn = tier(job)[:3], job.op.name
        seen[turn] = seen.get(turn, -1) + 1
        ranked.append((turn[0], seen[turn], places.get(job.op.name, len(places)), job))
    return [job for *_, job in sorted(ranked, key=lambda entry: entry[:3])]


def check(op: Op, dtype: torch.dtype, device: torch.device, implementations: dict[str, str | Callable]) -> dict[str, str]:
    """Run the error check (`ladder`) over the smoke cases and return, for each implementation that fails, why: the exception
    or the table of its errors.

    A peer may refuse some sizes, but not all of them: an implementation that passed at no size is not timed.
    """
    red: dict[str, str] = {}
    refused: dict[str, str] = {}
    green: set[str] = set()
    for case in (*(c for c in op.workload.cases if c.kind == "smoke"), *CHECKED.get(op.name, ())):
        for scale in (1.0, 1e-4):
            generator = torch.Generator(device).manual_seed(SEED)
            sample = op.workload.sample(case, dtype, device, generator)
            upstream = draw_upstream(op, sample, scale, generator)
            for name, implementation in implementations.items():
                if name in red or (name in PEERS.get(op.name, {}) and op.name in CHECKED and case.kind == "smoke"):
                    continue
                try:  # on copies of the inputs, because some peers write into them
                    rungs = ladder(op, [Draw(sample, run(op, _copy(sample), implementation, _clones(upstream)), upstream)])
                except NotImplementedError:  # the peer does not offer these options
                    continue
                except Exception as error:  # a peer may raise anything; the run reports it
                    (red if name.startswith("ours ") else refused).setdefault(name, f"{type(error).__name__}: {error}")
                    continue
                if all(rung.ok for rung in rungs):
                    green.add(name)
                else:
                    red[name] = f"{size_of(case.dims)}, upstream {scale:g}\n{ladder_table(rungs)}"
    return red | {name: why for name, why in refused.items() if name not in green}


def _clones(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tensors.items()}


def _copy(sample: Sample) -> Sample:
    inputs = {name: v.detach().clone() if isinstance(v, torch.Tensor) else v for name, v in sample.inputs.items()}
    return Sample(inputs, sample.grad)


def _call(function: Callable, inputs: dict[str, Any]) -> Callable[[], Any]:
    """The call to time. A form with a `prepare` gets its inputs prepared here, outside the timed part."""
    if getattr(function, "prepare", None) is None:
        return partial(function, **inputs)
    return partial(function.run, **function.prepare(**inputs))


class Bench:
    """Runs passes on one device. It remembers which implementations failed their checks, which run once for each operator and
    dtype, and notes what was left out of the run."""

    def __init__(self, device: torch.device, peaks: Peaks, settings: Settings, loops: dict[str, Loop] | None = None) -> None:
        self.device, self.peaks, self.settings = device, peaks, settings
        self.loops = loops or {}  # for each dtype the loop that shows the register peak, see registers.py
        self.memory = torch.empty(0)  # the tensor that the yardsticks copy and read, grown on demand
        self.checked: dict[tuple[str, torch.dtype], dict[str, str]] = {}
        self.notes: list[str] = []
        self.lost = False  # set when the GPU stops answering: after a kernel's fault CUDA refuses every call of this process

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def backends(self, op: Op) -> list[str]:
        """Our backends to time on this device. The reference is timed only where the operator has no other."""
        usable = op.usable[self.device.type]
        interpreted = "triton" if self.device.type == "cpu" else None
        return [b for b in usable if b not in ("reference", interpreted)] or [usable[0]]

    def run(self, job: Pass) -> tuple[list[Row], Paired | None]:
        """The rows of one pass. Rows of an operator that fails its checks are red: they carry the reason and no number.

        On a GPU a fault or a lack of memory makes this pass red and leaves the others alone.
        """
        if self.device.type != "cuda":
            return self._run(job)
        try:
            return self._run(job)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        finally:
            self._free()
        self.note(f"{job}: {reason}")
        return self._rows(job, {f"ours {b}": reason for b in self.backends(job.op)}), None

    def _free(self) -> None:
        """Free the memory of the pass, which CUDA graphs hold in their own pools, and note whether the device still answers."""
        gc.collect()
        try:
            torch.cuda.synchronize(self.device)
            torch.cuda.empty_cache()
        except RuntimeError:
            self.lost = True

    def _rows(self, job: Pass, red: dict[str, str]) -> list[Row]:
        chosen = self._chosen(job.op)
        return [Row(job.op.name, job.case.dims, short(job.dtype), direction, self.device.type, b, chosen == b, "", 0,
                    red=red.get(f"ours {b}", "")) for b in self.backends(job.op) for direction in PASSES[job.kind]]

    def _run(self, job: Pass) -> tuple[list[Row], Paired | None]:
        op, case = job.op, job.case
        functions: dict[str, tuple[str, Callable]] = {
            f"ours {b}": ("", partial(op.public, backend=b)) for b in self.backends(op)}
        functions |= {f"eager {name}": ("eager", form) for name, form in op.workload.eager.items()}
        further = peers_of(op.name, self.device.type, job.training, case.dims) if not job.small else {}
        red = self._red(job, {name: function for name, (_, function) in functions.items()} | (
            further if self.device.type == "cuda" else {}))
        functions |= {name: (name, peer) for name, peer in further.items()}
        rows = self._rows(job, red)
        if all(row.red for row in rows):
            return rows, None
        functions = {name: value for name, value in functions.items() if name not in red}
        if op.name in OURS and not job.small:
            functions = {name: value if value[0] else ("ours", OURS[op.name]) for name, value in functions.items()
                         if value[0] != "eager"}
        torch._dynamo.reset()  # otherwise Dynamo's recompile limit makes later compiled rows run eagerly
        if self.settings.compiled and not job.small and op.name not in settings()["not_compiled"] and (
                op.name not in OURS):
            forms = list(op.workload.eager.items())[:1 if self.settings.quick else None]
            functions |= {f"compile {name}": ("compile", torch.compile(form, dynamic=False)) for name, form in forms}
        with torch.set_grad_enabled(job.training):
            paired = self._time(job, functions)
        return [row if row.red else self._row(row, job, paired) for row in rows], paired

    def _red(self, job: Pass, implementations: dict[str, Callable]) -> dict[str, str]:
        key = (job.op.name, job.dtype)
        if key not in self.checked:
            self.checked[key] = check(job.op, job.dtype, self.device, implementations)
            for name, table in self.checked[key].items():
                self.note(f"{job.op.name} {short(job.dtype)}: {name} is red and is not timed: {table}")
        return self.checked[key]

    def _chosen(self, op: Op) -> str:
        return op.usable[self.device.type][0] if self.lost else op.select(torch.empty(0, device=self.device), None)

    def _time(self, job: Pass, functions: dict[str, tuple[str, Callable]]) -> Paired:
        generator = torch.Generator(self.device).manual_seed(SEED)
        sample = job.op.workload.sample(job.case, job.dtype, self.device, generator)
        upstream = draw_upstream(job.op, sample, 1.0, generator, job.op.public) if job.training else {}
        # `loss.backward()` sends 1 to a loss, so that is what is timed; the checks use random upstream gradients.
        upstream = {name: torch.ones_like(v) if v.dim() == 0 else v for name, v in upstream.items()}
        tensors = [v for v in [*sample.inputs.values(), *upstream.values()] if isinstance(v, torch.Tensor)]
        sets = 1 if job.small else cold_sets(sum(v.numel() * v.element_size() for v in tensors), self.device)
        make_sets = lambda: [(with_leaves(_copy(sample)) if job.training else _copy(sample), _clones(upstream))
                             for _ in range(sets)]
        shared, contenders = make_sets(), []
        for name, (family, function) in functions.items():
            own = make_sets() if family in PEERS.get(job.op.name, {}) and job.op.name not in OURS else shared
            contender = self._contender(name, family, function, own, job)
            if contender is not None:
                contenders.append(contender)
        if job.small:
            return interleave(contenders, 1, self.device, seconds=0.3, rounds=(31, 101), repeat=100, host=True)
        contenders += self._yardsticks(job)
        return interleave(contenders, sets, self.device, seconds=self.settings.seconds, rounds=self.settings.rounds,
                          longest=self.settings.longest)

    def _contender(self, name: str, family: str, function: Callable, sets: list, job: Pass) -> Contender | None:
        try:
            calls = [_call(function, sample.inputs) for sample, _ in sets]
        except NotImplementedError:
            return None
        leaves = [[sample.inputs[name] for name in sample.grad] for sample, _ in sets]
        upstreams = [list(upstream.values()) for _, upstream in sets]
        retain = self.device.type == "cuda"  # a backward that is captured in a graph runs more than once

        def backward(i: int, outputs: Any) -> Any:
            outputs = [t for t in flat(outputs) if t.requires_grad]
            return torch.autograd.grad(outputs, leaves[i], upstreams[i], retain_graph=retain)

        contender = Contender(name, lambda i: calls[i](), backward if job.kind == "training" else None, family)
        if family not in ("", "eager") or (family and self.device.type == "cuda"):
            try:
                outputs = contender.forward(0)
                if contender.backward:
                    contender.backward(0, outputs)
            except Exception as error:  # no compiler or an unsupported shape: the form is left out and the run says so
                self.note(f"{job}: {name} cannot run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                return None
        return contender

    def _bytes(self, job: Pass, direction: str) -> int:
        size = torch.empty((), dtype=job.dtype).element_size()
        ways = ("forward", "backward") if direction == "both" else (direction,)
        return sum(job.op.workload.bytes(job.case.dims, size, way) for way in ways)

    def _flops(self, job: Pass, direction: str) -> int:
        ways = ("forward", "backward") if direction == "both" else (direction,)
        return sum(job.op.workload.flops(job.case.dims, way) for way in ways)

    def _moved(self, job: Pass) -> int:
        """How many bytes one call of the copy or read yardstick moves: as many as the forward, at most LARGEST_YARDSTICK."""
        return max(8, min(self._bytes(job, "forward"), LARGEST_YARDSTICK) // 8 * 8)

    def _memory(self, moved: int) -> torch.Tensor:
        """Memory for yardsticks that move `moved` bytes a call: enough parts of that size that a part has left the cache when
        its turn comes again, and written once, so that no call causes page faults."""
        count = max(2, cold_sets(moved, self.device)) * moved // 4
        if self.memory.numel() < count:
            self.memory = torch.ones(count)
        return self.memory[:count]

    def _yardsticks(self, job: Pass) -> list[Contender]:
        """Contenders that show what the CPU allows: copy, read and, for a pass with enough operations a byte, the loop of
        multiply-adds. None on a GPU: its speed does not drift, so its rows are compared with the rates measured at the start
        of the run."""
        if self.device.type != "cpu":
            return []
        moved = self._moved(job)
        # The yardsticks go through their memory by themselves: an operator with large inputs has only one input set.
        reads, copies = (itertools.cycle(self._memory(moved).split(moved // 4)) for _ in range(2))

        def copy(i: int) -> None:
            source, target = next(copies).chunk(2)  # reads one half and writes the other: as many bytes as "read" reads
            target.copy_(source)

        contenders = [Contender("copy", copy), Contender("read", lambda i: next(reads).sum())]
        loop = self.loops.get(short(job.dtype))
        if loop is not None and self._flops(job, "forward") >= FLOPS_A_BYTE * self._bytes(job, "forward"):
            contenders.append(Contender("registers", lambda i: loop()))
        return contenders

    def _row(self, row: Row, job: Pass, paired: Paired) -> Row:
        stage, ours = STAGES.get(row.direction, row.direction), f"ours {row.backend}"
        times = paired.times[stage]
        seconds = quantiles(times[ours])
        against = {}
        for family in ("eager", "compile", *PEERS.get(job.op.name, {})):
            forms = [name for name in times if name == family or name.startswith(family + " ")]
            if forms:
                fastest = min(forms, key=lambda name: paired.median(stage, name))
                against[family] = {"form": fastest.removeprefix(family + " "),
                                   "ratio": paired.ratio(stage, fastest, ours),
                                   "seconds": quantiles(times[fastest])}
        done = asdict(row) | {"seconds": seconds, "against": against, "method": paired.method,
                              "rounds": len(times[ours])}
        return Row(**done | ({} if job.small else self._limit(row, job, paired, stage, seconds[0])))

    def _limit(self, row: Row, job: Pass, paired: Paired, stage: str, seconds: float) -> dict[str, Any]:
        count, flops = self._bytes(job, row.direction), self._flops(job, row.direction)
        ours, rates = paired.times[stage][f"ours {row.backend}"], paired.times["forward"]

        def share(work: float, yardstick: str, done: float) -> float:
            """This row's rate divided by the yardstick's: the median over rounds. A call does `work`, the yardstick `done`."""
            pairs = zip(rates[yardstick], ours, strict=True)
            return quantiles([work / mine / (done / its) for its, mine in pairs])[0]

        if self.device.type == "cpu":
            moved = self._moved(job)
            found = {"copy_fraction": share(count, "copy", moved), "read_fraction": share(count, "read", moved)}
            if "registers" in rates:
                found["product_fraction"] = share(flops, "registers", self.loops[row.dtype].flops)
        else:
            peaks, single = self.peaks, row.dtype == "float32"
            matrix = peaks.matmul_float32_flops_per_s if single else peaks.matmul_flops_per_s
            found = {"copy_fraction": count / seconds / peaks.copy_bytes_per_s,
                     "read_fraction": count / seconds / peaks.read_bytes_per_s, "product_fraction": flops / seconds / matrix}
        bytes_share = found["read_fraction" if only_reads(row.op, row.direction) else "copy_fraction"]
        return found | {"bytes": count, "flops": flops, "bytes_per_s": count / seconds,
                        "limit_fraction": max(bytes_share, found.get("product_fraction", 0.0))}
