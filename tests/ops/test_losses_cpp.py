"""What the shared checks do not cover of the C++ losses and optimizer: random bits, long runs, whole ranges, errors."""

import math

import numpy as np
import pytest
import torch
from shared import instruction_set

import internlm2_kernels as ik
from internlm2_kernels import OPS

STEP = OPS["adamw"].overloads["step_"]["cpp"]
SIZES = (1, 7, 64, 1000, 0, 70001)


@pytest.fixture(params=("avx2", "avx512"))
def isa(request):
    with instruction_set(request.param):
        yield request.param


# -------------------------------------------------------------------------------------------------------- random bits
def philox(counter, key):
    """Philox4x32-10 in NumPy, written from the paper: counter [4, n] and a key of two words give words [4, n]."""
    c, k, mask = [np.asarray(word, np.uint64) for word in counter], list(key), np.uint64(0xFFFFFFFF)
    for _ in range(10):
        a, b = c[0] * np.uint64(0xD2511F53), c[2] * np.uint64(0xCD9E8D57)
        c = [(b >> np.uint64(32)) ^ c[1] ^ np.uint64(k[0]), b & mask, (a >> np.uint64(32)) ^ c[3] ^ np.uint64(k[1]), a & mask]
        k = [(k[0] + 0x9E3779B9) & 0xFFFFFFFF, (k[1] + 0xBB67AE85) & 0xFFFFFFFF]
    return np.stack(c).astype(np.uint32)


