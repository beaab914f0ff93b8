"""Triton's interpreter, repaired for the tests: bfloat16 and fused multiply-add as the hardware computes them, and loops whose
bound is known at run time only, with every version of numpy.

Unrepaired (Triton 3.6) it truncates float32 to bfloat16 where hardware rounds to nearest even, multiplies and adds the raw
bits of bfloat16, rounds the product in tl.fma before it adds, and from numpy 2.4 on cannot loop to a bound that is known at
run time only. test_triton_interpreter.py shows each of them, with and without `install()`.
"""

import interpreter_speed
import numpy as np

installed = False


def round_to_bfloat16(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values rounded to bfloat16, to nearest even; NaN stays NaN."""
    bits = np.ascontiguousarray(values).view(np.uint32)
    rounded = ((bits + (0x7FFF + ((bits >> 16) & 1))) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def from_bfloat16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def install(fast=True) -> None:
    """Repairs the interpreter of this process, once, and with `fast` also speeds it up (interpreter_speed.py). Call before
    kernels are imported, with TRITON_INTERPRET=1 set.
    """
    global installed
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # no Triton on this system: its backend is not there to be tested
        return
    if installed:
        return
    installed = True
    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    is_bf16 = lambda operand: operand.dtype.scalar == tl.bfloat16
    cast, fp_to_fp, dot = builder.cast_impl, builder.create_fp_to_fp, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op
    patch_tensor = interpreter._patch_lang_tensor

    def convert(original):
        def converted(self, source, dst_type, *mode):
            source_type, target_type = source.dtype.scalar, dst_type.scalar
            if source_type == tl.float32 and target_type == tl.bfloat16:
                return handle(round_to_bfloat16(source.data), tl.bfloat16)
            if source_type == tl.bfloat16 and target_type == tl.float32:
                return handle(from_bfloat16(source.data), tl.float32)
            if source_type != target_type and tl.bfloat16 in (source_type, target_type):
                raise TypeError(f"the interpreter's {source_type} to {target_type} is not repaired: go through float32")
            return original(self, source, dst_type, *mode)
        return converted

    def repaired_dot(self, a, b, *rest):
        a, b = (handle(from_bfloat16(x.data), tl.float32) if is_bf16(x) else x for x in (a, b))
        return dot(self, a, b, *rest)

    def refusing(original):
        """The interpreter would compute with the raw bits of bfloat16 operands. Our kernels compute in float32, so such
        arithmetic raises an error.
        """
        def checked(self, operand, *rest):
            if is_bf16(operand):
                raise TypeError("arithmetic on bfloat16 operands: the interpreter would take their bits for integers")
            return original(self, operand, *rest)
        return checked

    def fused(self, x, y, z):
        """x * y + z in float32, computed in float64, where the product is exact. The kernels use no other dtype."""
        if z.dtype.scalar != tl.float32:
            raise TypeError(f"the interpreter's fma of {z.dtype.scalar} is not repaired: use float32")
        with np.errstate(over="ignore", invalid="ignore"):
            total = x.data.astype(np.float64) * y.data.astype(np.float64) + z.data.astype(np.float64)
            return handle(total.astype(np.float32), z.dtype.scalar)

    def patch_tensor_with_index(tensor, scope):
        patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    builder.cast_impl, builder.create_fp_to_fp, builder.create_dot = convert(cast), convert(fp_to_fp), repaired_dot
    builder.binary_op, builder.unary_op, builder.create_fma = refusing(binary), refusing(unary), fused
    interpreter._patch_lang_tensor = patch_tensor_with_index
    if fast:
        interpreter_speed.install(interpreter, tl)
