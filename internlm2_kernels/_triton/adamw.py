"""AdamW over lists of tensors. Contract: ops/adamw.py.

There are two kinds of launches. The first decides on the device whether the step is skipped, computes the factor of the
gradients, and counts the steps. The second updates the chunks of all tensors, which it finds through a table of addresses
(tables.py); there is one launch of it for each combination of dtypes.

Groups of eight consecutive elements share one Philox counter and are processed by one thread, so that their random 16-bit
numbers stay in its registers. A shard may begin in the middle of such a group of the whole tensor. Its chunks are then counted
from the beginning of the group, `shift` elements before the first element of the shard.
"""

import math

import torch
import triton
import triton.language as tl

from .common import check_dtype, launch
from .functions import _expm1
from .squared_norm import TYPES
from .tables import _address_of, _find_chunk, aligned, table

CHUNK = 8192  # elements that a program updates
GROUPS = 256  # groups of eight elements that a program updates in one step of its loop
# The rows of the table of addresses (tables.py, which defines row 0). The address of a master is 0 if there is none.
SIZE, PARAM, GRAD, MASTER, EXP_AVG, EXP_AVG_SQ, STEPS, INDEX, OFFSET = (tl.constexpr(i) for i in range(1, 10))


@triton.jit(do_not_specialize=["tensors"])
def adamw_prepare_kernel(table_ptr, state_ptr, skipped_ptr, total_sq_ptr, grad_scale_ptr, found_inf_ptr, lr_ptr, tensors,
                         max_grad_norm, sign, BLOCK: tl.constexpr):
    """Stores in `state` two numbers: 1 if the step is taken or 0 if it is skipped, and the factor of the gradients. Increments
    the step counts of all tensors, or `skipped` if the step is skipped."""
    taken = tl.where(tl.abs(tl.load(lr_ptr)) < float("inf"), tensors * 0 + 1, 0)  # the comparison is false for NaN too
    factor = sign
    if grad_scale_ptr is not None:
        factor = tl.div_rn(factor, tl.load(grad_scale_ptr).to(tl.float32))
    if found_inf_ptr is not None:
        taken = tl.where(tl.load(found_inf_ptr).to(tl.float32) == 0.0, taken, 0)
    if total_sq_ptr is not None:
        norm = tl.sqrt_rn(tl.load(total_sq_ptr).to(tl.float32)) * tl.abs(factor)
        taken = tl.where(norm < float("inf"), taken, 0)
        clip = tl.div_rn(max_grad_norm, norm + 1e-6)
        factor = tl.where((max_grad_norm > 0.0) & (clip < 1.0), factor * clip, factor)
    tl.store(state_ptr, taken.to(tl.float32))
    tl.store(state_ptr + 1, factor)
    tl.store(skipped_ptr, tl.load(skipped_ptr) + (1 - taken))
    for start in range(0, tensors, BLOCK):
        index = start + tl.arange(0, BLOCK)
        known = index < tensors
        address = tl.load(table_ptr + STEPS * (tensors + 1) + index, mask=known, other=0)
        step_ptr = address.to(tl.pointer_type(tl.float32))
        step = tl.load(step_ptr, mask=known, other=0.0)
        tl.store(step_ptr, step + 1.0, mask=known & (taken != 0))


@triton.jit
def _random(bits, seed, group, tensor, stream, step):
    """16 random bits for each of [groups, 8] elements, by Philox4x32-10. `stream` is 0 for the parameter, 1 for exp_avg and 2
    for exp_avg_sq, so that each draws other bits (ops/_philox.py)."""
    low = (group & 0xFFFFFFFF).to(tl.uint32)
    high = (group >> 32).to(tl.uint32)
    third = low * 0 + (tensor * 4 + stream).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, low, high, third, low * 0 + step.to(tl.uint32))
    place = tl.arange(0, 8)[None, :]
    word = tl.where(place < 4, tl.where(place < 2, w0[:, None], w1[:, None]), tl.where(place < 6, w2[:, None], w3[:, None]))
    return (word >> ((place % 2) * 16).to(tl.uint32)) & 0xFFFF


@triton.jit
def _stochastic(x, seed, group, tensor, stream, step):
    """float32 x rounded stochastically to a bfloat16 value: away from 0 with the probability of the discarded fraction.
    Infinity and NaN are kept."""
    bits = x.to(tl.uint32, bitcast=True)
    up = (bits + _random(bits, seed, group, tensor, stream, step)) & 0xFFFF0000
    up = tl.where((up & 0x7F800000) == 0x7F800000, up - 0x10000, up)  # a finite number must not become infinite
    return tl.where((bits & 0x7F800000) == 0x7F800000, x, up.to(tl.float32, bitcast=True))


