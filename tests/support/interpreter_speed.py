"""Triton's interpreter with less work in Python between the calls of NumPy; every result keeps its bits.

Unchanged (Triton 3.6), most of the time of a small kernel goes to Python objects that are made again and again: the
functions of triton.language are replaced anew for every call of a device function, every integer operation is computed a
second time in int64 for an overflow check whose result `device_assert` drops (InterpreterOptions.debug is off), and the shape
of every tensor is built, checked and wrapped element by element. test_triton_interpreter.py compares the bits with and
without `install()`.
"""

import builtins
import math
import types


def install(interpreter, tl) -> None:
    """Replaces these parts of the interpreter. To be called once, after the repairs of interpreter.py."""
    core = tl.core
    interpreter._patch_lang = patch_once(interpreter, tl)
    interpreter._patch_attr = patch_attribute(interpreter)
    interpreter._get_np_dtype = remembered(interpreter._get_np_dtype)
    interpreter.TritonSemantic.binary_op_sanitize_overflow_impl = lambda self, lhs, rhs, binary_op: None
    core.dtype.__eq__ = equal(core.dtype)
    core.tensor.__init__, core.block_type.__init__ = tensor_init(core), block_init(core)


def patch_attribute(interpreter):
    """As the original, without a new dictionary of arguments in every call."""
    def patch(obj, name, member, builder, scope):
        semantic = interpreter.TritonSemantic(builder)

        def call(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return member(*args, **kwargs)
        scope.set_attr(obj, name, call)
    return patch


def patch_once(interpreter, tl):
    """triton.language is replaced at the start of a launch and restored at its end. The original also replaces it at every
    call of a device function, which finds all of it replaced. What is replaced does not depend on the kernel, so it is found
    once.
    """
    original, changes, active = interpreter._patch_lang, [], []

    class Nothing:
        @staticmethod
        def restore():
            pass

    class Scope:
        @staticmethod
        def restore():
            active.clear()
            for obj, name, before, _ in reversed(changes):
                if before is interpreter._MISSING:
                    delattr(obj, name)
                else:
                    setattr(obj, name, before)

    def patch(fn):
        if active:
            return Nothing
        if not changes:
            found = {}
            scope = original(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
            for obj, name, before in scope._changes:  # an attribute may be there twice; its first value is the original one
                found.setdefault((id(obj), name), (obj, name, before, getattr(obj, name)))
            scope.restore()
            changes.extend(found.values())
        active.append(fn)
        for obj, name, _, value in changes:
            setattr(obj, name, value)
        return Scope
    return patch


def remembered(np_dtype):
    """The NumPy dtype of a type of Triton by the type's name, which names its element type."""
    known = {}

    def lookup(kind):
        found = known.get(kind.name)
        if found is None:
            found = known[kind.name] = np_dtype(kind)
        return found
    return lookup


def equal(dtype):
    original = dtype.__eq__

    def __eq__(self, other):
        return True if self is other else original(self, other)
    return __eq__


def tensor_init(core):
    """The shape of a tensor in constants of Triton, and the number of its elements, made once for each shape."""
    known = {}

    def __init__(self, handle, type):
        self.handle, self.type, self.dtype = handle, type, type.scalar
        shape = builtins.tuple(type.shape) if type.is_block() else ()
        if shape not in known:
            known[shape] = core.tuple([core.constexpr(size) for size in shape]), core.constexpr(math.prod(shape))
        self.shape, self.numel = known[shape]
    return __init__


def block_init(core):
    """The type of a block; a shape is checked once."""
    original, known = core.block_type.__init__, {}

    def __init__(self, element_ty, shape):
        key = builtins.tuple(shape)
        if not all(type(size) is int for size in key):
            original(self, element_ty, shape)
            return
        if key not in known:
            original(self, element_ty, shape)
            known[key] = self.shape, self.numel, f"<{self.shape}, "
        self.element_ty = element_ty
        self.shape, self.numel, start = known[key]
        self.name = f"{start}{element_ty}>"
    return __init__
