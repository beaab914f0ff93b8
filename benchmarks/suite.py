"""From the registry to rows: what to time, against whom, and what a timed pass says.

A pass is one operator at one size and dtype, all contenders interleaved: `forward` without gradients, `training`
(forward and backward in turn, giving the rows backward and both), `call` and `call_grad` (host time of a small call).
"""

import gc
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

from .peers import CHECKED, NOT_COMPILED, OURS, PEERS, READ_BOUND, peers_of

PASSES = {"forward": ("forward",), "training": ("backward", "both"), "call": ("call",), "call_grad": ("call_grad",)}
STAGES = {"call": "forward", "call_grad": "forward"}  # the stage of `Paired` a direction is read from, else its own name
SEED = 20240326


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
    and the paired `ratio`. `copy_fraction` is bytes / time over the copy rate, `read_fraction` over the read rate,
    `roof_fraction` what `roof_share` says.
    """

    op: str
    dims: dict[str, Any]
    dtype: str
    direction: str
    device: str
    backend: str
    chosen: bool  # what the automatic choice takes
    method: str
    rounds: int
    seconds: tuple[float, float, float] | None = None
    against: dict[str, dict[str, Any]] = field(default_factory=dict)
    bytes: int = 0
    flops: int = 0
    bytes_per_s: float = 0.0
    copy_fraction: float | None = None
    read_fraction: float | None = None
    roof_fraction: float | None = None
    red: str = ""


def roof_share(row: dict[str, Any], peaks: dict[str, float]) -> float:
    """The larger of two shares of the time that a row (a `Row` as a dict) took: of the bytes at the copy rate, at the read
    rate for what only reads, and of the flops at torch's matrix rate. Neither rate is a limit: it may exceed 1."""
    matrix = peaks["matmul_float32_flops_per_s" if row["dtype"] == "float32" else "matmul_flops_per_s"]
    moved = row["read_fraction" if row["op"] in READ_BOUND else "copy_fraction"]
    return max(moved, row["flops"] / row["seconds"][0] / matrix)


@dataclass(frozen=True)
class Settings:
    """How long to measure. `quick` is for looking whether it works: its numbers are noise and are not recorded."""

    seconds: float = 1.0
    rounds: tuple[int, int] = (11, 101)
    longest: float = 25.0  # seconds after which a pass whose calls take long ends with at least three rounds
    compiled: bool = True
    quick: bool = False


QUICK = Settings(seconds=0.2, rounds=(3, 11), quick=True)


def size_of(dims: dict[str, Any]) -> str:
    """A size as people write it: lists by name, numbers with x between, true flags and words by name."""
    lists = [f"{key} {_list(v)}" for key, v in dims.items() if isinstance(v, (tuple, list))]
    numbers = [str(v) for v in dims.values() if isinstance(v, int) and not isinstance(v, bool)]
    words = [str(k) if v is True else f"{k}={v}" for k, v in dims.items() if v and (v is True or isinstance(v, str))]
    return " ".join([*lists, "x".join(numbers), *words])


def _list(values: tuple[int, ...]) -> str:
    """8x512 where all are equal, else 8 of 256-2816."""
    if len(set(values)) == 1:
        return f"{len(values)}x{values[0]}"
    return f"{len(values)} of {min(values)}-{max(values)}" if values else "none"


def short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


# Where the time is short: operators in the order in which a training step and a decoded token spend their time on them.
FIRST = ("flash_attention", "rms_norm", "cross_entropy", "linear_cross_entropy", "swiglu", "qkv_rope", "paged_attention",
         "adamw", "linear_logprobs", "apply_rope", "squared_norm", "gae", "ppo_policy_loss", "ppo_value_loss",
         "reward_loss_from_last", "reward_loss")
SHAPES_7B = ({"heads": 32, "head_dim": 128}, {"cols": 4096}, {"cols": 14336})
LONGEST_FIRST = 2**16  # tokens; attention over more takes as long as everything else


