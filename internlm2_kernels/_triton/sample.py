"""Sampling of tokens. Contract: ops/sample.py.

One program computes one row. Where bias, penalties or a mask change logits, kernels before it write the changed row to
scratch memory. Top-k and top-p keep tokens by a threshold, which is found by bisection over the bits of a float: 32 passes over
the row, which stays in the L2 cache, for each of the two that is in use. Cumulative sums are in float64.

The log-probabilities are those of the contract, but their bits are not those of the kernels for a linear head.
"""

import torch
import triton
import triton.language as tl

from .._device_errors import CODES, error_word
from .common import check_dtype, launch

LARGEST_BLOCK = 4096
LIST_BLOCK = 1024  # tokens that one program of the counting kernel takes
PROMPT, BIASED, GENERATED = (tl.constexpr(i) for i in (1, 2, 4))  # the bits of `counts`; a generated token adds GENERATED
NONE = tl.constexpr(float("-inf"))
BIT = {name: CODES["sample", name] for op, name in CODES if op == "sample"}


@triton.jit
def _option(ptr, value, row):
    """An option of the row: one number for all rows where there is no tensor."""
    if ptr is not None:
        return tl.load(ptr + row).to(tl.float32)
    else:
        return row * 0.0 + value


@triton.jit
def _heat(temperature_ptr, temperature, inverse, row):
    """(temperature, its inverse; 1 for a greedy row). The host computes the inverse of a temperature for all rows."""
    if temperature_ptr is not None:
        heat = tl.load(temperature_ptr + row).to(tl.float32)
        return heat, tl.div_rn(1.0, tl.where(heat == 0.0, 1.0, heat))
    else:
        return row * 0.0 + temperature, row * 0.0 + inverse


