"""Paired timing and measured peak rates.

The speed of a machine may change by a factor of 2 to 3 within minutes. Therefore the contenders run alternately, call by call,
in an order that is balanced over the rounds, and they are compared by the ratio of their times within a round.
"""

import gc
import math
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

MIN_ROUNDS, MAX_ROUNDS = 11, 201
FEWEST_ROUNDS = 3
SCREEN = 2.0  # a contender this much slower in the warm-up than the fastest of its family is not timed
CAPTURED_S = 10e-3  # longer calls are not captured: launch overhead does not matter for them, and a graph keeps its memory
CYCLES_PER_S, LONGEST_LEAD_S = 2e9, 20e-3


@dataclass(frozen=True)
class Contender:
    """One implementation to time: `forward(i)` runs it on input set i, `backward(i, outputs)` its backward.

    Of a `family`, such as the eager forms of one operator, only the fastest is of interest. The family "" is never screened.
    """

    name: str
    forward: Callable[[int], Any]
    backward: Callable[[int, Any], Any] | None = None
    family: str = ""


@dataclass(frozen=True)
class Paired:
    """Seconds per call, by stage (`forward`, `backward`, `both`) and name. Equal indices belong to the same round."""

    times: dict[str, dict[str, list[float]]]
    screened: dict[str, list[float]]  # warm-up times, forward and backward together, of contenders that were not timed
    method: str

    def median(self, stage: str, name: str) -> float:
        return statistics.median(self.times[stage][name])

    def ratio(self, stage: str, peer: str, ours: str) -> tuple[float, float, float]:
        """The peer's time divided by ours: the median, 20 % and 80 % quantiles of the ratios within rounds."""
        pairs = zip(self.times[stage][peer], self.times[stage][ours], strict=True)
        return quantiles([theirs / mine for theirs, mine in pairs])


def quantiles(values: list[float]) -> tuple[float, float, float]:
    """Median, 20 % and 80 % quantile."""
    values = torch.tensor(values, dtype=torch.float64)
    return tuple(torch.quantile(values, torch.tensor([0.5, 0.2, 0.8], dtype=torch.float64)).tolist())


