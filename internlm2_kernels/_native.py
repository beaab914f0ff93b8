"""The compiled library `_C`, and the errors that its C++ raises."""

from typing import Any

import torch

try:
    from . import _C
    NATIVE_ERROR: str | None = None
except ImportError as error:
    _C = None
    NATIVE_ERROR = f"the compiled library is not here ({error}); see `python -m internlm2_kernels doctor`"

OPERATOR: dict[Any, str] = {}  # of every registered overload: the name of the operator that it belongs to


def native(overload: Any, *args: Any) -> Any:
    """Calls an overload whose C++ checks values. torch delivers its errors as RuntimeError; here they become ValueError.

    Inside a compiled graph nothing can catch them: there they stay a RuntimeError whose text begins with "ValueError: ".
    """
    if torch.compiler.is_compiling():
        return overload(*args)
    try:
        return overload(*args)
    except RuntimeError as error:
        _, found, message = str(error).partition("ValueError: ")
        if not found:
            raise
        message, prefix = message.splitlines()[0], f"{OPERATOR[overload]}: "
        raise ValueError(message if message.startswith(prefix) else prefix + message) from None
