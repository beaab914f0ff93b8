"""The reference of `sample` in plain PyTorch, step by step, and the checks of values for the backend `reference`."""

import torch

from .._checks import check_values, fail
from ._losses import accumulator
from ._philox import WORD, philox

NONE = float("-inf")  # the logit of a token that cannot be drawn


def uniform(seeds, positions):
    """One number in [0, 1) of 53 random bits for each row, from the first two words of Philox with the key `seed` and the
    counter (position, 0)."""
    zero = torch.zeros_like(positions)
    first, second, *_ = philox((positions & WORD, positions >> 32 & WORD, zero, zero), (seeds & WORD, seeds >> 32 & WORD))
    return (first << 21 | second >> 11).double() * 2.0**-53


def column(value, like, dtype=torch.float64):
    """An option, a number or a tensor [...], as a tensor [..., 1]."""
    if not isinstance(value, torch.Tensor):
        value = torch.full(like.shape[:-1], value, dtype=dtype, device=like.device)
    return value.to(dtype)[..., None]


def unpacked(allowed, vocab):
    """The mask as a bool tensor [..., V]. In packed form bit j of word i belongs to token 32 i + j."""
    if allowed.dtype == torch.bool:
        return allowed
    bits = allowed[..., None] >> torch.arange(32, dtype=torch.int32, device=allowed.device) & 1
    return bits.flatten(-2)[..., :vocab].bool()


def penalised(z, token_ids, prompt_lengths, repetition, presence, frequency):
    at = torch.arange(token_ids.shape[-1], device=z.device)
    generated = at >= (column(prompt_lengths, z, torch.int64) if prompt_lengths is not None else 0)
    index, real = token_ids.long().clamp(min=0), token_ids >= 0
    count = lambda which: torch.zeros_like(z).scatter_add(-1, index, which.to(z.dtype))
    seen, times = count(real), count(real & generated)
    repetition, presence, frequency = (column(x, z, z.dtype) for x in (repetition, presence, frequency))
    z = torch.where(seen > 0, torch.where(z > 0, z / repetition, z * repetition), z)
    return torch.where(times > 0, z - frequency * times - presence, z)


def limit_of(z, top_k, top_p, min_p):
    """The smallest value of `z` that top-k, top-p and min-p keep, [..., 1]; -inf where none of them is in use."""
    ranked, vocab = z.sort(-1, descending=True).values, z.shape[-1]
    rank, mass, ratio = column(top_k, z, torch.int64), column(top_p, z), column(min_p, z)
    limit = torch.where(rank > 0, ranked.gather(-1, rank.clamp(1, vocab) - 1), NONE)
    sums = ranked.masked_fill(ranked < limit, NONE).double().softmax(-1).cumsum(-1)
    last = (sums < mass * sums[..., -1:]).sum(-1, keepdim=True).clamp(max=vocab - 1)
    limit = torch.where(mass < 1, limit.maximum(ranked.gather(-1, last)), limit)
    return torch.where(ratio > 0, limit.double().maximum(ranked[..., :1] + ratio.log()), limit.double())


def drawn(z, seeds, positions):
    """The first token whose cumulative probability exceeds the row's uniform number."""
    sums = z.double().softmax(-1).cumsum(-1)
    target = uniform(seeds, positions)[..., None] * sums[..., -1:]
    return ((sums <= target) & (sums < sums[..., -1:])).sum(-1)


def changed_logits(logits, acc, token_ids, prompt_lengths, repetition_penalty, presence_penalty, frequency_penalty, bias_ids,
                   bias_values, allowed):
    """The logits with bias, penalties and mask, in this order."""
    z = logits.to(acc)
    if bias_ids is not None:
        z = z.scatter_add(-1, bias_ids.long().clamp(min=0), bias_values.to(acc).masked_fill(bias_ids < 0, 0))
    if token_ids is not None:
        z = penalised(z, token_ids, prompt_lengths, repetition_penalty, presence_penalty, frequency_penalty)
    return z if allowed is None else z.masked_fill(~unpacked(allowed, logits.shape[-1]), NONE)