@triton.jit
def _within(at, size):
    """0 <= at < size as one unsigned comparison."""
    return at.to(tl.uint64, bitcast=True) < size.to(tl.uint64, bitcast=True)


@triton.jit
def _load(ptr, at, size, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(ptr + at, mask=_within(at, size), other=0.0).to(tl.float32)
    else:
        return tl.load(ptr + at).to(tl.float32)


@triton.jit
def _store(ptr, at, x, size, MASKED: tl.constexpr):
    if MASKED:
        tl.store(ptr + at, x.to(ptr.dtype.element_ty), mask=_within(at, size))
    else:
        tl.store(ptr + at, x.to(ptr.dtype.element_ty))


@triton.jit
def _update(param_ptr, grad_ptr, master_ptr, avg_ptr, sq_ptr, first, size, first_group, factor, decay, rate, root, beta1,
            one_less_beta1, beta2, one_less_beta2, eps, seed, index, step, STOCHASTIC: tl.constexpr, MASKED: tl.constexpr,
            CHUNK: tl.constexpr, GROUPS: tl.constexpr):
    """Updates one chunk, which begins at element `first`. MASKED: the chunk is shorter than CHUNK or is shifted (see the top of
    the file). Other chunks need no masks and use 16-byte accesses."""
    for start in range(0, CHUNK // 8, GROUPS):
        group = first_group + start + tl.arange(0, GROUPS)
        at = first + (start + tl.arange(0, GROUPS))[:, None] * 8 + tl.arange(0, 8)[None, :]
        g = _load(grad_ptr, at, size, MASKED) * factor
        w = _load(param_ptr if master_ptr is None else master_ptr, at, size, MASKED)
        m = beta1 * _load(avg_ptr, at, size, MASKED) + one_less_beta1 * g
        v = beta2 * _load(sq_ptr, at, size, MASKED) + one_less_beta2 * (g * g)
        w = w * decay - rate * tl.div_rn(m, tl.div_rn(tl.sqrt_rn(v), root) + eps)
        if master_ptr is not None:
            _store(master_ptr, at, w, size, MASKED)
        if STOCHASTIC:
            w = _stochastic(w, seed, group, index, 0, step)
        if avg_ptr.dtype.element_ty == tl.bfloat16:
            m = _stochastic(m, seed, group, index, 1, step)
        if sq_ptr.dtype.element_ty == tl.bfloat16:
            v = _stochastic(v, seed, group, index, 2, step)
        _store(param_ptr, at, w, size, MASKED)
        _store(avg_ptr, at, m, size, MASKED)
        _store(sq_ptr, at, v, size, MASKED)


@triton.jit(do_not_specialize=["tensors", "seed"])
def adamw_step_kernel(table_ptr, state_ptr, lr_ptr, tensors, seed, beta1, one_less_beta1, log_beta1, beta2, one_less_beta2,
                      log_beta2, eps, weight_decay,
                      PARAM_TYPE: tl.constexpr, GRAD_TYPE: tl.constexpr, AVG_TYPE: tl.constexpr, SQ_TYPE: tl.constexpr,
                      HAS_MASTER: tl.constexpr, STOCHASTIC: tl.constexpr, ALIGNED: tl.constexpr,
                      CHUNK: tl.constexpr, GROUPS: tl.constexpr):
    if tl.load(state_ptr) == 0.0:
        return
    factor = tl.load(state_ptr + 1)
    lr = tl.load(lr_ptr)
    tensor, chunk = _find_chunk(table_ptr, tensors, tl.program_id(0).to(tl.int64))
    first = chunk * CHUNK
    size = tl.load(table_ptr + SIZE * (tensors + 1) + tensor)
    index = tl.load(table_ptr + INDEX * (tensors + 1) + tensor)
    if STOCHASTIC or AVG_TYPE == tl.bfloat16 or SQ_TYPE == tl.bfloat16:
        offset = tl.load(table_ptr + OFFSET * (tensors + 1) + tensor)
    else:
        offset = first * 0
    step = tl.load(_address_of(table_ptr, tensors, STEPS, tensor, tl.float32, False))
    param_ptr = _address_of(table_ptr, tensors, PARAM, tensor, PARAM_TYPE, ALIGNED)
    grad_ptr = _address_of(table_ptr, tensors, GRAD, tensor, GRAD_TYPE, ALIGNED)
    avg_ptr = _address_of(table_ptr, tensors, EXP_AVG, tensor, AVG_TYPE, ALIGNED)
    sq_ptr = _address_of(table_ptr, tensors, EXP_AVG_SQ, tensor, SQ_TYPE, ALIGNED)
    if HAS_MASTER:
        master_ptr = _address_of(table_ptr, tensors, MASTER, tensor, tl.float32, ALIGNED)
    else:
        master_ptr = None
    rate = tl.div_rn(lr, 0.0 - _expm1(step * log_beta1))  # lr / (1 - beta1^step), without cancellation
    root = tl.sqrt_rn(0.0 - _expm1(step * log_beta2))
    decay = 1.0 - lr * weight_decay
    shift = offset % 8
    first_group = (offset + first) // 8
    if (first + CHUNK <= size) & (shift == 0):
        _update(param_ptr, grad_ptr, master_ptr, avg_ptr, sq_ptr, first, size, first_group, factor, decay, rate, root, beta1,
                one_less_beta1, beta2, one_less_beta2, eps, seed, index, step, STOCHASTIC, False, CHUNK, GROUPS)
    else:
        _update(param_ptr, grad_ptr, master_ptr, avg_ptr, sq_ptr, first - shift, size, first_group, factor, decay, rate, root,
                beta1, one_less_beta1, beta2, one_less_beta2, eps, seed, index, step, STOCHASTIC, True, CHUNK, GROUPS)


def _table(entries, device):
    """(table on the device, number of chunks) of entries (index, param, grad, master, exp_avg, exp_avg_sq, step, offset)."""
    indices, *tensors, offsets = zip(*entries, strict=True)
    address = lambda tensors: [0 if t is None else t.data_ptr() for t in tensors]
    sizes = [t.numel() for t in tensors[0]]
    shifted = [size + offset % 8 if size else 0 for size, offset in zip(sizes, offsets, strict=True)]
    rows = [sizes, *(address(c) for c in tensors), indices, offsets]
    return table(CHUNK, shifted, rows, device)


def _log(beta):
    return math.log(beta) if beta > 0 else -1e4


def adamw_step_(params, grads, masters, exp_avgs, exp_avg_sqs, steps, skipped, total_sq, grad_scale, found_inf, lr, beta1,
                beta2, eps, weight_decay, max_grad_norm, stochastic_rounding, maximize, seed, indices, offsets=()):
    if not params:
        return
    for param in params:
        check_dtype("adamw", "param", param)
    device = params[0].device
    rounded = stochastic_rounding and not masters
    random = lambda i: torch.bfloat16 in (params[i].dtype if rounded else None, exp_avgs[i].dtype, exp_avg_sqs[i].dtype)
    offsets = [offset if random(i) else 0 for i, offset in enumerate(offsets or [0] * len(params))]
    entries = list(zip(indices, params, grads, masters or [None] * len(params), exp_avgs, exp_avg_sqs, steps,
                       offsets, strict=True))
    groups: dict[tuple, list] = {}
    for entry in entries:
        groups.setdefault(tuple(entry[i].dtype for i in (1, 2, 4, 5)), []).append(entry)
    state = torch.empty(2, dtype=torch.float32, device=device)
    rows, count = _table(entries, device)
    launch(adamw_prepare_kernel, 1, device,
           dict(table_ptr=rows, state_ptr=state, skipped_ptr=skipped, total_sq_ptr=total_sq, grad_scale_ptr=grad_scale,
                found_inf_ptr=found_inf, lr_ptr=lr, tensors=len(params), max_grad_norm=max_grad_norm,
                sign=-1.0 if maximize else 1.0, BLOCK=256), num_warps=4)
    for (param, grad, avg, sq), own in groups.items():
        if len(groups) > 1:
            rows, count = _table(own, device)
        if not count:
            continue
        lists = [[entry[i] for entry in own] for i in ((1, 2, 3, 4, 5) if masters else (1, 2, 4, 5))]
        launch(adamw_step_kernel, count, device,
               dict(table_ptr=rows, state_ptr=state, lr_ptr=lr, tensors=len(own), seed=seed, beta1=beta1,
                    one_less_beta1=1 - beta1, log_beta1=_log(beta1), beta2=beta2, one_less_beta2=1 - beta2,
                    log_beta2=_log(beta2), eps=eps, weight_decay=weight_decay, PARAM_TYPE=TYPES[param],
                    GRAD_TYPE=TYPES[grad], AVG_TYPE=TYPES[avg], SQ_TYPE=TYPES[sq], HAS_MASTER=bool(masters),
                    STOCHASTIC=rounded and param == torch.bfloat16, ALIGNED=aligned(*lists),
                    CHUNK=CHUNK, GROUPS=GROUPS), num_warps=8)
