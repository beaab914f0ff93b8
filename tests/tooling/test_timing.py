"""What the benchmarks rely on. Of timing: that every contender runs at every position of a round equally often, and that ratios
within a round cancel the machine's drift. Of the error ladder (testing.py): that it accepts and rejects what it should.
"""

import contextlib
import math
import os
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from internlm2_kernels import OPS, testing
from internlm2_kernels.testing import Draw, ladder, run
from internlm2_kernels.workloads import Case
from tools import timing
from tools.timing import Contender, interleave, quantiles, turns

CPU = torch.device("cpu")


class Clock:
    """A clock that only the contenders advance, so that the expected result is known exactly."""

    def __init__(self, monkeypatch):
        self.ns = 0
        monkeypatch.setattr(timing.time, "perf_counter", lambda: self.ns * 1e-9)
        monkeypatch.setattr(timing.time, "perf_counter_ns", lambda: self.ns)

    def contender(self, name, ms, family="", back=0.0, drift=lambda: 1.0):
        def spend(ms):
            self.ns += int(ms * drift() * 1e6)
        backward = (lambda i, outputs: spend(back)) if back else None
        return Contender(name, lambda i: spend(ms), backward, family)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_turns_are_balanced(count):
    """Over 2 x count rounds every contender runs at every position of the round equally often."""
    places = [(who, place) for r in range(2 * count) for place, who in enumerate(turns(count, r))]
    assert {places.count(p) for p in places} == {2}
    assert sorted(turns(count, 3)) == list(range(count))


def test_paired_ratios_cancel_the_machines_drift(monkeypatch):
    """A machine that becomes 3 times slower half-way changes neither the ratio nor its spread."""
    clock, calls = Clock(monkeypatch), []
    drift = lambda: 3.0 if len(calls) > 60 else 1.0
    ours, peer = clock.contender("ours", 2, back=4, drift=drift), clock.contender("peer", 5, back=10, drift=drift)
    counted = replace(ours, forward=lambda i: (calls.append(i), ours.forward(i))[1])
    paired = interleave([counted, peer], 4, CPU, seconds=0.0, rounds=(40, 40))
    for stage, expected in (("forward", 2.5), ("backward", 2.5), ("both", 2.5)):
        median, low, high = paired.ratio(stage, "peer", "ours")
        assert median == pytest.approx(expected, rel=1e-6) and low == pytest.approx(expected, rel=0.3)
        assert high == pytest.approx(expected, rel=0.3)
    assert paired.times["both"]["ours"][0] == pytest.approx(0.006)
    assert set(calls) == {0, 1, 2, 3}  # the input sets rotate


def test_rounds_end_with_the_time_but_never_before_the_minimum(monkeypatch):
    clock = Clock(monkeypatch)
    slow = interleave([clock.contender("a", 1000)], 1, CPU, seconds=1.0, rounds=(5, 100))
    assert len(slow.times["forward"]["a"]) == 5
    fast = interleave([clock.contender("a", 100)], 1, CPU, seconds=1.0, rounds=(5, 100))
    assert 10 <= len(fast.times["forward"]["a"]) <= 12


def test_slow_forms_are_screened_within_their_family_only(monkeypatch):
    clock = Clock(monkeypatch)
    contenders = [clock.contender("ours", 50), clock.contender("fast", 1, "eager"), clock.contender("near", 1.9, "eager"),
                  clock.contender("slow", 2.5, "eager")]
    paired = interleave(contenders, 1, CPU, seconds=0.0, rounds=(3, 3))
    assert set(paired.times["forward"]) == {"ours", "fast", "near"}
    assert paired.screened["slow"][0] == pytest.approx(0.0025)


