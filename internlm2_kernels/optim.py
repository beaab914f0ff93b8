"""`FusedAdamW`: AdamW over lists of parameters, with master weights or stochastic rounding, clipping, skipped steps."""

from collections.abc import Iterable

import torch
from torch.optim import Optimizer

from ._checks import FLOAT_DTYPES, check_flag, check_number, check_tensor, fail
from ._optim_state import LOW, STATE, check_saved, loaded_count, settle_masters, warn_of_masters
from ._registry import BACKENDS, OPS
from ._shards import check_placements, is_dtensor, local_of, offset_of, split_dimensions
from .ops.adamw import STEP, check_settings, reference_step
from .ops.squared_norm import SQUARED_NORM, dense
from .ops.squared_norm import reference as reference_norm

OPTIONS = ("master_weights", "stochastic_rounding", "moment_dtype", "max_grad_norm", "skip_nonfinite", "seed", "backend")
# Options in the parameter groups of torch.optim that have one supported value.
FIXED = {"amsgrad": False, "differentiable": False, "decoupled_weight_decay": True}


def _layout(tensor):
    """A tensor with the memory layout that the optimizer state of `tensor` has: the layout of `tensor` if its elements fill its
    memory without gaps, otherwise a dense one."""
    return tensor if dense(tensor) else torch.empty_like(tensor)


def _chosen(op, tensor, backend):
    return OPS[op].select(tensor, backend)


