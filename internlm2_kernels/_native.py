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
    """Calls an overload whose C++ checks values, and raises its errors as ValueError: torch delivers them as RuntimeError.

    csrc/errors.h marks them with "ValueError: " before the operator's name. In compiled code nothing can catch them, so that
    they stay RuntimeErrors with that mark.
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
