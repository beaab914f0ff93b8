"""Sampling of the next token from logits, with the log-probabilities of the unfiltered distribution."""

import torch

from .._checks import (
    check_device,
    check_flag,
    check_number,
    check_shape,
    check_tensor,
    fail,
    last_stride_1,
)
from .._device_errors import Index
from .._native import native
from .._registry import FLOATS, Op
from ._sampling import OPTIONS, check_reference
from ._sampling import reference as reference

LARGEST_TOP = 1024


def _fake_fwd(logits, seeds, positions, temperature, temperature_all, top_k, top_k_all, top_p, top_p_all, min_p, min_p_all,
              repetition_penalty, repetition_all, presence_penalty, presence_all, frequency_penalty, frequency_all, token_ids,
              prompt_lengths, bias_ids, bias_values, allowed, num_top, needs_filtered):
    rows = logits.shape[0]
    new = lambda *shape, dtype=torch.float32: logits.new_empty(shape, dtype=dtype)
    return (new(rows, dtype=torch.int64), new(rows), new(rows, num_top, dtype=torch.int64), new(rows, num_top),
            new(rows if needs_filtered else 0))


_REFUSED = "those rows have the token -1 and the log-probability NaN"
SAMPLE = Op(
    name="sample",
    source="top-p: arXiv:1904.09751; min-p: arXiv:2407.01082; repetition penalty: arXiv:1909.05858 section 4.1; order: vLLM"
           " v1/sample/sampler.py and transformers generation/logits_process.py; random bits: Philox, SC 2011",
    summary="sampling of tokens with penalties, top-k, top-p, min-p and log-probabilities",
    reference=reference,
    schemas={
        "fwd": "(Tensor logits, Tensor? seeds, Tensor? positions, Tensor? temperature, float temperature_all, Tensor? top_k,"
               " int top_k_all, Tensor? top_p, float top_p_all, Tensor? min_p, float min_p_all, Tensor? repetition_penalty,"
               " float repetition_all, Tensor? presence_penalty, float presence_all, Tensor? frequency_penalty,"
               " float frequency_all, Tensor? token_ids, Tensor? prompt_lengths, Tensor? bias_ids, Tensor? bias_values,"
               " Tensor? allowed, int num_top, bool needs_filtered)"
               " -> (Tensor tokens, Tensor logprobs, Tensor top_ids, Tensor top_logprobs, Tensor filtered)",
    },
    fakes={"fwd": _fake_fwd},
    outputs=("tokens", "logprobs", "top_ids", "top_logprobs", "filtered_logprobs"),
    directions=("forward",),
    indices={
        "logits": Index(1 << 14, "finite numbers or -inf, and at least one token that is allowed", _REFUSED),
        "token_ids": Index(1 << 15, "values from -1 to V - 1", _REFUSED),
        "bias_ids": Index(1 << 16, "values from -1 to V - 1", _REFUSED),
        "bias_values": Index(1 << 17, "finite numbers or -inf", _REFUSED),
        **{name: Index(1 << 18 + i, expected, _REFUSED) for i, (name, (expected, _)) in enumerate(OPTIONS.items())},
    },
)
_FWD = SAMPLE.overloads["fwd"]


def _option(name, value, logits):
    """(tensor, number) for an option: a tensor with one number for each row and 0, or None and the number for all rows."""
    expected, accept = OPTIONS[name]
    whole = name == "top_k"
    if isinstance(value, torch.Tensor):
        check_tensor("sample", name, value)
        dtypes = (torch.int64, torch.int32) if whole else (torch.float32, torch.float64)
        if value.dtype not in dtypes:
            fail(TypeError, "sample", name, f"a number, or a tensor of {dtypes[0]} or {dtypes[1]}", value.dtype)
        check_shape("sample", name, value, logits.shape[:-1], "the leading dimensions of logits")
        check_device("sample", name, value, logits, "logits")
        return value.detach().contiguous().view(-1), 0 if whole else 0.0
    if whole:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**63:
            fail(ValueError, "sample", name, "an integer from 0 (all tokens) to 2^63 - 1, or a tensor", repr(value))
        return None, value
    return None, check_number("sample", name, value, f"{expected}, or a tensor", accept)