def turns(count: int, round_index: int) -> list[int]:
    """The order in which the contenders run in a round. It is rotated every second round and reversed in each round between,
    so that over many rounds every contender runs at every position equally often."""
    start = (round_index // 2) % count
    order = [(start + i) % count for i in range(count)]
    return order[::-1] if round_index % 2 else order


def cache_bytes(device: torch.device) -> int:
    """The size of the last-level cache: L2 on CUDA; on a CPU what Linux reports, or 32 MiB."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    units = {"K": 2**10, "M": 2**20, "G": 2**30}
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=32 * 2**20)


def cold_sets(input_bytes: int, device: torch.device) -> int:
    """The number of copies of the inputs that are used in turn, so that a set has left the cache when it is used again."""
    return max(1, min(32, math.ceil(3 * cache_bytes(device) / max(1, input_bytes))))


def pin(threads: int) -> None:
    """Restricts this process to `threads` processors (on Linux) and torch to as many threads."""
    if hasattr(os, "sched_setaffinity"):
        allowed = sorted(os.sched_getaffinity(0))
        if threads > len(allowed):
            raise ValueError(f"threads: expected at most {len(allowed)}, the processors this process may use, got {threads}")
        os.sched_setaffinity(0, allowed[:threads])
    torch.set_num_threads(threads)


def interleave(contenders: list[Contender], sets: int, device: torch.device, *, seconds: float = 2.0,
               rounds: tuple[int, int] = (MIN_ROUNDS, MAX_ROUNDS), repeat: int = 1, host: bool = False,
               longest: float = math.inf) -> Paired:
    """Times the contenders alternately: at least `rounds[0]` rounds, then until `seconds` have passed or `rounds[1]` rounds are
    done. Where calls are so slow that `longest` seconds pass before that, it ends as soon as three rounds are done.

    CPU: the wall-clock time of each call, which includes freeing its results; the calls use the input sets in turn. CUDA: a
    graph of each contender, which runs every input set once, is replayed between events. Calls longer than 10 ms, calls that
    wait for the device and calls that cannot be captured are launched instead, and `Paired.method` says so. The device is
    kept busy while work is queued, so that the device's time is measured and not the host's. `repeat`: calls per sample, for
    calls of microseconds. `host=True` measures the time on the host for CUDA as well.
    """
    names = [c.name for c in contenders]
    if len(set(names)) != len(names) or not names:
        raise ValueError(f"contenders: expected distinct names, got {names}")
    on_host = host or device.type == "cpu"
    collecting = gc.isenabled()
    gc.disable()
    try:
        warm = {c.name: _warm_up(c, sets, device) for c in contenders}
        kept = [c for c in contenders if not _slow(c, contenders, warm)]
        screened = {c.name: warm[c.name] for c in contenders if c not in kept}
        samplers, method = (_host_samplers(kept, sets, device, repeat) if on_host else
                            _cuda_samplers(kept, sets, device, warm))
        times = defaultdict(lambda: defaultdict(list))
        start = time.perf_counter()
        for index in range(rounds[1]):
            passed = time.perf_counter() - start
            if (index >= rounds[0] and passed > seconds) or (index >= FEWEST_ROUNDS and passed > longest):
                break
            for turn, who in enumerate(turns(len(kept), index)):
                name = kept[who].name
                # Consecutive calls use different sets; otherwise the second would find its inputs in the cache.
                taken = samplers[name]((index * len(kept) + turn) % sets)
                for stage, value in taken.items():
                    times[stage][name].append(value)
    finally:
        if collecting:
            gc.enable()
    return Paired({stage: dict(by_name) for stage, by_name in times.items()}, screened, method)


def _slow(contender: Contender, contenders: list[Contender], warm: dict[str, list[float]]) -> bool:
    rivals = [min(warm[c.name]) for c in contenders if c.family == contender.family]
    return contender.family != "" and min(warm[contender.name]) > SCREEN * min(rivals)


def _warm_up(contender: Contender, sets: int, device: torch.device) -> list[float]:
    """Seconds of the warm-up calls: the first call, which compiles, is left out; then at least two calls, and 0.1 s of them."""
    times, began = [], 0.0
    for index in range(1000):
        start = time.perf_counter()
        outputs = contender.forward(index % sets)
        if contender.backward:
            contender.backward(index % sets, outputs)
        del outputs
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        end = time.perf_counter()
        if index == 0:
            began = end
            continue
        times.append(end - start)
        if index >= 2 and end - began >= 0.1:
            break
    return times


def _host_samplers(contenders: list[Contender], sets: int, device: torch.device,
                   repeat: int) -> tuple[dict[str, Callable[[int], dict[str, float]]], str]:
    synchronize = (lambda: torch.cuda.synchronize(device)) if device.type == "cuda" else (lambda: None)

    def one_way(contender: Contender, i: int) -> dict[str, float]:
        synchronize()
        start = time.perf_counter_ns()
        for _ in range(repeat):
            contender.forward(i)
        return {"forward": (time.perf_counter_ns() - start) / repeat * 1e-9}

    def both_ways(contender: Contender, i: int) -> dict[str, float]:
        there = back = 0
        for _ in range(repeat):
            synchronize()
            start = time.perf_counter_ns()
            outputs = contender.forward(i)
            turned = time.perf_counter_ns()
            contender.backward(i, outputs)
            del outputs
            there, back = there + turned - start, back + time.perf_counter_ns() - turned
        return {"forward": there / repeat * 1e-9, "backward": back / repeat * 1e-9,
                "both": (there + back) / repeat * 1e-9}

    kinds = {c.name: both_ways if c.backward else one_way for c in contenders}
    return {c.name: (lambda i, c=c: kinds[c.name](c, i)) for c in contenders}, "perf_counter"


def _cuda_samplers(contenders: list[Contender], sets: int, device: torch.device, warm: dict[str, list[float]]
                   ) -> tuple[dict[str, Callable[[int], dict[str, float]]], str]:
    """A sampler returns seconds per set, measured on a graph that runs all sets, or on launches if there is no graph."""
    samplers, launched = {}, {}
    # Graphs with the same pool and stream share their memory.
    pool, stream, outside = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device), torch.cuda.current_stream(device)
    for contender in contenders:
        took = min(warm[contender.name])
        waits, why = _waits(contender), f"calls of {1e3 * took:.0f} ms"
        if waits:
            why = "it waits for the device"
        elif took <= CAPTURED_S:
            try:
                samplers[contender.name] = _cuda_replays(contender, sets, device, pool, stream)
                continue
            except RuntimeError as error:
                torch.cuda.set_stream(outside)  # a failed capture leaves the capture's stream as the current one
                torch.cuda.synchronize(device)
                pool, why = torch.cuda.graph_pool_handle(), f"no graph: {str(error).splitlines()[0]}"
        launched[contender.name] = why
        samplers[contender.name] = _cuda_launches(contender, sets, device, took, waits)
    if not launched:
        return samplers, "cuda graph replay"
    reasons = set(launched.values())
    if len(launched) == len(contenders):
        return samplers, f"cuda launches between events ({'; '.join(sorted(reasons))})"
    return samplers, "cuda graph replay, launched: " + ", ".join(f"{name} ({why})" for name, why in launched.items())


def _waits(contender: Contender) -> bool:
    """Whether a call waits for the device. Its capture would fail and leave the allocator in an invalid state."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        outputs = contender.forward(0)
        if contender.backward:
            contender.backward(0, outputs)
    except RuntimeError as error:
        if "synchronizing" not in str(error):
            raise
        return True
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return False


def _lead(host_s: float, device: torch.device) -> None:
    """Keeps the device busy while the host queues work for `host_s` seconds; otherwise the events would measure the host."""
    torch.cuda.synchronize(device)
    torch.cuda._sleep(int(min(1.5 * host_s + 50e-6, LONGEST_LEAD_S) * CYCLES_PER_S))


def _host_seconds(body: Callable[[], Any], device: torch.device) -> float:
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def _cuda_replays(contender: Contender, sets: int, device: torch.device, pool: Any,
                  stream: torch.cuda.Stream) -> Callable[[int], dict[str, float]]:
    """A sampler that replays one CUDA graph for each stage. The graphs share a memory pool, so that each reuses the memory of
    the one before, which is safe because no result is read. Within a graph the outputs of all input sets are alive at once, so
    that each call writes to memory that is not in the cache."""
    stream.wait_stream(torch.cuda.current_stream(device))
    indices = range(sets)
    there = lambda: [contender.forward(i) for i in indices]
    bodies = {"forward": there}
    with torch.cuda.stream(stream):  # autograd runs a backward on the stream of its forward, which must be the captured one
        if contender.backward:
            outputs = there()
            bodies = {"backward": lambda: [contender.backward(i, outputs[i]) for i in indices],
                      "both": lambda: [contender.backward(i, out) for i, out in enumerate(there())]}
        for body in bodies.values():
            body()
    torch.cuda.current_stream(device).wait_stream(stream)
    graphs = {}
    for stage, body in bodies.items():
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            body()
        graphs[stage] = graph, _host_seconds(graph.replay, device)

    def sample(_: int) -> dict[str, float]:
        seconds = {}
        for stage, (graph, host_s) in graphs.items():
            before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            _lead(host_s, device)
            before.record()
            graph.replay()
            after.record()
            after.synchronize()
            seconds[stage] = before.elapsed_time(after) * 1e-3 / sets
        return seconds

    return sample


def _cuda_launches(contender: Contender, sets: int, device: torch.device, call_s: float,
                   waits: bool) -> Callable[[int], dict[str, float]]:
    """A sampler that launches the calls between CUDA events, on as many input sets as fill CAPTURED_S seconds."""
    count = max(1, min(sets, math.ceil(CAPTURED_S / call_s)))

    def launch(first: int) -> list[list[torch.cuda.Event]]:
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(3)] for _ in range(count)]
        for step, (start, turn, end) in enumerate(marks):
            i = (first + step) % sets
            start.record()
            outputs = contender.forward(i)
            turn.record()
            if contender.backward:
                contender.backward(i, outputs)
            del outputs
            end.record()
        return marks

    host_s = _host_seconds(lambda: launch(0), device)

    def sample(first: int) -> dict[str, float]:
        torch.cuda.synchronize(device) if waits else _lead(host_s, device)
        marks = launch(first)
        torch.cuda.synchronize(device)
        mean = lambda a, b: sum(mark[a].elapsed_time(mark[b]) for mark in marks) * 1e-3 / count
        return {"backward": mean(1, 2), "both": mean(0, 2)} if contender.backward else {"forward": mean(0, 1)}

    return sample


