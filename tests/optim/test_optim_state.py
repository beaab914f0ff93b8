"""The state of FusedAdamW: to and from PyTorch's AdamW, bitwise resuming, and what is refused."""

import copy
import math
import pickle

import pytest
import torch
from optim_runs import close, in_groups, parameters, state_of, steps
from shared import assert_bitwise

import internlm2_kernels as ik


def test_state_goes_to_and_comes_from_torch():
    ours, theirs = parameters(), parameters()
    wanted = {"lr": 0.01, "betas": (0.9, 0.95), "weight_decay": 0.1, "maximize": True}
    a, b = ik.FusedAdamW(in_groups(ours, lr=0.1), **wanted), torch.optim.AdamW(in_groups(theirs, lr=0.1), **wanted)
    steps(a, ours, 3)
    steps(b, theirs, 3)
    swapped = [[torch.nn.Parameter(p.detach().clone()) for p in params] for params in (ours, theirs)]
    to_torch = torch.optim.AdamW(in_groups(swapped[0]))
    from_torch = ik.FusedAdamW(in_groups(swapped[1]))
    to_torch.load_state_dict(copy.deepcopy(a.state_dict()))
    from_torch.load_state_dict(copy.deepcopy(b.state_dict()))
    for params, optimizer in ((ours, a), (theirs, b), (swapped[0], to_torch), (swapped[1], from_torch)):
        steps(optimizer, params, 3, 3)
    close(swapped[0], ours)
    close(swapped[1], theirs)
    close(swapped[0], swapped[1])


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("options", ({}, {"master_weights": False}, {"moment_dtype": torch.bfloat16}, {
    "master_weights": False, "stochastic_rounding": True, "moment_dtype": torch.bfloat16, "seed": 11}), ids=str)
def test_resume_is_bitwise(backend, options, tmp_path):
    """A run resumed through a file has the bits of one that was not interrupted. Moments and masters keep their dtypes, while
    torch's base class would cast them to the parameter's.
    """
    straight = parameters(torch.bfloat16)
    make = lambda params: ik.FusedAdamW(in_groups(params, lr=0.02), lr=0.01, max_grad_norm=1.0, backend=backend, **options)
    a = make(straight)
    steps(a, straight, 3)
    torch.save({"parameters": straight, "optimizer": a.state_dict()}, tmp_path / "state.pt")
    saved = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in saved["parameters"]]
    b = make(resumed)
    b.load_state_dict(saved["optimizer"])
    wanted = {"exp_avg": a.moment_dtype, "exp_avg_sq": a.moment_dtype, "step": torch.float32, "master": torch.float32}
    for p in resumed:
        assert {n: v.dtype for n, v in b.state[p].items()} == {n: wanted[n] for n in a.state[straight[0]]}
    assert_bitwise(state_of(b), state_of(a))
    pickled = pickle.loads(pickle.dumps((a, straight)))  # parameters and optimizer together, so that they stay tied
    copied = copy.deepcopy((a, straight))
    steps(a, straight, 3, 3)
    for optimizer, params in ((b, resumed), pickled, copied):
        steps(optimizer, params, 3, 3)
        assert_bitwise(state_of(optimizer), state_of(a))
        assert_bitwise(dict(enumerate(p.detach() for p in params)), dict(enumerate(p.detach() for p in straight)))


def test_a_state_without_masters_gets_them_from_the_parameters():
    params = parameters(torch.bfloat16)
    theirs = torch.optim.AdamW(params, lr=0.01)
    steps(theirs, params, 2)
    optimizer = ik.FusedAdamW(params, lr=0.01)
    optimizer.load_state_dict(theirs.state_dict())
    steps(optimizer, params, 1, 2)
    for p in params:
        state = optimizer.state[p]
        assert float(state["step"]) == 3 and torch.equal(p, state["master"].bfloat16())
        assert all(v.dtype == torch.float32 for v in state.values())


