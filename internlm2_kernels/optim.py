"""`FusedAdamW`: AdamW over all parameters in one call, with master weights or stochastic rounding, clipping, skipped steps."""

import functools

import torch
from torch.optim import Optimizer

from ._checks import FLOAT_DTYPES, fail
from ._registry import OPS
from .ops._losses import check_number
from .ops.adamw import STEP, check_settings, reference_step
from .ops.squared_norm import SQUARED_NORM, dense
from .ops.squared_norm import reference as reference_norm

LOW = (torch.bfloat16, torch.float16)
STATE = ("exp_avg", "exp_avg_sq", "master")
OPTIONS = ("master_weights", "stochastic_rounding", "moment_dtype", "max_grad_norm", "seed", "backend")


def _is_dtensor(tensor):
    return hasattr(tensor, "to_local")  # the class itself takes half a second to import


def _local(tensor):
    return tensor.to_local() if _is_dtensor(tensor) else tensor


def _offset(p):
    """What random bits count p's elements from: how many elements of the whole tensor lie before this shard's.

    Shards are ordered by the first dimension that is split (as it lies in memory), then the next. Rows that follow each
    other (FSDP2's) so have the places that they have in the whole tensor. A part that is no contiguous range of it
    (Shard(d), d > 0) has a range of numbers of its own: no bits are shared, but they are not those of the whole tensor.
    """
    if not _is_dtensor(p) or not p.to_local().numel():
        return 0
    local = p.to_local()
    order = tuple(sorted(range(local.dim()), key=lambda d: -local.stride(d)))
    return _elements_before(p.shape, p.device_mesh, p.placements, order)


@functools.lru_cache(maxsize=1024)
def _elements_before(shape, mesh, placements, order):
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset  # half a second to import

    local, first = compute_local_shape_and_global_offset(shape, mesh, placements)
    before, inner = 0, shape.numel()
    for d in order:
        inner //= shape[d]
        before, inner = before + first[d] * inner, inner * local[d]
    return before


def _layout(tensor):
    """The tensor, or, where its elements do not fill its memory, one of the shape that do: what its state is laid out like."""
    return tensor if dense(tensor) else torch.empty_like(tensor)


def _chosen(op, tensor, backend):
    return OPS[op].select(tensor, backend)