@dataclass(frozen=True)
class Peaks:
    """The rates of this machine in this run: copying (bytes read and written), reading, bf16 and float32 matrix products."""

    copy_bytes_per_s: float
    read_bytes_per_s: float
    matmul_flops_per_s: float
    matmul_float32_flops_per_s: float


def measure_peaks(device: torch.device, seconds: float = 1.0) -> Peaks:
    """Measures copying of 128 MiB (CUDA: 1 GiB) into memory that is already mapped, `sum()` of as many bytes, and products of
    square matrices of 2048 (CUDA: 8192) rows in bf16 and float32 with PyTorch's current settings, on random data."""
    cuda = device.type == "cuda"
    count, cube = (2**28, 8192) if cuda else (2**25, 2048)
    flat = torch.randn(count, device=device)
    present = flat.clone()  # copying into fresh memory would measure its page faults
    a32, b32 = (torch.randn(cube, cube, device=device) for _ in range(2))
    a, b = a32.bfloat16(), b32.bfloat16()
    contenders = [Contender("copy", lambda i: present.copy_(flat)), Contender("read", lambda i: flat.sum()),
                  Contender("matmul", lambda i: a @ b), Contender("matmul float32", lambda i: a32 @ b32)]
    paired = interleave(contenders, 1, device, seconds=seconds, rounds=(MIN_ROUNDS, 101))
    size = flat.numel() * flat.element_size()
    return Peaks(2 * size / paired.median("forward", "copy"), size / paired.median("forward", "read"),
                 2 * cube**3 / paired.median("forward", "matmul"), 2 * cube**3 / paired.median("forward", "matmul float32"))