def test_a_wrong_state_is_refused_and_changes_nothing():
    params = parameters()
    optimizer = ik.FusedAdamW(params)
    steps(optimizer, params, 2)
    before, sound = state_of(optimizer), copy.deepcopy(optimizer.state_dict())

    def spoilt(change):
        state = copy.deepcopy(sound)
        change(state)
        return state

    cases = ((lambda s: s["state"][0].update(exp_avg=torch.zeros(5)), r"exp_avg: expected shape \[7, 5\], got \[5\]"),
             (lambda s: s["state"][0].pop("exp_avg_sq"), "state_dict: expected step, exp_avg and exp_avg_sq"),
             (lambda s: s["param_groups"][0].update(amsgrad=True), "state_dict: expected amsgrad=False, got True"),
             (lambda s: s["param_groups"][0].update(decoupled_weight_decay=False), "expected decoupled_weight_decay=True"),
             (lambda s: s["param_groups"][0].update(lr=math.nan), "state_dict: lr: expected a finite number >= 0, got nan"),
             (lambda s: s["param_groups"][0].update(lr=torch.tensor(-1.0)), "state_dict: lr: expected .*, got -1.0"),
             (lambda s: s["param_groups"][0].update(betas=(2.0, 0.9)), "state_dict: betas: expected .*, got 2.0"),
             (lambda s: s["param_groups"][0].pop("betas"), "state_dict: expected betas in every group"),
             (lambda s: s.clear(), "state_dict: expected state and param_groups, got nothing"),
             (lambda s: s["param_groups"][0]["params"].pop(), "parameter group"),
             (lambda s: s["param_groups"].append({"params": []}), "parameter groups"))
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            optimizer.load_state_dict(spoilt(change))
        assert_bitwise(state_of(optimizer), before)
        assert optimizer.param_groups[0]["lr"] == 1e-3
    others = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    others.step()
    with pytest.raises(ValueError, match="expected betas in every group"):
        optimizer.load_state_dict(others.state_dict())
    with pytest.raises(TypeError, match="FusedAdamW: state_dict: expected a dictionary, got NoneType"):
        optimizer.load_state_dict(None)
    with pytest.raises(TypeError, match="FusedAdamW: state_dict: expected no seed in a group"):
        optimizer.load_state_dict(spoilt(lambda s: s["param_groups"][0].update(seed=3)))
    assert_bitwise(state_of(optimizer), before)
    steps(optimizer, params, 1)


def test_hooks_on_loading():
    """torch's hooks of load_state_dict work: a pre-hook may return another dictionary to load, and a post-hook sees the loaded
    state and may change it.
    """
    params = parameters(torch.bfloat16)
    optimizer = ik.FusedAdamW(params)
    steps(optimizer, params, 2)
    saved, seen = copy.deepcopy(optimizer.state_dict()), []

    def replace(_, state_dict):
        state_dict = copy.deepcopy(state_dict)
        for state in state_dict["state"].values():
            state["exp_avg"].fill_(7)
        return state_dict

    def finish(loaded):
        seen.extend(float(state["exp_avg"].sum() / 7) for state in loaded.state.values())
        loaded.state[params[0]]["exp_avg_sq"].fill_(2)

    hooks = optimizer.register_load_state_dict_pre_hook(replace), optimizer.register_load_state_dict_post_hook(finish)
    optimizer.load_state_dict(saved)
    assert seen == [p.numel() for p in params]
    assert (optimizer.state[params[0]]["exp_avg_sq"] == 2).all()
    for hook in hooks:
        hook.remove()
    optimizer.load_state_dict(saved)
    assert_bitwise(state_of(optimizer), {f"{i}.{n}": v for i, state in saved["state"].items() for n, v in state.items()})
    assert len(optimizer._optimizer_load_state_dict_pre_hooks) == len(optimizer._optimizer_load_state_dict_post_hooks) == 0


@pytest.mark.parametrize("name,value,kind", (
    ("amsgrad", True, ValueError), ("differentiable", True, ValueError), ("max_grad_norm", 1.0, TypeError),
    ("master_weights", False, TypeError), ("seed", 3, TypeError), ("moment_dtype", torch.bfloat16, TypeError),
    ("backend", "cpp", TypeError), ("skip_nonfinite", False, TypeError), ("stochastic_rounding", True, TypeError)))
def test_options_that_no_group_has(name, value, kind):
    optimizer = ik.FusedAdamW(parameters())
    with pytest.raises(kind, match=f"FusedAdamW: params: expected .*{name}"):
        optimizer.add_param_group({"params": parameters(), name: value})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(kind, match=f"FusedAdamW: params: expected .*{name}"):
        ik.FusedAdamW([{"params": parameters(), name: value}])
    theirs = torch.optim.AdamW(parameters(), foreach=True, amsgrad=False)  # the keys of a group of PyTorch's AdamW are accepted
    optimizer.add_param_group({"params": parameters(), **{k: v for k, v in theirs.defaults.items() if k != "params"}})


