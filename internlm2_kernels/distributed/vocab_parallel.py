"""Cross-entropy of a linear head whose vocabulary is sharded over a process group."""

import torch
import torch.distributed as dist

from .._autograd import once_differentiable
from .._checks import check_labels, check_values, fail, last_stride_1
from .._device_errors import CODES, Index, declare, error_word
from .._native import native
from ..ops._head import as_matrix, check_head, check_weights
from ..ops._losses import check_loss_options, reduced_losses
from ..ops.linear_logprobs import BWD, FWD, LINEAR_LOGPROBS

NAME = "vocab_parallel_linear_cross_entropy"
declare(NAME, {"vocab_start": Index(1 << 13, "the ranks' rows to follow each other from 0 to vocab_size",
                                    "all results of the call are NaN")})


def _global_lse(lse, group):
    """The log-sum-exp over all ranks, from that of each rank. Both are pairs [T, 2]: the maximum logit, and the log of the sum
    of exp(logit - maximum).

    The two numbers are not added, because the loss of a token whose probability is close to 1 is less than an ulp of the sum.
    """
    top, log_sum = lse.unbind(-1)
    most = top.clone()
    dist.all_reduce(most, dist.ReduceOp.MAX, group)
    most = most.masked_fill(most.isinf(), 0)
    total = torch.exp((top - most) + log_sum)
    dist.all_reduce(total, group=group)
    return torch.stack((most, torch.log(total)), -1)


def _marks(begin, end):
    """Two checksums of a rank's rows [begin, end). Their sums over the ranks equal those of [0, V) if the shards cover [0, V).

    They are f(end) - f(begin) for f(x) = x and x^2, modulo a prime that is small enough for exact float32 sums over 4,096
    ranks. Shards with a gap or an overlap are missed once in 16 million cases.
    """
    prime = 4093
    return end % prime - begin % prime, end * end % prime - begin * begin % prime


def _check_cover(found, start, rows, vocab_size):
    """bool [1]: whether the shards of all ranks cover the vocabulary once.

    If they do not, it raises on the CPU outside compiled code. On CUDA it sets a bit of the device's error word
    (_device_errors.py), so that the host need not wait.
    """
    first, second = _marks(0, vocab_size)
    covered = (found[:1] == first) & (found[1:] == second)
    if torch.compiler.is_compiling():
        return covered
    if found.device.type == "cuda":
        error_word(found.device).bitwise_or_((~covered).int() * CODES[NAME, "vocab_start"])
    elif not covered:  # `found` is the same on all ranks, so either all ranks raise or none does
        fail(ValueError, NAME, "vocab_start", f"the ranks' rows to follow each other from 0 to {vocab_size}",
             f"[{start}, {start + rows}) on this rank, and on others what leaves a gap or an overlap")
    return covered


class _Losses(torch.autograd.Function):
    """The loss of every token from this rank's rows of the weight."""

    @staticmethod
    def forward(ctx, hidden, weight, labels, smoothing, z_loss, softcap, start, vocab_size, group, backend):
        options = 1.0, softcap, start, vocab_size
        logprobs, lse, _, _, total = native(FWD[backend], hidden, weight, labels, *options, False, smoothing > 0, False)
        end = start + weight.shape[0]
        own, lse = lse, _global_lse(lse, group)
        most, log_sum = lse.unbind(-1)
        # On the rank that holds the label's row: loss = lse - logit = (lse of all ranks - lse of this rank) - logprobs, where
        # logprobs is the log-probability of the label under the softmax of this rank's rows.
        loss = torch.where((labels >= start) & (labels < end), ((most - own[:, 0]) - own[:, 1]) + (log_sum - logprobs), 0)
        marks = [lse.new_full((1,), mark) for mark in _marks(start, end)]  # on the device: CUDA graphs capture no host copy
        parts = torch.cat((loss, total, *marks))  # summed in one all-reduce; `total` is empty without label smoothing
        dist.all_reduce(parts, group=group)
        loss, total, found = parts.split((loss.shape[0], total.shape[0], 2))
        right = (labels >= 0) & (labels < vocab_size) & _check_cover(found, start, weight.shape[0], vocab_size)
        lse = lse.masked_fill(~right[:, None], float("nan"))  # so that the gradients of these tokens are NaN too
        z_losses = z_loss * (most + log_sum).square()
        loss = (1 - smoothing) * loss + z_losses
        if smoothing > 0:
            loss = loss + smoothing * ((most - total / vocab_size) + log_sum)
        loss = torch.where(right, loss, float("nan"))
        ctx.save_for_backward(hidden, weight, labels, lse)
        ctx.options, ctx.coefficients, ctx.group, ctx.backend = options, (smoothing, z_loss), group, backend
        ctx.mark_non_differentiable(z_losses)
        return loss, z_losses

    @staticmethod
    @once_differentiable(NAME)
    def backward(ctx, dloss, _):
        hidden, weight, labels, lse = ctx.saved_tensors
        (smoothing, z_loss), vocab_size, needs = ctx.coefficients, ctx.options[-1], ctx.needs_input_grad
        dlse = None
        if smoothing or z_loss:  # the lse of an ignored token may be infinite or NaN
            dlse = torch.where(dloss == 0, 0, dloss * (smoothing + 2 * z_loss * lse.sum(-1)))
        dsum = (-smoothing / vocab_size * dloss).contiguous() if smoothing else None
        dhidden, dweight = BWD[ctx.backend](((smoothing - 1) * dloss).contiguous(), None, dlse, dsum, hidden, weight, labels,
                                            lse, None, *ctx.options, needs[0], needs[1])
        if needs[0]:
            dist.all_reduce(dhidden, group=ctx.group)
        return dhidden if needs[0] else None, dweight if needs[1] else None, *[None] * 8


