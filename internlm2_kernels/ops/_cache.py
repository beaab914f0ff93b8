"""Checks of a paged key/value cache, for qkv_rope, which writes it, and paged_attention, which reads it."""

import torch

from .._checks import check_device, check_shape, check_tensor, fail


def check_cache(op, tensors, like, of, heads=None):
    """Checks the tensors of a paged cache: `tensors` holds k, v, k_scale and v_scale in this order, by their argument names.

    The cache must have the dtype of `like`, the argument named `of`, or int8, which needs scales. `heads` is the expected
    (kv_heads, head_dim), or None.
    """
    (k_name, k), (v_name, v), *scales = tensors.items()
    last = "kv_heads, head_dim" if heads is None else f"{heads[0]}, {heads[1]}"
    for (name, cache), (scale_name, scale) in zip(((k_name, k), (v_name, v)), scales, strict=True):
        check_tensor(op, name, cache)
        if cache.dtype not in (like.dtype, torch.int8) or cache.dtype != k.dtype:
            fail(TypeError, op, name, f"{like.dtype} or int8, {k_name} and {v_name} alike", cache.dtype)
        if cache.dim() != 4 or cache.shape != k.shape or not cache.shape[1] or heads not in (None, tuple(cache.shape[2:])):
            fail(ValueError, op, name, f"shape [blocks, block_size, {last}], both alike", list(cache.shape))
        if not cache.is_contiguous():
            fail(ValueError, op, name, "a contiguous tensor", f"strides {cache.stride()}")
        check_device(op, name, cache, like, of)
        if (scale is not None) != (cache.dtype == torch.int8):
            fail(ValueError, op, scale_name, "a tensor with an int8 cache and None otherwise",
                 "None" if scale is None else "a tensor")
        if scale is None:
            continue
        check_tensor(op, scale_name, scale)
        if scale.dtype != torch.float32:
            fail(TypeError, op, scale_name, "a contiguous float32 tensor", scale.dtype)
        check_shape(op, scale_name, scale, cache.shape[:3], "the cache's first three dimensions")
        if not scale.is_contiguous():
            fail(ValueError, op, scale_name, "a contiguous tensor", f"strides {scale.stride()}")
        check_device(op, scale_name, scale, like, of)

