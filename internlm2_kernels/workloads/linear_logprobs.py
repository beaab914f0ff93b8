"""Workload of `linear_logprobs`."""





import torch
import torch.nn.functional as F

from ..ops._losses import accumulator
from . import Case, Sample, Workload
from .linear_cross_entropy import HEAD_CASES, head_bytes, head_flops, head_sample, logit_error


def _eager(hidden, weight, tokens, *, temperature=1.0, return_entropy=False):
    acc = accumulator(hidden.dtype)
    logp = F.log_softmax(F.linear(hidden, weight).to(acc) / temperature, -1)
    logprobs = logp.gather(-1, tokens.long()[..., None])[..., 0]
    return (logprobs, -(logp.exp() * logp).sum(-1)) if return_entropy else logprobs


def _sample(case, dtype, device, generator):
    hidden, weight, tokens = head_sample(case, dtype, device, generator)
    options = {"temperature": case.dims["temperature"]} if "temperature" in case.dims else {}
    if case.dims.get("entropy"):
        options["return_entropy"] = True
    return Sample({"hidden": hidden, "weight": weight, "tokens": tokens, **options}, ("hidden", "weight"))


def _magnitude(sample, upstream):
    """The size of the terms that cancel in each output and gradient, by name: the error ladder (testing.py) takes it as the
    scale of the allowed error where it is larger than the result itself.

    Logits are sums over the hidden size, gradients are sums over the vocabulary or the tokens, all with terms of both signs.
    """
    hidden, weight = sample.inputs["hidden"], sample.inputs["weight"]
    if not sample.inputs["tokens"].numel():
        return {}
    temperature = sample.inputs.get("temperature", 1.0)
    size = float((hidden.abs() @ weight.abs().T).max()) / temperature
    each = sum(float(u.abs().max()) * (size if name == "entropy" else 1) for name, u in upstream.items()) / temperature
    each *= 1 + logit_error(hidden, weight) / temperature
    return {"logprobs": size, "entropy": size, "d_hidden": each * float(weight.abs().max()),
            "d_weight": each * float(hidden.abs().max())}


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"rows": 5, "cols": 64, "vocab": 100, "entropy": True}),
        Case("smoke", {"rows": 33, "cols": 48, "vocab": 517, "temperature": 0.7}),
        Case("smoke", {"rows": 18, "cols": 40, "vocab": 129, "temperature": 1.5, "entropy": True}),
        *HEAD_CASES,
        Case("edge", {"rows": 6, "cols": 24, "vocab": 2049, "entropy": True}),
        Case("model", {"rows": 512, "cols": 2048, "vocab": 92544, "entropy": True}),
        Case("gpu", {"rows": 8192, "cols": 4096, "vocab": 92544, "entropy": True}, dtypes=(torch.bfloat16,)),
    ),
    eager={"log_softmax(F.linear)": _eager},
    batched=("hidden", "tokens"),
    bytes=head_bytes,
    flops=head_flops,
    magnitude=_magnitude,
    domain={"vocab": (1, 300, 1)},
)