def by_importance(passes: list[Pass]) -> list[Pass]:
    """bfloat16 before other dtypes, small calls last; in these the operators take turns, each with its 7B shapes first."""
    places = {name: place for place, name in enumerate(FIRST)}
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
    """The error ladder over the smoke cases; for each implementation that is red, its table.

    A peer may refuse sizes, but not all of them: what was never found right is not timed.
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
                try:  # copies: some peers write into their inputs
                    rungs = ladder(op, [Draw(sample, run(op, _copy(sample), implementation, _clones(upstream)), upstream)])
                except NotImplementedError:  # not what this peer does
                    continue
                except Exception as error:  # whatever a peer raises, and the run says what
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
    """The call to time: a form that has to `prepare` does so beforehand."""
    if getattr(function, "prepare", None) is None:
        return partial(function, **inputs)
    return partial(function.run, **function.prepare(**inputs))


class Bench:
    """Runs passes on one device; remembers which operators are green (checked once per dtype) and what was left out."""

    def __init__(self, device: torch.device, peaks: Peaks, settings: Settings) -> None:
        self.device, self.peaks, self.settings = device, peaks, settings
        self.checked: dict[tuple[str, torch.dtype], dict[str, str]] = {}
        self.notes: list[str] = []
        self.lost = False  # after a kernel's fault CUDA refuses everything in this process

    def note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def backends(self, op: Op) -> list[str]:
        """What is ours and worth timing: the reference only where there is nothing else."""
        usable = op.usable[self.device.type]
        interpreted = "triton" if self.device.type == "cpu" else None
        return [b for b in usable if b not in ("reference", interpreted)] or [usable[0]]

    def run(self, job: Pass) -> tuple[list[Row], Paired | None]:
        """The rows of one pass; a red operator's rows carry the reason and no number.

        On a GPU what fails (a fault, too little memory) makes the pass red and leaves the others alone.
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
        """Gives the pass's memory back, which graphs hold in pools of their own; sees whether the device still answers."""
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
        torch._dynamo.reset()  # else the recompile limit turns later compiled rows into eager ones
        if self.settings.compiled and not job.small and op.name not in NOT_COMPILED and op.name not in OURS:
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
        # What `loss.backward()` sends to a loss; the checks draw other numbers.
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
        contenders.append(self._clone(job, sets))
        if job.op.name in READ_BOUND:
            contenders.append(self._read(job, sets))
        return interleave(contenders, sets, self.device, seconds=self.settings.seconds, rounds=self.settings.rounds,
                          longest=self.settings.longest)

    def _contender(self, name: str, family: str, function: Callable, sets: list, job: Pass) -> Contender | None:
        try:
            calls = [_call(function, sample.inputs) for sample, _ in sets]
        except NotImplementedError:
            return None
        leaves = [[sample.inputs[name] for name in sample.grad] for sample, _ in sets]
        upstreams = [list(upstream.values()) for _, upstream in sets]
        retain = self.device.type == "cuda"  # a graph is captured from a backward that must be able to run again

        def backward(i: int, outputs: Any) -> Any:
            outputs = [t for t in flat(outputs) if t.requires_grad]
            return torch.autograd.grad(outputs, leaves[i], upstreams[i], retain_graph=retain)

        contender = Contender(name, lambda i: calls[i](), backward if job.kind == "training" else None, family)
        if family not in ("", "eager") or (family and self.device.type == "cuda"):
            try:
                outputs = contender.forward(0)
                if contender.backward:
                    contender.backward(0, outputs)
            except Exception as error:  # no compiler, an unsupported shape: the family is missing, and the run says so
                self.note(f"{job}: {name} cannot run: {type(error).__name__}: {(str(error).splitlines() or [''])[0]}")
                return None
        return contender

    def _clone(self, job: Pass, sets: int) -> Contender:
        """A copy that moves as many bytes as the forward: the bandwidth yardstick of this very row."""
        size = torch.empty((), dtype=job.dtype).element_size()
        count = max(1, job.op.workload.bytes(job.case.dims, size, "forward") // 2 // size)
        sources = [torch.randn(count, device=self.device).to(job.dtype) for _ in range(sets)]
        return Contender("clone", lambda i: sources[i].clone())

    def _read(self, job: Pass, sets: int) -> Contender:
        """A sum over as many bytes as the forward moves: the yardstick of what reads a cache and writes next to nothing."""
        count = max(1, job.op.workload.bytes(job.case.dims, torch.empty((), dtype=job.dtype).element_size(), "forward") // 4)
        sources = [torch.randn(count, device=self.device) for _ in range(sets)]
        return Contender("read", lambda i: sources[i].sum())

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
        return Row(**done | ({} if job.small else self._roof(row, job, paired, stage, seconds[0])))

    def _roof(self, row: Row, job: Pass, paired: Paired, stage: str, seconds: float) -> dict[str, Any]:
        size = torch.empty((), dtype=job.dtype).element_size()
        ways = ("forward", "backward") if row.direction == "both" else (row.direction,)
        count = sum(job.op.workload.bytes(job.case.dims, size, way) for way in ways)
        flops = sum(job.op.workload.flops(job.case.dims, way) for way in ways)
        copied = paired.times["forward"]["clone"]
        moved = 2 * (job.op.workload.bytes(job.case.dims, size, "forward") // 2 // size) * size
        if self.device.type == "cpu" and moved:
            pairs = zip(copied, paired.times[stage][f"ours {row.backend}"], strict=True)
            copy_fraction = quantiles([count / ours / (moved / clone) for clone, ours in pairs])[0]
        else:
            copy_fraction = count / seconds / self.peaks.copy_bytes_per_s
        read_fraction = count / seconds / self.peaks.read_bytes_per_s
        if "read" in paired.times["forward"]:  # interleaved with the row, which a machine whose speed drifts needs
            reads = zip(paired.times["forward"]["read"], paired.times[stage][f"ours {row.backend}"], strict=True)
            read_fraction = quantiles([read / ours for read, ours in reads])[0]
        found = {"bytes": count, "flops": flops, "bytes_per_s": count / seconds, "copy_fraction": copy_fraction,
                 "read_fraction": read_fraction}
        return found | {"roof_fraction": roof_share(asdict(row) | found | {"seconds": (seconds,)}, asdict(self.peaks))}