class FakeCuda:
    """Streams, graphs and events of a simulated device: a graph replays its capture by advancing the clock."""

    def __init__(self, clock, monkeypatch, refuses=False):
        cuda, outer = torch.cuda, self
        self.replays, self.captured, self.mode, self.slept, self.pools = 0, 0, "default", [], set()

        class Graph:
            def replay(self):
                outer.replays += 1
                clock.ns += self.cost

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing
            def record(self):
                self.at = clock.ns
            def elapsed_time(self, end):
                return (end.at - self.at) * 1e-6
            synchronize = lambda self: None

        @contextlib.contextmanager
        def capture(graph, pool, stream):
            outer.pools.add(pool)
            if refuses:
                raise RuntimeError("operation not permitted when stream is capturing\nmore")
            before = clock.ns
            yield
            graph.cost, outer.captured = clock.ns - before, outer.captured + 1

        stream = SimpleNamespace(wait_stream=lambda other: None)
        for name, fake in {"Stream": lambda device: stream, "current_stream": lambda device: stream, "Event": Event,
                           "stream": lambda s: contextlib.nullcontext(), "CUDAGraph": Graph, "graph": capture,
                           "synchronize": lambda device=None: None, "graph_pool_handle": lambda: 7,
                           "set_stream": lambda s: None, "_sleep": self.slept.append,
                           "set_sync_debug_mode": lambda m: setattr(self, "mode", m)}.items():
            monkeypatch.setattr(cuda, name, fake)


@pytest.mark.parametrize("refuses", [False, True], ids=["graph", "launches"])
def test_cuda_times_a_replay_of_all_input_sets(monkeypatch, refuses):
    """On a simulated device: one replay runs every set, times are for one set, and the backward has a graph too."""
    clock = Clock(monkeypatch)
    cuda = FakeCuda(clock, monkeypatch, refuses)
    contenders = [clock.contender("ours", 1, back=2), clock.contender("peer", 3, back=6), clock.contender("clone", 1)]
    paired = interleave(contenders, 4, torch.device("cuda"), seconds=0.0, rounds=(3, 3))
    assert paired.median("backward", "ours") == pytest.approx(2e-3) and paired.median("both", "ours") == pytest.approx(3e-3)
    assert paired.ratio("both", "peer", "ours")[0] == pytest.approx(3.0)
    assert paired.median("forward", "clone") == pytest.approx(1e-3)
    if refuses:
        assert paired.method.endswith("(no graph: operation not permitted when stream is capturing)")
    else:
        assert paired.method == "cuda graph replay" and cuda.captured == 5
        assert cuda.replays == (1 + 3) * 5 and cuda.pools == {7}  # one replay of each graph measures the host's time


def test_cuda_launches_what_is_long_and_what_waits(monkeypatch):
    """Calls that take long and calls that wait for the device are launched instead of captured in a graph. While other calls
    are queued, the device is kept busy, so that its time is measured and not the host's.
    """
    clock = Clock(monkeypatch)
    cuda = FakeCuda(clock, monkeypatch)
    waiting = clock.contender("waiting", 2)

    def waits(i):
        if cuda.mode == "error":
            raise RuntimeError("called a synchronizing CUDA operation")
        return waiting.forward(i)

    contenders = [clock.contender("ours", 1), clock.contender("long", 40), replace(waiting, forward=waits)]
    paired = interleave(contenders, 4, torch.device("cuda"), seconds=0.0, rounds=(3, 3))
    assert cuda.captured == 1 and cuda.mode == "default"
    assert paired.method == ("cuda graph replay, launched: long (calls of 40 ms), waiting (it waits for the device)")
    assert [paired.median("forward", name) for name in ("ours", "long", "waiting")] == pytest.approx([1e-3, 40e-3, 2e-3])
    assert sorted(cuda.slept) == [int((1.5 * 4e-3 + 50e-6) * 2e9)] * 3 + [int(20e-3 * 2e9)] * 3

    def fails(i):
        raise RuntimeError("out of memory")
    monkeypatch.setattr(timing, "_warm_up", lambda *args: [1e-3])
    with pytest.raises(RuntimeError, match="out of memory"):
        interleave([Contender("fails", fails)], 1, torch.device("cuda"), rounds=(3, 3))
    assert cuda.mode == "default"


