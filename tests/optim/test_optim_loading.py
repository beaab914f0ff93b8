"""Loading the state of FusedAdamW: master weights that no longer match their parameters, because another optimizer or other
weights came in between; impossible values; the count of skipped steps.
"""

import copy
import math
import warnings

import pytest
import torch
from optim_runs import draw_gradients, in_groups, parameters, state_of, steps
from shared import assert_bitwise

import internlm2_kernels as ik


# ------------------------------------------------------------------------------------------------- masters that are stale
def resumed_through(state, params, kind=ik.FusedAdamW, **options):
    optimizer = kind(params, **options)
    optimizer.load_state_dict(copy.deepcopy(state))
    return optimizer


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_steps_of_another_optimizer_are_not_undone(dtype):
    """A run goes from FusedAdamW to PyTorch's AdamW and back. The latter keeps the loaded masters in its state but never
    updates them, so FusedAdamW must not return to their values.
    """
    params = parameters(dtype)
    ours = ik.FusedAdamW(params, lr=0.01, weight_decay=0.0)
    steps(ours, params, 3)
    theirs = resumed_through(ours.state_dict(), params, torch.optim.AdamW)
    theirs.param_groups[0]["lr"] = 0.1
    steps(theirs, params, 10, 3)
    assert theirs.state[params[0]]["master"].dtype == dtype
    weights = [p.detach().clone() for p in params]
    with pytest.warns(UserWarning, match="FusedAdamW: state_dict: master: the masters of 5 parameters are not float32"):
        back = resumed_through(theirs.state_dict(), params)
    back.param_groups[0]["lr"] = 1e-6
    steps(back, params, 1, 13)
    for p, weight in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach(), weight, rtol=0, atol=1e-5)
        assert back.state[p]["master"].dtype == torch.float32