class FusedAdamW(Optimizer):
    """AdamW with decoupled weight decay. One call updates, in place, all parameters of a group that share device and dtype.

    m = b1 m + (1 - b1) g, v = b2 v + (1 - b2) g^2, w = w (1 - lr wd) - lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps).
    g is the gradient, divided by the loss scale and multiplied by min(1, max_grad_norm / (norm + 1e-6)); the norm is that of
    the gradients of all groups and shards.

    Arguments beyond those of `torch.optim.AdamW` (for the whole optimizer, not for a group):
      master_weights       keep float32 copies of bfloat16 and float16 parameters, and update those
      stochastic_rounding  without masters: round bfloat16 parameters up or down at random, so that updates far below one ulp
                           survive on average. The bits are Philox4x32-10 of (seed, step, tensor, element), the same on CPU
                           and GPU
      moment_dtype         float32, or bfloat16: half the memory, and always stochastically rounded
      max_grad_norm        clip by the global norm on the device; None: no clipping
      skip_nonfinite       skip a step whose gradient norm is not finite, since one NaN would stay in the weights forever.
                           The norm takes one more read of the gradients. With False and no max_grad_norm no norm is
                           computed, as in PyTorch's AdamW
      seed                 seed of the random bits
      backend              backend of all operators; None: the first usable one on each device

    Skipped steps: a step changes nothing but `skipped` if its gradient norm or its lr tensor is not finite, or if a
    `GradScaler` found an infinity. The device decides; the host does not wait. The squared norm is a float32, so that a norm
    above 1.8e19, before division by the loss scale, counts as infinite.

    Masters (the float32 copies) are created in the first step of a parameter or loaded, and every later step starts from them.
    Call `refresh_masters()` after writing to parameters yourself; otherwise the next step overwrites your values. In the first
    step after loading, where a master does not round to its parameter, the parameter is used instead, with a warning.

    State: step (float32, counts to 2^24), exp_avg, exp_avg_sq and master take 8 to 12 bytes an element, or 4 with bfloat16
    moments and no master. State dictionaries are exchanged with `torch.optim.AdamW`; resuming is bitwise. FSDP2's DTensor
    parameters work, and draw the same random bits as the whole tensor does (shards along a later dimension draw other bits).
    For compiled steps pass lr as a 0-dim tensor and fill it: every new value of a float is compiled again.

    Results: `skipped` [] int64, the number of skipped steps; `grad_norm` [] float32, of the last step, before clipping.
    Errors: ValueError and TypeError name the argument, before anything has changed.   Source: arXiv:1711.05101 algorithm 2
    """

    _step_supports_amp_scaling = True
    _unseen_masters = False  # True from the loading of master weights until a step has compared them with the parameters

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, *, master_weights=True,
                 stochastic_rounding=False, moment_dtype=torch.float32, max_grad_norm=None, skip_nonfinite=True, maximize=False,
                 seed=0, backend=None):
        if not isinstance(params, Iterable) or isinstance(params, torch.Tensor):
            fail(TypeError, "FusedAdamW", "params", "parameters, or groups of them", type(params).__name__)
        flags = {"master_weights": master_weights, "stochastic_rounding": stochastic_rounding, "skip_nonfinite": skip_nonfinite}
        for name, value in flags.items():
            check_flag("FusedAdamW", name, value)
        if master_weights and stochastic_rounding:
            fail(ValueError, "FusedAdamW", "stochastic_rounding", "False with master_weights, which it is in place of", True)
        if not isinstance(moment_dtype, torch.dtype) or moment_dtype not in (torch.float32, torch.bfloat16):
            fail(TypeError, "FusedAdamW", "moment_dtype", "torch.float32 or torch.bfloat16", moment_dtype)
        if max_grad_norm is not None:
            check_number("FusedAdamW", "max_grad_norm", max_grad_norm, "None or a finite number > 0", lambda v: v > 0)
            if not skip_nonfinite:
                fail(ValueError, "FusedAdamW", "skip_nonfinite", "True with max_grad_norm, whose norm decides", False)
        if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed < 2**63:
            fail(ValueError, "FusedAdamW", "seed", "an integer from 0 to 2^63 - 1", repr(seed))
        if backend is not None and (not isinstance(backend, str) or backend not in BACKENDS):
            fail(ValueError, "FusedAdamW", "backend", f"None or one of {', '.join(BACKENDS)}", repr(backend))
        self.master_weights, self.stochastic_rounding, self.skip_nonfinite = master_weights, stochastic_rounding, skip_nonfinite
        self.moment_dtype, self.max_grad_norm, self.seed, self.backend = moment_dtype, max_grad_norm, seed, backend
        self.grad_norm = None
        self._skipped, self._rates = {}, {}
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize})

    def __getstate__(self):
        """For copy and pickle. The base class keeps only the groups and the state; this adds the options of the optimizer."""
        own = {name: getattr(self, name) for name in (*OPTIONS, "grad_norm", "_skipped", "_unseen_masters")}
        return super().__getstate__() | own | {"_rates": {}}

    def add_param_group(self, param_group):
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            self._check_dtypes(p.dtype for p in self.param_groups[-1]["params"])
            for p in self.param_groups[-1]["params"]:
                check_placements("FusedAdamW", p)
        except (TypeError, ValueError):
            self.param_groups.pop()
            raise

    @staticmethod
    def _check_numbers(op, group):
        """Checks the numbers and flags of a group. It reads no tensor, so that the host never waits for a device."""
        check_settings(op, group["betas"], group["eps"], group["weight_decay"])
        check_flag(op, "maximize", group["maximize"])
        lr = group["lr"]
        if not isinstance(lr, torch.Tensor):
            check_number(op, "lr", lr, "a finite number >= 0", lambda v: v >= 0)
            return
        check_tensor(op, "lr", lr)
        if lr.numel() != 1:
            fail(ValueError, op, "lr", "a number or a tensor of one element", list(lr.shape))
        if lr.is_complex() or lr.dtype == torch.bool:
            fail(TypeError, op, "lr", "a tensor of a real number", lr.dtype)

    def _check_group(self, group, argument="params"):
        """Checks a group that was passed (`params`) or loaded (`state_dict`)."""
        op, lr = "FusedAdamW" if argument == "params" else f"FusedAdamW: {argument}", group["lr"]
        for name in (*OPTIONS, "skipped"):
            if name in group:
                fail(TypeError, "FusedAdamW", argument, f"no {name} in a group: it is of the whole optimizer", group[name])
        for name, value in FIXED.items():
            if group.get(name, value) != value:
                fail(ValueError, "FusedAdamW", argument, f"{name}={value}", group[name])
        self._check_numbers(op, group)
        if isinstance(lr, torch.Tensor) and lr.device.type == "cpu":
            check_number(op, "lr", lr.item(), "a finite number >= 0", lambda v: v >= 0)

    def _check_dtypes(self, dtypes):
        for dtype in dtypes:
            if dtype not in FLOAT_DTYPES:
                fail(TypeError, "FusedAdamW", "params", "float32, bfloat16, float16 or float64", dtype)
            if self.stochastic_rounding and dtype == torch.float16:
                fail(TypeError, "FusedAdamW", "stochastic_rounding", "False with float16 parameters", True)

    @property
    def skipped(self):
        """The number of skipped steps: a 0-dim tensor on the first device that has parameters."""
        return next(iter(self._skipped.values()), torch.zeros((), dtype=torch.int64))

    # ------------------------------------------------------------------------------------------------------------- state
    def _has_master(self, p):
        return self.master_weights and p.dtype in LOW

    def _dtype(self, p, name):
        if name == "master" or p.dtype == torch.float64:
            return torch.float64 if p.dtype == torch.float64 else torch.float32
        return self.moment_dtype

    def _state_of(self, p):
        """The state of p. Missing entries are created, and entries of another dtype or layout than p needs are converted."""
        state = self.state[p]
        if "step" not in state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=p.device)
        for name in STATE[:2]:
            if name not in state:
                state[name] = torch.zeros_like(p, dtype=self._dtype(p, name))
        if not self._has_master(p):  # p may have been converted to a dtype that needs no master
            state.pop("master", None)
        elif "master" not in state:
            state["master"] = self._like(p, "master", p.detach())
        strides = _layout(local_of(p)).stride()
        for name in STATE:
            if name in state and (state[name].dtype != self._dtype(p, name) or local_of(state[name]).stride() != strides):
                state[name] = self._like(p, name, state[name])
        return state

    def _like(self, p, name, value):
        """`value` in the dtype of the state `name` and in the memory layout of p: the update reads the elements of state and
        parameter in memory order, so element i of one must belong to element i of the other."""
        return torch.empty_like(p.detach(), dtype=self._dtype(p, name)).copy_(value)

    @torch.no_grad()
    def refresh_masters(self):
        """Sets every master to its parameter. Call it after writing to parameters outside the optimizer."""
        for p, state in self.state.items():
            if "master" in state:
                state["master"] = self._like(p, "master", p.detach())

    def state_dict(self):
        """The base class's dictionary with `skipped`. A count other than 0 is also written into the first group, because
        distributed checkpoints keep only the groups and the state."""
        saved, count = super().state_dict(), int(self.skipped)
        if count:
            saved["param_groups"][0]["skipped"] = count
        return {**saved, "skipped": self.skipped.clone()}

    def load_state_dict(self, state_dict):
        """Loads a dictionary of this class or of `torch.optim.AdamW`. Masters stay float32, moments have `moment_dtype`.

        A dictionary that is refused changes nothing. Hooks work as with every optimizer.
        """
        if not isinstance(state_dict, dict):
            fail(TypeError, "FusedAdamW", "state_dict", "a dictionary", type(state_dict).__name__)
        made = []

        def last(_, final):  # runs after the user's hooks; the base class gets no state, which it would cast to p's dtype
            groups = self._loaded_groups(final)
            made.append(self._loaded_state(final))
            return {"state": {}, "param_groups": groups}

        def first(_):
            state, skipped, stale = made[0]
            for p, own in state.items():
                self.state[p] = own
            if skipped is not None:
                self._skipped = {skipped.device: skipped}
            self._unseen_masters = any("master" in own for own in state.values())
            warn_of_masters(stale, "are not float32, as after a step of another optimizer")

        handles = (self.register_load_state_dict_pre_hook(last), self.register_load_state_dict_post_hook(first, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()

    def _loaded_groups(self, state_dict):
        if not {"state", "param_groups"} <= set(state_dict):
            fail(ValueError, "FusedAdamW", "state_dict", "state and param_groups", ", ".join(map(str, state_dict)) or "nothing")
        groups = [{"maximize": False, **group} for group in state_dict["param_groups"]]
        for group in groups:
            group.pop("skipped", None)  # the count is not an option of the group; _loaded_state reads it
        if len(groups) != len(self.param_groups):
            fail(ValueError, "FusedAdamW", "state_dict", f"{len(self.param_groups)} parameter groups", len(groups))
        for group in groups:
            for name in ("lr", "betas", "eps", "weight_decay"):
                if name not in group:
                    fail(ValueError, "FusedAdamW", "state_dict", f"{name} in every group, as AdamW's have it", "none")
            self._check_group(group, "state_dict")
        return groups

    @torch.no_grad()
    def _loaded_state(self, state_dict):
        """(state by parameter, number of skipped steps or None, number of stale masters: those saved in 16 bits, which are left
        out). All is checked and copied here, so that storing it afterwards cannot fail."""
        saved_ids = [i for group in state_dict["param_groups"] for i in group["params"]]
        params = [p for group in self.param_groups for p in group["params"]]
        found = {p: state_dict["state"][i] for i, p in zip(saved_ids, params, strict=False) if state_dict["state"].get(i)}
        for p, saved in found.items():
            check_saved(p, saved)
        skipped = loaded_count(state_dict)
        state, stale = {}, 0
        for p, saved in found.items():
            step = torch.as_tensor(local_of(saved["step"]), dtype=torch.float32)
            state[p] = {"step": step.detach().reshape(()).to(p.device, copy=True)}
            for name in STATE:
                if name not in saved or (name == "master" and not self._has_master(p)):
                    continue
                if name == "master" and saved[name].dtype in LOW:
                    stale += 1
                else:
                    state[p][name] = self._like(p, name, saved[name].detach())
        if skipped is not None and params:
            skipped = torch.as_tensor(skipped).reshape(()).to(params[0].device, torch.int64, copy=True)
        return state, skipped if params else None, stale

    # -------------------------------------------------------------------------------------------------------------- step
    def _gradient(self, p):
        """The gradient of p, in the memory layout of p; of a DTensor, the shard of this process."""
        check_placements("FusedAdamW", p)
        grad = p.grad
        if grad.is_sparse:
            fail(TypeError, "FusedAdamW", "grad", "a dense gradient", "a sparse one")
        if is_dtensor(p) and grad.placements != p.placements:
            grad = grad.redistribute(placements=p.placements)
        grad, p = local_of(grad), local_of(p)
        if grad.dtype not in (p.dtype, torch.float32):
            fail(TypeError, "FusedAdamW", "grad", f"{p.dtype} or torch.float32", grad.dtype)
        if grad.stride() != p.stride() or not dense(grad):
            grad = torch.empty_like(p.detach(), dtype=grad.dtype).copy_(grad)
        return grad

    def _lists(self):
        """The parameters that have gradients and their indices among all parameters, by (number of the group, device, dtype,
        whether they have masters). One call of the operator updates one such list."""
        lists, place = {}, 0
        for number, group in enumerate(self.param_groups):
            for p in group["params"]:
                if p.grad is not None:
                    params, places = lists.setdefault((number, p.device, p.dtype, self._has_master(p)), ([], []))
                    params.append(p)
                    places.append(place)
                place += 1
        return lists

    def _offsets(self, dtype, params):
        """For each parameter, the position of its first element in the whole tensor, by which its random bits are numbered (see
        _shards.offset_of). An empty list where nothing is rounded stochastically."""
        stochastic = self.stochastic_rounding and dtype == torch.bfloat16
        random = stochastic or (self.moment_dtype == torch.bfloat16 and dtype != torch.float64)
        return [offset_of(p) for p in params] if random else []

    def _total(self, gradients):
        """{device: squared norm} for each device that has gradients. The norm, a 0-dim tensor, is that of the gradients of all
        groups, devices and shards together."""
        parts = {}
        for p, grad in gradients.items():
            where = (p.device_mesh, split_dimensions(p)) if is_dtensor(p) else None
            parts.setdefault((p.device, where), []).append(grad)
        total, devices = None, {}
        for (device, where), grads in parts.items():
            grads = [g for g in grads if g.numel()] or grads[:1]
            chosen = _chosen("squared_norm", grads[0], self.backend)
            part = reference_norm(grads) if chosen == "reference" else SQUARED_NORM.overloads["fwd"][chosen](grads)
            if where is not None:
                mesh, split = where
                for dim in split:
                    torch.distributed.all_reduce(part, group=mesh.get_group(dim))
            total = part if total is None else total + part.to(total.device, non_blocking=True)
            devices[device] = None
        return {device: total.to(device, non_blocking=True) for device in devices}

    def _rate(self, number, device, dtype):
        """The learning rate of group `number` as a tensor on the device. The tensor is kept, and written only when the learning
        rate has changed."""
        lr = self.param_groups[number]["lr"]
        if isinstance(lr, torch.Tensor):
            return lr.detach().reshape(()).to(device, dtype, non_blocking=True)
        lr = float(lr)
        known = self._rates.get((number, device, dtype))
        if known is None or known[0] != lr:
            tensor = torch.full((), lr, dtype=dtype, device=device) if known is None else known[1].fill_(lr)
            known = self._rates[number, device, dtype] = lr, tensor
        return known[1]

    def _rates_of(self, lists):
        """(the learning rate of each list of `_lists`, float32, or float64 for float64 parameters; an overflow flag or None).

        The flag is 1 where a learning rate tensor is not finite, so that all lists skip the step together.
        """
        computed_in = lambda dtype: torch.float64 if dtype == torch.float64 else torch.float32
        rates = {key: self._rate(*key[:2], computed_in(key[2])) for key in lists}
        tensors = [rate for key, rate in rates.items() if isinstance(self.param_groups[key[0]]["lr"], torch.Tensor)]
        if len(lists) == 1 or not tensors:  # the kernel of a single list checks its learning rate itself
            return rates, None
        together = torch.stack([t.to(tensors[0].device, non_blocking=True) for t in tensors])
        return rates, 1 - together.isfinite().all().to(torch.float32)

    def _see_masters(self):
        """Called once after loading. Where a master does not round to its parameter, the parameter has been written to, and the
        master takes the value of the parameter."""
        settle_masters((p, self.state[p]["master"]) for group in self.param_groups for p in group["params"]
                       if p in self.state and "master" in self.state[p] and self._has_master(p))
        self._unseen_masters = False

    @torch.no_grad()
    def step(self, closure=None):
        """Makes one step. Returns what `closure` returns."""
        loss = None
        if closure is not None:
            if not callable(closure):
                fail(TypeError, "FusedAdamW", "closure", "a function or None", type(closure).__name__)
            with torch.enable_grad():
                loss = closure()
        lists = self._lists()
        for group in self.param_groups:
            self._check_numbers("FusedAdamW", group)
        self._check_dtypes(dtype for _, _, dtype, _ in lists)
        gradients = {p: self._gradient(p) for params, _ in lists.values() for p in params}
        if not gradients:
            return loss
        offsets = {key: self._offsets(key[2], params) for key, (params, _) in lists.items()}
        if self._unseen_masters:
            self._see_masters()
        total = self._total(gradients) if self.skip_nonfinite else {}
        rates, overflow = self._rates_of(lists)
        scale, found = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if overflow is not None:
            found = overflow if found is None else torch.maximum(found.to(overflow.device), overflow)
        if total:
            first = next(iter(total.values()))
            self.grad_norm = first.sqrt() if scale is None else first.sqrt() / scale.to(first.device)
        counted = set()
        for key, (params, places) in lists.items():
            (_, device, _, master), group = key, self.param_groups[key[0]]
            states = [self._state_of(p) for p in params]
            local = lambda name, states=states: [local_of(state[name]) for state in states]
            skipped = self._skipped.setdefault(device, torch.zeros((), dtype=torch.int64, device=device))
            on = lambda t, device=device: None if t is None else t.to(device, non_blocking=True)
            beta1, beta2 = group["betas"]
            chosen = _chosen("adamw", local_of(params[0]), self.backend)
            run = reference_step if chosen == "reference" else STEP[chosen]
            weights = [local_of(p).detach() for p in params]
            filled = [w if dense(w) else torch.empty_like(w).copy_(w) for w in weights]
            run(filled, [gradients[p] for p in params], local("master") if master else [],
                local("exp_avg"), local("exp_avg_sq"), local("step"), skipped.clone() if device in counted else skipped,
                total.get(device), on(scale), on(found), rates[key], beta1, beta2, group["eps"],
                group["weight_decay"], self.max_grad_norm or 0.0, self.stochastic_rounding, group["maximize"], self.seed,
                places, offsets[key])
            for weight, new in zip(weights, filled, strict=True):
                if weight is not new:
                    weight.copy_(new)
            counted.add(device)
        return loss
