"""Prints as JSON what five small kernels compute in Triton's interpreter. `python interpreter_probe.py bare | repaired`.
With `fast` or `slow`: the bits of the package's own kernels, in the repaired interpreter with and without what speeds it up.
"""

import hashlib
import json
import os
import sys
import warnings

os.environ["TRITON_INTERPRET"] = "1"
warnings.filterwarnings("error", category=DeprecationWarning, message="Conversion of an array")  # numpy 2.4 makes it an error
if sys.argv[1] != "bare":
    import interpreter

    interpreter.install(fast=sys.argv[1] != "slow")

import torch  # noqa: E402 (after the environment is set)
import triton  # noqa: E402 (after the environment is set)
import triton.language as tl  # noqa: E402 (after the environment is set)


@triton.jit
def cast_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at).to(tl.bfloat16))


@triton.jit
def dot_kernel(a_ptr, b_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    tl.store(y_ptr + at, tl.dot(tl.load(a_ptr + at), tl.load(b_ptr + at)))


@triton.jit
def sum_kernel(x_ptr, y_ptr, count):
    total = 0.0
    for i in range(0, count):
        total += tl.load(x_ptr + i)
    tl.store(y_ptr, total)


@triton.jit
def add_kernel(x_ptr, y_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at) + tl.load(x_ptr + at))


@triton.jit
def fma_kernel(x_ptr, y_ptr, z_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out_ptr + at, tl.fma(tl.load(x_ptr + at), tl.load(y_ptr + at), tl.load(z_ptr + at)))


def attempt(probe) -> object:
    try:
        return probe()
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def cast():
    """The fraction of float32 values that the interpreter rounds to bfloat16 as PyTorch does."""
    x = torch.cat([torch.randn(1020), torch.tensor([float("nan"), float("inf"), -0.0, 3.3e38])])
    y = torch.zeros(1024, dtype=torch.bfloat16)
    cast_kernel[(1,)](x, y, BLOCK=1024)
    return float((torch.nan_to_num(y, 7.0) == torch.nan_to_num(x.to(torch.bfloat16), 7.0)).float().mean())


def dot():
    """Largest relative error of a product of bfloat16 matrices."""
    a, b = torch.randn(32, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    y = torch.zeros(32, 32)
    dot_kernel[(1,)](a, b, y, BLOCK=32)
    want = a.double() @ b.double()
    return float(((y - want).abs().max() / want.abs().max()).nan_to_num(float("inf")))


def loop():
    """The sum of five ones by a loop whose bound is known at run time only; 5 is right."""
    y = torch.zeros(1)
    sum_kernel[(1,)](torch.ones(5), y, 5)
    return float(y)


def add():
    """Largest error of an addition in bfloat16."""
    x, y = torch.randn(32).bfloat16(), torch.zeros(32, dtype=torch.bfloat16)
    add_kernel[(1,)](x, y, BLOCK=32)
    return float((y.double() - 2 * x.double()).abs().max().nan_to_num(float("inf")))


def fma():
    """Largest error of x * y - round(x * y), which a fused multiply-add computes exactly."""
    x, y, out = torch.randn(1024), torch.randn(1024), torch.zeros(1024)
    fma_kernel[(1,)](x, y, -(x * y), out, BLOCK=1024)
    return float((out.double() - (x.double() * y.double() - (x * y).double())).abs().max())


def digests():
    """A digest of outputs and gradients for two smoke cases of every operator, in two dtypes."""
    from shared import OPS, forward_backward, sample_of, smoke_cases

    found = {}
    for op in OPS.values():
        for case in smoke_cases(op)[:2] if "triton" in op.backends else ():
            for dtype in op.dtypes[:2]:
                generator = torch.Generator().manual_seed(11)
                sample = sample_of(op, case, dtype, "cpu", generator)
                results = forward_backward(op, sample, "triton", generator)
                data = b"".join(t.flatten().contiguous().view(torch.uint8).numpy().tobytes() for t in results.values())
                found[f"{op.name} {case} {dtype}"] = hashlib.sha256(data).hexdigest()
    return found


torch.manual_seed(0)
if sys.argv[1] in ("fast", "slow"):
    print(json.dumps(digests()))
else:
    print(json.dumps({probe.__name__: attempt(probe) for probe in (cast, dot, loop, add, fma)}))