def _listed(name, value, logits, dtypes, width=None, last=""):
    """A tensor [...] or, with `last`, [..., width], as a contiguous one with one leading dimension; None for None."""
    if value is None:
        return None
    check_tensor("sample", name, value)
    if value.dtype not in dtypes:
        fail(TypeError, "sample", name, " or ".join(map(str, dtypes)), value.dtype)
    rows = logits.shape[:-1]
    if not last:
        check_shape("sample", name, value, rows, "the leading dimensions of logits")
    elif value.dim() != logits.dim() or value.shape[:-1] != rows or (width is not None and value.shape[-1] != width):
        size = last if width is None else width
        fail(ValueError, "sample", name, f"shape [{', '.join(map(str, (*rows, size)))}]", list(value.shape))
    check_device("sample", name, value, logits, "logits")
    value = value.detach()
    if not last:
        return value.contiguous().view(-1)
    return (value if value.dim() == 2 else value.reshape(rows.numel(), value.shape[-1])).contiguous()


def _mask(allowed, logits):
    if allowed is None:
        return None
    check_tensor("sample", "allowed", allowed)
    if allowed.dtype not in (torch.bool, torch.int32):
        fail(TypeError, "sample", "allowed", "a tensor of torch.bool, or of torch.int32 with 32 tokens a word", allowed.dtype)
    width = logits.shape[-1] if allowed.dtype == torch.bool else (logits.shape[-1] + 31) // 32
    check_shape("sample", "allowed", allowed, (*logits.shape[:-1], width), "one bool, or one bit of 32, for each logit")
    check_device("sample", "allowed", allowed, logits, "logits")
    return last_stride_1(allowed if allowed.dim() == 2 else allowed.reshape(-1, width))


