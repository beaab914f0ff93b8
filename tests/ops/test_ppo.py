"""What is special to the PPO operators: comparison with a plain loop, masks over NaN, branches of the clipping, statistics."""

import math

import parameters
import pytest
import torch
from shared import Recorder, assert_bitwise

import internlm2_kernels as ik

BACKENDS = ("reference", "cpp", "triton")
NATIVE = ("cpp", "triton")
NAN = math.nan


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    parameters.small_tiles(monkeypatch)


def wide(backend):
    return (torch.float32, 2e-5) if backend == "triton" else (torch.float64, 1e-13)


def loop(rewards, values, lengths, mask, bootstrap, gamma, lam):
    """Generalised advantage estimation as a plain loop over Python numbers."""
    advantages, begin = [], 0
    for length, last in zip(lengths, bootstrap, strict=True):
        carried, following, passed = 0.0, last, []
        for t in reversed(range(begin, begin + length)):
            if mask[t]:
                carried = rewards[t] + gamma * following - values[t] + gamma * lam * carried
                following = values[t]
            passed.append(carried)
        advantages += passed[::-1]
        begin += length
    return torch.tensor(advantages, dtype=torch.float64)


# -------------------------------------------------------------------------------------------------------------- gae
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("gamma,lam", ((1.0, 0.99), (0.9, 0.8), (1.0, 1.0), (0.0, 0.5), (0.99, 0.0)))
def test_gae_is_the_loop(backend, gamma, lam, generator):
    dtype, tolerance = wide(backend)
    lengths = (5, 0, 1, 130, 17, 0)
    total = sum(lengths)
    draw = lambda n: torch.randn(n, generator=generator, dtype=torch.float64).to(dtype)
    rewards, values, bootstrap = draw(total), draw(total), draw(len(lengths))
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    mask = torch.rand(total, generator=generator) > 0.4
    mask[5:] |= torch.arange(total - 5) % 7 == 0
    options = ((None, None), (mask, None), (None, bootstrap), (mask, bootstrap), (mask.double(), bootstrap))
    for counts, last in options[3:4] if backend == "triton" else options:  # Triton's interpreter takes two seconds a call
        want = loop(rewards.tolist(), values.tolist(), lengths, [True] * total if counts is None else counts.tolist(),
                    [0.0] * len(lengths) if last is None else last.tolist(), gamma, lam)
        advantages, returns = ik.gae(rewards, values, cu, mask=counts, bootstrap=last, gamma=gamma, lam=lam, backend=backend)
        torch.testing.assert_close(advantages.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(returns.double(), want + values.double(), rtol=tolerance, atol=tolerance)
        assert not advantages.requires_grad and advantages.dtype == dtype


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_looks_at_nothing_that_is_masked(backend, generator):
    rewards, values = torch.randn(2, 40, generator=generator)
    mask = torch.rand(40, generator=generator) > 0.5
    cu = torch.tensor([0, 12, 40], dtype=torch.int32)
    want, _ = ik.gae(rewards, values, cu, mask=mask, backend=backend)
    got, _ = ik.gae(rewards.masked_fill(~mask, NAN), values.masked_fill(~mask, NAN), cu, mask=mask, backend=backend)
    assert_bitwise({"advantages": got}, {"advantages": want})
    assert want.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_gae_of_a_sequence_has_its_bits_beside_any_other(backend, generator):
    rewards, values = torch.randn(2, 300, generator=generator)
    mask = torch.rand(300, generator=generator) > 0.2
    bounds = [0, 3, 3, 170, 171, 300]
    whole = ik.gae(rewards, values, torch.tensor(bounds, dtype=torch.int32), mask=mask, backend=backend)
    for begin, end in zip(bounds, bounds[1:], strict=False):
        part = slice(begin, end)
        alone = ik.gae(rewards[part], values[part], torch.tensor([0, end - begin], dtype=torch.int32), mask=mask[part],
                       backend=backend)
        assert_bitwise(dict(enumerate(alone)), dict(enumerate(t[part] for t in whole)))


# ------------------------------------------------------------------------------------------------------ policy loss
@pytest.mark.parametrize("backend", BACKENDS)
def test_policy_branches_by_hand(backend):
    """The policy loss has no gradient where the clipped term is the smaller one, the whole gradient where both terms are equal,
    and none where the log-ratio exceeds 20.
    """
    dtype, tolerance = wide(backend)
    ratios = [1.0, 1.1, 1.5, 1.5, 0.5, 0.5, 0.9]
    advantages = [2.0, 2.0, 2.0, -2.0, 2.0, -2.0, -1.0]
    clipped = [False, False, True, False, False, True, False]
    logprobs = torch.tensor([math.log(r) for r in ratios] + [25.0, -25.0], dtype=dtype, requires_grad=True)
    old = torch.zeros(9, dtype=dtype)
    a = torch.tensor(advantages + [-1.0, 1.0], dtype=dtype)
    mask = torch.ones(9, dtype=torch.bool)
    loss, stats = ik.ppo_policy_loss(logprobs, old, a, mask, backend=backend)
    terms = [min(r * x, min(max(r, 0.8), 1.2) * x) for r, x in zip(ratios, advantages, strict=True)]
    terms += [-math.exp(20), math.exp(-20)]
    torch.testing.assert_close(loss.double(), torch.tensor(-sum(terms) / 9, dtype=torch.float64), rtol=tolerance, atol=0)
    assert float(stats["clip_fraction"]) == pytest.approx(sum(clipped) / 9)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    want = [0.0 if c else -r * x / 9 for r, x, c in zip(ratios, advantages, clipped, strict=True)] + [0.0, 0.0]
    torch.testing.assert_close(gradient.double(), torch.tensor(want, dtype=torch.float64), rtol=tolerance, atol=1e-15)


@pytest.mark.parametrize("backend", BACKENDS)
def test_approximate_kl_near_the_old_policy(backend):
    """approx_kl is about x^2 / 2 for a log-ratio of x = 1e-4, where exp(x) - 1 - x in float32 would be nothing but rounding."""
    x = torch.full((64,), 1e-4)
    x[1::2] *= -1
    _, stats = ik.ppo_policy_loss(x, torch.zeros(64), torch.ones(64), torch.ones(64), backend=backend)
    assert float(stats["approx_kl"]) == pytest.approx(5e-9, rel=1e-3 if backend == "cpp" else 2e-2)
    assert stats["clip_fraction"] == 0


def policy(backend, mask, *tensors):
    return ik.ppo_policy_loss(*tensors, mask, clip=0.1, backend=backend)


def value(backend, mask, *tensors):
    return ik.ppo_value_loss(*tensors, mask, clip=0.1, backend=backend)


@pytest.mark.parametrize("loss", (policy, value))
@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_masked_has_no_influence(loss, backend, generator):
    """Whatever masked elements hold (NaN, infinity), loss and gradients are those of the unmasked elements, whose mean the loss
    is.
    """
    mask = torch.rand(4, 50, generator=generator) > 0.4
    tensors = [torch.randn(4, 50, generator=generator) for _ in range(3)]
    results = []
    for filled in (None, NAN, math.inf, -1e30):
        inputs = [t if filled is None else t.masked_fill(~mask, filled) for t in tensors]
        inputs[0] = inputs[0].clone().requires_grad_()
        total, stats = loss(backend, mask, *inputs)
        (gradient,) = torch.autograd.grad(total, inputs[0])
        assert not gradient[~mask].any() and gradient.isfinite().all()
        results.append({"loss": total.detach(), "gradient": gradient, **stats})
    for other in results[1:]:
        assert_bitwise(other, results[0])
    alone = [t[mask] for t in tensors]
    total, stats = loss(backend, torch.ones(len(alone[0])), *alone)
    torch.testing.assert_close(total, results[0]["loss"], rtol=1e-5, atol=1e-6)
    for name, stat in stats.items():
        torch.testing.assert_close(stat, results[0][name], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("loss", (policy, value))
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (0, 33))
def test_nothing_counts(loss, backend, size):
    inputs = [torch.full((size,), NAN) for _ in range(3)]
    inputs[0].requires_grad_()
    total, stats = loss(backend, torch.zeros(size, dtype=torch.bool), *inputs)
    (gradient,) = torch.autograd.grad(total, inputs[0])
    assert total == 0 and not gradient.any() and all(stat == 0 for stat in stats.values())


# ------------------------------------------------------------------------------------------------------- value loss
@pytest.mark.parametrize("backend", BACKENDS)
def test_value_loss_by_hand(backend):
    """Without a clip the value loss is half the mean square error. With a clip it is the larger of the clipped and the
    unclipped term, without a gradient where the clipped term is the larger.
    """
    values = torch.tensor([1.0, 1.0, 3.0, -2.0], requires_grad=True)
    old, returns = torch.tensor([1.0, 0.0, 0.0, 0.0]), torch.tensor([2.0, 3.0, 5.0, -3.0])
    mask = torch.ones(4)
    loss, stats = ik.ppo_value_loss(values, old, returns, mask, backend=backend)
    assert loss.item() == pytest.approx(0.5 * (1 + 4 + 4 + 1) / 4) and stats["clip_fraction"] == 0
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([-0.25, -0.5, -0.5, 0.25])
    loss, stats = ik.ppo_value_loss(values, old, returns, mask, clip=0.5, backend=backend)
    assert loss.item() == pytest.approx(0.5 * (1 + 6.25 + 20.25 + 6.25) / 4) and stats["clip_fraction"] == 0.75
    assert torch.autograd.grad(loss, values)[0].tolist() == pytest.approx([-0.25, 0.0, 0.0, 0.0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_explained_variance(backend, generator):
    returns = torch.randn(5000, generator=generator) + 1000.0  # a variance by sums of squares would lose all digits
    values = returns + 0.5 * torch.randn(5000, generator=generator)
    mask = torch.rand(5000, generator=generator) > 0.1
    _, stats = ik.ppo_value_loss(values, values, returns, mask, backend=backend)
    r, v = returns[mask].double(), values[mask].double()
    want = 1 - (r - v).var(correction=0) / r.var(correction=0)
    assert float(stats["explained_variance"]) == pytest.approx(float(want), rel=1e-4)
    _, stats = ik.ppo_value_loss(returns, values, returns, mask, backend=backend)
    assert stats["explained_variance"] == 1


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("tokens", (1, 7, 5000, 20000))
def test_explained_variance_of_constant_returns(tokens, backend, generator):
    """The explained variance of constant returns is 0, although the mean of many 0.1 is not exactly 0.1. With a single
    different return it is not 0.
    """
    values = torch.randn(tokens, generator=generator)
    mask = torch.rand(tokens, generator=generator) > 0.1
    mask[0] = True
    explained = lambda r: float(ik.ppo_value_loss(values, values, r, mask, backend=backend)[1]["explained_variance"])
    for constant in (0.0, 7.0, 0.1, -1 / 3, 1e6 + 0.3, 1e-20, -1e-42):
        returns = torch.where(mask, constant, 5.0)  # what is masked is another number
        assert explained(returns) == 0, constant
    if tokens > 1:
        last = int(mask.nonzero()[-1])
        for other in (0.2, -math.inf, math.nan):
            returns = torch.full((tokens,), 0.1)
            returns[last] = other
            got = explained(returns)
            assert got < -1 if other == 0.2 else math.isnan(got), (other, got)
        tiny = torch.full((tokens,), 1e-30)
        tiny[last] = 2e-30
        assert explained(tiny) == 0  # float32, in which it is computed, has no number as small as their variance but 0
    assert math.isnan(explained(torch.full((tokens,), math.inf)))
    mask.zero_()
    assert explained(values) == 0


# -------------------------------------------------------------------------------------------------------------- KL
@pytest.mark.parametrize("backend", BACKENDS)
def test_k3_near_equality(backend):
    """For small x the k3 estimate is about x^2 / 2 and its slope about x. Both keep float32's precision, which a difference of
    numbers near 1 would lose.
    """
    x = torch.tensor([1e-5, -1e-5, 3e-4, -3e-4, 1e-2], requires_grad=True)
    kl = ik.kl_penalty(x, torch.zeros(5), estimator="k3", backend=backend)
    exact = torch.expm1(-x.detach().double()) + x.detach().double()
    (gradient,) = torch.autograd.grad(kl.sum(), x)
    precise = backend != "reference"  # PyTorch's expm1(-x) + x in float32 does cancel
    torch.testing.assert_close(kl.detach().double(), exact, rtol=1e-4, atol=0 if precise else 1e-9)
    torch.testing.assert_close(gradient.double(), -torch.expm1(-x.detach().double()), rtol=1e-5, atol=0 if precise else 1e-7)


@pytest.mark.parametrize("estimator", ("k1", "k2", "k3"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_tokens_have_no_influence_on_kl(backend, estimator, generator):
    """Padding and its upstream gradient may hold anything: kl and both gradients are 0 there and unchanged elsewhere."""
    mask = torch.tensor([True, False] * 20)
    results = []
    for padding in ((0.0, 0.0), (-math.inf, -200.0), (-200.0, 0.0), (math.nan, -math.inf)):
        generator.manual_seed(0)
        pair = [torch.randn(40, generator=generator) - 2 for _ in padding]
        pair = [torch.where(mask, x, hole).requires_grad_() for x, hole in zip(pair, padding, strict=True)]
        kl = ik.kl_penalty(*pair, mask=mask, estimator=estimator, backend=backend)
        upstream = torch.where(mask, 1.5, 0.0 if padding[0] == 0 else math.inf)
        results.append((kl.detach(), *torch.autograd.grad(kl, pair, upstream)))
        assert not any(x[~mask].any() for x in results[-1]), padding  # `any` also finds NaN
        assert_bitwise(dict(enumerate(results[-1])), dict(enumerate(results[0])), str(padding))
    free = [torch.where(mask, x.detach(), 0.0).requires_grad_() for x in pair]
    assert torch.equal(ik.kl_penalty(*free, estimator=estimator, backend=backend)[mask], kl[mask])
    as_numbers = ik.kl_penalty(*pair, mask=mask.float() * 3, estimator=estimator, backend=backend)
    assert torch.equal(as_numbers, kl)


@pytest.mark.parametrize("backend", NATIVE)
def test_one_registered_call_each_way_and_compiled(backend, generator):
    """One registered call returns loss and statistics. Compiled with fullgraph=True, the function, which returns a dictionary
    too, gives the same bits.
    """
    a, b, c = (torch.randn(40, generator=generator).requires_grad_() for _ in range(3))
    mask = torch.rand(40, generator=generator) > 0.3
    losses = {"ppo_policy_loss": lambda: ik.ppo_policy_loss(a, b, c, mask, backend=backend),
              "ppo_value_loss": lambda: ik.ppo_value_loss(a, b, c, mask, clip=0.2, backend=backend),
              "kl_penalty": lambda: (ik.kl_penalty(a, b, mask=mask, estimator="k3", backend=backend).sum(), {})}
    for name, call in losses.items():
        torch._dynamo.reset()
        results = []
        with Recorder() as recorder:
            call()[0].backward()
        calls = [f._schema.name for f, _ in recorder.calls if f.namespace == "internlm2"]
        assert calls == [f"internlm2::{name}_fwd", f"internlm2::{name}_bwd"]
        for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager")):
            loss, stats = function()
            gradients = torch.autograd.grad(loss, (a, b, c), allow_unused=True)
            assert (gradients[1] is not None) == (name == "kl_penalty") and gradients[2] is None  # targets take no gradient
            assert not any(stat.requires_grad for stat in stats.values())
            results.append({"loss": loss.detach(), "gradient": gradients[0], **stats})
        assert_bitwise(results[1], results[0], name)
