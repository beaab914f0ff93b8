"""One step of AdamW on tensors: the operator under `internlm2_kernels.optim.FusedAdamW`."""

import torch

from .._checks import check_device, check_flag, check_float, check_number, check_shape, fail
from .._registry import Op
from ._philox import bits16, stochastic_bfloat16

LEAST_NORMAL = torch.finfo(torch.float32).tiny
MOST_STEPS = 2**24  # the step count is a float32; from here on adding 1 does not change it
INDICES = 2**30  # tensors are numbered below this, so that each has random bits of its own
MOMENTS = ((torch.float32, torch.bfloat16), (torch.float64,))


def reference(param, grad, exp_avg, exp_avg_sq, master=None, *, step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
              maximize=False, stochastic_rounding=False, seed=0, index=0, offset=0):
    acc = torch.promote_types(param.dtype, torch.float32)
    w = (param if master is None else master).to(acc)
    g = -grad.to(acc) if maximize else grad.to(acc)
    beta1, beta2 = betas
    w = w * (1 - lr * weight_decay)
    m = beta1 * exp_avg.to(acc) + (1 - beta1) * g
    v = beta2 * exp_avg_sq.to(acc) + (1 - beta2) * g.square()
    w = w - lr / (1 - beta1**step) * m / (v.sqrt() / (1 - beta2**step) ** 0.5 + eps)

    def stored(x, dtype, stream, random):
        if not random:
            return x.to(dtype)
        return stochastic_bfloat16(x, bits16(x.numel(), seed, index, stream, step, x.device, offset))

    low = torch.bfloat16
    results = (stored(w, param.dtype, 0, stochastic_rounding and master is None and param.dtype == low),
               stored(m, exp_avg.dtype, 1, exp_avg.dtype == low), stored(v, exp_avg_sq.dtype, 2, exp_avg_sq.dtype == low))
    return results if master is None else (*results, w)


def reference_step(params, grads, masters, exp_avgs, exp_avg_sqs, steps, skipped, total_sq, grad_scale, found_inf, lr, beta1,
                   beta2, eps, weight_decay, max_grad_norm, stochastic_rounding, maximize, seed, indices, offsets=()):
    """The registered function `step_` in plain PyTorch: updates the tensors in place. It may wait for the device."""
    norm = None if total_sq is None else total_sq.sqrt() / (1 if grad_scale is None else grad_scale)
    if any(t is not None and not bool(t.isfinite()) for t in (norm, lr)) or (found_inf is not None and bool(found_inf)):
        skipped += 1
        return
    factor = 1.0 if grad_scale is None else 1 / float(grad_scale)
    if max_grad_norm > 0 and norm is not None:
        factor *= min(1.0, max_grad_norm / (float(norm) + 1e-6))
    in_memory = lambda t: t.as_strided((t.numel(),), (1,))  # elements are numbered in memory order
    for i, param in enumerate(params):
        steps[i] += 1
        param, grad, *moments = (in_memory(t) for t in (param, grads[i], exp_avgs[i], exp_avg_sqs[i]))
        old = param, grad.to(torch.promote_types(param.dtype, torch.float32)) * factor, *moments
        master = (in_memory(masters[i]),) if masters else ()
        new = reference(*old, *master, step=int(steps[i]), lr=float(lr), betas=(beta1, beta2), eps=eps,
                        weight_decay=weight_decay, maximize=maximize, stochastic_rounding=stochastic_rounding, seed=seed,
                        index=indices[i], offset=offsets[i] if offsets else 0)
        for tensor, value in zip((param, *moments, *master), new, strict=True):
            tensor.copy_(value)


ADAMW = Op(
    name="adamw",
    source="arXiv:1711.05101 algorithm 2; stochastic rounding with Philox4x32-10 (SC 2011)",
    summary="AdamW step with master weights or stochastic rounding",
    reference=reference,
    schemas={"step_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] masters, Tensor(c!)[] exp_avgs,"
                      " Tensor(d!)[] exp_avg_sqs, Tensor(e!)[] steps, Tensor(f!) skipped, Tensor? total_sq,"
                      " Tensor? grad_scale, Tensor? found_inf, Tensor lr, float beta1, float beta2, float eps,"
                      " float weight_decay, float max_grad_norm, bool stochastic_rounding, bool maximize, int seed,"
                      " int[] indices, int[] offsets=[]) -> ()"},
    fakes={"step_": lambda *args: None},
    outputs=("param", "exp_avg", "exp_avg_sq", "master"),
    directions=("forward",),
)
STEP = ADAMW.overloads["step_"]


