"""What flash_attention and paged_attention share: the reference of one sequence, masks, and checks of their options."""

import math
import numbers

import torch
import torch.nn.functional as F

from .._checks import check_device, check_layout, fail
from .._registry import without_autocast

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 8
SMALLEST, LARGEST = 1e-37, 1e37  # of scale and soft-cap: in float32 still normal after a factor of log2(e) or ln(2)
UNLIMITED = 2**40  # windows and lengths are cut to this, more than any sequence: a position plus a window must not overflow
SHAPES = "cpp"  # for meta tensors, on which nothing runs: any overload knows the shapes of its results


def allowed_keys(queries, keys, left, right, device):
    """bool [queries, keys]: key j for the query at position i + keys - queries, in the window (left, right), -1 unlimited."""
    position = torch.arange(queries, device=device)[:, None] + keys - queries
    j = torch.arange(keys, device=device)[None]
    allowed = torch.ones(queries, keys, dtype=torch.bool, device=device)
    if left >= 0:
        allowed &= j >= position - left
    if right >= 0:
        allowed &= j <= position + right
    return allowed


@without_autocast
def attend(q, k, v, left, right, scale, softcap):
    """One sequence: q [S_q, H, d], k, v [S_k, G, d] -> out [S_q, H, d], lse [H, S_q], in q's dtype as it stands."""
    group = q.shape[1] // k.shape[1]
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    allowed = allowed_keys(q.shape[0], k.shape[0], left, right, q.device)
    some = allowed.any(-1)
    # A row without a key is 0 here and cleared below, so that nothing which it or its gradient holds reaches the others; its
    # scores stay finite, so that no derivative is infinity minus infinity.
    q = torch.where(some[:, None, None], q, 0)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~allowed & some[:, None], -math.inf)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    p = torch.exp(s - lse[..., None]).masked_fill(~allowed, 0)
    out = torch.where(some[:, None, None], torch.einsum("hij,jhd->ihd", p, v), 0)
    return out, lse.masked_fill(~some, -math.inf)


def sdpa(q, k, v, left, right, scale, enable_gqa):
    """`attend` by F.scaled_dot_product_attention on batched [B, S, H, d], keys expanded first or left to it."""
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
    """How many (query, key) pairs the mask allows."""
    if left < 0 and right < 0:
        return queries * keys
    total = 0
    for i in range(queries):
        position = i + keys - queries
        high = keys - 1 if right < 0 else min(keys - 1, position + right)
        low = 0 if left < 0 else max(0, position - left)
        total += max(0, high - low + 1)
    return total


def check_heads(op, q, k, k_name):
    """Heads and head size of q [..., H, d] and k [..., G, d]."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if head_dim % HEAD_DIM_STEP or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        fail(ValueError, op, "q", f"a head size of {MIN_HEAD_DIM} to {MAX_HEAD_DIM} that is a multiple of {HEAD_DIM_STEP}",
             head_dim)
    if k.shape[-1] != head_dim:
        fail(ValueError, op, k_name, f"the head size of q, {head_dim}", k.shape[-1])
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        fail(ValueError, op, "q", f"a number of heads that is a multiple of {k_name}'s, {kv_heads}", heads)


def check_causal(op, causal):
    if not isinstance(causal, bool):
        fail(TypeError, op, "causal", "a bool", type(causal).__name__)


def check_options(op, head_dim, scale, window, softcap):
    """(scale, left, right, softcap) as the kernels take them. head_dim None: not known yet, the one that allows most."""
    if scale is None:
        scale = (MIN_HEAD_DIM if head_dim is None else head_dim)**-0.5
    if not _number(scale) or not SMALLEST <= scale <= LARGEST:
        fail(ValueError, op, "scale", "None or a number from 1e-37 to 1e37", repr(scale))
    if not _number(softcap) or not (softcap == 0 or SMALLEST <= softcap <= LARGEST):
        fail(ValueError, op, "softcap", "0 (none) or a number from 1e-37 to 1e37", repr(softcap))
    if softcap and not SMALLEST <= scale / softcap <= LARGEST:
        fail(ValueError, op, "softcap", f"at most 1e37 times more or less than scale, {scale}", repr(softcap))
    left = right = -1
    if window is not None:
        if not isinstance(window, tuple | list) or len(window) != 2 or not all(_int(w) and w >= -1 for w in window):
            fail(ValueError, op, "window", "None or (left, right), integers >= -1, -1 for no limit", repr(window))
        left, right = (min(int(w), UNLIMITED) for w in window)
    return float(scale), left, right, float(softcap)


def _number(value):
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _int(value):
    return type(value) is int or isinstance(value, numbers.Integral) and not isinstance(value, bool)


def check_bound(op, argument, value):
    """A max_seqlen: -1 stands for one that was not given. Compiled code drops it: a new value would be a new graph."""
    if value is None or torch.compiler.is_compiling():
        return -1
    if not _int(value) or value < 0:
        fail(ValueError, op, argument, "None or an integer >= 0", repr(value))
    return min(int(value), UNLIMITED)


def check_longest(op, argument, bound, longest):
    """A bound that was given (not -1) holds for sequences of the length `longest`."""
    if 0 <= bound < longest:
        fail(ValueError, op, argument, f"at least the longest sequence, {longest}", bound)


def check_cu_seqlens(op, argument, cu, like, of):
    """int32 [n + 1] on the device of `like`, the argument named `of`; contiguous on return."""
    if not isinstance(cu, torch.Tensor):
        fail(TypeError, op, argument, "an int32 tensor [sequences + 1]", type(cu).__name__)
    if cu.dtype != torch.int32:
        fail(TypeError, op, argument, "torch.int32", cu.dtype)
    check_layout(op, argument, cu)
    if cu.dim() != 1 or cu.shape[0] < 1:
        fail(ValueError, op, argument, "shape [sequences + 1]", list(cu.shape))
    check_device(op, argument, cu, like, of)
    return cu.contiguous()


def check_boundaries(op, argument, cu, total, longest=-1):
    """What the compiled kernels check themselves: cu_seqlens rises from 0 to `total`, no sequence above the bound."""
    if cu.device.type != "cpu" or torch.compiler.is_compiling():
        return
    bounds = cu.tolist()
    lengths = [b - a for a, b in zip(bounds, bounds[1:], strict=False)]
    if bounds[0] != 0:
        fail(ValueError, op, argument, "values that start at 0", bounds[0])
    for before, after in zip(bounds, bounds[1:], strict=False):
        if after < before:
            fail(ValueError, op, argument, "values that never fall", f"{after} after {before}")
    if bounds[-1] != total:
        fail(ValueError, op, argument, f"values that end at {total}", bounds[-1])
    check_longest(op, argument.replace("cu_seqlens", "max_seqlen"), longest, max(lengths, default=0))


def autocast(*tensors):
    """Under autocast attention computes in autocast's dtype; float64 stays."""
    device = tensors[0].device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(t.to(dtype) if t.is_floating_point() and t.dtype != torch.float64 else t for t in tensors)
