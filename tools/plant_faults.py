"""Plants one fault at a time in each operator and backend, and shows that the shared checks see it.

    python tools/plant_faults.py                      # a table operator x backend x fault: red, or NOT SEEN
    python tools/plant_faults.py --op rms_norm --backend cpp
    python tools/plant_faults.py --source             # instead: one wrong line in a C++ kernel of each family, built and tested

A fault negates the last row of one result of one pass, as a kernel with a forgotten edge would. It is planted below the
public function and its autograd formula: `cpp` in what the dispatcher returns of an overload, `triton` in what a launcher
returns or writes, `reference` in what the plain PyTorch function returns, and in the gradient that it gives each argument.
What runs is `test_ladder` of tests/shared in float32: first without a fault, where it must pass, then with each of them,
where it must not. The exit status is 1 if a fault is not seen or if a test fails without one.
"""

import argparse
import contextlib
import importlib
import inspect
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TESTS = ROOT / "tests" / "shared" / "test_ops.py"
BACKENDS = ("reference", "cpp", "triton")


# ------------------------------------------------------------------------------------------------------------ faults
def negate_last_row(x) -> None:
    """Plants the fault in x, in place: negates its last row. Zeros, which negation would not change, become as large as the
    largest element, and a tensor of one number is multiplied by 1.5."""
    import torch

    if x.dtype == torch.bool or x.numel() == 0:
        x.logical_not_()
    elif x.numel() == 1:
        x.copy_(torch.where(x == 0, torch.ones_like(x), x + x / 2))
    else:
        last = x[-1]
        last.copy_(torch.where(last == 0, x.abs().max().clamp(min=1), -last))


def spoilt(x):
    x = x.detach().clone()
    negate_last_row(x)
    return x


class Planted:
    """The active fault: (pass, place), or None. `met` says whether that pass has run since the fault was planted."""

    fault = None
    met = False

    def spoil(self, name: str, schema, args, result):
        """Returns `result`, which the pass `name` returned. If that pass has the active fault, the fault is put into `result`
        or into the arguments that the pass wrote."""
        import torch

        if self.fault is None or self.fault[0] != name:
            return result
        place = self.fault[1]
        if place.startswith("argument "):
            index = [a.name for a in schema.arguments].index(place.removeprefix("argument "))
            written = args[index]
            for tensor in written if isinstance(written, (list, tuple)) else [written]:
                if tensor is not None and tensor.numel():
                    self.met = True
                    negate_last_row(tensor)
            return result
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        index = int(place.split()[1])
        if results[index].numel():
            self.met = True
            results[index] = spoilt(results[index])
        return results[0] if isinstance(result, torch.Tensor) else tuple(results)


PLANTED = Planted()


def faults(op, backend: str) -> list[tuple[str, str]]:
    """The faults to plant: (pass, place) of every result that the operator's passes return or write."""
    if backend == "reference":
        found = [("forward", f"result {i}") for i in range(len(op.outputs))]
        case = next(case for case in op.workload.cases if case.kind == "smoke")
        import torch

        sample = op.workload.sample(case, torch.float32, torch.device("cpu"), torch.Generator().manual_seed(0))
        return found + [("backward", name) for name in (sample.grad if "backward" in op.directions else ())]
    found = []
    for name in op.schemas:
        schema = op.overloads[name][backend]._schema
        written = [a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write]
        found += [(name, f"argument {argument}") for argument in written]
        found += [(name, f"result {i} {r.name}".strip()) for i, r in enumerate(schema.returns)]
    return found