def check_tensors(param, grad, exp_avg, exp_avg_sq, master):
    check_float("adamw", "param", param)
    wide = param.dtype == torch.float64
    for name, tensor in (("grad", grad), ("exp_avg", exp_avg), ("exp_avg_sq", exp_avg_sq), ("master", master)):
        if tensor is None and name == "master":
            continue
        check_float("adamw", name, tensor)
        allowed = {"grad": (param.dtype, torch.float64 if wide else torch.float32),
                   "master": (torch.float64 if wide else torch.float32,)}.get(name, MOMENTS[wide])
        if tensor.dtype not in allowed:
            fail(TypeError, "adamw", name, " or ".join(str(d) for d in dict.fromkeys(allowed)), tensor.dtype)
        check_shape("adamw", name, tensor, param.shape, "the shape of param")
        check_device("adamw", name, tensor, param, "param")
    if exp_avg_sq.dtype != exp_avg.dtype:
        fail(TypeError, "adamw", "exp_avg_sq", f"the dtype of exp_avg, {exp_avg.dtype}", exp_avg_sq.dtype)


def check_settings(op, betas, eps, weight_decay):
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        fail(ValueError, op, "betas", "two numbers from 0 up to below 1", repr(betas))
    beta1, beta2 = (check_number(op, "betas", b, "two numbers from 0 up to below 1", lambda v: 0 <= v < 1) for b in betas)
    return (beta1, beta2, check_number(op, "eps", eps, "a finite number >= 1.1754944e-38, float32's least normal one",
                                       lambda v: v >= LEAST_NORMAL),  # with a smaller eps 0 / (0 + eps) would be NaN
            check_number(op, "weight_decay", weight_decay, "a finite number >= 0", lambda v: v >= 0))


def adamw(param, grad, exp_avg, exp_avg_sq, master=None, *, step, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1,
          maximize=False, stochastic_rounding=False, seed=0, index=0, offset=0, backend=None):
    """One step of AdamW into new tensors: m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2,
    w = w (1 - lr weight_decay) - lr / (1 - b1^step) m / (sqrt(v) / sqrt(1 - b2^step) + eps).

    Shapes:   param, grad, exp_avg, exp_avg_sq, master, all of one shape -> (param, exp_avg, exp_avg_sq), and the master if one
              is given. step counts from 1 to 2^24
    Dtypes:   param float32 | bfloat16 | float16 | float64; grad like param or float32; master float32; moments float32 or
              bfloat16; all float64 with a float64 param. Computed in float32 (float64). w is the master, or param without one;
              param is w rounded to nearest, or stochastically on request (bfloat16 without a master). bfloat16 moments are
              always rounded stochastically: rounded to nearest, v with b2 = 0.999 would stop far below its true value
    Random:   Philox4x32-10 with (seed, step, index, element), so that CPU and GPU draw the same bits. index is the tensor's
              number in the optimizer, below 2^30; offset counts the elements of the whole tensor before this shard
    Backward: none: an update. Deterministic: yes
    Errors:   ValueError and TypeError
    Cost:     memory-bound. `FusedAdamW` updates all parameters in place in one call.   Source: arXiv:1711.05101 algorithm 2
    """
    check_tensors(param, grad, exp_avg, exp_avg_sq, master)
    beta1, beta2, eps, weight_decay = check_settings("adamw", betas, eps, weight_decay)
    for name, value in (("step", step), ("seed", seed), ("index", index), ("offset", offset)):
        if not isinstance(value, int) or isinstance(value, bool) or not int(name == "step") <= value < 2**63:
            fail(ValueError, "adamw", name, f"an integer of at least {int(name == 'step')}", repr(value))
    if step > MOST_STEPS:
        fail(ValueError, "adamw", "step", "an integer of at most 2^24", step)
    if index >= INDICES:  # one 32-bit word of the Philox counter is 4 * index + stream (_philox.py)
        fail(ValueError, "adamw", "index", "an integer below 2^30", index)
    check_flag("adamw", "maximize", maximize)
    check_flag("adamw", "stochastic_rounding", stochastic_rounding)
    if stochastic_rounding and param.dtype == torch.float16 and master is None:
        fail(TypeError, "adamw", "stochastic_rounding", "False for a float16 param: bfloat16 alone is rounded so", True)
    lr = check_number("adamw", "lr", lr, "a finite number >= 0", lambda v: v >= 0)
    chosen = ADAMW.select(param, backend)
    tensors = [t if t is None else t.detach() for t in (param, grad, exp_avg, exp_avg_sq, master)]
    if chosen == "reference":
        return reference(*tensors, step=step, lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay,
                         maximize=maximize, stochastic_rounding=stochastic_rounding, seed=seed, index=index, offset=offset)
    grad = tensors.pop(1).contiguous()
    new = [None if t is None else t.clone(memory_format=torch.contiguous_format) for t in tensors]
    scalar = lambda value, dtype=torch.float32: torch.full((), value, dtype=dtype, device=param.device)
    rate = scalar(lr, torch.float64 if param.dtype == torch.float64 else torch.float32)
    STEP[chosen]([new[0]], [grad], [] if master is None else [new[3]], [new[1]], [new[2]], [scalar(step - 1.0)],
                 scalar(0, torch.int64), None, None, None, rate, beta1, beta2, eps, weight_decay, 0.0,
                 stochastic_rounding, maximize, seed, [index], [offset])
    return tuple(t for t in new if t is not None)
