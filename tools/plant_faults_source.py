"""Wrong lines in the C++ kernels, one for each family of operators: `python tools/plant_faults.py --source`.

The lines are changed together, since each belongs to another operator, and the library is built once with them. Every
operator's shared checks must then fail. The sources are restored and the library is built again at the end, also after an
error or an interrupt.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Line:
    """A fault in the operator `op`: in `file`, below csrc/cpu, the text `right` is replaced by `wrong`."""

    op: str
    file: str
    right: str
    wrong: str
    what: str


LINES = (
    Line("swiglu", "swiglu.cpp", "fma(g, min(most, e) * s, V(1))", "fma(g, min(most, e), V(1))",
         "elementwise: the derivative of silu lacks a factor"),
    Line("rms_norm", "rms_norm.cpp", "for (; row < last; ++row) bwd_rows<1, T, W, kHf>(a, row, partial);",
         "for (; row + 1 < last; ++row) bwd_rows<1, T, W, kHf>(a, row, partial);", "normalisation: the last row is left out"),
    Line("apply_rope", "apply_rope.cpp", "rotate_heads<kInterleaved, T>(a.k, a.k_out, token, angles, half, first, n);",
         "rotate_heads<kInterleaved, T>(a.k, a.k_out, token, angles, half, first, n - 1);", "rotary: a column is missing"),
    Line("flash_attention", "attention/prefill.h", "lesser(begin + kSplit, last_key())",
         "lesser(begin + kSplit, last_key() - 1)", "attention: the last key of a tile is masked"),
    Line("cross_entropy", "cross_entropy.cpp", "fma(exp_for_result(load<V>(x + i, part) - down), va, vs)",
         "exp_for_result(load<V>(x + i, part) - down) * va", "losses: label smoothing is missing in the gradient"),
    Line("focal_ranking_loss", "focal_ranking_loss.cpp", "store(dchosen + j, V(0) - fall, lanes)",
         "store(dchosen + j, fall, lanes)", "rewards: a gradient has the wrong sign"),
    Line("ppo_value_loss", "ppo_value_loss.cpp", "pick(less(error * error, far * far), V(0), error * scale)", "error * scale",
         "PPO: the clipped branch has a gradient"),
    Line("adamw", "adamw.cpp", "fma(load<V>(p.m + j, Both<Order>{}), c.beta1, g * c.rest1)",
         "fma(load<V>(p.m + j, Both<Order>{}), c.beta1, g * c.rest2)", "optimizer: the first moment has another's factor"),
)


def build() -> None:
    subprocess.run([sys.executable, "setup.py", "-q", "build_ext", "--inplace"], cwd=ROOT, check=True)


def red(op: str) -> bool:
    """Whether the shared checks of the operator's cpp backend fail. Only failed tests count; an error of pytest itself
    raises."""
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-x", "-n", "0", "--tb=no", "-p", "no:cacheprovider",
                           "tests/shared/test_ops.py", "-k", f"test_ladder and {op}-cpp"], cwd=ROOT, capture_output=True,
                          text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    return done.returncode == 1


def table(names: list[str]) -> int:
    chosen = [line for line in LINES if not names or line.op in names]
    texts: dict[Path, str] = {}
    for line in chosen:
        path = ROOT / "csrc" / "cpu" / line.file
        texts.setdefault(path, path.read_text())
        if texts[path].count(line.right) < 1:
            raise SystemExit(f"{path.name} no longer has the line of {line.op}'s fault: {line.right}")
    missed = 0
    try:
        for line in chosen:
            path = ROOT / "csrc" / "cpu" / line.file
            path.write_text(path.read_text().replace(line.right, line.wrong))
        build()
        for line in chosen:
            seen = red(line.op)
            missed += not seen
            print(f"{line.op:<22}{line.what:<60}{'red' if seen else 'NOT SEEN'}", flush=True)
    finally:
        for path, text in texts.items():
            path.write_text(text)
        build()
    return int(missed > 0 or not chosen)