def vocab_parallel_linear_cross_entropy(hidden, weight, labels, *, vocab_start, vocab_size, group=None, ignore_index=-100,
                                        label_smoothing=0.0, z_loss=0.0, softcap=0.0, token_weights=None, reduction="mean",
                                        return_z_loss=False, backend=None):
    """`linear_cross_entropy` where this rank holds the rows [vocab_start, vocab_start + V_local) of the head's weight.

    Shapes:   hidden [..., D] and labels [...], the same on all ranks of `group` (default: all); weight [V_local, D], shards of
              any sizes that cover vocab_size rows together -> loss [] or [...], the same on all ranks; with return_z_loss
              (loss, z_loss)
    Dtypes:   as for `linear_cross_entropy`. The ranks exchange two or three float32 (float64) numbers for each token forward,
              and dhidden [T, D] in hidden's dtype backward
    Backward: saves hidden, weight, labels and lse (8 bytes a token). dhidden is summed over the ranks; dweight stays local.
              Deterministic as far as the group's all-reduce is
    Errors:   ValueError and TypeError as for `linear_cross_entropy`, and for a shard outside the vocabulary. The values of
              labels are checked before anything is sent, so that all ranks raise or none does. Shards with a gap or an overlap
              raise on every rank on the CPU; on CUDA all results are NaN. A label outside [0, vocab_size) makes its own loss
              and gradient NaN on CUDA. `internlm2_kernels.check()` reports both
    Cost:     four products of this rank's share of the flops.   Source: arXiv:1909.08053 section 3
    """
    hidden, weight = check_head(NAME, hidden, weight)
    for name, value in (("vocab_start", vocab_start), ("vocab_size", vocab_size)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 0:
            fail(ValueError, NAME, name, "an integer >= 0", repr(value))
    if vocab_start + weight.shape[0] > vocab_size:
        fail(ValueError, NAME, "vocab_start", f"at most vocab_size - V_local = {vocab_size - weight.shape[0]}", vocab_start)
    shape = hidden.shape[:-1]
    labels = check_labels(NAME, "labels", labels, shape, hidden, "hidden")
    _, smoothing, z_loss, softcap, _ = check_loss_options(NAME, ignore_index, label_smoothing, z_loss, softcap, reduction,
                                                          return_z_loss)
    check_values(NAME, "labels", labels, 0, vocab_size, ignore_index)
    token_weights = check_weights(NAME, token_weights, labels, hidden)
    chosen = LINEAR_LOGPROBS.select(hidden, backend)
    if chosen == "reference":
        fail(ValueError, NAME, "backend", "a compiled one", "'reference'")
    valid = labels != ignore_index
    losses, z_losses = _Losses.apply(as_matrix(hidden), last_stride_1(weight), labels.masked_fill(~valid, 0).view(-1),
                                     smoothing, z_loss, softcap, vocab_start, vocab_size, group, chosen)
    return reduced_losses(losses.view(shape), z_losses.view(shape), valid, reduction, token_weights, return_z_loss)
