"""The compiled library `_C`, and the errors that its C++ raises."""

from typing import Any

import torch

try:
    from . import _C
    NATIVE_ERROR: str | None = None
except ImportError as error:
    _C = None
    NATIVE_ERROR = f"the compiled library is not here ({error}); see `python -m internlm2_kernels doctor`"


def native(overload: Any, *args: Any) -> Any:
    """Calls a C++ overload that checks the values of its arguments, and raises its errors as ValueError. torch turns them into
    RuntimeError; their message begins with "ValueError: " (csrc/errors.h), by which they are recognised.

    In compiled code they cannot be caught here, so they stay RuntimeErrors whose message begins with "ValueError: ".
    """
    if torch.compiler.is_compiling():
        return overload(*args)
    try:
        return overload(*args)
    except RuntimeError as error:
        _, found, message = str(error).partition("ValueError: ")
        if not found:
            raise
        raise ValueError(message.splitlines()[0]) from None
