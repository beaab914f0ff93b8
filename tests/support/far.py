"""Runs Triton's kernels on tensors whose elements lie more than 2^31 elements apart, while few pages of their memory are
touched. They run in a process of their own, because a kernel with 32-bit offsets would read other memory or crash.
"""

import os
import subprocess
import sys

import pytest

START = """
import torch
import interpreter
interpreter.install()
import internlm2_kernels as ik
torch.manual_seed(0)
def results(function, inputs, upstream):
    # all outputs, and the gradients of all inputs; upstream(i, y): of output i
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = function(*leaves)
    out = out if isinstance(out, tuple) else (out,)
    return *out, *torch.autograd.grad(out, leaves, [upstream(i, y) for i, y in enumerate(out)])
"""
END = """
import resource
assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss < 2 * 2**20, "the far tensors were meant to stay untouched"
print("all right")
"""


def assert_far(checks: str, device) -> None:
    """Runs the code `checks` after START in a new process, and skips the test on a GPU, where all of a tensor's memory is taken
    when it is allocated.
    """
    if device.type != "cpu":
        pytest.skip("relies on memory that is committed when touched")
    out = subprocess.run([sys.executable, "-c", START + checks + END], capture_output=True, text=True,
                         cwd=os.path.dirname(__file__), env={**os.environ, "TRITON_INTERPRET": "1"})
    assert out.returncode == 0 and "all right" in out.stdout, f"exit status {out.returncode}\n{out.stdout}{out.stderr[-3000:]}"