def rounded(x, seed, tensor, stream, step):
    """float32 x rounded stochastically to bfloat16 with the random bits that docs/contract.md prescribes; the bits as
    uint16.
    """
    e = np.arange((len(x) + 7) // 8, dtype=np.uint64)
    other = np.full_like(e, tensor * 4 + stream), np.full_like(e, step)
    words = philox((e & np.uint64(0xFFFFFFFF), e >> np.uint64(32), *other), (seed & 0xFFFFFFFF, seed >> 32))
    random = words.T.copy().view(np.uint16).reshape(-1)[:len(x)]
    return ((x.view(np.uint32) + random) >> 16).astype(np.uint16)


def test_philox_known_answers():
    """`philox` above, which later tests rely on, gives the test vectors that Random123 publishes with the generator."""
    ones, pi = 0xFFFFFFFF, (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    cases = (((0,) * 4, (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
             ((ones,) * 4, (ones, ones), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
             (pi, (0xA4093822, 0x299F31D0), (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1)))
    for counter, key, want in cases:
        assert tuple(philox([[word] for word in counter], key)[:, 0]) == want


def state(size, dtype, moments=torch.float32, master=True, generator=None):
    draw = lambda scale: scale * torch.randn(size, generator=generator)
    param = draw(1.0)
    return {"params": param.to(dtype), "grads": draw(0.1).to(dtype), "masters": param if master else None,
            "exp_avgs": draw(0.1).to(moments), "exp_avg_sqs": draw(0.1).square().to(moments), "steps": torch.tensor(2.0)}


LISTS = ("params", "grads", "masters", "exp_avgs", "exp_avg_sqs", "steps")


def step(states, *, skipped=None, total_sq=None, grad_scale=None, found_inf=None, lr=1e-3, betas=(0.9, 0.95), eps=1e-8,
         weight_decay=0.0, max_grad_norm=0.0, stochastic_rounding=False, maximize=False, seed=0, first_index=0):
    lists = [[s[name] for s in states if s[name] is not None] for name in LISTS]
    STEP(*lists, torch.zeros((), dtype=torch.int64) if skipped is None else skipped, total_sq, grad_scale, found_inf,
         torch.tensor(lr), *betas, eps, weight_decay, max_grad_norm, stochastic_rounding, maximize, seed,
         list(range(first_index, first_index + len(states))))


def test_stored_bits_are_philox(isa, generator):
    """What adamw stores is the exact value rounded with Philox's random bits: for weights and both moments, which draw from
    different streams, for several tensors, and for sizes that are no multiple of a vector.
    """
    seed, first = 0x1234_5678_9ABC_DEF0 & (2**63 - 1), 11
    states = []
    for size in SIZES:
        s = state(size, torch.bfloat16, torch.bfloat16, master=False, generator=generator)
        s["grads"] = torch.randn(size, generator=generator)  # float32: with beta = 0 the moments are g and g^2 themselves
        states.append(s)
    before = [s["params"].clone() for s in states]
    step(states, betas=(0.0, 0.0), lr=0.5, eps=1.0, stochastic_rounding=True, seed=seed, first_index=first)
    for i, s in enumerate(states):
        g = s["grads"]
        w = before[i].float() - 0.5 * (g / (g.square().sqrt() + 1))
        for name, stream, exact in (("params", 0, None), ("exp_avgs", 1, g), ("exp_avg_sqs", 2, g.square())):
            got = s[name].view(torch.int16).numpy().view(np.uint16)
            if exact is not None:
                assert np.array_equal(got, rounded(exact.numpy(), seed, first + i, stream, 3)), (i, name)
            else:  # the kernel's update may differ in its last bit: at most a few of 70,000 then round to the other neighbour
                assert (got != rounded(w.numpy(), seed, first + i, stream, 3)).sum() <= 4 + len(got) // 5000, (i, name)
        assert s["steps"] == 3


def test_rounding_of_what_has_no_neighbour(isa):
    """Infinity and NaN stay, the largest finite numbers stay finite, and numbers that bfloat16 represents exactly stay."""
    largest = float(torch.finfo(torch.float32).max)
    g = torch.tensor([largest, -largest, math.inf, -math.inf, math.nan, 1.5, 0.0, -0.0] * 40)
    s = {"params": torch.zeros(320, dtype=torch.bfloat16), "grads": g, "masters": None, "steps": torch.tensor(0.0),
         "exp_avgs": torch.zeros(320, dtype=torch.bfloat16), "exp_avg_sqs": torch.zeros(320, dtype=torch.bfloat16)}
    step([s], betas=(0.0, 0.5), seed=5)
    got, top = s["exp_avgs"].float().view(40, 8), float(torch.finfo(torch.bfloat16).max)
    assert (got[:, 0] == top).all() and (got[:, 1] == -top).all()
    assert (got[:, 2] == math.inf).all() and (got[:, 3] == -math.inf).all() and got[:, 4].isnan().all()
    assert (got[:, 5] == 1.5).all() and (got[:, 6:] == 0).all()


# ---------------------------------------------------------------------------------------------------------- long runs
def run_of_steps(s, count, **options):
    for _ in range(count):
        step([s], eps=0.0, seed=3, **options)
    return s


def test_small_updates_are_not_lost():
    """10,000 updates of 1e-5 at |w| = 1 add up, although each is far below bfloat16's spacing and would be lost by rounding to
    nearest: with float32 master weights within 0.5 %, with stochastic rounding on average.
    """
    count, lr = 10_000, 1e-5
    ones = lambda dtype: torch.ones(4096, dtype=dtype)
    zeros = lambda: torch.zeros(4096)
    s = {"params": ones(torch.bfloat16), "grads": ones(torch.bfloat16), "masters": ones(torch.float32), "exp_avgs": zeros(),
         "exp_avg_sqs": zeros(), "steps": torch.tensor(0.0)}
    run_of_steps(s, count, lr=lr)
    assert ((1 - s["masters"].double()) / (count * lr) - 1).abs().max() < 0.005
    assert torch.equal(s["params"], s["masters"].bfloat16())

    s |= {"params": ones(torch.bfloat16), "masters": None, "exp_avgs": zeros(), "exp_avg_sqs": zeros(),
          "steps": torch.tensor(0.0)}
    run_of_steps(s, count, lr=lr, stochastic_rounding=True)
    moved = 1 - s["params"].double()
    assert abs(float(moved.mean()) / (count * lr) - 1) < 0.02
    assert abs(float(moved.mean()) - count * lr) < 3 * float(moved.std()) / 4096**0.5


@pytest.mark.parametrize(("beta2", "count"), ((0.95, 400), (0.999, 9000)))
def test_bfloat16_second_moments_reach_their_level(beta2, count):
    """Second moments in bfloat16 reach the square of a constant gradient, thanks to stochastic rounding. Rounded to nearest
    with beta2 = 0.999 they would stop at a quarter of it.
    """
    g = 0.01
    s = {"params": torch.zeros(4096), "grads": torch.full((4096,), g), "masters": None, "steps": torch.tensor(0.0),
         "exp_avgs": torch.zeros(4096), "exp_avg_sqs": torch.zeros(4096)}
    s |= {name: s[name].bfloat16() for name in ("exp_avgs", "exp_avg_sqs")}
    run_of_steps(s, count, betas=(0.9, beta2))
    assert abs(float(s["exp_avg_sqs"].double().mean()) / g**2 - 1) < 0.01
    assert abs(float(s["exp_avgs"].double().mean()) / g - 1) < 0.01


# -------------------------------------------------------------------------------------------------- lists of tensors
def copied(states):
    return [{name: None if t is None else t.clone() for name, t in s.items()} for s in states]


def equal(states, others):
    bits = lambda t: t.contiguous().view(torch.uint8) if t.dim() else t
    return all(torch.equal(bits(s[name]), bits(o[name])) for s, o in zip(states, others, strict=True) for name in LISTS
               if s[name] is not None)


def test_many_tensors_at_once_are_each_by_itself(isa, generator):
    """A list of tensors gives the bits of one call for each tensor: how it is divided into chunks and distributed over threads
    changes no bit, and neither does a transposed layout.
    """
    states = [state(size, torch.bfloat16, generator=generator) for size in SIZES]
    together, alone = copied(states), copied(states)
    threads = torch.get_num_threads()
    step(together, weight_decay=0.1)
    try:
        torch.set_num_threads(1)
        for s in alone:
            step([s], weight_decay=0.1)
    finally:
        torch.set_num_threads(threads)
    assert equal(together, alone) and not equal(together, states)

    turned = [{name: t if t.dim() == 0 else t.view(40, 25).t() for name, t in s.items()} for s in copied(states[3:4])]
    step(turned, weight_decay=0.1)
    assert equal([{name: t if t.dim() == 0 else t.t().flatten() for name, t in turned[0].items()}], together[3:4])


def test_norm_clips_scales_and_skips(generator):
    states = [state(size, torch.bfloat16, generator=generator) for size in SIZES]
    total = ik.squared_norm([s["grads"] for s in states], backend="cpp")
    gold = sum(float(s["grads"].double().square().sum()) for s in states)
    assert abs(float(total) / gold - 1) < 1e-7
    scale = torch.tensor(128.0)
    want, got = copied(states), copied(states)
    for s in want:
        s["grads"] = -s["grads"].float() / 128 * float(0.05 / (math.sqrt(gold) / 128 + 1e-6))
    step(want)
    step(got, total_sq=total, grad_scale=scale, max_grad_norm=0.05, maximize=True)
    for s, other in zip(got, want, strict=True):
        torch.testing.assert_close(s["masters"], other["masters"], rtol=1e-6, atol=1e-9)

    for options in ({"total_sq": torch.tensor(math.inf)}, {"total_sq": torch.tensor(math.nan)},
                    {"found_inf": torch.tensor(1.0), "total_sq": total}):
        got, skipped = copied(states), torch.tensor(7)
        step(got, skipped=skipped, max_grad_norm=1.0, weight_decay=0.1, **options)
        assert equal(got, states) and skipped == 8


def test_norm_of_any_mixture(isa):
    """Squares of float32 values are summed in double, where none overflows; those of bfloat16 values may overflow."""
    full = lambda count, value, dtype: torch.full((count,), value, dtype=dtype)
    mixed = [full(3, 1e-30, torch.float32), full(100_003, 2.0, torch.bfloat16), full(5, 3.0, torch.float16)]
    assert float(ik.squared_norm(mixed, backend="cpp")) == 400_012 + 45
    tiny = ik.squared_norm([torch.full((1 << 20,), 1e-22)], backend="cpp")
    assert abs(float(tiny) / (2**20 * 1e-44) - 1) < 1e-3
    assert float(ik.squared_norm([torch.full((2,), 1e20)], backend="cpp")) == math.inf
    wide = [full(2, 1e20, torch.float64), full(1000, 2.0**70, torch.float32)]
    assert abs(float(ik.squared_norm(wide, backend="cpp")) / (2e40 + 1000 * 2.0**140) - 1) < 1e-12
    assert float(ik.squared_norm([wide[0], full(1000, 2.0**70, torch.bfloat16)], backend="cpp")) == math.inf


def test_refusals_come_before_any_write(generator):
    wrong = (("grads", lambda t: t.float()[:-1], "grads: expected 1000 elements"),
             ("grads", lambda t: t.half(), "grads: expected bfloat16 or float32"),
             ("masters", lambda t: t.double(), "masters: expected float32"),
             ("exp_avgs", lambda t: t.half(), "exp_avgs: expected float32 or bfloat16"),
             ("exp_avg_sqs", lambda t: t.bfloat16(), "exp_avg_sqs: expected float32"),
             ("exp_avg_sqs", lambda t: t.repeat_interleave(2)[::2], "exp_avg_sqs: expected a dense tensor"),
             ("steps", lambda t: t.long(), "steps: expected float32"),
             ("steps", lambda t: t.repeat(2), "steps: expected one element"))
    states = [state(size, torch.bfloat16, generator=generator) for size in (64, 1000)]
    for name, change, message in wrong:
        bad = copied(states)
        bad[1][name] = change(bad[1][name])
        kept = copied(bad)
        with pytest.raises(RuntimeError, match=f"ValueError: adamw: {message}"):
            step(bad)
        assert equal(bad, kept), name
    short = copied(states)
    short[1]["exp_avgs"] = None
    with pytest.raises(RuntimeError, match="ValueError: adamw: exp_avgs: expected 2 tensors, as many as params, got 1"):
        step(short)


# ------------------------------------------------------------------------------------------------------------- losses
def relative(got, gold):
    return float(((got.double() - gold) / gold).abs().max())


def test_accurate_over_whole_ranges(isa):
    """The vectorised log(x), log(1 + x), exp(x) - 1 and exp(x) - 1 - x are accurate over their whole ranges, measured through
    the losses that use them.
    """
    eps = torch.finfo(torch.float32).eps
    d = torch.cat((torch.linspace(-60, 40, 200_001), torch.logspace(-20, 0, 20_001), -torch.logspace(-20, 0, 20_001)))
    zero = torch.zeros_like(d)
    gold = torch.nn.functional.softplus(-d.double(), threshold=1000)
    assert relative(ik.focal_ranking_loss(d, zero, gamma=0.0, backend="cpp"), gold) < 4 * eps
    gold *= torch.where(d > 0, (2 * torch.sigmoid(-d.double())) ** 2, 1.0)
    normal = gold > 1e-37  # the product of three exponentials of -d leaves float32's range near 28
    assert relative(ik.focal_ranking_loss(d, zero, backend="cpp")[normal], gold[normal]) < 12 * eps

    x = torch.linspace(-4.99, 4.99, 200_001)
    gold = -(torch.log(5 - x.double()) + torch.log(5 + x.double()))
    got = ik.log_barrier_penalty(x, backend="cpp").double()
    assert float((got - gold).abs().max()) < 12 * eps  # two logarithms of magnitude up to 5, which may cancel

    x = torch.cat((torch.logspace(-18, 1.5, 100_001), -torch.logspace(-18, 1.5, 100_001)))
    small, exact = x.abs() < 1e-3, x.double()
    series = exact**2 / 2 - exact**3 / 6 + exact**4 / 24 - exact**5 / 120
    gold = torch.where(small, series, torch.expm1(-exact) + exact)
    assert relative(ik.kl_penalty(x, torch.zeros_like(x), estimator="k3", backend="cpp"), gold) < 8 * eps
    leaf = x.clone().requires_grad_()
    ik.kl_penalty(leaf, torch.zeros_like(x), estimator="k3", backend="cpp").sum().backward()
    assert relative(leaf.grad, -torch.expm1(-exact)) < 4 * eps


def test_focal_gradient_flows_through_the_weight():
    d = torch.tensor([0.5, 0.0, -1.0], requires_grad=True)
    ik.focal_ranking_loss(d, torch.zeros(3), backend="cpp").sum().backward()
    torch.testing.assert_close(d.grad, torch.tensor([-0.552, -0.5, -0.7310586]), rtol=0, atol=5e-4)
    assert d.grad[1] == -0.5


def test_losses_at_the_ends():
    """Infinite and NaN rewards give what the formulas give."""
    ends = torch.tensor([math.inf, -math.inf, math.nan, 1e38, -1e38, 0.0], requires_grad=True)
    for gamma in (0.0, 1.5, 2.0):
        loss = ik.focal_ranking_loss(ends, torch.zeros(6), gamma=gamma, backend="cpp")
        assert loss[0] == 0 and loss[1] == math.inf and loss[2].isnan() and loss[3] == 0 and loss[4] == torch.tensor(1e38)
        (grad,) = torch.autograd.grad(loss[[0, 1, 3, 4, 5]].sum(), ends)
        assert grad[0] == 0 and grad[1] == -1 and grad[4] == -1 and grad[5] == -0.5
    for outside, far in (("linear", math.inf), ("clamp", None)):
        penalty = ik.log_barrier_penalty(ends, outside=outside, backend="cpp")
        (grad,) = torch.autograd.grad(penalty[[0, 1, 3, 4, 5]].sum(), ends)
        edge = 1 / 0.001 - 1 / 9.999 if outside == "linear" else 0.0
        assert penalty[2].isnan() and not penalty[[0, 1, 3, 4, 5]].isnan().any()
        assert penalty[0] == penalty[1] and (far is None or penalty[0] == far)
        torch.testing.assert_close(grad[[0, 1, 3, 4, 5]], torch.tensor([edge, -edge, edge, -edge, 0.0]))


@pytest.mark.parametrize("size", (5, 513, 10_000))
def test_masked_entries_never_leak(isa, size, generator):
    """NaN and infinity in masked elements change nothing. Where all elements are masked, loss and gradients are 0."""
    draw = lambda: torch.randn(size, generator=generator)
    mask = torch.rand(size, generator=generator) > 0.4
    inputs = [draw() for _ in range(3)]
    poisoned = [torch.where(mask, x, math.nan if i % 2 else math.inf) for i, x in enumerate(inputs)]
    for loss_of, options in ((ik.ppo_policy_loss, {}), (ik.ppo_value_loss, {"clip": 0.2}), (ik.ppo_value_loss, {})):
        results = []
        for values in (inputs, poisoned):
            leaf = values[0].clone().requires_grad_()
            loss, stats = loss_of(leaf, *values[1:], mask, **options, backend="cpp")
            (grad,) = torch.autograd.grad(loss, leaf)
            results.append(torch.cat((torch.stack((loss, *stats.values())).detach(), grad)))
        assert torch.equal(*results) and results[0].isfinite().all() and (results[0][3:][~mask] == 0).all()
        leaf = poisoned[1].clone().requires_grad_()
        loss, stats = loss_of(leaf, *poisoned[1:], torch.zeros_like(mask), **options, backend="cpp")
        (grad,) = torch.autograd.grad(loss, leaf)
        assert loss == 0 and all(s == 0 for s in stats.values()) and (grad == 0).all()


def test_explained_variance_keeps_its_digits(isa, generator):
    """Explained variance is accurate for returns far from zero, where a variance from a float32 sum of squares would have no
    correct digit. For equal returns it is exactly 0.
    """
    returns = 4096 + torch.randn(30_000, generator=generator)
    values = returns + 0.5 * torch.randn(30_000, generator=generator)
    mask = torch.rand(30_000, generator=generator) > 0.3
    _, stats = ik.ppo_value_loss(values, values, returns, mask, backend="cpp")
    r, error = returns[mask].double(), (returns - values)[mask].double()
    gold = 1 - error.var(correction=0) / r.var(correction=0)
    assert abs(float(stats["explained_variance"]) - float(gold)) < 1e-5
    _, stats = ik.ppo_value_loss(values, values, torch.full_like(returns, 0.1), mask, backend="cpp")
    assert stats["explained_variance"] == 0


def test_gae_of_long_sequences(isa, generator):
    """Sequences longer than a block of the kernel, with and without a mask, agree with the recurrence computed in float64. A
    mask of ones changes no bit.
    """
    lengths = [0, 1, 511, 512, 513, 3000]
    cu = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    rewards, values = (torch.randn(int(cu[-1]), generator=generator) for _ in range(2))
    mask = torch.rand(int(cu[-1]), generator=generator) > 0.5
    bootstrap = torch.randn(len(lengths), generator=generator)
    options = {"bootstrap": bootstrap, "gamma": 0.999, "lam": 0.95}
    got = ik.gae(rewards.where(mask, math.nan), values.where(mask, 0), cu, mask=mask, **options, backend="cpp")
    want = ik.gae(rewards.double(), values.where(mask, 0).double(), cu, mask=mask, **options, backend="reference")
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=2e-5)
    free = ik.gae(rewards, values, cu, **options, backend="cpp")
    assert all(map(torch.equal, free, ik.gae(rewards, values, cu, mask=torch.ones_like(mask), **options, backend="cpp")))
    want = ik.gae(rewards.double(), values.double(), cu, **options, backend="reference")
    torch.testing.assert_close(free[0].double(), want[0], rtol=1e-5, atol=2e-5)
