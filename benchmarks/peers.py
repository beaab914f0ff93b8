"""Other libraries' kernels by operator name, as functions with the operator's own arguments; CUDA only, optional.

A peer that is not installed, or whose result fails the operator's error ladder, is left out and the run says so.
Liger is called with `in_place=False`: its in-place backward overwrites the incoming gradient, which the bench reuses.
Its swiglu backward overwrites its saved inputs all the same, so every peer gets input copies of its own.
"""

from collections.abc import Callable


def _rms_norm(x, weight, eps=1e-5, residual=None, *, rounding="once"):
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    casting = "llama" if rounding == "hf" else "gemma"  # gemma's: everything in float32, rounded once
    if residual is None:
        return LigerRMSNormFunction.apply(x, weight, eps, 0.0, casting, False)
    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, casting, False)


def _swiglu(gate, up=None):
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    if up is None:
        gate, up = gate.chunk(2, -1)
    return LigerSiLUMulFunction.apply(gate, up)


PEERS: dict[str, dict[str, Callable]] = {"rms_norm": {"liger": _rms_norm}, "swiglu": {"liger": _swiglu}}