def test_float16_is_not_rounded_stochastically():
    options, message = {"master_weights": False, "stochastic_rounding": True}, "stochastic_rounding: expected False"
    with pytest.raises(TypeError, match=message):
        ik.FusedAdamW(parameters(torch.float16), **options)
    params = parameters(torch.bfloat16)
    optimizer = ik.FusedAdamW(params, **options)
    for p in params:
        p.data, p.grad = p.data.half(), None
        p.grad_dtype = None
    with pytest.raises(TypeError, match=message):
        steps(optimizer, params, 1)


@pytest.mark.parametrize("options,kind,message", (
    ({"lr": -1e-3}, ValueError, "FusedAdamW: lr: expected a finite number >= 0, got -0.001"),
    ({"lr": math.nan}, ValueError, "FusedAdamW: lr: expected a finite number >= 0, got nan"),
    ({"lr": torch.zeros(2)}, ValueError, "FusedAdamW: lr: expected a number or a tensor of one element, got [2]"),
    ({"betas": (0.9, 1.0)}, ValueError, "FusedAdamW: betas: expected two numbers from 0 up to below 1, got 1.0"),
    *(({"eps": eps}, ValueError, "FusedAdamW: eps: expected a finite number >= 1.1754944e-38, float32's least normal one, got "
       + repr(eps)) for eps in (-1.0, 0.0, 1e-60)),
    ({"lr": torch.tensor(math.nan)}, ValueError, "FusedAdamW: lr: expected a finite number >= 0, got nan"),
    ({"lr": torch.tensor([-1.0])}, ValueError, "FusedAdamW: lr: expected a finite number >= 0, got -1.0"),
    ({"lr": torch.tensor(True)}, TypeError, "FusedAdamW: lr: expected a tensor of a real number, got torch.bool"),
    ({"maximize": "x"}, TypeError, "FusedAdamW: maximize: expected True or False, got 'x'"),
    ({"master_weights": "no"}, TypeError, "FusedAdamW: master_weights: expected True or False, got 'no'"),
    ({"skip_nonfinite": 1}, TypeError, "FusedAdamW: skip_nonfinite: expected True or False, got 1"),
    ({"skip_nonfinite": False, "max_grad_norm": 1.0}, ValueError,
     "FusedAdamW: skip_nonfinite: expected True with max_grad_norm, whose norm decides, got False"),
    ({"backend": "nope"}, ValueError,
     "FusedAdamW: backend: expected None or one of reference, cpp, triton, cuda, got 'nope'"),
    ({"weight_decay": math.inf}, ValueError, "FusedAdamW: weight_decay: expected a finite number >= 0, got inf"),
    ({"max_grad_norm": 0.0}, ValueError, "FusedAdamW: max_grad_norm: expected None or a finite number > 0, got 0.0"),
    ({"max_grad_norm": math.nan}, ValueError, "FusedAdamW: max_grad_norm: expected None or a finite number > 0, got nan"),
    ({"moment_dtype": torch.float16}, TypeError,
     "FusedAdamW: moment_dtype: expected torch.float32 or torch.bfloat16, got torch.float16"),
    ({"stochastic_rounding": True}, ValueError,
     "FusedAdamW: stochastic_rounding: expected False with master_weights, which it is in place of, got True"),
    ({"seed": -1}, ValueError, "FusedAdamW: seed: expected an integer from 0 to 2^63 - 1, got -1"),
), ids=str)
def test_wrong_settings(options, kind, message):
    with pytest.raises(kind) as caught:
        ik.FusedAdamW(parameters(), **options)
    assert str(caught.value) == message
    if {"lr", "eps", "maximize"} & set(options):  # a group that was refused must not have been added
        optimizer = ik.FusedAdamW(parameters())
        with pytest.raises(kind):
            optimizer.add_param_group({"params": parameters(), **options})
        assert len(optimizer.param_groups) == 1


def test_wrong_parameters_and_gradients():
    with pytest.raises(TypeError, match="FusedAdamW: params: expected float32, .*, got torch.complex64"):
        ik.FusedAdamW([torch.zeros(3, dtype=torch.complex64, requires_grad=True)])
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = ik.FusedAdamW(embedding.parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="FusedAdamW: grad: expected a dense gradient, got a sparse one"):
        optimizer.step()
