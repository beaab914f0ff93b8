"""What the operators on a linear head share: the shapes of the gradients, and the checks of hidden states and weight."""

import math

from .._autocast import autocast
from .._checks import check_device, check_float, check_same, fail, last_stride_1
from ._losses import accumulator


def gradient_shapes(hidden, weight, needs_dhidden, needs_dweight):
    return ((hidden.shape[0] if needs_dhidden else 0, hidden.shape[1]),
            (weight.shape[0] if needs_dweight else 0, weight.shape[1]))


def check_head(op, hidden, weight):
    """Checks hidden [..., D] and weight [V, D], which must have the same dtype and device, and returns them, under autocast in
    its dtype."""
    for name, tensor in (("hidden", hidden), ("weight", weight)):
        check_float(op, name, tensor)
    hidden, weight = autocast(hidden, weight)
    check_same(op, "weight", weight, hidden, "hidden")
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        fail(ValueError, op, "hidden", "a last dimension of at least 1", list(hidden.shape))
    if weight.dim() != 2 or weight.shape[0] == 0 or weight.shape[1] != hidden.shape[-1]:
        fail(ValueError, op, "weight", f"shape [V, {hidden.shape[-1]}] with V at least 1", list(weight.shape))
    return hidden, weight


def as_matrix(x):
    return last_stride_1(x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), x.shape[-1]))


def check_weights(op, token_weights, labels, hidden):
    """Checks token_weights. Returns them in the dtype in which losses are summed (float32 or float64), detached; None for
    None."""
    if token_weights is None:
        return None
    check_float(op, "token_weights", token_weights)
    if token_weights.shape != labels.shape:
        fail(ValueError, op, "token_weights", f"the shape of labels, {list(labels.shape)}", list(token_weights.shape))
    check_device(op, "token_weights", token_weights, hidden, "hidden")
    return token_weights.detach().to(accumulator(hidden.dtype)).contiguous()
