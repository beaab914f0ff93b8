"""What the workloads of flash_attention and paged_attention share: PyTorch's attention, and the number of score pairs."""

import torch.nn.functional as F

from ..ops._attention import allowed_keys


def sdpa(q, k, v, left, right, scale, enable_gqa):
    """What `attend` of ops/_attention.py computes, by F.scaled_dot_product_attention, for q, k, v [B, S, heads, d].

    With enable_gqa PyTorch shares the key heads among the query heads; without it the key heads are repeated first.
    """
    if not enable_gqa:
        k, v = (t.repeat_interleave(q.shape[2] // k.shape[2], 2) for t in (k, v))
    queries, keys = q.shape[1], k.shape[1]
    causal = left < 0 and right == 0 and queries == keys
    mask = None if causal or (left < 0 and right < 0) else allowed_keys(queries, keys, left, right, q.device)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal, scale=scale,
                                         enable_gqa=enable_gqa and q.shape[1] != k.shape[1])
    return out.transpose(1, 2)


def pairs_of(queries, keys, left, right):
    """The number of pairs of a query and an unmasked key."""
    if left < 0 and right < 0:
        return queries * keys
    total = 0
    for i in range(queries):
        position = i + keys - queries
        high = keys - 1 if right < 0 else min(keys - 1, position + right)
        low = 0 if left < 0 else max(0, position - left)
        total += max(0, high - low + 1)
    return total
