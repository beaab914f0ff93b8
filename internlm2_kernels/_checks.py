"""Argument checks shared by the public functions: each error names the operator, the argument, what was expected, what came."""

import torch

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(kind: type[Exception], op: str, argument: str, expected: str, got: object) -> None:
    raise kind(f"{op}: {argument}: expected {expected}, got {got}")


def check_float(op: str, argument: str, tensor: object) -> None:
    """`tensor` is a floating-point tensor of an accepted dtype."""
    if not isinstance(tensor, torch.Tensor):
        fail(TypeError, op, argument, "a tensor", type(tensor).__name__)
    if tensor.dtype not in FLOAT_DTYPES:
        fail(TypeError, op, argument, "float32, bfloat16, float16 or float64", tensor.dtype)
    check_layout(op, argument, tensor)


def check_layout(op: str, argument: str, tensor: torch.Tensor) -> None:
    if tensor.layout != torch.strided:
        fail(TypeError, op, argument, "a dense (strided) tensor", tensor.layout)


def check_same(op: str, argument: str, tensor: object, like: torch.Tensor, of: str) -> None:
    """`tensor` has the dtype and the device of `like`, the argument named `of`."""
    if not isinstance(tensor, torch.Tensor):
        fail(TypeError, op, argument, "a tensor", type(tensor).__name__)
    if tensor.dtype != like.dtype:
        fail(TypeError, op, argument, f"the dtype of {of}, {like.dtype}", tensor.dtype)
    check_layout(op, argument, tensor)
    check_device(op, argument, tensor, like, of)


def check_device(op: str, argument: str, tensor: torch.Tensor, like: torch.Tensor, of: str) -> None:
    if tensor.device != like.device:
        fail(ValueError, op, argument, f"a tensor on the device of {of}, {like.device}", tensor.device)


def check_shape(op: str, argument: str, tensor: torch.Tensor, shape: tuple, meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        fail(ValueError, op, argument, f"shape {list(shape)} ({meaning})", list(tensor.shape))


def check_choice(op: str, argument: str, value: object, choices: tuple) -> None:
    if value not in choices:
        fail(ValueError, op, argument, " or ".join(repr(c) for c in choices), repr(value))


def check_flag(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(TypeError, op, argument, "True or False", repr(value))


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where kernels could not walk it: they take up to three dimensions and a last stride of 1."""
    if x.is_contiguous() or (x.dim() <= 3 and x.stride(-1) == 1):
        return x
    return x.contiguous()


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a copy where its last dimension is not dense: kernels take every other stride as it is."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