def test_quantiles_and_cold_sets():
    assert quantiles([float(i) for i in range(11)]) == (5.0, 2.0, 8.0)
    cache = timing.cache_bytes(CPU)
    assert cache > 0 and timing.cold_sets(4 * cache, CPU) == 1 and timing.cold_sets(cache // 2, CPU) == 6


def test_same_name_twice_and_too_many_threads_are_errors():
    same = Contender("a", lambda i: None)
    with pytest.raises(ValueError, match="contenders: expected distinct names"):
        interleave([same, same], 1, CPU)
    if hasattr(os, "sched_setaffinity"):
        with pytest.raises(ValueError, match="threads: expected at most"):
            timing.pin(len(os.sched_getaffinity(0)) + 1)


@pytest.fixture
def laddered(generator):
    op = OPS["rms_norm"]
    sample = op.workload.sample(Case("smoke", {"rows": 9, "cols": 40, "residual": True}), torch.bfloat16, CPU, generator)
    upstream = testing.draw_upstream(op, sample, 1.0, generator)
    return op, sample, run(op, sample, "reference", upstream), upstream


def _last(tensor, value):
    broken = tensor.clone()
    broken.view(-1)[-1] = value
    return broken


@pytest.mark.parametrize("broken", [
    torch.zeros_like,
    lambda t: _last(t, math.nan),
    lambda t: _last(t, math.inf),
    lambda t: torch.roll(t, 1, 0),
    lambda t: t * 1.05,
    lambda t: t.float(),
    lambda t: t[..., :-1],
], ids=["zeros", "nan", "inf", "rolled", "5 % off", "dtype", "shape"])
def test_ladder_turns_red(laddered, broken):
    op, sample, right, upstream = laddered
    assert all(r.ok for r in ladder(op, [Draw(sample, right, upstream)]))
    for name, tensor in right.items():
        rungs = {r.name: r for r in ladder(op, [Draw(sample, {**right, name: broken(tensor)}, upstream)])}
        assert not rungs.pop(name).ok and all(r.ok for r in rungs.values()), name
    with pytest.raises(AssertionError, match="RED"):
        testing.assert_ladder(op, [Draw(sample, {**right, "y": broken(right["y"])}, upstream)])


def test_ladder_wants_every_tensor_and_no_other(laddered):
    op, sample, right, upstream = laddered
    missing = ladder(op, [Draw(sample, {n: t for n, t in right.items() if n != "d_x"}, upstream)])
    assert [r.problem for r in missing if not r.ok] == ["missing"]
    extra = ladder(op, [Draw(sample, {**right, "d_eps": right["y"]}, upstream)])
    assert [r.problem for r in extra if not r.ok] == ["unexpected"]


def test_a_baseline_that_overflows_excuses_nothing():
    gold, base = torch.ones(4, dtype=torch.float64), torch.tensor([1.0, 1.0, 1.0, math.inf])
    assert testing._rung("y", torch.ones(4), base, gold, 0.0).ok
    assert not testing._rung("y", base, base, gold, 0.0).ok
    gold[0] = -math.inf  # where gold is infinite, the result must be the same infinity
    assert not testing._rung("y", torch.ones(4), base, gold, 0.0).ok
    assert testing._rung("y", torch.tensor([-math.inf, 1.0, 1.0, 1.0]), base, gold, 0.0).ok


def test_errors_of_all_draws_are_pooled():
    """The ladder compares root mean squares of errors over all draws. Ours err by 2, 2, 2 and the baseline by 1, 1, 4: the
    first draw alone is rejected, but all three together are within the allowed 1.25 times the baseline.
    """
    gold = [torch.full((100,), 1e6, dtype=torch.float64)] * 3
    with_errors = lambda *errors: [g + error for g, error in zip(gold, errors, strict=True)]
    ours, base = with_errors(2.0, 2.0, 2.0), with_errors(1.0, 1.0, 4.0)
    assert not testing._rung("y", ours[:1], base[:1], gold[:1], 0.0).ok
    assert testing._rung("y", ours, base, gold, 0.0).ok
    assert not testing._rung("y", with_errors(2.0, 2.0, 9.0), base, gold, 0.0).ok  # more than twice the baseline's largest
    assert not testing._rung("y", [*ours[:2], None], base, gold, 0.0).ok
