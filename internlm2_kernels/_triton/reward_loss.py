"""Reward loss from packed hidden states or from their last tokens. Contract: ops/reward_loss.py.

Forward: one program computes the rewards of 16 pairs, their losses, and the derivatives of the losses, which depend only on
the pair and on the number of pairs. With more than 16 pairs a second launch adds the programs' losses in order.
Backward: one program owns a tile of columns. It writes the gradients of the last tokens and sums dhead_weight over the
sequences in order. The gradients of all other tokens are filled with 0 before the launch.
Forward and backward check the boundaries of every sequence that they process. If one is invalid, all results are overwritten
with NaN: by the second launch of the forward, and by every program of the backward.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .attention import _fill
from .common import check_dtype, launch
from .focal_ranking_loss import _focal
from .log_barrier_penalty import _barrier

ROWS = 32  # rewards per program of the forward: 16 pairs
BACKWARD_ROWS = 16  # sequences that a program of the backward processes in one step of its loop


@triton.jit
def _last(cu_ptr, row, sequences, tokens):
    """(index of the last token of sequence `row`, whether its boundaries are valid). Without boundaries the rows of `hidden`
    are the last tokens themselves."""
    known = row < sequences
    if cu_ptr is None:
        return row, known
    else:
        begin = tl.load(cu_ptr + row, mask=known, other=0).to(tl.int64)
        end = tl.load(cu_ptr + row + 1, mask=known, other=0).to(tl.int64)
        right = (begin >= 0) & (begin < end) & (end <= tokens)
        right = right & ((row > 0) | (begin == 0)) & ((row < sequences - 1) | (end == tokens))
        return end - 1, known & right


@triton.jit
def _none_wrong(cu_ptr, sequences, tokens):
    """For a call without sequences: whether cu_seqlens is wrong, because it does not hold 0 or there are tokens. The loops over
    sequences do not see this case."""
    return (sequences == 0) & ((tokens != 0) | (tl.load(cu_ptr) != 0))


@triton.jit(do_not_specialize=["sequences", "tokens"])
def reward_loss_fwd_kernel(hidden_ptr, weight_ptr, cu_ptr, loss_ptr, rewards_ptr, slopes_ptr, partial_ptr, wrong_ptr,
                           error_ptr, sequences, tokens, depth, stride, gamma, penalty_weight, bound, margin,
                           ERROR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    known = row < sequences
    last, right = _last(cu_ptr, row, sequences, tokens)
    wrong = tl.program_id(0) < 0
    if cu_ptr is not None:
        wrong = (tl.max((known & (right == 0)).to(tl.int32), axis=0) != 0) | _none_wrong(cu_ptr, sequences, tokens)
        tl.atomic_or(error_ptr, ERROR, mask=wrong)
    hidden_ptr += last[:, None] * stride
    products = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, depth, BLOCK):
        col = start + tl.arange(0, BLOCK)
        weight = tl.load(weight_ptr + col, mask=col < depth, other=0.0).to(tl.float32)
        h = tl.load(hidden_ptr + col[None, :], mask=right[:, None] & (col < depth)[None, :], other=0.0).to(tl.float32)
        products += h * weight[None, :]
    reward = tl.where(wrong, float("nan"), tl.sum(products, axis=1))
    tl.store(rewards_ptr + row, reward, mask=known)
    chosen, rejected = tl.split(tl.reshape(reward, (ROWS // 2, 2)))
    loss, slope = _focal(chosen - rejected, gamma)
    pairs = tl.cast(sequences // 2, tl.float32)
    slope = tl.div_rn(slope, pairs)
    penalty, inward = _barrier(reward, bound, margin, False)
    both = tl.reshape(tl.join(slope, -slope), (ROWS,))
    tl.store(slopes_ptr + row, both + tl.div_rn(penalty_weight * inward, pairs * 2.0), mask=known)
    pair = tl.program_id(0) * (ROWS // 2) + tl.arange(0, ROWS // 2)
    total = tl.div_rn(tl.sum(tl.where(pair < sequences // 2, loss, 0.0), axis=0), pairs)
    total += penalty_weight * tl.div_rn(tl.sum(tl.where(known, penalty, 0.0), axis=0), pairs * 2.0)
    if partial_ptr is None:
        tl.store(loss_ptr, tl.where(wrong, float("nan"), tl.where(sequences == 0, 0.0, total)))
    else:
        tl.store(partial_ptr + tl.program_id(0), total)
        tl.store(wrong_ptr + tl.program_id(0), wrong.to(tl.int32))


@triton.jit(do_not_specialize=["size", "sequences"])
def reward_loss_sum_kernel(partial_ptr, wrong_ptr, loss_ptr, rewards_ptr, size, sequences, BLOCK: tl.constexpr):
    total = tl.zeros((BLOCK,), tl.float32)
    wrong = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK)
        total += tl.load(partial_ptr + index, mask=index < size, other=0.0)
        wrong |= tl.load(wrong_ptr + index, mask=index < size, other=0)
    tl.store(loss_ptr, tl.sum(total, axis=0))
    if tl.max(wrong, axis=0) != 0:
        _fill(rewards_ptr, sequences, BLOCK)


@triton.jit(do_not_specialize=["sequences", "tokens"])
def reward_loss_bwd_kernel(dloss_ptr, drewards_ptr, hidden_ptr, weight_ptr, cu_ptr, slopes_ptr, dhidden_ptr, dweight_ptr,
                           error_ptr, sequences, tokens, depth, stride,
                           ERROR: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    col = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + col, mask=col < depth, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), tl.float32)
    wrong = tl.zeros((ROWS,), tl.int32)
    for start in range(0, sequences, ROWS):
        row = start + tl.arange(0, ROWS).to(tl.int64)
        known = row < sequences
        last, right = _last(cu_ptr, row, sequences, tokens)
        wrong |= (known & (right == 0)).to(tl.int32)
        d = tl.zeros((ROWS,), tl.float32)
        if dloss_ptr is not None:
            d += tl.load(dloss_ptr) * tl.load(slopes_ptr + row, mask=known, other=0.0)
        if drewards_ptr is not None:
            d += tl.load(drewards_ptr + row, mask=known, other=0.0)
        d = tl.where(known, d, 0.0)
        mask = right[:, None] & (col < depth)[None, :]
        if dhidden_ptr is not None:
            dh = d[:, None] * weight[None, :]
            tl.store(dhidden_ptr + last[:, None] * depth + col[None, :], dh.to(dhidden_ptr.dtype.element_ty), mask=mask)
        if dweight_ptr is not None:
            h = tl.load(hidden_ptr + last[:, None] * stride + col[None, :], mask=mask, other=0.0).to(tl.float32)
            dweight += d[:, None] * h
    dw = tl.sum(dweight, axis=0)
    if cu_ptr is not None:
        bad = (tl.max(wrong, axis=0) != 0) | _none_wrong(cu_ptr, sequences, tokens)
        tl.atomic_or(error_ptr, ERROR, mask=bad)
        dw = tl.where(bad, float("nan"), dw)
        if dhidden_ptr is not None:
            if bad:
                tl.debug_barrier()  # NaN must be stored after the gradients that other threads store
                nan = tl.full((ROWS, BLOCK), float("nan"), dhidden_ptr.dtype.element_ty)
                for start in range(0, tokens, ROWS):
                    row = start + tl.arange(0, ROWS).to(tl.int64)
                    tl.store(dhidden_ptr + row[:, None] * depth + col[None, :], nan,
                             mask=(row < tokens)[:, None] & (col < depth)[None, :])
    if dweight_ptr is not None:
        tl.store(dweight_ptr + col, dw.to(dweight_ptr.dtype.element_ty), mask=col < depth)


def _forward(op, hidden, head_weight, cu_seqlens, gamma, penalty_weight, bound, margin):
    check_dtype(op, "hidden", hidden)
    check_dtype(op, "head_weight", head_weight)
    sequences, depth = hidden.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1, hidden.shape[1]
    new = lambda *shape: torch.empty(shape, dtype=torch.float32, device=hidden.device)
    loss, rewards, slopes = new(), new(sequences), new(sequences)
    programs = max(1, triton.cdiv(sequences, ROWS))
    partial = new(programs) if programs > 1 else None
    wrong = torch.empty(programs, dtype=torch.int32, device=hidden.device) if programs > 1 else None
    launch(reward_loss_fwd_kernel, programs, hidden.device,
           dict(hidden_ptr=hidden, weight_ptr=head_weight, cu_ptr=cu_seqlens, loss_ptr=loss, rewards_ptr=rewards,
                slopes_ptr=slopes, partial_ptr=partial, wrong_ptr=wrong, error_ptr=error_word(hidden.device),
                sequences=sequences, tokens=hidden.shape[0], depth=depth, stride=hidden.stride(0), gamma=gamma,
                penalty_weight=penalty_weight, bound=bound, margin=margin, ERROR=CODES["reward_loss", "cu_seqlens"], ROWS=ROWS,
                BLOCK=min(512, max(32, triton.next_power_of_2(depth)))), num_warps=16)
    if partial is not None:
        launch(reward_loss_sum_kernel, 1, hidden.device,
               dict(partial_ptr=partial, wrong_ptr=wrong, loss_ptr=loss, rewards_ptr=rewards, size=programs,
                    sequences=sequences, BLOCK=1024), num_warps=4)
    return loss, rewards, slopes


def _backward(op, dloss, drewards, hidden, head_weight, cu_seqlens, slopes, needs_dhidden, needs_dweight):
    check_dtype(op, "hidden", hidden)
    sequences, depth = slopes.shape[0], hidden.shape[1]
    make = torch.zeros if cu_seqlens is not None else torch.empty
    dhidden = make((hidden.shape[0] if needs_dhidden else 0, depth), dtype=hidden.dtype, device=hidden.device)
    dweight = torch.empty(depth if needs_dweight else 0, dtype=head_weight.dtype, device=hidden.device)
    if (needs_dhidden or needs_dweight) and depth:
        launch(reward_loss_bwd_kernel, triton.cdiv(depth, 128), hidden.device,
               dict(dloss_ptr=dloss, drewards_ptr=drewards, hidden_ptr=hidden, weight_ptr=head_weight, cu_ptr=cu_seqlens,
                    slopes_ptr=slopes, dhidden_ptr=dhidden if needs_dhidden else None,
                    dweight_ptr=dweight if needs_dweight else None, error_ptr=error_word(hidden.device),
                    sequences=sequences, tokens=hidden.shape[0], depth=depth, stride=hidden.stride(0),
                    ERROR=CODES["reward_loss", "cu_seqlens"], ROWS=BACKWARD_ROWS, BLOCK=128), num_warps=8)
    return dhidden, dweight


def reward_loss_fwd(hidden, head_weight, cu_seqlens, gamma, penalty_weight, bound, margin):
    return _forward("reward_loss", hidden, head_weight, cu_seqlens, gamma, penalty_weight, bound, margin)


def reward_loss_bwd(dloss, drewards, hidden, head_weight, cu_seqlens, slopes, needs_dhidden, needs_dweight):
    return _backward("reward_loss", dloss, drewards, hidden, head_weight, cu_seqlens, slopes, needs_dhidden, needs_dweight)