class FusedAdamW(Optimizer):
    """AdamW with decoupled weight decay; one registered call updates all parameters of a group in place.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = w (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps),
    g the gradient divided by the loss scale and clipped: times min(1, max_grad_norm / (norm + 1e-6)), norm over all groups
    and shards.

    Arguments beyond `torch.optim.AdamW`'s:
      master_weights       float32 copies of bfloat16 and float16 parameters, which the update goes through
      stochastic_rounding  without masters: bfloat16 parameters are rounded up or down by chance, so that updates far below one
                           ulp survive on average; bits are Philox4x32-10 of (seed, step, tensor, element), equal on CPU and GPU
      moment_dtype         float32, or bfloat16 (half the memory; always stored stochastically rounded)
      max_grad_norm        clip by the global norm, on the device; None: no clipping
      seed                 of the random bits
    lr may be a 0-dim tensor. A step whose gradient norm is not finite (with max_grad_norm), or in which a `GradScaler` found
    an infinity, changes nothing but `skipped`: decided on the device, nothing waits for it.

    State a parameter: step (float32, on its device), exp_avg, exp_avg_sq, master: 8 to 12 bytes an element, 4 with bfloat16
    moments and stochastic rounding. `state_dict()` goes to and comes from `torch.optim.AdamW`; a state without masters gets
    them from the parameters. Resuming is bitwise. Works with FSDP2's DTensor parameters, `GradScaler` and parameter groups.

    Results: `skipped` [] int64, how many steps were skipped; `grad_norm` [] float32, of the last step with max_grad_norm,
    before clipping. Errors: ValueError, TypeError naming the argument. Source: arXiv:1711.05101 algorithm 2
    """

    _step_supports_amp_scaling = True

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, *, master_weights=True,
                 stochastic_rounding=False, moment_dtype=torch.float32, max_grad_norm=None, maximize=False, seed=0,
                 backend=None):
        if master_weights and stochastic_rounding:
            fail(ValueError, "FusedAdamW", "stochastic_rounding", "False with master_weights, which it is in place of", True)
        if moment_dtype not in (torch.float32, torch.bfloat16):
            fail(TypeError, "FusedAdamW", "moment_dtype", "torch.float32 or torch.bfloat16", moment_dtype)
        if max_grad_norm is not None:
            check_number("FusedAdamW", "max_grad_norm", max_grad_norm, "None or a finite number > 0", lambda v: v > 0)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            fail(ValueError, "FusedAdamW", "seed", "an integer from 0 to 2^63 - 1", repr(seed))
        self.master_weights, self.stochastic_rounding = master_weights, stochastic_rounding
        self.moment_dtype, self.max_grad_norm, self.seed, self.backend = moment_dtype, max_grad_norm, seed, backend
        self.grad_norm = None
        self._skipped, self._rates = {}, {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})

    def __getstate__(self):
        """For copy and pickle: the base class knows of groups and state alone."""
        own = {name: getattr(self, name) for name in (*OPTIONS, "grad_norm", "_skipped")}
        return super().__getstate__() | own | {"_rates": {}}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    def _check_group(self, group):
        check_settings("FusedAdamW", group["betas"], group["eps"], group["weight_decay"])
        if isinstance(group["lr"], torch.Tensor):
            if group["lr"].numel() != 1:
                fail(ValueError, "FusedAdamW", "lr", "a number or a tensor of one element", list(group["lr"].shape))
        else:
            check_number("FusedAdamW", "lr", group["lr"], "a finite number >= 0", lambda v: v >= 0)
        for p in group["params"]:
            if p.dtype not in FLOAT_DTYPES:
                fail(TypeError, "FusedAdamW", "params", "float32, bfloat16, float16 or float64", p.dtype)

    @property
    def skipped(self):
        """How many steps changed nothing: the first device's count, a 0-dim tensor that lives there."""
        return next(iter(self._skipped.values()), torch.zeros((), dtype=torch.int64))

    # ------------------------------------------------------------------------------------------------------------- state
    def _has_master(self, p):
        return self.master_weights and p.dtype in LOW

    def _dtype(self, p, name):
        if name == "master" or p.dtype == torch.float64:
            return torch.float64 if p.dtype == torch.float64 else torch.float32
        return self.moment_dtype

    def _state_of(self, p):
        """This parameter's state, with what it lacks made now."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in STATE[:2]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self._dtype(p, name))
        if self._has_master(p) and "master" not in state:
            state["master"] = self._like(p, "master", p.detach())
        strides = _layout(_local(p)).stride()
        for name in STATE:  # the parameter may have been given another layout since
            if name in state and _local(state[name]).stride() != strides:
                state[name] = self._like(p, name, state[name])
        return state

    def _like(self, p, name, value):
        """`value` in the dtype of this state, laid out in memory as p is: the update walks them side by side."""
        return torch.empty_like(p.detach(), dtype=self._dtype(p, name)).copy_(value)

    def state_dict(self):
        return {**super().state_dict(), "skipped": self.skipped.clone()}

    def load_state_dict(self, state_dict):
        """Accepts its own and `torch.optim.AdamW`'s; moments and masters keep float32, or the moments' dtype asked for."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        found = {p: state_dict["state"][i] for i, p in zip(saved_ids, params, strict=False) if state_dict["state"].get(i)}
        for group in state_dict["param_groups"]:
            if group.get("amsgrad"):
                fail(ValueError, "FusedAdamW", "state_dict", "amsgrad=False", True)
        for p, saved in found.items():
            if not {"step", *STATE[:2]} <= set(saved):
                fail(ValueError, "FusedAdamW", "state_dict", "step, exp_avg and exp_avg_sq of a parameter", ", ".join(saved))
            for name in STATE:
                if name in saved and saved[name].shape != p.shape:
                    fail(ValueError, "FusedAdamW", f"state_dict: {name}", f"shape {list(p.shape)}", list(saved[name].shape))
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "skipped"})
        for p, saved in found.items():
            state = self.state[p]
            state.clear()
            state["step"] = torch.as_tensor(saved["step"], dtype=torch.float32).to(p.device, copy=True)
            for name in STATE:
                if name in saved and (name != "master" or self._has_master(p)):
                    state[name] = self._like(p, name, saved[name].detach())
        if "skipped" in state_dict and params:
            self._skipped = {params[0].device: state_dict["skipped"].to(params[0].device, torch.int64, copy=True)}

    # -------------------------------------------------------------------------------------------------------------- step
    def _gradient(self, p):
        """The local part of p's gradient, in p's memory layout."""
        grad = p.grad
        if grad.is_sparse:
            fail(TypeError, "FusedAdamW", "grad", "a dense gradient", "a sparse one")
        if _is_dtensor(p) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        grad, p = _local(grad), _local(p)
        if grad.dtype not in (p.dtype, torch.float32):
            fail(TypeError, "FusedAdamW", "grad", f"{p.dtype} or torch.float32", grad.dtype)
        if grad.stride() != p.stride() or not dense(grad):
            grad = torch.empty_like(p.detach(), dtype=grad.dtype).copy_(grad)
        return grad

    def _lists(self):
        """Per (group, device, dtype, master or not): its parameters with gradients, and the index of its first one."""
        lists, first = {}, 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                key = number, p.device, p.dtype, self._has_master(p)
                if key not in lists:
                    lists[key] = [], [0]
                lists[key][1][0] += 1
                if p.grad is not None:
                    lists[key][0].append(p)
        for _, count in lists.values():
            count[0], first = first, first + count[0]
        return {key: (params, start[0]) for key, (params, start) in lists.items() if params}

    def _total(self, gradients):
        """The squared global norm as a 0-dim tensor by device: of all groups, devices and shards."""
        parts = {}
        for p, grad in gradients.items():
            where = (p.device_mesh, p.placements) if _is_dtensor(p) else None
            parts.setdefault((p.device, where), []).append(grad)
        total, devices = None, {}
        for (device, where), grads in parts.items():
            grads = [g for g in grads if g.numel()] or grads[:1]
            chosen = _chosen("squared_norm", grads[0], self.backend)
            part = reference_norm(grads) if chosen == "reference" else SQUARED_NORM.overloads["fwd"][chosen](grads)
            if where is not None:
                mesh, placements = where
                for dim, placement in enumerate(placements):
                    if placement.is_shard() or placement.is_partial():
                        torch.distributed.all_reduce(part, group=mesh.get_group(dim))
            total = part if total is None else total + part.to(total.device, total.dtype, non_blocking=True)
            devices[device] = None
        return {device: total.to(device, non_blocking=True) for device in devices}

    def _rate(self, number, device):
        """The group's learning rate as a float32 tensor on the device; filled anew only where it changed."""
        lr = self.param_groups[number]["lr"]
        if isinstance(lr, torch.Tensor):
            return lr.detach().reshape(()).to(device, torch.float32, non_blocking=True)
        known = self._rates.get((number, device))
        if known is None or known[0] != lr:
            tensor = torch.full((), lr, dtype=torch.float32, device=device) if known is None else known[1].fill_(lr)
            known = self._rates[number, device] = lr, tensor
        return known[1]

    @torch.no_grad()
    def step(self, closure=None):
        """One update. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        lists = self._lists()
        gradients = {p: self._gradient(p) for params, _ in lists.values() for p in params}
        if not gradients:
            return loss
        total = self._total(gradients) if self.max_grad_norm is not None else {}
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if total:
            first = next(iter(total.values()))
            self.grad_norm = first.sqrt() if scale is None else first.sqrt() / scale.to(first.device)
        counted = set()
        for (number, device, _, master), (params, first_index) in lists.items():
            group = self.param_groups[number]
            states = [self._state_of(p) for p in params]
            local = lambda name, states=states: [_local(state[name]) for state in states]
            skipped = self._skipped.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
            on = lambda t, device=device: None if t is None else t.to(device, non_blocking=True)
            beta1, beta2 = group["betas"]
            chosen = _chosen("adamw", _local(params[0]), self.backend)
            run = reference_step if chosen == "reference" else STEP[chosen]
            weights = [_local(p).detach() for p in params]
            filled = [w if dense(w) else torch.empty_like(w).copy_(w) for w in weights]
            random = self.stochastic_rounding or states[0]["exp_avg"].dtype == torch.bfloat16
            run(filled, [gradients[p] for p in params], local("master") if master else [],
                local("exp_avg"), local("exp_avg_sq"), local("step"), skipped.clone() if device in counted else skipped,
                total.get(device), on(scale), on(found), self._rate(number, device), beta1, beta2, group["eps"],
                group["weight_decay"], self.max_grad_norm or 0.0, self.stochastic_rounding, group["maximize"], self.seed,
                first_index, [_offset(p) for p in params] if random else [])
            for weight, new in zip(weights, filled, strict=True):
                if weight is not new:
                    weight.copy_(new)
            counted.add(device)
        return loss
