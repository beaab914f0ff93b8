"""What flash_attention and paged_attention share: the reference for one sequence, the mask, and the checks of options."""

import math
import numbers

import torch

from .._autocast import without_autocast
from .._checks import fail

MIN_HEAD_DIM, MAX_HEAD_DIM, HEAD_DIM_STEP = 32, 256, 8
# The limits of scale and soft-cap. Kernels multiply them by log2(e) or ln(2), and the products must be normal float32 numbers.
SMALLEST, LARGEST = 1e-37, 1e37
UNLIMITED = 2**40  # windows and lengths are limited to this, so that a position plus a window cannot overflow
SHAPES = "cpp"  # the overload that meta tensors take. Any would do: only its fake implementation runs, and all have the same


def allowed_keys(queries, keys, left, right, device):
    """bool [queries, keys]: whether query i, at position i + keys - queries, sees key j. A window bound of -1 is no limit."""
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
    """The reference: attention of one sequence, computed in the dtype of q. q [S_q, H, d], k and v [S_k, G, d] ->
    (out [S_q, H, d], lse [H, S_q])."""
    from einops import repeat

    k, v = (repeat(t, "j g d -> j (g h) d", h=q.shape[1] // t.shape[1]) for t in (k, v))
    allowed = allowed_keys(q.shape[0], k.shape[0], left, right, q.device)
    some = allowed.any(-1)
    # The query of a fully masked row is replaced by 0, and the results of the row are cleared below, because NaN in that query
    # must not reach other rows or gradients. The scores of the row are not set to -inf: their derivative would be NaN.
    q = torch.where(some[:, None, None], q, 0)
    s = torch.einsum("ihd,jhd->hij", q, k) * scale
    if softcap > 0:
        s = softcap * torch.tanh(s / softcap)
    s = s.masked_fill(~allowed & some[:, None], -math.inf)
    lse = s.logsumexp(-1) if s.shape[-1] else s.new_full(s.shape[:-1], -math.inf)
    p = torch.exp(s - lse[..., None]).masked_fill(~allowed, 0)
    out = torch.where(some[:, None, None], torch.einsum("hij,jhd->ihd", p, v), 0)
    return out, lse.masked_fill(~some, -math.inf)


def check_heads(op, q, k, k_name):
    """Checks the numbers of heads and the head sizes of q [..., H, d] and k [..., G, d]."""
    heads, kv_heads, head_dim = q.shape[-2], k.shape[-2], q.shape[-1]
    if head_dim % HEAD_DIM_STEP or not MIN_HEAD_DIM <= head_dim <= MAX_HEAD_DIM:
        fail(ValueError, op, "q", f"a head size of {MIN_HEAD_DIM} to {MAX_HEAD_DIM} that is a multiple of {HEAD_DIM_STEP}",
             head_dim)
    if k.shape[-1] != head_dim:
        fail(ValueError, op, k_name, f"the head size of q, {head_dim}", k.shape[-1])
    if kv_heads == 0 or heads == 0 or heads % kv_heads:
        fail(ValueError, op, "q", f"a number of heads that is a multiple of {k_name}'s, {kv_heads}", heads)


def check_options(op, head_dim, scale, window, softcap):
    """Checks the options. Returns (scale, left, right, softcap): numbers, with -1 for a side of the window without limit.
    head_dim, from which the default scale follows, is None where it is not known yet."""
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
    """Checks a max_seqlen argument and returns it; -1 for None. In compiled code it is always -1, because torch.compile would
    compile a graph for every value."""
    if value is None or torch.compiler.is_compiling():
        return -1
    if not _int(value) or value < 0:
        fail(ValueError, op, argument, "None or an integer >= 0", repr(value))
    return min(int(value), UNLIMITED)
