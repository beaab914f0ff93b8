"""Workload of `adamw`."""

import torch

from . import Case, Sample, Workload


def _eager(param, grad, exp_avg, exp_avg_sq, master=None, *, step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
           maximize=False, stochastic_rounding=False, seed=0, index=0, offset=0):
    """The step of torch.optim.AdamW, in its functional form. It is computed on float32 copies of the tensors, whose results are
    cast back."""
    acc = torch.promote_types(param.dtype, torch.float32)
    w = (param if master is None else master).to(acc, copy=True)
    m, v = exp_avg.to(acc, copy=True), exp_avg_sq.to(acc, copy=True)
    before = torch.tensor(float(step - 1), device=param.device)
    torch.optim._functional.adamw([w], [grad.to(acc)], [m], [v], [], [before], foreach=False, amsgrad=False, beta1=betas[0],
                                  beta2=betas[1], lr=lr, weight_decay=weight_decay, eps=eps, maximize=maximize)
    results = w.to(param.dtype), m.to(exp_avg.dtype), v.to(exp_avg_sq.dtype)
    return results if master is None else (*results, w)


def _sample(case, dtype, device, generator):
    dims = case.dims
    draw = lambda size: size * torch.randn(dims["elements"], generator=generator, device=device)
    param = draw(1)
    inputs = {"param": param.to(dtype), "grad": draw(0.1).to(dtype), "exp_avg": draw(0.1), "exp_avg_sq": draw(0.1).square()}
    if dims.get("master"):
        inputs["master"] = param
    if dtype == torch.float64:
        inputs = {name: value.double() for name, value in inputs.items()}
    elif dims.get("moments") == "bfloat16":
        inputs |= {name: inputs[name].bfloat16() for name in ("exp_avg", "exp_avg_sq")}
    options = {key: dims[key] for key in ("maximize", "stochastic_rounding", "offset") if dims.get(key)}
    if dtype == torch.float16:  # the operator rounds only bfloat16 stochastically
        options.pop("stochastic_rounding", None)
    return Sample({**inputs, "step": dims.get("step", 3), "lr": 1e-2, "seed": 2**40 + 7, "index": 5, **options})


def _bytes(dims, size, direction):
    """The bytes that a step moves. The gradient is read twice, the first time for its norm. The two moments and the master (or,
    without one, the parameter) are read and written; with a master the parameter is only written."""
    moments = 2 if dims.get("moments") == "bfloat16" else 4
    return dims["elements"] * (2 * size + 4 * moments + (8 + size if dims.get("master") else 2 * size))


WORKLOAD = Workload(
    sample=_sample,
    cases=(
        Case("smoke", {"elements": 1000, "master": True}),
        Case("smoke", {"elements": 333, "step": 1, "maximize": True}),
        Case("smoke", {"elements": 517, "moments": "bfloat16", "stochastic_rounding": True, "offset": 2**36 + 13}),
        Case("edge", {"elements": 0}),
        Case("edge", {"elements": 1, "master": True, "step": 1}),
        Case("edge", {"elements": 4099, "master": True, "moments": "bfloat16", "step": 1000}),
        *(Case(kind, {"elements": n, "master": True}, dtypes=(torch.bfloat16,))
          for kind, n in (("model", 2**26), ("gpu", 2**28))),
    ),
    eager={"torch.optim.AdamW": _eager},
    batched=("param", "grad", "exp_avg", "exp_avg_sq", "master"),
    bytes=_bytes,
    flops=lambda dims, direction: 15 * dims["elements"],
    rowwise=False,
    copies=("clone", "full"),
    counters=lambda sample: {"steps": sample.inputs["step"], "skipped": 0},
    domain={"elements": (0, 3000, 1), "step": (1, 100, 1)},
)
