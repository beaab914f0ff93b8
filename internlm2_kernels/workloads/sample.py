"""Workload of `sample`."""

import torch

from ..ops._sampling import changed_logits, column, reference
from . import Case, Sample, Workload


def _eager(logits, **options):
    """The steps one by one, with the random bits of the contract, so that the tokens can be compared."""
    return reference(logits, **options)


def _race(probabilities):
    """The index of a draw from each row, as serving engines draw: the largest of p / e with exponential random e."""
    return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(-1, keepdim=True)


def _composed(logits, choose, temperature, top_k, top_p, min_p, lists, num_top, return_filtered_logprob):
    heat = column(temperature, logits, torch.float32)
    heat = heat.masked_fill(heat == 0, 1)
    logp = (logits.float() / heat).log_softmax(-1)
    z = changed_logits(logits, torch.float32, **lists) / heat
    if not isinstance(temperature, torch.Tensor) and temperature == 0:
        tokens = z.argmax(-1, keepdim=True)
    else:
        tokens = choose(z, top_k, top_p, min_p)
    results = [tokens[..., 0], logp.gather(-1, tokens)[..., 0]]
    if num_top:
        results += reversed(torch.topk(logp, num_top))
    if return_filtered_logprob:
        results.append(z.log_softmax(-1).gather(-1, tokens)[..., 0])
    return tuple(results)


def _kept(ranked, top_p, min_p):
    """The probabilities of logits in falling order that the filters keep, 0 elsewhere."""
    p = ranked.softmax(-1)
    if not isinstance(top_p, float) or top_p < 1:
        before = p.cumsum(-1) - p
        p = p.masked_fill(before >= column(top_p, p, torch.float32), 0)
    return p.masked_fill(p < column(min_p, p, torch.float32) * p[..., :1], 0)


def _draw_cut(z, top_k, top_p, min_p):
    """Cuts to the largest top_k first, where that is one number for all rows."""
    if isinstance(top_k, int) and 0 < top_k < z.shape[-1]:
        values, ids = z.topk(top_k, -1)
        return ids.gather(-1, _race(_kept(values, top_p, min_p)))
    return _draw_sorted(z, top_k, top_p, min_p)


def _draw_sorted(z, top_k, top_p, min_p):
    """Sorts where top-k or top-p needs it, as PyTorch's samplers of serving engines do."""
    if not isinstance(top_k, torch.Tensor) and top_k == 0 and not isinstance(top_p, torch.Tensor) and top_p == 1:
        p = z.softmax(-1)
        ratio = column(min_p, p, torch.float32)
        return _race(p.masked_fill(p < ratio * p.amax(-1, keepdim=True), 0))
    values, ids = z.sort(-1, descending=True)
    rank = column(top_k, z, torch.int64)
    place = torch.arange(z.shape[-1], device=z.device)
    values = values.masked_fill((rank > 0) & (place >= rank), float("-inf"))
    return ids.gather(-1, _race(_kept(values, top_p, min_p)))


def _form(choose):
    def form(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0, presence_penalty=0.0,
             frequency_penalty=0.0, token_ids=None, prompt_lengths=None, bias_ids=None, bias_values=None, allowed=None,
             seeds=None, positions=None, num_top=0, return_filtered_logprob=False):
        lists = {"token_ids": token_ids, "prompt_lengths": prompt_lengths, "repetition_penalty": repetition_penalty,
                 "presence_penalty": presence_penalty, "frequency_penalty": frequency_penalty, "bias_ids": bias_ids,
                 "bias_values": bias_values, "allowed": allowed}
        return _composed(logits, choose, temperature, top_k, top_p, min_p, lists, num_top, return_filtered_logprob)

    return form