def sample(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
           frequency_penalty=0.0, token_ids=None, prompt_lengths=None, bias_ids=None, bias_values=None, allowed=None,
           seeds=None, positions=None, num_top=0, return_filtered_logprob=False, backend=None):
    """One token from each row of logits, and its log-probability log softmax(logits / temperature) without filters.

    Shapes:   logits [..., V]; seeds and positions [...] int64. temperature, top_k, top_p, min_p and the three penalties: a
              number, or a tensor [...] (int64 or int32 for top_k, float32 or float64 for the others). token_ids [..., L] int64
              or int32: the tokens so far, padded anywhere with -1; prompt_lengths [...] int64 or int32: how many of the first
              columns hold the prompt, 0 where it is None. bias_ids [..., N] int64 or int32, -1: none, with bias_values [..., N]
              float32. allowed: bool [..., V], or int32 [..., ceil(V / 32)], of which bit j of word i is token 32 i + j.
              -> (tokens [...] int64, logprobs [...]), then with num_top = n > 0 the n most probable tokens [..., n] int64 and
              their log-probabilities [..., n], of equal ones the lower ids first; then with return_filtered_logprob [...] the
              token's log-probability in the distribution it was drawn from (0 for a greedy row)
    Order:    bias, repetition penalty (z / r for z > 0 and z r otherwise, for tokens of prompt and output), then
              z - frequency_penalty count - presence_penalty for tokens of the output, then the mask, division by temperature,
              top-k, top-p of what top-k keeps (the smallest set of the largest logits with a mass of at least top_p), min-p
              (tokens of at least min_p times the largest probability). Tokens of equal logits are kept or dropped together.
              top_k 0, top_p 1 and min_p 0 keep all tokens
    Random:   the first token whose cumulative probability exceeds u, one number of 53 bits from Philox4x32-10 with the key seed
              and the counter position. The token depends on the row, its options, seed and position alone, never on the
              batch; on CPU it is the same on every instruction set. temperature 0 is greedy: the arg-max after bias, penalties
              and mask, of equal logits the lowest id; its log-probability is that at temperature 1, and seeds and positions
              may be None where the number 0 makes all rows greedy
    Dtypes:   logits float32 | bfloat16 | float16; all results are computed in float32 from the logits as they are. On CPU
              logprobs equal those of `linear_logprobs` for the same logits and temperature bit for bit. num_top at most 1024
              and V
    Backward: none. Deterministic: yes, and batch-invariant
    Errors:   ValueError and TypeError. On the CPU also for values: logits with NaN or +inf, a row without a token that is
              allowed and above -inf, ids outside [-1, V), options out of range (each also in a tensor). On CUDA such a row has
              the token -1 and NaN, and `check()` reports it
    Cost:     memory-bound: one read of the logits, and two more of the part that top-k, top-p and min-p cannot exclude by the
              largest logits of blocks of 64. Scratch: up to 41 bytes for each column and thread.
              Source: arXiv:1904.09751 (top-p), arXiv:2407.01082 (min-p), arXiv:1909.05858 section 4.1 (repetition); the order
              is that of vLLM v1/sample/sampler.py and of transformers generation/logits_process.py
    """
    check_tensor("sample", "logits", logits)
    if logits.dtype not in FLOATS:
        fail(TypeError, "sample", "logits", "float32, bfloat16 or float16", logits.dtype)
    if logits.dim() == 0 or not 1 <= logits.shape[-1] < 2**31:
        fail(ValueError, "sample", "logits", "a last dimension from 1 to 2^31 - 1", list(logits.shape))
    rows, vocab = logits.shape[:-1], logits.shape[-1]
    logits = logits.detach()
    options = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "min_p": min_p,
               "repetition_penalty": repetition_penalty, "presence_penalty": presence_penalty,
               "frequency_penalty": frequency_penalty}
    pairs = {name: _option(name, value, logits) for name, value in options.items()}
    given = [part for pair in pairs.values() for part in pair]
    options = {name: value if isinstance(value, torch.Tensor) else pairs[name][1] for name, value in options.items()}
    whole = torch.int64, torch.int32
    lists = (_listed("token_ids", token_ids, logits, whole, last="L"),
             _listed("prompt_lengths", prompt_lengths, logits, whole), _listed("bias_ids", bias_ids, logits, whole, last="N"))
    if prompt_lengths is not None and token_ids is None:
        fail(ValueError, "sample", "prompt_lengths", "None without token_ids", "a tensor")
    if (bias_ids is None) != (bias_values is None):
        fail(ValueError, "sample", "bias_values", "a tensor with bias_ids, None without",
             "None" if bias_values is None else "a tensor")
    width = None if bias_ids is None else bias_ids.shape[-1]
    values = _listed("bias_values", bias_values, logits, (torch.float32,), width, "N")
    mask = _mask(allowed, logits)
    flat_seeds = _listed("seeds", seeds, logits, (torch.int64,))
    flat_positions = _listed("positions", positions, logits, (torch.int64,))
    greedy = not isinstance(temperature, torch.Tensor) and temperature == 0
    for name, value in (("seeds", seeds), ("positions", positions)):
        if value is None and not greedy:
            fail(ValueError, "sample", name, "an int64 tensor of the leading dimensions of logits, unless temperature is 0",
                 "None")
    if not isinstance(num_top, int) or isinstance(num_top, bool) or not 0 <= num_top <= min(vocab, LARGEST_TOP):
        fail(ValueError, "sample", "num_top", f"an integer from 0 to {min(vocab, LARGEST_TOP)}", repr(num_top))
    check_flag("sample", "return_filtered_logprob", return_filtered_logprob)
    chosen = SAMPLE.select(logits, backend)
    if chosen == "reference":
        changes = {"token_ids": token_ids, "prompt_lengths": prompt_lengths, "bias_ids": bias_ids, "bias_values": bias_values,
                   "allowed": allowed} | {name: options[name] for name in OPTIONS if name.endswith("_penalty")}
        check_reference(logits, options, changes)
        return reference(logits, **options | changes, seeds=seeds, positions=positions, num_top=num_top,
                         return_filtered_logprob=return_filtered_logprob)
    flat = last_stride_1(logits if logits.dim() == 2 else logits.reshape(-1, vocab))
    results = native(_FWD[chosen], flat, flat_seeds, flat_positions, *given, *lists, values, mask, num_top,
                     return_filtered_logprob)
    tokens, logprobs, top_ids, top_logprobs, filtered = results
    shaped = [tokens.view(rows), logprobs.view(rows)]
    if num_top:
        shaped += [top_ids.view(*rows, num_top), top_logprobs.view(*rows, num_top)]
    if return_filtered_logprob:
        shaped.append(filtered.view(rows))
    return tuple(shaped)
