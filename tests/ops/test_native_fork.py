"""A forked child must not wait for threads that exist in its parent only; DataLoader workers call operators too."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from internlm2_kernels import OPS
from internlm2_kernels._registry import _C

pytestmark = pytest.mark.skipif(_C is None or not hasattr(os, "fork"), reason="needs the compiled library and fork")

# Every pass of every operator as the public functions call it, at a size that runs on two threads; then the same calls in a
# forked child, bit for bit. The child compares with NumPy, because torch's own kernels hang after a fork.
CHILD = """
    import os, sys, signal
    sys.path.insert(0, {tests!r})
    import torch
    from shared import Recorder
    from internlm2_kernels import OPS
    from internlm2_kernels.workloads import Case
    from internlm2_kernels.testing import draw_upstream, run

    SIZES = {{"rows": 512, "cols": 1024, "tokens": 512, "heads": 8, "kv_heads": 2, "head_dim": 128}}
    torch.set_num_threads(2)
    calls = []
    for op in OPS.values():
        if "cpp" not in op.usable["cpu"]:
            continue
        case = next(c for c in op.workload.cases if c.kind == "smoke")
        case = Case("fork", {{key: SIZES.get(key, value) for key, value in case.dims.items()}})
        generator = torch.Generator().manual_seed(0)
        sample = op.workload.sample(case, op.dtypes[0], torch.device("cpu"), generator)
        with Recorder() as recorder:
            run(op, sample, "cpp", draw_upstream(op, sample, 1.0, generator))
        calls += [call for call in recorder.calls if call[0].namespace == "internlm2"]

    def bits(overload, args):
        given = [t for a in args for t in (a if isinstance(a, (list, tuple)) else (a,)) if isinstance(t, torch.Tensor)]
        given = [t.detach().numpy() for t in given] if overload._schema.is_mutable else []
        before = [array.copy() for array in given]
        out = overload(*args)
        results = given if out is None else [t.numpy() for t in (out if isinstance(out, tuple) else (out,))]
        results = [array.tobytes() for array in results]
        for array, old in zip(given, before):  # the next call, the child's, starts from the same
            array[...] = old
        return results

    want = [bits(*call) for call in calls]
    names = sorted(call[0]._schema.name.split("::")[1] for call in calls)
    pid = os.fork()
    if pid == 0:
        signal.alarm(60)  # a hang ends the child, and the parent reports it
        os._exit(0 if [bits(*call) for call in calls] == want else 3)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), *names)
"""


def test_every_operator_runs_in_a_forked_child():
    code = textwrap.dedent(CHILD).format(tests=str(Path(__file__).parents[1] / "support"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    status, *names = done.stdout.split()
    assert status == "0", f"the child ended with {status} (-14: it hung, 3: other values)"
    ran = [op.name for op in OPS.values() if "cpp" in op.usable["cpu"]]
    assert len(ran) >= 5 and all(any(name.startswith(f"{op}_") for name in names) for op in ran), names
    assert sum(name.endswith("bwd") for name in names) >= 3, names