@contextlib.contextmanager
def in_reference(op):
    """Inside the block the operator's reference has the active fault. The float64 gold was computed before, without it."""
    import torch

    module, original = importlib.import_module(f"internlm2_kernels.ops.{op.name}"), op.reference
    signature = inspect.signature(original)

    class WrongGradient(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.view_as(x)

        @staticmethod
        def backward(ctx, gradient):
            return spoilt(gradient)

    def wrong(*args, **kwargs):
        kind, place = PLANTED.fault or ("", "")
        bound = signature.bind(*args, **kwargs)
        if kind == "backward" and place in bound.arguments:
            PLANTED.met = True
            bound.arguments[place] = WrongGradient.apply(bound.arguments[place])
        result = original(*bound.args, **bound.kwargs)
        if kind != "forward":
            return result
        results = [result] if isinstance(result, torch.Tensor) else list(result)
        index = int(place.split()[1])
        if index < len(results):
            PLANTED.met = True
            with torch.no_grad():
                difference = spoilt(results[index].detach()) - results[index].detach()
            results[index] = results[index] + difference if difference.is_floating_point() else spoilt(results[index])
        return results[0] if isinstance(result, torch.Tensor) else type(result)(results) if type(result) is tuple else (
            type(result)(*results))

    kept = {name: vars(module)[name] for name in ("reference",) if vars(module).get(name) is original}
    for name in kept:
        setattr(module, name, wrong)
    object.__setattr__(op, "reference", wrong)
    try:
        yield
    finally:
        object.__setattr__(op, "reference", original)
        for name, value in kept.items():
            setattr(module, name, value)


def in_dispatcher():
    """A dispatch mode that puts the active fault into what any overload `cpp` returns."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Wrong(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if func.namespace != "internlm2":
                return result
            return PLANTED.spoil(func._schema.name.removeprefix("internlm2::"), func._schema, args, result)

    return Wrong()


def in_launchers(op) -> None:
    """Puts the active fault into the operator's Triton launchers, for the rest of this process: the registry looks a launcher
    up once and keeps it."""
    module = importlib.import_module(f"internlm2_kernels._triton.{op.name}")

    def wrapped(launcher, name, schema):
        return lambda *args: PLANTED.spoil(name, schema, args, launcher(*args))

    for name in op.schemas:
        qualified = f"{op.name}_{name}"
        launcher, schema = getattr(module, qualified), op.overloads[name]["triton"]._schema
        setattr(module, qualified, wrapped(launcher, qualified, schema))


# ------------------------------------------------------------------------------------------------- the tests, with them
class Session:
    """A pytest plugin that replaces pytest's loop over the tests: it runs the collected tests once for each planted fault."""

    def __init__(self, op_name: str, backends: list[str]):
        self.op_name, self.backends, self.rows = op_name, backends, []

    def pytest_runtestloop(self, session):
        from internlm2_kernels import OPS

        op = OPS[self.op_name]
        for backend in self.backends:
            items = [item for item in session.items if item.originalname == "test_ladder" and self.chosen(item, op, backend)]
            if not items or backend not in op.usable["cpu"]:
                continue
            if backend == "triton":
                in_launchers(op)
            wrong = self.first_red(items)
            if wrong:
                self.rows.append([op.name, backend, "none", f"FAILS WITHOUT A FAULT: {wrong}"])
                continue
            for name, place in faults(op, backend):
                PLANTED.fault = (name if backend == "reference" else f"{op.name}_{name}"), place
                PLANTED.met = False
                with in_reference(op) if backend == "reference" else (
                        in_dispatcher() if backend == "cpp" else contextlib.nullcontext()):
                    red = self.first_red(items)
                PLANTED.fault = None
                verdict = "red" if red else "NOT SEEN" if PLANTED.met else "not returned by any case"
                self.rows.append([op.name, backend, f"{name}: {place}", verdict])
        return True

    @staticmethod
    def chosen(item, op, backend) -> bool:
        import torch
        from cells import variants

        mine = [v for v in variants("cpu", op) if v[0] == backend]
        dtype = torch.float32 if torch.float32 in op.dtypes else op.dtypes[0]
        parameters = item.callspec.params
        return bool(mine) and parameters["op"] is op and parameters["variant"] == mine[-1] and parameters["dtype"] == dtype

    @staticmethod
    def first_red(items) -> str:
        """The name of the first item that fails. Backward items run first, because they compare the forward's results too."""
        from _pytest.runner import runtestprotocol

        for item in sorted(items, key=lambda item: item.callspec.params["direction"]):
            item._initrequest()
            for report in runtestprotocol(item, nextitem=None, log=False):
                if report.failed:
                    return item.name
        return ""


def work(op_name: str, backends: list[str]) -> int:
    """What the process of one operator does: it plants the faults, tests with each, and prints its rows of the table as JSON on
    the last line of standard output."""
    import pytest

    session = Session(op_name, backends)
    pytest.main([str(TESTS), "-k", "test_ladder", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--tb=no"],
                plugins=[session])
    print(json.dumps(session.rows))
    return 0


def table(names: list[str], backends: list[str], jobs: int) -> int:
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(
        [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}

    def rows_of(name):
        done = subprocess.run([sys.executable, __file__, "--worker", name, *(f"--backend={b}" for b in backends)], text=True,
                              capture_output=True, env=environment, cwd=ROOT)
        try:
            return json.loads(done.stdout.splitlines()[-1]) or [[name, "", "", "NO FAULT PLANTED"]]
        except (IndexError, ValueError):
            return [[name, "", "", f"NO RESULT: {(done.stderr or done.stdout)[-1500:]}"]]

    counts: dict[str, int] = {}
    with ThreadPoolExecutor(jobs) as pool:
        for rows in pool.map(rows_of, names):
            for op, backend, fault, verdict in rows:
                print(f"{op:<24}{backend:<11}{fault:<40}{verdict}", flush=True)
                counts[verdict] = counts.get(verdict, 0) + 1
    print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    return int(not counts or any(verdict not in ("red", "not returned by any case") for verdict in counts))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--op", action="append", default=[], help="only this operator (may be repeated)")
    parser.add_argument("--backend", action="append", default=[], choices=BACKENDS)
    parser.add_argument("--jobs", type=int, default=2, help="operators at a time")
    parser.add_argument("--source", action="store_true", help="wrong lines in C++ sources instead, each built and tested")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    backends = args.backend or list(BACKENDS)
    if args.worker:
        return work(args.worker, backends)
    sys.path.insert(0, str(ROOT))
    if args.source:
        from tools.plant_faults_source import table as source_table

        return source_table(args.op)
    from internlm2_kernels import OPS

    return table([name for name in OPS if not args.op or name in args.op], backends, args.jobs)


if __name__ == "__main__":
    sys.exit(main())
