"""What is special to the reward model's losses: gradients by hand, the barrier's continuation beyond its edge, packed
sequences.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from shared import Recorder, assert_bitwise

import internlm2_kernels as ik

BACKENDS = ("reference", "cpp", "triton")
NATIVE = ("cpp", "triton")
EDGE = 5 - 1e-3


def wide(backend):
    """The widest dtype of the backend, and the tolerance of its results."""
    return (torch.float32, 2e-6) if backend == "triton" else (torch.float64, 1e-13)


def slope(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    return y.detach(), torch.autograd.grad(y.sum(), x)[0]


# ---------------------------------------------------------------------------------------------------- focal ranking
def focal_by_hand(d, gamma):
    """The focal ranking loss and its derivative at one difference d of rewards, chosen minus rejected."""
    s, softplus = 1 / (1 + math.exp(d)), max(-d, 0) + math.log1p(math.exp(-abs(d)))
    if d <= 0:
        return softplus, -s
    return (2 * s) ** gamma * softplus, -((2 * s) ** gamma) * (s + gamma * (1 - s) * softplus)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", (0.0, 0.5, 1.0, 2.0, 3.7))
def test_focal_gradient_by_hand(backend, gamma):
    dtype, tolerance = wide(backend)
    d = torch.tensor([-30.0, -3.0, -1e-3, 0.0, 1e-3, 0.5, 2.0, 9.0, 20.0], dtype=dtype)
    rejected = torch.full_like(d, 0.25)
    got, gradient = slope(lambda x: ik.focal_ranking_loss(x, rejected, gamma=gamma, backend=backend), d + 0.25)
    _, other = slope(lambda x: ik.focal_ranking_loss(d + 0.25, x, gamma=gamma, backend=backend), rejected)
    exact = [focal_by_hand(float(x), gamma) for x in (d + 0.25).double() - 0.25]
    loss, slopes = (torch.tensor(x, dtype=torch.float64) for x in zip(*exact, strict=True))
    torch.testing.assert_close(got.double(), loss, rtol=4 * tolerance, atol=tolerance / 10)
    torch.testing.assert_close(gradient.double(), slopes, rtol=4 * tolerance, atol=tolerance / 10)
    assert torch.equal(other, -gradient)


@pytest.mark.parametrize("backend", BACKENDS)
def test_focal_gradient_goes_through_the_weight(backend):
    """The gradient is -1/2 at 0, where a head initialised with zeros starts, and -0.552 at 0.5; with a detached weight it would
    be -0.215.
    """
    dtype, _ = wide(backend)
    _, gradient = slope(lambda x: ik.focal_ranking_loss(x, torch.zeros_like(x), backend=backend),
                        torch.tensor([0.0, 0.5], dtype=dtype))
    assert gradient[0] == -0.5
    assert float(gradient[1]) == pytest.approx(-0.552, abs=5e-4)
    s = torch.sigmoid(torch.tensor(-0.5))
    assert -((2 * s) ** 2 * s) == pytest.approx(-0.215, abs=5e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma", (0.5, 2.0))
def test_focal_far_out(backend, gamma):
    d = torch.tensor([-1e30, -200.0, 200.0, 1e30])
    loss, gradient = slope(lambda x: ik.focal_ranking_loss(x, torch.zeros(4), gamma=gamma, backend=backend), d)
    torch.testing.assert_close(loss, torch.tensor([1e30, 200.0, 0.0, 0.0]))
    torch.testing.assert_close(gradient, torch.tensor([-1.0, -1.0, 0.0, 0.0]))


# ---------------------------------------------------------------------------------------------------------- barrier
@pytest.mark.parametrize("backend", BACKENDS)
def test_barrier_by_hand_and_its_continuation(backend):
    """Beyond bound - margin the log barrier continues as a straight line: value and slope are continuous at both edges, and
    exactly at an edge the derivative is that of one branch, not the sum of both.
    """
    dtype, tolerance = wide(backend)
    inside = torch.tensor([0.0, 1.5, -4.9, 4.99], dtype=dtype)
    value, gradient = slope(lambda x: ik.log_barrier_penalty(x, backend=backend), inside)
    x = inside.double()
    torch.testing.assert_close(value.double(), -((x + 5).log() + (5 - x).log()), rtol=tolerance, atol=4 * tolerance)
    torch.testing.assert_close(gradient.double(), 1 / (5 - x) - 1 / (5 + x), rtol=4 * tolerance, atol=tolerance)
    assert float(value[0]) == pytest.approx(-2 * math.log(5))
    at, steep = -(math.log(EDGE + 5) + math.log(5 - EDGE)), 1 / (5 - EDGE) - 1 / (5 + EDGE)
    x = torch.tensor([EDGE, EDGE + 1e-3, 5.0, 7.0, 40.0], dtype=dtype)
    x = torch.cat((x, -x))
    value, gradient = slope(lambda x: ik.log_barrier_penalty(x, backend=backend), x)
    beyond = torch.tensor(at, dtype=torch.float64) + steep * (x.double().abs() - EDGE)
    torch.testing.assert_close(value.double(), beyond, rtol=1e-5 if backend == "triton" else 1e-12,
                               atol=2e-4 if backend == "triton" else 1e-10)
    near = 2e-4 if backend == "triton" else 1e-10
    torch.testing.assert_close(gradient.double(), steep * x.double().sign(), rtol=near, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_barrier_of_anything(backend):
    x = torch.tensor([1e30, -1e30, math.inf, -math.inf, 3e38])
    value, gradient = slope(lambda x: ik.log_barrier_penalty(x, backend=backend), x)
    assert not value.isnan().any() and (value > 1e30).all() and value[2:4].isinf().all()
    torch.testing.assert_close(gradient, x.sign() * gradient[0], rtol=1e-5, atol=0)
    assert 990 < gradient[0] < 1010
    value, gradient = slope(lambda x: ik.log_barrier_penalty(x, outside="clamp", backend=backend), x)
    torch.testing.assert_close(value, torch.full((5,), -(math.log(EDGE + 5) + math.log(5 - EDGE))), rtol=1e-4, atol=1e-4)
    assert not gradient.any()
    assert ik.log_barrier_penalty(torch.tensor([math.nan]), backend=backend).isnan().all()


@pytest.mark.parametrize("outside", ("linear", "clamp"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_margin_is_absolute(backend, outside):
    """The margin is a distance (1e-3, as in XTuner, which clamps to bound - 1e-3), not a fraction of the bound: 4.9989 lies
    inside, with penalty 4.510 and slope 909. Outside, at 5.5, "clamp" has no gradient.
    """
    x = torch.tensor([4.9989, -4.9989, 5.5])
    value, gradient = slope(lambda x: ik.log_barrier_penalty(x, outside=outside, backend=backend), x)
    torch.testing.assert_close(value[:2], torch.tensor([4.510, 4.510]), rtol=0, atol=1e-3)
    torch.testing.assert_close(gradient[:2], torch.tensor([909.0, -909.0]), rtol=1e-3, atol=0)
    beyond = -math.log(9.999) - math.log(1e-3) + (outside == "linear") * (1000 - 1 / 9.999) * 0.501
    assert float(value[2]) == pytest.approx(beyond, rel=1e-5)
    assert float(gradient[2]) == pytest.approx((outside == "linear") * (1000 - 1 / 9.999), rel=1e-5)
    loss, _ = ik.reward_loss_from_last(torch.tensor([[4.9989], [-4.9989]]), torch.ones(1), penalty_weight=1e3, backend=backend)
    assert float(loss) == pytest.approx(4510, rel=1e-3)


# ------------------------------------------------------------------------------------------------------ reward loss
def packed(generator, lengths=(3, 1, 5, 2), cols=24, dtype=torch.float32, scale=1.0):
    """hidden and head, which require gradients, cu_seqlens, and the last row of each sequence."""
    cu = torch.tensor([0, *lengths]).cumsum(0)
    hidden = torch.randn(int(cu[-1]), cols, generator=generator).to(dtype).requires_grad_()
    head = (scale * torch.randn(cols, generator=generator) * cols**-0.5).to(dtype).requires_grad_()
    return hidden, head, cu.to(torch.int32), cu[1:] - 1


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_to_the_published_form_where_both_are_defined(backend, generator):
    """Rewards inside the bound give the loss of XTuner's published code: clamped logits, -logsigmoid times the focal weight,
    plus 0.01 times the sum of penalties over the pairs.
    """
    dtype, tolerance = wide(backend)
    hidden, head, cu, last = packed(generator, dtype=dtype, scale=2.0)
    loss, rewards = ik.reward_loss(hidden, head, cu, backend=backend)
    assert rewards.abs().max() < EDGE
    logits = (hidden[last].double() @ head.double()).clamp(-5 + 1e-3, 5 - 1e-3)
    chosen, rejected = logits[0::2], logits[1::2]
    probability = torch.sigmoid(chosen - rejected)
    ranking = (-F.logsigmoid(chosen - rejected) * (1 - 2 * F.relu(probability - 0.5)) ** 2).sum() / len(chosen)
    penalty = sum((-(torch.log(x + 5) + torch.log(5 - x))).sum() for x in (chosen, rejected)) / len(chosen)
    published = ranking + 0.01 * penalty
    got, want = (torch.autograd.grad(x, (hidden, head)) for x in (loss, published))
    torch.testing.assert_close(loss.double(), published, rtol=8 * tolerance, atol=tolerance)
    for ours, theirs in zip(got, want, strict=True):
        torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=16 * tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_last_rows_have_gradients(backend, generator):
    hidden, head, cu, last = packed(generator)
    rest = torch.ones(hidden.shape[0], dtype=torch.bool)
    rest[last] = False
    with torch.no_grad():
        hidden[rest] = math.nan  # no other row is read
    gathered = hidden.detach()[last].requires_grad_()
    upstream = torch.tensor(0.7), torch.randn(4, generator=generator)
    got = torch.autograd.grad(ik.reward_loss(hidden, head, cu, backend=backend), (hidden, head), upstream)
    want = torch.autograd.grad(ik.reward_loss_from_last(gathered, head, backend=backend), (gathered, head), upstream)
    assert not got[0][rest].any()
    assert_bitwise({"last": got[0][last], "head": got[1]}, {"last": want[0], "head": want[1]})
    row = head.detach()[None].requires_grad_()
    (turned,) = torch.autograd.grad(ik.reward_loss(hidden, row, cu, backend=backend), row, upstream)
    assert torch.equal(turned[0], got[1])


@pytest.mark.parametrize("backend", NATIVE)
def test_one_registered_call_each_way_and_no_more_work_than_asked(backend, generator):
    hidden, head, cu, last = packed(generator)
    for op, call in (("reward_loss", lambda: ik.reward_loss(hidden, head, cu, backend=backend)[0]),
                     ("reward_loss_from_last", lambda: ik.reward_loss_from_last(hidden[last], head, backend=backend)[0])):
        for frozen, needs in ((None, (True, True)), (hidden, (False, True)), (head, (True, False))):
            if frozen is not None:
                frozen.requires_grad_(False)
            with Recorder() as recorder:
                call().backward()
            calls = [(f, args) for f, args in recorder.calls if f.namespace == "internlm2"]
            assert [f._schema.name for f, _ in calls] == [f"internlm2::{op}_fwd", f"internlm2::{op}_bwd"]
            func, args = calls[1]
            assert args[-2:] == needs and [g.numel() > 0 for g in func(*args)] == list(needs)
            for leaf in (hidden, head):
                leaf.requires_grad_()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_head_far_outside_comes_back(backend, generator):
    """Rewards of 40 are inside the bound after at most 200 steps of AdamW at learning rate 1e-2, and stay there."""
    hidden = torch.randn(1, 48, generator=generator) + 0.3 * torch.randn(16, 48, generator=generator)  # much in common
    head = torch.nn.Parameter(torch.linalg.lstsq(hidden, torch.full((16, 1), 40.0)).solution[:, 0])
    optimizer = ik.FusedAdamW([head], lr=1e-2, weight_decay=0.0, backend=backend if backend != "triton" else None)
    rewards, largest = None, []
    for _ in range(20 if backend == "triton" else 260):
        loss, rewards = ik.reward_loss_from_last(hidden, head, backend=backend)
        assert loss.isfinite()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        largest.append(float(rewards.detach().abs().max()))
    assert largest[0] == pytest.approx(40, rel=1e-3)
    if backend == "triton":  # the interpreter is slow: it suffices that the rewards fall
        assert largest[-1] < 36
    else:
        assert max(largest[200:]) < 5, largest[::20]


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_sequences(backend):
    hidden, head = torch.zeros(0, 8, requires_grad=True), torch.ones(8, requires_grad=True)
    for loss, rewards in (ik.reward_loss(hidden, head, torch.zeros(1, dtype=torch.int32), backend=backend),
                          ik.reward_loss_from_last(hidden, head, backend=backend)):
        head.grad = None
        loss.backward()
        assert loss == 0 and rewards.shape == (0,) and not head.grad.any()


@pytest.mark.parametrize("backend", NATIVE)
def test_compiled_with_a_float32_head(backend, generator):
    """bfloat16 hidden states with a float32 head compile with fullgraph=True, with the bits of the eager call and a float32
    gradient for the head.
    """
    hidden, head, cu, _ = packed(generator, dtype=torch.bfloat16)
    head = head.detach().float().requires_grad_()
    call = lambda: ik.reward_loss(hidden, head, cu, backend=backend)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = []
    for function in (call, compiled):
        loss, rewards = function()
        results.append((loss.detach(), rewards.detach(), *torch.autograd.grad(loss + rewards.sum(), (hidden, head))))
    assert_bitwise(*(dict(enumerate(r)) for r in results))
    assert results[0][3].dtype == torch.float32 and results[0][2].dtype == torch.bfloat16
