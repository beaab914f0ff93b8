"""What the launchers of all operators share: rows of strided tensors, the supported dtypes, the launch itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)

# Only the static audit, which compiles kernels without a GPU and reads their machine code, sets these two variables. `record`
# is then called with (kernel, arguments, options) in place of every launch.
record: Callable[[Any, dict, dict], None] | None = None
recorded_architecture = 90


class Rows(NamedTuple):
    """Where the rows of a tensor lie in memory: row i begins at element (i // inner) * outer_stride + (i % inner) *
    inner_stride."""

    count: int
    inner: int
    outer_stride: int
    inner_stride: int

    def named(self, name: str) -> dict[str, int]:
        """The kernel arguments that describe the rows of the tensor `name`."""
        return {f"{name}_inner": self.inner, f"{name}_outer_stride": self.outer_stride,
                f"{name}_inner_stride": self.inner_stride}


def rows_of(x: torch.Tensor) -> Rows:
    """The rows of `x`, along its last dimension, which must have stride 1. `x` may have any shape if it is contiguous, and up
    to three dimensions otherwise."""
    cols = x.shape[-1]
    if x.is_contiguous():
        return Rows(x.numel() // cols if cols else 0, 1, cols, 0)
    if x.dim() == 1:
        return Rows(1, 1, 0, 0)
    if x.dim() == 2:
        return Rows(x.shape[0], 1, x.stride(0), 0)
    if x.stride(0) == x.shape[1] * x.stride(1):
        return Rows(x.shape[0] * x.shape[1], 1, x.stride(1), 0)
    return Rows(x.shape[0] * x.shape[1], x.shape[1], x.stride(0), x.stride(1))


def check_dtype(op: str, argument: str, x: torch.Tensor) -> None:
    if x.dtype not in DTYPES:
        raise TypeError(f"{op}: {argument}: expected float32, bfloat16 or float16 for backend 'triton', got {x.dtype}")


def architecture(device: torch.device) -> int:
    """The compute capability, such as 90 for Hopper, from which tiles are chosen. On other devices than CUDA it is the one for
    which the static audit compiles."""
    if device.type != "cuda":
        return recorded_architecture
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def launch(kernel: Any, programs: int, device: torch.device, arguments: dict, *, num_warps: int, num_stages: int = 1) -> None:
    """Runs `programs` programs of `kernel` on `device`.

    The compiler does not contract multiplications and additions, so results do not depend on its heuristics and every operation
    rounds as it is written. Loops that are bound by arithmetic use tl.fma where a fused operation saves instructions.
    """
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": False}
    if record is not None:
        record(kernel, arguments, options)
    elif device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[(programs,)](**arguments, **options)
    else:
        with torch.cuda.device(device):
            kernel[(programs,)](**arguments, **options)


def launch_elements(kernel: Any, x: torch.Tensor, block: int, arguments: dict, *, num_warps: int = 4) -> None:
    """Runs `kernel` with one program for every `block` elements of `x`; without elements there is no launch."""
    if x.numel():
        launch(kernel, -(-x.numel() // block), x.device, dict(arguments, size=x.numel(), BLOCK=block), num_warps=num_warps)