def reference(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
              frequency_penalty=0.0, token_ids=None, prompt_lengths=None, bias_ids=None, bias_values=None, allowed=None,
              seeds=None, positions=None, num_top=0, return_filtered_logprob=False):
    acc = accumulator(logits.dtype)
    heat = column(temperature, logits)
    greedy, heat = heat == 0, heat.masked_fill(heat == 0, 1).to(acc)
    plain = logits.to(acc) / heat
    logp = plain.log_softmax(-1)
    z = changed_logits(logits, acc, token_ids, prompt_lengths, repetition_penalty, presence_penalty, frequency_penalty,
                       bias_ids, bias_values, allowed) / heat
    ids = torch.arange(z.shape[-1], device=z.device)
    tokens = torch.where(z == z.amax(-1, keepdim=True), ids, z.shape[-1]).amin(-1)
    kept = z.masked_fill(z < limit_of(z, top_k, top_p, min_p), NONE)
    if seeds is not None:
        tokens = torch.where(greedy[..., 0], tokens, drawn(kept, seeds, positions))
    # A row that the kernels refuse: NaN, +inf, or no token left. It has no token and no log-probability.
    usable = (logp.amax(-1) <= 0) & z.amax(-1).isfinite() & ~z.isnan().any(-1)
    at = torch.where(usable, tokens, 0)[..., None]
    pick = lambda x: torch.where(usable, x.gather(-1, at)[..., 0], float("nan"))
    results = [torch.where(usable, tokens, -1), pick(logp)]
    if num_top:
        best = plain.sort(dim=-1, descending=True, stable=True).indices[..., :num_top]
        results += [best, logp.gather(-1, best)]
    if return_filtered_logprob:
        results.append(torch.where(greedy[..., 0], pick(torch.zeros_like(z)), pick(kept.log_softmax(-1))))
    return tuple(results)


# ------------------------------------------------------------------------------------------------------------- checks
_LEAST = 9.999999e-7  # what a float32 tensor of 1e-6 holds is a little less than 1e-6
OPTIONS = {  # name: (what is expected, whether a number is accepted; also of a tensor's elements)
    "temperature": ("0 or a number from 1e-6 to 1e6", lambda v: (v == 0) | ((v >= _LEAST) & (v <= 1e6))),
    "top_k": ("0 (all tokens) or more", lambda v: v >= 0),
    "top_p": ("a number above 0 and at most 1", lambda v: (v > 0) & (v <= 1)),
    "min_p": ("a number from 0 to 1", lambda v: (v >= 0) & (v <= 1)),
    "repetition_penalty": ("a number from 1e-6 to 1e6", lambda v: (v >= _LEAST) & (v <= 1e6)),
    "presence_penalty": ("a finite number", lambda v: (v - v) == 0),
    "frequency_penalty": ("a finite number", lambda v: (v - v) == 0),
}


def check_rows(argument, expected, wrong, got):
    """Raises for the first row of a CPU tensor in which `wrong` is True, outside compiled code and functorch transforms."""
    if wrong.device.type != "cpu" or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return
    if wrong.any():
        row = int(wrong.reshape(-1).nonzero()[0])
        shown = got if isinstance(got, str) else f"{got.reshape(-1)[row].item():g}"
        fail(ValueError, "sample", argument, expected, f"{shown} in row {row}")


def check_reference(logits, options, changes):
    """The checks of values that compiled kernels make themselves."""
    for name, (expected, accept) in OPTIONS.items():
        if isinstance(options[name], torch.Tensor):
            check_rows(name, expected, ~accept(options[name].detach().double()), options[name].detach())
    check_values("sample", "token_ids", changes["token_ids"], -1, logits.shape[-1])
    check_values("sample", "bias_ids", changes["bias_ids"], -1, logits.shape[-1])
    if (values := changes["bias_values"]) is not None and values.numel():
        wrong = values.isnan() | (values == float("inf"))
        first = torch.where(wrong.any(-1), values.gather(-1, wrong.long().argmax(-1, keepdim=True))[..., 0], 0)
        check_rows("bias_values", "finite numbers or -inf", wrong.any(-1), first)
    heat = column(options["temperature"], logits)
    heat = heat.masked_fill(heat == 0, 1).float()
    bad = lambda x: (x.isnan() | (x == float("inf"))).any(-1)
    kept = "finite numbers, or -inf, also {}, got NaN or infinity"
    plain, z = logits.float() / heat, changed_logits(logits, torch.float32, **changes) / heat
    for expected, wrong in (("after the division by temperature", bad(plain)), ("with penalties and bias", bad(z))):
        expected, got = kept.format(expected).split(", got ")
        check_rows("logits", expected, wrong, got)
    check_rows("logits", "at least one token that is allowed and not -inf", (z == NONE).all(-1), "none")