def _sample(case, dtype, device, generator):
    dims, rows, vocab = case.dims, case.dims["rows"], case.dims["cols"]
    rand = lambda *shape: torch.rand(shape, generator=generator, device=device)
    ids = lambda high, *shape: torch.randint(high, shape, generator=generator, device=device)
    logits = (3 * torch.randn(rows, vocab, generator=generator, device=device)).to(dtype)
    inputs = {"logits": logits, "seeds": ids(2**62, rows), "positions": ids(2**40, rows)}
    if "temperature" in dims:
        inputs["temperature"] = float(dims["temperature"])
    if dims.get("filters") == "numbers":
        inputs |= {"top_k": 50, "top_p": 0.9, "min_p": 0.02}
    elif dims.get("filters") == "tensors":
        inputs |= {"top_k": ids(vocab + 1, rows), "top_p": 0.5 + rand(rows) / 2, "min_p": rand(rows) / 20,
                   "temperature": (2 * rand(rows) * (rand(rows) > 0.2)).clamp(max=1.9)}
        inputs["temperature"] = inputs["temperature"].where(inputs["temperature"] > 0.05, 0)
    if dims.get("lists"):
        width = dims["lists"]
        inputs |= {"token_ids": ids(vocab + 1, rows, width) - 1, "prompt_lengths": ids(width + 1, rows),
                   "bias_ids": (ids(vocab + 1, rows, 5) - 1).to(torch.int32), "bias_values": 4 * rand(rows, 5) - 2,
                   "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": 0.1}
    if "mask" in dims:
        allowed = rand(rows, vocab) < 0.9
        if rows:
            allowed[:, -1] = True
        inputs["allowed"] = _packed(allowed) if dims["mask"] == "packed" else allowed
    if "top" in dims:
        inputs |= {"num_top": min(dims["top"], vocab), "return_filtered_logprob": True}
    return Sample(inputs)


def _packed(allowed):
    vocab = allowed.shape[-1]
    bits = torch.zeros(*allowed.shape[:-1], (vocab + 31) // 32 * 32, dtype=torch.int64, device=allowed.device)
    bits[..., :vocab] = allowed.long()
    words = (bits.unflatten(-1, (-1, 32)) << torch.arange(32, device=allowed.device)).sum(-1)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _magnitude(sample, upstream):
    logits, heat = sample.inputs["logits"], sample.inputs.get("temperature", 1.0)
    if not logits.numel():
        return {}
    heat = torch.as_tensor(heat, dtype=torch.float64)
    size = float(logits.abs().max()) / float(torch.where(heat == 0, 1, heat).min())
    return {name: size for name in ("logprobs", "top_logprobs", "filtered_logprobs")}


ALL = {"filters": "numbers", "lists": 256, "mask": "packed"}

WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64}),
        Case("smoke", {"rows": 33, "cols": 517, "filters": "tensors", "lists": 7, "mask": "bool", "top": 3}),
        Case("smoke", {"rows": 18, "cols": 1000, "temperature": "0.7", "filters": "numbers", "mask": "packed", "top": 5}),
        Case("smoke", {"rows": 9, "cols": 129, "temperature": "0", "lists": 11}),
        Case("edge", {"rows": 0, "cols": 64}),
        Case("edge", {"rows": 1, "cols": 1}),
        Case("edge", {"rows": 3, "cols": 4099, "filters": "tensors"}),
        Case("edge", {"rows": 17, "cols": 65, "temperature": "1.7", "lists": 200, "top": 65}),
        Case("model", {"rows": 64, "cols": 92544, "temperature": "0"}),
        Case("model", {"rows": 64, "cols": 92544, "temperature": "0.8"}),
        Case("model", {"rows": 64, "cols": 92544, "temperature": "0.8", **ALL}),
        Case("gpu", {"rows": 256, "cols": 92544, "temperature": "0.8"}),
        Case("gpu", {"rows": 256, "cols": 92544, "temperature": "0.8", **ALL}),
    ),
    eager={"softmax, cumsum": _eager, "top-k first": _form(_draw_cut), "sort": _form(_draw_sorted)},
    batched=("logits", "seeds", "positions", "temperature", "top_k", "top_p", "min_p", "token_ids", "prompt_lengths",
             "bias_ids", "bias_values", "allowed"),
    bytes=lambda dims, size, direction: dims["rows"] * dims["cols"] * size,
    flops=lambda dims, direction: 16 * dims["rows"] * dims["cols"],
    magnitude=_magnitude,
)
