"""Argument checks of the public functions. Every error names operator and argument, and says what was expected and given."""

import math
import numbers

import torch

LARGEST = torch.finfo(torch.float32).max
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def fail(kind: type[Exception], op: str, argument: str, expected: str, got: object) -> None:
    shown = " ".join(str(got).split())  # a tensor given as an option is shown on one line
    raise kind(f"{op}: {argument}: expected {expected}, got {shown if len(shown) <= 500 else shown[:500] + ' ...'}")


def check_float(op: str, argument: str, tensor: object) -> None:
    """Raises unless `tensor` is a strided tensor of an accepted floating-point dtype."""
    check_tensor(op, argument, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        fail(TypeError, op, argument, "float32, bfloat16, float16 or float64", tensor.dtype)


def check_tensor(op: str, argument: str, value: object, expected: str = "a tensor") -> None:
    """Raises unless `value` is a strided tensor: sparse, nested and mkldnn tensors are refused."""
    if not isinstance(value, torch.Tensor):
        fail(TypeError, op, argument, expected, type(value).__name__)
    if value.layout != torch.strided or value.is_nested:
        fail(TypeError, op, argument, "a dense (strided) tensor", "a nested one" if value.is_nested else value.layout)


def check_same(op: str, argument: str, tensor: object, like: torch.Tensor, of: str) -> None:
    """Raises unless `tensor` has the dtype and the device of `like`, the argument named `of`."""
    check_tensor(op, argument, tensor)
    if tensor.dtype != like.dtype:
        fail(TypeError, op, argument, f"the dtype of {of}, {like.dtype}", tensor.dtype)
    check_device(op, argument, tensor, like, of)


def check_device(op: str, argument: str, tensor: torch.Tensor, like: torch.Tensor, of: str) -> None:
    if tensor.device != like.device:
        fail(ValueError, op, argument, f"a tensor on the device of {of}, {like.device}", tensor.device)


def check_shape(op: str, argument: str, tensor: torch.Tensor, shape: tuple, meaning: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        fail(ValueError, op, argument, f"shape {list(shape)} ({meaning})", list(tensor.shape))


def check_choice(op: str, argument: str, value: object, choices: tuple) -> None:
    if not isinstance(value, str | int) or value not in choices:  # `in` would raise for an array
        fail(ValueError, op, argument, " or ".join(repr(c) for c in choices), repr(value))


def check_flag(op: str, argument: str, value: object) -> None:
    if not isinstance(value, bool):
        fail(TypeError, op, argument, "True or False", repr(value))


def check_number(op, argument, value, expected, accept):
    """Returns `value` as a float. Raises unless it is a real number, finite in float32, that `accept` accepts.

    Comparisons decide whether it is finite, because torch.compile cannot trace math.isfinite of a symbolic number.
    """
    if type(value) is float and -LARGEST <= value <= LARGEST and accept(value):  # fast: isinstance of Real takes 1 us
        return value
    try:
        number = float(value) if isinstance(value, numbers.Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer that is too large for a float
        number = math.inf
    if not -LARGEST <= number <= LARGEST or not accept(number):
        if accept(number) and abs(value) != math.inf:  # only its size is wrong
            expected += ", within the range of float32"
        fail(ValueError, op, argument, expected, repr(value))
    return number


def check_factory(op: str, device: object, dtype: object = None) -> None:
    """Raises unless floating-point tensors of `dtype` can be made on `device`; None stands for PyTorch's default."""
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        fail(TypeError, op, "dtype", "a floating-point torch.dtype or None", repr(dtype))
    if device is None:
        return
    if isinstance(device, bool) or not isinstance(device, str | int | torch.device):
        fail(TypeError, op, "device", "a torch.device, its name or None", repr(device))
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ValueError, NotImplementedError):  # torch's own message does not name the argument
        fail(ValueError, op, "device", "a device of this machine that PyTorch was built for", repr(device))


def check_labels(op, argument, labels, rows, like, of):
    """Returns `labels` contiguous. Raises unless it is int64 or int32, of shape `rows`, on the device of `like`.

    The values of the labels are not checked here, but by the kernels, or for the backend `reference` by `check_values`.
    """
    check_tensor(op, argument, labels, "an int64 or int32 tensor")
    if labels.dtype not in (torch.int64, torch.int32):
        fail(TypeError, op, argument, "torch.int64 or torch.int32", labels.dtype)
    check_shape(op, argument, labels, rows, f"the leading dimensions of {of}")
    check_device(op, argument, labels, like, of)
    return labels.contiguous()


def check_values(op: str, argument: str, values: torch.Tensor | None, low: int, high: int, besides: int | None = None) -> None:
    """Raises unless all values of a CPU tensor lie in [low, high) or equal `besides`.

    Only the backend `reference` calls this: compiled kernels check the values themselves.
    """
    if values is None or values.device.type != "cpu" or torch.compiler.is_compiling() or not values.numel():
        return
    wrong = (values < low) | (values >= high)
    if besides is not None:
        wrong &= values != besides
    if wrong.any():
        fail(ValueError, op, argument, f"values from {low} to {high - 1}" + ("" if besides is None else " or ignore_index"),
             int(values[wrong][0]))


def check_vector(op, argument, tensor, shape, like, of):
    """Returns `tensor` contiguous. Raises unless it has `shape` and the dtype and device of `like`."""
    check_tensor(op, argument, tensor)
    if tensor.dtype != like.dtype:
        fail(TypeError, op, argument, f"the dtype of {of}, {like.dtype}", tensor.dtype)
    if tensor.shape != shape:
        check_shape(op, argument, tensor, shape, f"the shape of {of}")
    check_device(op, argument, tensor, like, of)
    return tensor.contiguous()


def check_mask(op, mask, like, of):
    """Returns `mask` as a contiguous bool tensor, in which every number but 0 is True. Raises unless it has the shape of
    `like`, the argument named `of`."""
    check_tensor(op, "mask", mask)
    if mask.shape != like.shape:
        check_shape(op, "mask", mask, like.shape, f"the shape of {of}")
    check_device(op, "mask", mask, like, of)
    return (mask if mask.dtype == torch.bool else mask != 0).contiguous()


def check_cu_seqlens(op, argument, cu, like, of):
    """Returns `cu` contiguous. Raises unless it is int32 [n + 1] on the device of `like`, the argument named `of`."""
    check_tensor(op, argument, cu, "an int32 tensor [sequences + 1]")
    if cu.dtype != torch.int32:
        fail(TypeError, op, argument, "torch.int32", cu.dtype)
    if cu.dim() != 1 or cu.shape[0] < 1:
        fail(ValueError, op, argument, "shape [sequences + 1]", list(cu.shape))
    check_device(op, argument, cu, like, of)
    return cu.contiguous()


def check_boundaries(op: str, argument: str, cu: torch.Tensor, total: int, shortest: int = 0, longest: int = -1) -> None:
    """Raises unless cu_seqlens on the CPU rise from 0 to `total`, in steps from `shortest` to `longest` (-1: no bound).

    Only the backend `reference` calls this: compiled kernels check the values themselves.
    """
    if cu.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds, rising = cu.tolist(), f"rise by at least {shortest}" if shortest else "never fall"
    if bounds[0] != 0:
        fail(ValueError, op, argument, "values that start at 0", bounds[0])
    lengths = [after - before for before, after in zip(bounds, bounds[1:], strict=False)]
    for i, length in enumerate(lengths):
        if length < shortest:
            fail(ValueError, op, argument, f"values that {rising}", f"{bounds[i + 1]} after {bounds[i]}")
    if bounds[-1] != total:
        fail(ValueError, op, argument, f"values that end at {total}", bounds[-1])
    check_longest(op, argument.replace("cu_seqlens", "max_seqlen"), longest, max(lengths, default=0))


def check_longest(op, argument, bound, longest):
    """Raises if `bound`, a max_seqlen argument (-1: not given), is less than the longest sequence."""
    if 0 <= bound < longest:
        fail(ValueError, op, argument, f"at least the longest sequence, {longest}", bound)


def as_rows(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy where kernels cannot read the rows of `x`: if it is not contiguous, they need at most three
    dimensions, the last of them with stride 1."""
    if x.is_contiguous() or (x.dim() <= 3 and x.stride(-1) == 1):
        return x
    return x.contiguous()


def last_stride_1(x: torch.Tensor) -> torch.Tensor:
    """`x`, or a contiguous copy if the stride of its last dimension is not 1. Kernels accept any other strides."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