@triton.jit(do_not_specialize=["history"])
def sample_count_kernel(token_ids_ptr, prompt_ptr, counts_ptr, bad_ptr, error_ptr, history, vocab, ERROR: tl.constexpr,
                        BLOCK: tl.constexpr):
    """Adds the tokens so far to `counts`: integers, so that the order in which they are added does not matter."""
    blocks = tl.cdiv(history, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(token_ids_ptr + row * history + at, mask=at < history, other=-1).to(tl.int64)
    wrong = (token < -1) | (token >= vocab)
    tl.atomic_or(error_ptr + token * 0, ERROR, mask=wrong)
    tl.store(bad_ptr + row + token * 0, 1, mask=wrong)
    real = (token >= 0) & (token < vocab)
    generated = real
    if prompt_ptr is not None:
        generated = real & (at >= tl.load(prompt_ptr + row))
    tl.atomic_or(counts_ptr + row * vocab + token, PROMPT, mask=real)
    tl.atomic_add(counts_ptr + row * vocab + token, GENERATED, mask=generated)


@triton.jit(do_not_specialize=["biases"])
def sample_bias_kernel(logits_ptr, ids_ptr, values_ptr, work_ptr, counts_ptr, bad_ptr, error_ptr, biases, stride, vocab,
                       ERROR: tl.constexpr, VALUE_ERROR: tl.constexpr, BLOCK: tl.constexpr):
    """Writes the biased logits of the listed tokens to `work`. An id that is listed more than once gets its values one after
    the other, and all its entries write the same sum."""
    row = tl.program_id(0).to(tl.int64)
    for start in range(0, biases, BLOCK):
        at = start + tl.arange(0, BLOCK)
        token = tl.load(ids_ptr + row * biases + at, mask=at < biases, other=-1).to(tl.int64)
        own = tl.load(values_ptr + row * biases + at, mask=at < biases, other=0.0)
        wrong, unfit = (token < -1) | (token >= vocab), (own < float("inf")) == 0
        tl.atomic_or(error_ptr + token * 0, ERROR, mask=wrong)
        tl.atomic_or(error_ptr + token * 0, VALUE_ERROR, mask=unfit)
        tl.store(bad_ptr + row + token * 0, 1, mask=wrong | unfit)
        real = (token >= 0) & (token < vocab)
        z = tl.load(logits_ptr + row * stride + token, mask=real, other=0.0).to(tl.float32)
        for other in range(0, biases):
            same = token == tl.load(ids_ptr + row * biases + other).to(tl.int64)
            z = tl.where(same, z + tl.load(values_ptr + row * biases + other), z)
        tl.store(work_ptr + row * vocab + token, z, mask=real)
        tl.atomic_or(counts_ptr + row * vocab + token, BIASED, mask=real)


@triton.jit
def sample_change_kernel(logits_ptr, work_ptr, counts_ptr, allowed_ptr, temperature_ptr, temperature, inverse, repetition_ptr,
                         repetition, presence_ptr, presence, frequency_ptr, frequency, stride, vocab, allowed_stride,
                         PACKED: tl.constexpr, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    blocks = tl.cdiv(vocab, BLOCK)
    row = tl.program_id(0).to(tl.int64) // blocks
    col = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    known = col < vocab
    z = tl.load(logits_ptr + row * stride + col, mask=known, other=0.0).to(tl.float32)
    if counts_ptr is not None:
        counts = tl.load(counts_ptr + row * vocab + col, mask=known, other=0)
        if BIAS:
            z = tl.where((counts & BIASED) != 0, tl.load(work_ptr + row * vocab + col, mask=known, other=0.0), z)
        times = counts // GENERATED
        factor = _option(repetition_ptr, repetition, row)
        z = tl.where((counts & PROMPT) != 0, tl.where(z > 0.0, tl.div_rn(z, factor), z * factor), z)
        less = z - _option(frequency_ptr, frequency, row) * times.to(tl.float32)
        z = tl.where(times > 0, less - _option(presence_ptr, presence, row), z)
    _, scale = _heat(temperature_ptr, temperature, inverse, row)
    z = z * scale
    if allowed_ptr is not None:
        if PACKED:
            word = tl.load(allowed_ptr + row * allowed_stride + col // 32, mask=known, other=0)
            z = tl.where(((word >> (col % 32)) & 1) != 0, z, NONE)
        else:
            z = tl.where(tl.load(allowed_ptr + row * allowed_stride + col, mask=known, other=0) != 0, z, NONE)
    tl.store(work_ptr + row * vocab + col, z, mask=known)


@triton.jit
def _read(ptr, scale, start, vocab, BLOCK: tl.constexpr):
    """(columns, their logits), -inf beyond the vocabulary."""
    col = tl.max_contiguous(tl.multiple_of(start + tl.arange(0, BLOCK), BLOCK), BLOCK)
    return col, tl.load(ptr + col, mask=col < vocab, other=NONE).to(tl.float32) * scale


@triton.jit
def _ordered(x):
    """The bits of a float as an integer that rises with it; -0 counts as 0."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)


@triton.jit
def _weight(ptr, scale, limit, least, most, vocab, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The number (MASS: the sum of exp(x - most)) of the logits x >= limit whose ordered bits are at least `least`."""
    total = tl.zeros((BLOCK,), tl.float64)
    for start in range(0, vocab, BLOCK):
        _, x = _read(ptr, scale, start, vocab, BLOCK)
        kept = (x >= limit) & (x > NONE) & (_ordered(x) >= least)
        if MASS:
            total += tl.where(kept, tl.exp(x - most), 0.0).to(tl.float64)
        else:
            total += kept.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def _boundary(ptr, scale, limit, target, most, vocab, MASS: tl.constexpr, BLOCK: tl.constexpr):
    """The largest float t for which the logits >= max(t, limit) weigh at least `target`, and the least finite float where they
    never do."""
    low = _ordered(most * 0.0 - 3.4028234663852886e38)
    high = _ordered(most)
    for _ in range(32):
        middle = low + ((high - low + 1) >> 1)
        reached = _weight(ptr, scale, limit, middle, most, vocab, MASS, BLOCK) >= target
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, tl.maximum(low, middle - 1))
    bits = low.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, position):
    low = (position & 0xFFFFFFFF).to(tl.uint32)
    high = ((position >> 32) & 0xFFFFFFFF).to(tl.uint32)
    first, second, _, _ = tl.philox(seed, low, high, low * 0, low * 0)
    bits = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
    return bits.to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def _report(bad, error_ptr, ERROR: tl.constexpr, wrong):
    tl.atomic_or(error_ptr, ERROR, mask=wrong)
    return bad | wrong


@triton.jit(do_not_specialize=["top_k"])
def sample_fwd_kernel(logits_ptr, work_ptr, bad_ptr, seeds_ptr, positions_ptr, temperature_ptr, temperature, inverse, top_k_ptr,
                      top_k, top_p_ptr, top_p, min_p_ptr, min_p, repetition_ptr, repetition, presence_ptr, presence,
                      frequency_ptr, frequency, tokens_ptr, logprobs_ptr, top_ids_ptr, top_logprobs_ptr, filtered_ptr,
                      error_ptr, stride, vocab,
                      TOP: tl.constexpr, E_LOGITS: tl.constexpr, E_TEMPERATURE: tl.constexpr, E_TOP_K: tl.constexpr,
                      E_TOP_P: tl.constexpr, E_MIN_P: tl.constexpr, E_REPETITION: tl.constexpr, E_PRESENCE: tl.constexpr,
                      E_FREQUENCY: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * stride
    heat, scale = _heat(temperature_ptr, temperature, inverse, row)
    mass, ratio = _option(top_p_ptr, top_p, row), _option(min_p_ptr, min_p, row)
    rank = row * 0 + top_k
    if top_k_ptr is not None:
        rank = tl.load(top_k_ptr + row).to(tl.int64)
    bad = row < 0
    if bad_ptr is not None:
        bad = tl.load(bad_ptr + row) != 0
    if temperature_ptr is not None:
        bad = _report(bad, error_ptr, E_TEMPERATURE, ((heat == 0.0) | ((heat >= 1e-6) & (heat <= 1e6))) == 0)
    if top_k_ptr is not None:
        bad = _report(bad, error_ptr, E_TOP_K, rank < 0)
    if top_p_ptr is not None:
        bad = _report(bad, error_ptr, E_TOP_P, ((mass > 0.0) & (mass <= 1.0)) == 0)
    if min_p_ptr is not None:
        bad = _report(bad, error_ptr, E_MIN_P, ((ratio >= 0.0) & (ratio <= 1.0)) == 0)
    if repetition_ptr is not None:
        divisor = tl.load(repetition_ptr + row).to(tl.float32)
        bad = _report(bad, error_ptr, E_REPETITION, ((divisor >= 1e-6) & (divisor <= 1e6)) == 0)
    if presence_ptr is not None:
        lower = tl.load(presence_ptr + row).to(tl.float32)
        bad = _report(bad, error_ptr, E_PRESENCE, (lower - lower == 0.0) == 0)
    if frequency_ptr is not None:
        each = tl.load(frequency_ptr + row).to(tl.float32)
        bad = _report(bad, error_ptr, E_FREQUENCY, (each - each == 0.0) == 0)
    scale = tl.where(bad, 1.0, scale)

    # The statistics of the logits at the row's temperature.
    m = tl.full((BLOCK,), NONE, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, x = _read(logits_ptr, scale, start, vocab, BLOCK)
        m_new = tl.maximum(m, x)
        m_safe = tl.where(m_new == NONE, 0.0, m_new)
        s = s * tl.exp(m - m_safe) + tl.exp(x - m_safe)  # NaN where x is NaN or +inf
        m = m_new
    top = tl.max(m, axis=0)
    log_sum = tl.log(tl.sum(s * tl.exp(m - tl.where(top == NONE, 0.0, top)), axis=0))
    unfit = (top < float("inf")) == 0
    unfit = unfit | ((log_sum < float("inf")) == 0)

    # The logits that the token is drawn from.
    ptr = logits_ptr
    factor = scale
    most = top
    if work_ptr is not None:
        ptr = work_ptr + row * vocab
        factor = scale * 0.0 + 1.0
        m = tl.full((BLOCK,), NONE, tl.float32)
        wrong = tl.zeros((BLOCK,), tl.int32)
        for start in range(0, vocab, BLOCK):
            _, x = _read(ptr, factor, start, vocab, BLOCK)
            wrong = wrong | ((x < float("inf")) == 0).to(tl.int32)
            m = tl.maximum(m, x)
        most = tl.max(m, axis=0)
        unfit = unfit | (tl.max(wrong, axis=0) != 0)
    unfit = unfit | (most == NONE)
    bad = _report(bad, error_ptr, E_LOGITS, unfit & (bad == 0))
    token = rank * 0 - 1
    filtered = top * 0.0
    if bad == 0:
        if heat == 0.0:
            first = tl.full((BLOCK,), 2147483647, tl.int32)
            for start in range(0, vocab, BLOCK):
                col, x = _read(ptr, factor, start, vocab, BLOCK)
                first = tl.minimum(first, tl.where(x == most, col, 2147483647))
            token = tl.min(first, axis=0).to(tl.int64)
            filtered = top * 0.0
        else:
            limit = most * 0.0 + NONE
            if (rank > 0) & (rank < vocab):
                limit = _boundary(ptr, factor, limit, rank.to(tl.float64), most, vocab, False, BLOCK)
            if mass < 1.0:
                total = _weight(ptr, factor, limit, _ordered(limit), most, vocab, True, BLOCK)
                limit = tl.maximum(limit, _boundary(ptr, factor, limit, mass.to(tl.float64) * total, most, vocab, True, BLOCK))
            if ratio > 0.0:
                limit = tl.maximum(limit, most + tl.log(ratio))
            total = _weight(ptr, factor, limit, _ordered(limit), most, vocab, True, BLOCK)
            target = _uniform(tl.load(seeds_ptr + row), tl.load(positions_ptr + row)) * total
            at = total * 0.0
            found = vocab * 1
            last = vocab * 0
            for start in range(0, vocab, BLOCK):
                col, x = _read(ptr, factor, start, vocab, BLOCK)
                e = tl.where((x >= limit) & (x > NONE), tl.exp(x - most), 0.0)
                sums = at + tl.cumsum(e.to(tl.float64), axis=0)
                found = tl.minimum(found, tl.min(tl.where((sums > target) & (e > 0.0), col, vocab), axis=0))
                last = tl.maximum(last, tl.max(tl.where(e > 0.0, col, 0), axis=0))
                at += tl.sum(e.to(tl.float64), axis=0)
            token = tl.where(found < vocab, found, last).to(tl.int64)  # rounding may put the target behind the last sum
            z = tl.load(ptr + token).to(tl.float32) * factor
            filtered = (z - most) - tl.log(total).to(tl.float32)
    own = tl.load(logits_ptr + tl.maximum(token, 0)).to(tl.float32) * scale
    tl.store(tokens_ptr + row, token)
    tl.store(logprobs_ptr + row, tl.where(bad, float("nan"), own - top - log_sum))
    if filtered_ptr is not None:
        tl.store(filtered_ptr + row, tl.where(bad, float("nan"), filtered))

    before = top * 0.0 + float("inf")  # the value and the column of the token before, in falling order
    column = row.to(tl.int32) * 0 - 1
    for i in range(TOP):
        m = tl.full((BLOCK,), NONE, tl.float32)
        for start in range(0, vocab, BLOCK):
            col, x = _read(logits_ptr, scale, start, vocab, BLOCK)
            m = tl.maximum(m, tl.where((x < before) | ((x == before) & (col > column)), x, NONE))
        value = tl.max(m, axis=0)
        first = tl.full((BLOCK,), 2147483647, tl.int32)
        for start in range(0, vocab, BLOCK):
            col, x = _read(logits_ptr, scale, start, vocab, BLOCK)
            free = (col < vocab) & (x == value) & ((x < before) | (col > column))
            first = tl.minimum(first, tl.where(free, col, 2147483647))
        before = value
        column = tl.minimum(tl.min(first, axis=0), vocab - 1)
        tl.store(top_ids_ptr + row * TOP + i, column.to(tl.int64))
        tl.store(top_logprobs_ptr + row * TOP + i, tl.where(bad, float("nan"), value - top - log_sum))


def sample_fwd(logits, seeds, positions, temperature, temperature_all, top_k, top_k_all, top_p, top_p_all, min_p, min_p_all,
               repetition_penalty, repetition_all, presence_penalty, presence_all, frequency_penalty, frequency_all, token_ids,
               prompt_lengths, bias_ids, bias_values, allowed, num_top, needs_filtered):
    check_dtype("sample", "logits", logits)
    (rows, vocab), device = logits.shape, logits.device
    new = lambda *shape, dtype=torch.float32: torch.empty(shape, dtype=dtype, device=device)
    tokens, logprobs = new(rows, dtype=torch.int64), new(rows)
    top_ids, top_logprobs = new(rows, num_top, dtype=torch.int64), new(rows, num_top)
    filtered = new(rows if needs_filtered else 0)
    if rows == 0:
        return tokens, logprobs, top_ids, top_logprobs, filtered
    error, block = error_word(device), min(triton.next_power_of_2(vocab), LARGEST_BLOCK)
    num_warps = max(1, min(16, block // 256))
    heat = dict(temperature_ptr=temperature, temperature=float(temperature_all),
                inverse=1.0 if temperature_all == 0 else 1.0 / temperature_all)
    penalties = dict(repetition_ptr=repetition_penalty, repetition=float(repetition_all), presence_ptr=presence_penalty,
                     presence=float(presence_all), frequency_ptr=frequency_penalty, frequency=float(frequency_all))
    shape = dict(stride=logits.stride(0), vocab=vocab)
    lists = token_ids is not None or bias_ids is not None
    work = bad = counts = None
    if lists or allowed is not None:
        work = new(rows, vocab)
    if lists:
        counts = torch.zeros((rows, vocab), dtype=torch.int32, device=device)
        bad = torch.zeros(rows, dtype=torch.int32, device=device)
    if token_ids is not None and token_ids.shape[1]:
        launch(sample_count_kernel, rows * triton.cdiv(token_ids.shape[1], LIST_BLOCK), device,
               dict(token_ids_ptr=token_ids, prompt_ptr=prompt_lengths, counts_ptr=counts, bad_ptr=bad, error_ptr=error,
                    history=token_ids.shape[1], vocab=vocab, ERROR=BIT["token_ids"], BLOCK=LIST_BLOCK), num_warps=4)
    if bias_ids is not None and bias_ids.shape[1]:
        launch(sample_bias_kernel, rows, device,
               dict(logits_ptr=logits, ids_ptr=bias_ids, values_ptr=bias_values, work_ptr=work, counts_ptr=counts, bad_ptr=bad,
                    error_ptr=error, biases=bias_ids.shape[1], **shape, ERROR=BIT["bias_ids"],
                    VALUE_ERROR=BIT["bias_values"],
                    BLOCK=min(triton.next_power_of_2(bias_ids.shape[1]), LIST_BLOCK)), num_warps=4)
    if work is not None:
        packed = allowed is not None and allowed.dtype == torch.int32
        launch(sample_change_kernel, rows * triton.cdiv(vocab, block), device,
               dict(logits_ptr=logits, work_ptr=work, counts_ptr=counts,
                    allowed_ptr=allowed if packed or allowed is None else allowed.view(torch.int8), **heat, **penalties,
                    **shape, allowed_stride=0 if allowed is None else allowed.stride(0), PACKED=packed,
                    BIAS=bias_ids is not None, BLOCK=block), num_warps=num_warps)
    launch(sample_fwd_kernel, rows, device,
           dict(logits_ptr=logits, work_ptr=work, bad_ptr=bad, seeds_ptr=seeds, positions_ptr=positions, **heat,
                top_k_ptr=top_k, top_k=top_k_all, top_p_ptr=top_p, top_p=float(top_p_all), min_p_ptr=min_p,
                min_p=float(min_p_all), **penalties, tokens_ptr=tokens, logprobs_ptr=logprobs, top_ids_ptr=top_ids,
                top_logprobs_ptr=top_logprobs, filtered_ptr=filtered if needs_filtered else None, error_ptr=error, **shape,
                TOP=num_top, E_LOGITS=BIT["logits"], E_TEMPERATURE=BIT["temperature"], E_TOP_K=BIT["top_k"],
                E_TOP_P=BIT["top_p"], E_MIN_P=BIT["min_p"], E_REPETITION=BIT["repetition_penalty"],
                E_PRESENCE=BIT["presence_penalty"], E_FREQUENCY=BIT["frequency_penalty"], BLOCK=block), num_warps=num_warps)
    return tokens, logprobs, top_ids, top_logprobs, filtered