@pytest.mark.parametrize("compiled", (False, True))
def test_a_master_that_is_not_its_parameter_takes_its_value(compiled):
    """In the first step after loading, a master that does not match its parameter is set to the parameter's value. It happens
    there and not in load_state_dict, because weights may be loaded before the optimizer's state or after it.
    """
    params = parameters(torch.bfloat16)
    ours = ik.FusedAdamW(params, lr=0.01, backend="cpp")
    steps(ours, params, 2)
    saved, weights = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in params]
    masters = [ours.state[p]["master"].clone() for p in params]
    for p in params:
        p.data.zero_()
    optimizer = resumed_through(saved, params, lr=torch.tensor(0.0), backend="cpp")
    optimizer.param_groups[0].update(lr=torch.tensor(0.0), weight_decay=0.0)
    with torch.no_grad():
        for p, weight in zip(params, weights, strict=True):
            p.copy_(weight)
        params[0][0] = 5.0  # one row of one parameter
    step = torch.compile(optimizer.step, fullgraph=True, backend="aot_eager") if compiled else optimizer.step
    draw_gradients(params, 3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        step()
        step()
    told = [str(w.message) for w in caught if "FusedAdamW" in str(w.message)]
    assert compiled or (len(told) == 1 and "master: the masters of 1 parameters do not round to" in told[0])
    masters[0][0] = 5.0
    for p, master in zip(params, masters, strict=True):
        assert torch.equal(optimizer.state[p]["master"], master) and torch.equal(p, master.bfloat16())


def test_a_sound_state_is_loaded_without_a_word(tmp_path):
    """A state that matches its parameters is loaded without a warning: also where the weights are loaded after the state, where
    some are not finite, and where optimizer and parameters have been copied in between.
    """
    params = parameters(torch.bfloat16)
    ours = ik.FusedAdamW(params, lr=0.01, skip_nonfinite=False)
    steps(ours, params, 2)
    params[0].data[0] = ours.state[params[0]]["master"][0] = math.nan
    saved, weights = copy.deepcopy(ours.state_dict()), [p.detach().clone() for p in params]
    fresh = parameters(torch.bfloat16, seed=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        other = resumed_through(saved, fresh, skip_nonfinite=False)
        for p, weight in zip(fresh, weights, strict=True):
            p.data.copy_(weight)
        copied = copy.deepcopy((other, fresh))
        steps(ours, params, 2, 2)
        for optimizer, own in ((other, fresh), copied):
            steps(optimizer, own, 2, 2)
            assert_bitwise(state_of(optimizer), state_of(ours))


# ------------------------------------------------------------------------------------------------------- values of a state
@pytest.mark.parametrize("name,value,message", (
    ("step", torch.tensor(math.nan), "step: expected a whole number from 0 to 2^24, got nan"),
    ("step", torch.tensor(-1.0), "step: expected a whole number from 0 to 2^24, got -1.0"),
    ("step", -1, "step: expected a whole number from 0 to 2^24, got -1"),
    ("step", torch.tensor(2.5), "step: expected a whole number from 0 to 2^24, got 2.5"),
    ("step", torch.tensor(2.0**25), "step: expected a whole number from 0 to 2^24, got 33554432.0"),
    ("step", torch.ones(2), r"step: expected one number, a whole number from 0 to 2^24, got [2]"),
    ("step", torch.tensor(True), "step: expected a real number, a whole number from 0 to 2^24, got torch.bool"),
    ("exp_avg_sq", -torch.ones(7, 5), "exp_avg_sq: expected numbers >= 0, got -1.0"),
    ("exp_avg_sq", torch.full((7, 5), math.nan), "exp_avg_sq: expected numbers >= 0, got nan"),
    ("exp_avg", torch.full((7, 5), math.nan), "exp_avg: expected numbers, got nan"),
    ("exp_avg", torch.ones(7, 5, dtype=torch.int32), "exp_avg: expected a tensor of real numbers, got torch.int32"),
    ("exp_avg", 3.0, "exp_avg: expected a tensor of real numbers, got float")), ids=str)
def test_values_that_no_state_has(name, value, message):
    params = parameters()
    optimizer = ik.FusedAdamW(params)
    steps(optimizer, params, 2)
    before, wrong = state_of(optimizer), copy.deepcopy(optimizer.state_dict())
    wrong["state"][0][name] = value
    with pytest.raises((ValueError, TypeError)) as caught:
        optimizer.load_state_dict(wrong)
    assert str(caught.value) == f"FusedAdamW: state_dict: {message}"
    assert isinstance(caught.value, TypeError if "real" in message else ValueError)
    assert_bitwise(state_of(optimizer), before)


def test_steps_of_one_element_or_plain_numbers():
    params = parameters()
    optimizer = ik.FusedAdamW(params)
    steps(optimizer, params, 2)
    for step in (2, 2.0, torch.tensor([2.0]), torch.tensor(2)):
        saved = copy.deepcopy(optimizer.state_dict())
        saved["state"][0]["step"] = step
        optimizer.load_state_dict(saved)
        got = optimizer.state[params[0]]["step"]
        assert got.shape == () and got.dtype == torch.float32 and got == 2


def test_how_many_steps_were_skipped_is_kept_by_groups_too():
    """The number of skipped steps is stored in the parameter groups too, since distributed checkpoints and PyTorch's AdamW pass
    on groups and per-parameter state only. A count of 0 is not stored.
    """
    params = parameters()
    optimizer = ik.FusedAdamW(in_groups(params, lr=0.1))
    steps(optimizer, params, 1)
    assert "skipped" not in optimizer.state_dict()["param_groups"][0]
    params[0].grad[0] = math.nan
    optimizer.step()
    saved = optimizer.state_dict()
    assert saved["param_groups"][0]["skipped"] == 1 and "skipped" not in optimizer.param_groups[0]
    theirs = torch.optim.AdamW(in_groups(params))
    theirs.load_state_dict(copy.deepcopy(saved))
    for partial in ({name: saved[name] for name in ("state", "param_groups")}, theirs.state_dict()):
        other = ik.FusedAdamW(in_groups(params))
        other.load_state_dict(copy.deepcopy(partial))
        assert int(other.skipped) == 1 and not any("skipped" in group for group in other.param_groups)
    for wrong in (-1, math.nan, torch.zeros(2)):
        with pytest.raises(ValueError, match="FusedAdamW: state_dict: skipped: expected"):
            other.load_state_dict({**saved, "skipped": wrong})
    assert int(other.skipped) == 1
