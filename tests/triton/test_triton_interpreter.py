"""The repairs of Triton's interpreter (support/interpreter.py): each of them is active in the tests, and each is needed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("triton")
PROBE = Path(__file__).parents[1] / "support" / "interpreter_probe.py"


def probe(mode: str) -> dict:
    out = subprocess.run([sys.executable, str(PROBE), mode], capture_output=True, text=True, cwd=PROBE.parent,
                         env={**os.environ, "TRITON_INTERPRET": "1"})
    assert out.returncode == 0, out.stderr
    return json.loads(out.stdout.splitlines()[-1])


def test_this_process_runs_repaired(device):
    if device.type != "cpu":
        pytest.skip("kernels run on the GPU")
    import interpreter

    assert interpreter.installed and os.environ["TRITON_INTERPRET"] == "1"


def test_repaired():
    found = probe("repaired")
    assert found["cast"] == 1.0  # every value as PyTorch rounds it, including NaN, infinity and overflow
    assert found["dot"] < 1e-6
    assert found["loop"] == 5.0
    assert "arithmetic on bfloat16 operands" in found["add"]
    assert found["fma"] == 0.0


def test_bare_is_wrong():
    """Without the repairs the interpreter computes wrong results. Where an assertion fails with a new Triton release, the
    repair that its message names can be removed.
    """
    found = probe("bare")
    assert found["cast"] < 0.9, "float32 to bfloat16 no longer truncates"
    assert found["dot"] > 1.0, "dot understands bfloat16 now"
    assert "DeprecationWarning" in str(found["loop"]) or "TypeError" in str(found["loop"]), "loops to a run-time bound work"
    assert found["add"] > 1.0, "bfloat16 arithmetic works now"
    assert found["fma"] > 1e-9, "fma rounds once now"


@pytest.mark.slow
def test_what_speeds_it_up_changes_no_bit():
    """Outputs and gradients of all operators are the same with and without support/interpreter_speed.py."""
    fast, slow = probe("fast"), probe("slow")
    assert len(fast) > 50 and fast == slow


def test_rounding_against_torch(generator, device):
    """The interpreter's repaired rounding to bfloat16 equals PyTorch's, at half-way cases, their neighbours, subnormal numbers
    and the largest values.
    """
    import interpreter

    high = torch.randint(0, 2**16, (20000,), generator=generator, device=device).cpu().numpy().astype(np.uint32)
    low = np.array([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF], dtype=np.uint32)
    values = (high[:, None] << 16 | low[None, :]).view(np.float32).ravel()
    got = torch.from_numpy(interpreter.from_bfloat16(interpreter.round_to_bfloat16(values)))
    want = torch.from_numpy(values).to(torch.bfloat16).float()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(torch.nan_to_num(got, 0.0), torch.nan_to_num(want, 0.0))
