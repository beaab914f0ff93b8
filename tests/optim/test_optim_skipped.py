"""Steps of FusedAdamW that change nothing: gradients and learning rates that are not finite, scaled losses, wrong numbers."""

import math

import pytest
import torch
from optim_runs import BACKENDS, close, draw_gradients, in_groups, parameters, state_of, steps
from shared import assert_bitwise

import internlm2_kernels as ik


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", (math.nan, math.inf, -math.inf))
def test_a_gradient_that_is_not_finite_changes_nothing(backend, poison):
    params = parameters(torch.bfloat16)
    optimizer = ik.FusedAdamW(in_groups(params, lr=0.1), max_grad_norm=1.0, backend=backend)
    steps(optimizer, params, 1)
    before, weights = state_of(optimizer), [p.detach().clone() for p in params]
    draw_gradients(params, 1)
    params[3].grad[1, 2, 3] = poison
    optimizer.step()
    assert_bitwise(state_of(optimizer), before)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
    assert int(optimizer.skipped) == 1 and not optimizer.grad_norm.isfinite()
    steps(optimizer, params, 1, 2)
    assert int(optimizer.skipped) == 1 and not torch.equal(params[0], weights[0])
    assert int(optimizer.state_dict()["skipped"]) == 1
    other = ik.FusedAdamW(in_groups(parameters(torch.bfloat16), lr=0.1), max_grad_norm=1.0, backend=backend)
    other.load_state_dict(optimizer.state_dict())
    assert int(other.skipped) == 1


@pytest.mark.parametrize("backend", ("reference", "cpp"))
@pytest.mark.parametrize("max_grad_norm", (None, 0.7))
@pytest.mark.parametrize("unscaled", (False, True))
def test_grad_scaler(backend, max_grad_norm, unscaled):
    """With torch's GradScaler, scaled gradients give the step of the unscaled ones. An infinite gradient lowers the scale, and
    the step is skipped.
    """
    ours, theirs = parameters(shapes=((7, 5), (9,))), parameters(shapes=((7, 5), (9,)))
    a, b = (ik.FusedAdamW(p, lr=0.01, max_grad_norm=max_grad_norm, backend=backend) for p in (ours, theirs))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1000)
    for seed in range(4):
        draw_gradients(theirs, seed)
        b.step()
        scaler.scale(torch.zeros((), requires_grad=True))  # the scaler creates its scale with the first loss
        draw_gradients(ours, seed)
        for p in ours:
            p.grad *= scaler.get_scale()
        if unscaled:
            scaler.unscale_(a)
        scaler.step(a)
        scaler.update()
        if max_grad_norm:
            torch.testing.assert_close(a.grad_norm, b.grad_norm, rtol=1e-6, atol=0)
    close(ours, theirs)
    weights = [p.detach().clone() for p in ours]
    ours[0].grad[0, 0] = math.inf
    scaler.step(a)
    scaler.update()
    assert scaler.get_scale() == 512 and int(a.skipped) == 1
    assert all(torch.equal(p, w) for p, w in zip(ours, weights, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_clipping_too_unless_asked_for(backend):
    """A step whose gradient norm is not finite is skipped, also without clipping. With skip_nonfinite=False NaN reaches the
    weights, as in PyTorch's AdamW.
    """
    for skip in (True, False):
        params = parameters(torch.bfloat16)
        optimizer = ik.FusedAdamW(params, lr=0.1, backend=backend, skip_nonfinite=skip)
        draw_gradients(params, 1)
        wanted = torch.stack([p.grad.float().square().sum() for p in params]).sum().sqrt()
        optimizer.step()
        if skip:
            torch.testing.assert_close(optimizer.grad_norm, wanted)
        before = [p.detach().clone() for p in params]
        params[0].grad[0, 0] = math.nan
        optimizer.step()
        assert (int(optimizer.skipped), bool(params[0].isnan().any())) == ((1, False) if skip else (0, True))
        assert (optimizer.grad_norm is None) == (not skip)
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True)) == skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("poison", (math.nan, math.inf))
@pytest.mark.parametrize("which", (0, 1))
def test_a_learning_rate_on_the_device_that_is_not_finite_skips_all_groups(backend, poison, which):
    params = parameters()
    optimizer = ik.FusedAdamW(in_groups(params, lr=torch.tensor(0.1)), lr=torch.tensor(0.2), backend=backend)
    steps(optimizer, params, 1)
    before, weights = state_of(optimizer), [p.detach().clone() for p in params]
    for skipped, broken in ((1, optimizer), (1, ik.FusedAdamW(params[:1], lr=torch.tensor(0.1), backend=backend))):
        group = broken.param_groups[which if broken is optimizer else 0]
        good = group["lr"].clone()
        group["lr"].fill_(poison)
        steps(broken, params, 1, 1)
        assert int(broken.skipped) == skipped
        assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
        group["lr"].copy_(good)
    assert_bitwise(state_of(optimizer), before)
    steps(optimizer, params, 1, 1)
    assert int(optimizer.skipped) == 1 and not torch.equal(params[3], weights[3])


@pytest.mark.parametrize("key,value", (("lr", math.nan), ("lr", -1.0), ("lr", 1e39), ("betas", (1.0, 0.9)), ("eps", 0.0),
                                       ("eps", 1e-60), ("weight_decay", math.inf), ("maximize", "x")), ids=str)
def test_numbers_that_went_wrong_after_construction(key, value):
    """A step with an invalid number in the second group raises an error before it has changed any parameter, those of the first
    group included.
    """
    params = parameters()
    optimizer = ik.FusedAdamW(in_groups(params, lr=0.1))
    steps(optimizer, params, 1)
    before, weights = state_of(optimizer), [p.detach().clone() for p in params]
    optimizer.param_groups[1][key] = value
    with pytest.raises((ValueError, TypeError), match=f"FusedAdamW: {key}: expected"):
        optimizer.step()
    assert_bitwise(state_of(optimizer), before)
    assert all(torch.equal(p, w) for p, w in zip(params, weights, strict=True))
