"""What the shared checks do not cover of Triton's losses: shards, chunks, bad indices, launches."""

import math

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels._device_errors import CODES, error_word
from internlm2_kernels._registry import OPS

triton = pytest.importorskip("triton")
tl = pytest.importorskip("triton.language")
functions, head, tables, ppo = (__import__(f"internlm2_kernels._triton.{name}", fromlist=[name])
                                for name in ("functions", "linear_head", "tables", "ppo"))
LINEAR, LOGPROBS, CROSS = OPS["linear_cross_entropy"], OPS["linear_logprobs"], OPS["cross_entropy"]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def raw(op, name):
    return OPS[op].overloads[name]["triton"]


@pytest.fixture
def randn(device, generator):
    return lambda *shape, dtype=torch.float32: torch.randn(*shape, generator=generator, device=device).to(dtype)


@pytest.fixture
def word(device):
    word = error_word(torch.device(device.type, 0) if device.type == "cuda" else device)
    word.zero_()
    yield word
    word.zero_()


def integers(*values, device, dtype=torch.int64):
    return torch.tensor(values, dtype=dtype, device=device)


def assert_near(got, want, dtype, times=8):
    """Asserts that no error exceeds `times` * eps of dtype * the largest magnitude in `want`."""
    assert got.shape == want.shape
    scale = float(want.abs().max()) if want.numel() else 0.0
    assert float((got.double() - want.double()).abs().max() if want.numel() else 0) <= times * torch.finfo(dtype).eps * scale


# --------------------------------------------------------------------------------------------------- elementary functions
@triton.jit
def functions_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + index, mask=index < size, other=0.0)
    known = index < size
    tl.store(out_ptr + index, functions._exponential(x), mask=known)
    tl.store(out_ptr + size + index, functions._expm1(x), mask=known)
    tl.store(out_ptr + 2 * size + index, functions._expm1_less_x(x), mask=known)
    tl.store(out_ptr + 3 * size + index, functions._softplus(x), mask=known)
    tl.store(out_ptr + 4 * size + index, functions._sigmoid(x), mask=known)


def test_elementary_functions(device):
    """The kernels' exp, log and similar functions are within 4 ulp over their whole ranges and near 0, and treat infinity and
    NaN as PyTorch does.
    """
    magnitudes = torch.logspace(-6, math.log10(80), 400)
    special = torch.tensor([0.0, float("inf"), -float("inf"), float("nan"), 88.5, -85.0, 0.35, -0.35, 1.0, -1.0])
    x = torch.cat((magnitudes, -magnitudes, special)).to(device)
    out = torch.empty(5, len(x), device=device)
    functions_kernel[(1,)](x, out, len(x), BLOCK=1024)
    wide = x.double()
    series = wide.square() * (0.5 + wide * (1 / 6 + wide * (1 / 24 + wide * (1 / 120 + wide / 720))))
    less = torch.where(wide.abs() < 0.01, series, wide.expm1() - wide)
    for got, want in zip(out, (wide.exp(), wide.expm1(), less, torch.logaddexp(wide, torch.zeros_like(wide)), wide.sigmoid()),
                         strict=True):
        want = want.float()
        kept = ~(want.abs() < 2.0**-120)
        kept &= ~(wide.isinf() & want.isinf()) & ~want.isnan()
        error = (got.double() - want.double()).abs() / want.double().abs()
        assert float(error[kept].nan_to_num(0.0).max()) < 4 * 2.0**-23
        assert torch.equal(got.isnan(), want.isnan() | (got.isnan() & wide.isinf()))


# ------------------------------------------------------------------------------------------- linear head: shards, chunks
def gold_logprobs(hidden, weight, tokens, inv, softcap, start):
    logits = hidden @ weight.T * inv
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    local = tokens - start
    inside = (local >= 0) & (local < weight.shape[0])
    own = torch.where(inside, logits.gather(1, local.clamp(0, weight.shape[0] - 1)[:, None])[:, 0], 0.0)
    lse = logits.logsumexp(1)
    p = (logits - lse[:, None]).exp()
    return own - lse, lse, lse - (p * logits).sum(1), logits.max(1), logits.sum(1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", (0.0, 4.0))
def test_logprobs_of_a_shard(softcap, dtype, device, randn):
    """All outputs and gradients for rows 100 to 399 of a vocabulary of 500, with tokens outside the shard among the labels."""
    hidden, weight = randn(9, 48, dtype=dtype), 0.3 * randn(300, 48)
    weight = weight.to(dtype)
    tokens = integers(100, 399, 99, 400, 0, 499, 250, 130, 260, device=device)
    options = 0.8, softcap, 100, 500
    fwd = raw("linear_logprobs", "fwd")
    got = fwd(hidden, weight, tokens, *options, True, True, True)
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    logprobs, lse, entropy, best, total = gold_logprobs(*wide, tokens, *options[:3])
    whole = got[1].double().sum(1)
    for mine, want in zip((got[0], whole.float(), *got[2:]), (logprobs, lse, entropy, None, total), strict=True):
        if want is not None:
            assert mine.dtype == torch.float32
            assert_near(mine, want, torch.float32, 64)
    assert torch.equal(got[3], best.indices + 100 == tokens)
    assert fwd(hidden, weight, best.indices + 100, *options, False, False, True)[3].all()
    assert not fwd(hidden, weight, best.indices, *options, False, False, True)[3].any()  # tokens of another shard
    assert not fwd(hidden, weight, tokens, *options, False, False, False)[3].numel()  # returned only on request
    upstreams = [randn(9) for _ in range(4)]
    want = torch.autograd.grad([logprobs, entropy, lse, total], wide, [u.double() for u in upstreams])
    grads = raw("linear_logprobs", "bwd")(*upstreams, hidden, weight, tokens, got[1], got[2], *options, True, True)
    for mine, gold in zip(grads, want, strict=True):
        assert mine.dtype == dtype
        assert_near(mine, gold, dtype, 16 if dtype == torch.float32 else 4)


def test_best_of_ties_is_the_first(device):
    """Of tokens with equal largest logits the first is the best one, also where the others lie in another block of the
    vocabulary.
    """
    weight = torch.zeros(700, 16, device=device)
    weight[[300, 301, 650]] = 1.0
    hidden = torch.ones(2, 16, device=device)
    for token in (305, 306, 655, 5):
        hits = raw("linear_logprobs", "fwd")(hidden, weight, integers(token, token, device=device), 1.0, 0.0, 5, 1000, False,
                                             False, True)[3]
        assert hits.tolist() == [token == 305] * 2


def test_chunks_cover_the_rows():
    for rows in (0, 1, 127, 128, 129, 1000, 4096, 8191, 200_001):
        for largest in (128, 2048):
            ranges = head.chunks(rows, largest)
            assert [i for begin, end in ranges for i in (begin, end)] == sorted(i for r in ranges for i in r)
            assert sum(end - begin for begin, end in ranges) == rows
            assert all(end - begin <= largest and begin % 128 == 0 for begin, end in ranges)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_several_chunks(dtype, device, randn, generator, monkeypatch):
    """Divided into two chunks of rows, the forward has the bits of one chunk. The gradients are as accurate, whether the
    forward or the backward computes them.
    """
    hidden, weight = randn(150, 24, dtype=dtype), randn(40, 24, dtype=dtype)
    labels = torch.randint(40, (150,), generator=generator, device=device)
    labels[::7] = -100
    args = hidden, weight, labels, None, -100, 0.1, 1e-3, 0.0
    loss, _, lse = raw("linear_cross_entropy", "fwd")(*args, 0, False)
    monkeypatch.setattr(head, "CHUNK_BYTES", 1)
    monkeypatch.setattr(head, "FORWARD_ROWS", 128)
    again = raw("linear_cross_entropy", "fwd")(*args, 0, False)
    assert torch.equal(loss, again[0]) and torch.equal(lse, again[2])
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    gold = LINEAR.reference(*wide, labels, label_smoothing=0.1, z_loss=1e-3)
    want = torch.autograd.grad(gold, wide)
    total, _, dhidden, dweight = raw("linear_cross_entropy", "grad_fwd")(*args, 1, False, True, True)
    assert dweight.dtype == torch.float32 and dhidden.dtype == torch.float32
    assert_near(total, gold.detach(), torch.float32)
    mean = raw("linear_cross_entropy", "fwd")(*args, 1, False)[0]
    assert torch.equal(total, mean)
    one = torch.ones((), device=device)
    twice = raw("linear_cross_entropy", "bwd")(one, *args[:4], lse, *args[4:], 1, True, True)
    for mine, other, right in zip((dhidden, dweight), twice, want, strict=True):
        assert other.dtype == dtype
        assert_near(mine, right, dtype, 16 if dtype == torch.float32 else 2)
        assert_near(other, right, dtype, 16 if dtype == torch.float32 else 2)
    for needs in ((True, False), (False, True)) if dtype == torch.bfloat16 else ():
        parts = raw("linear_cross_entropy", "grad_fwd")(*args, 1, False, *needs)[2:]
        for needed, part, whole in zip(needs, parts, (dhidden, dweight), strict=True):
            assert torch.equal(part, whole) if needed else part.shape == (0, 24)


@pytest.mark.parametrize("scale", (65536.0, 1e-6))
def test_float16_gradients_neither_overflow_nor_vanish(scale, device, randn, generator):
    """Upstream gradients (loss scales) beyond float16's range, or so small that unscaled gradients would round to 0, give
    gradients that are exact up to float16's own rounding.
    """
    hidden, weight = randn(40, 16, dtype=torch.float16), randn(50, 16, dtype=torch.float16)
    labels = torch.randint(50, (40,), generator=generator, device=device)
    args = hidden, weight, labels, None, -100, 0.0, 0.0, 0.0
    lse = raw("linear_cross_entropy", "fwd")(*args, 0, False)[2]
    upstream = scale * randn(40)
    gold = [t.double().requires_grad_() for t in (hidden, weight)]
    want = torch.autograd.grad(LINEAR.reference(*gold, labels, reduction="none"), gold, upstream.double())
    dhidden, dweight = raw("linear_cross_entropy", "bwd")(upstream / 40, *args[:4], lse, *args[4:], 0, True, True)
    for mine, right in zip((dhidden, dweight), want, strict=True):
        if scale > 1:
            assert_near(mine, right / 40, torch.float16, 2)
        else:
            assert mine.any() and float((mine.double() - right / 40).abs().max()) < 2.0**-23


def test_smoothed_and_capped_agree_with_given_logits(device, randn, generator):
    """With all options on, the loss of a head equals the loss of its logits up to float32's rounding."""
    hidden, weight = randn(20, 32), randn(300, 32)
    labels = torch.randint(300, (20,), generator=generator, device=device)
    options = dict(label_smoothing=0.2, z_loss=0.01, softcap=5.0, reduction="sum")
    mine = ik.linear_cross_entropy(hidden, weight, labels, **options, backend="triton")
    other = ik.cross_entropy(hidden @ weight.T, labels, **options, backend="triton")
    assert_near(mine, other, torch.float32)


# ---------------------------------------------------------------------------------------------------- labels and logits
@pytest.mark.parametrize("labels", ([3, -1, 2], [3, 40, 2], [3, -(2**40), 2], [3, 2**33, 2]), ids=str)
def test_bad_labels(labels, device, randn, word):
    """Rows whose label is out of range become NaN, the others are unchanged, the error bit is set, and nothing outside the
    weight is read.
    """
    hidden, weight = randn(3, 8), randn(40, 8)
    labels = integers(*labels, device=device)
    logits = hidden @ weight.T
    good = integers(3, 1, 2, device=device)
    per_row = CROSS.overloads["fwd"]["triton"](logits, labels, -100, 0.0, 0.0, 0.0, 0, False)[0]
    want = CROSS.overloads["fwd"]["triton"](logits, good, -100, 0.0, 0.0, 0.0, 0, False)[0]
    assert per_row[1].isnan() and torch.equal(per_row[::2], want[::2]) and int(word) == CODES["cross_entropy", "labels"]
    loss, _, grad = CROSS.overloads["grad_fwd"]["triton"](logits, labels, -100, 0.0, 0.0, 0.0, 1, False)
    assert loss.isnan() and grad[1].isnan().all() and grad[::2].isfinite().all()
    lse = CROSS.overloads["fwd"]["triton"](logits, good, -100, 0.0, 0.0, 0.0, 0, False)[2]
    grad = CROSS.overloads["bwd"]["triton"](torch.ones(3, device=device), logits, labels, lse, -100, 0.0, 0.0, 0.0, 0)
    assert grad[1].isnan().all() and grad[::2].isfinite().all()
    with pytest.raises(ValueError, match="cross_entropy: labels: expected values from 0 to V - 1 or ignore_index"):
        ik.check()
    options = None, -100, 0.0, 0.0, 0.0
    per_row = raw("linear_cross_entropy", "fwd")(hidden, weight, labels, *options, 0, False)[0]
    assert per_row[1].isnan() and per_row[::2].isfinite().all() and int(word) == CODES["linear_cross_entropy", "labels"]
    loss, _, dhidden, _ = raw("linear_cross_entropy", "grad_fwd")(hidden, weight, labels, *options, 1, False, True, False)
    assert loss.isnan() and dhidden[1].isnan().all() and dhidden[::2].isfinite().all()
    word.zero_()
    results = raw("linear_logprobs", "fwd")(hidden, weight, labels, 1.0, 0.0, 0, 40, True, True, True)
    assert results[0][1].isnan() and results[0][::2].isfinite().all() and int(word) == CODES["linear_logprobs", "tokens"]
    assert all(t.isfinite().all() for t in results[1:4])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_masked_vocabulary_and_ignored_rows(dtype, device, randn):
    """Logits of -inf have probability 0; an ignored row's gradient is 0 whatever its logits are."""
    logits = randn(4, 100, dtype=dtype)
    logits[:2, 10:90] = float("-inf")
    logits[3] = float("nan")
    labels = integers(5, 95, 50, -100, device=device)
    for options in ((-100, 0.0, 1e-3, 0.0), (-100, 0.0, 0.0, 20.0)):
        loss, _, lse = CROSS.overloads["fwd"]["triton"](logits, labels, *options, 0, False)
        assert loss[:3].isfinite().all() and loss[3] == 0 and lse[3].sum().isnan()
        gradients = [CROSS.overloads["bwd"]["triton"](torch.ones(4, device=device), logits, labels, lse, *options, 0),
                     CROSS.overloads["grad_fwd"]["triton"](logits, labels, *options, 2, False)[2]]
        for gradient in gradients:
            assert gradient.isfinite().all() and not gradient[3].any()
            assert options[3] or not gradient[:2, 10:90].any()
            if not options[3]:  # p sums to 1, so only the z-loss's part is left
                torch.testing.assert_close(gradient[:3].float().sum(1), 2e-3 * lse[:3].sum(1), rtol=0.05,
                                           atol=4 * torch.finfo(dtype).eps)


def test_in_place_equals_fresh(device, randn):
    """A view with gaps between rows and several column tiles a row; the gaps are not written."""
    wide = randn(3, 9000)
    logits, labels = wide[:, 100:8900], integers(5, 4096, 8799, device=device)
    dloss, options = randn(3), (-100, 0.1, 1e-3, 30.0)
    lse = CROSS.overloads["fwd"]["triton"](logits, labels, *options, 0, False)[2]
    want = CROSS.overloads["bwd"]["triton"](dloss, logits, labels, lse, *options, 0)
    before = wide.clone()
    CROSS.overloads["bwd_"]["triton"](dloss, logits, labels, lse, *options, 0)
    assert torch.equal(logits, want)
    assert torch.equal(wide[:, :100], before[:, :100]) and torch.equal(wide[:, 8900:], before[:, 8900:])


# --------------------------------------------------------------------------------------------------- rewards and PPO
@pytest.mark.parametrize("cu", ([0, 3, 3, 7, 10], [0, 3, 2, 7, 10], [0, 5, 3, 8, 10], [1, 3, 5, 7, 10], [0, 3, 5, 7, 11],
                                [0, 3, 5, 7, 9], [0, 3, 5, 7, 2**30], [-5, 3, 5, 7, 10], [0], [10],
                                [*range(40), 39, *range(41, 81)], [0, 0, *range(2, 81)], [*range(80), 81]),
                         ids=lambda cu: str(cu[:5]))
def test_reward_loss_with_bad_boundaries(cu, device, randn, word):
    """Every result of the call is NaN, including those of programs whose own boundaries are right."""
    tokens = 80 if len(cu) > 5 else 10
    hidden, weight = randn(tokens, 16), randn(16)
    bounds = integers(*cu, device=device, dtype=torch.int32)
    loss, rewards, slopes = raw("reward_loss", "fwd")(hidden, weight, bounds, 2.0, 0.02, 5.0, 1e-3)
    assert loss.isnan() and rewards.shape == (len(cu) - 1,) and rewards.isnan().all()
    assert int(word) == CODES["reward_loss", "cu_seqlens"]
    word.zero_()
    for drewards in (None, torch.ones_like(rewards)):
        gradients = raw("reward_loss", "bwd")(loss.new_ones(()), drewards, hidden, weight, bounds, slopes, True, True)
        assert all(gradient.isnan().all() for gradient in gradients)
        assert int(word) == CODES["reward_loss", "cu_seqlens"]
        word.zero_()


def test_gae_over_several_blocks(device, randn, generator, monkeypatch):
    """Sequences of many blocks, empty ones and masked ones, with a bootstrap value, compared with the loop in float64."""
    module = __import__("internlm2_kernels._triton.gae", fromlist=["gae"])
    monkeypatch.setattr(module, "BLOCK", 16)
    lengths = (0, 70, 1, 16, 0, 33, 32)
    cu = torch.tensor((0, *lengths)).cumsum(0).to(torch.int32).to(device)
    rewards, values = randn(sum(lengths)), randn(sum(lengths))
    mask = torch.rand(sum(lengths), generator=generator, device=device) > 0.4
    mask[20:60] = False  # some blocks of tokens are fully masked
    values[30] = float("nan")
    bootstrap = randn(len(lengths))
    got = ik.gae(rewards, values, cu, mask=mask, bootstrap=bootstrap, gamma=0.97, lam=0.9, backend="triton")
    want = ik.gae(rewards.double(), values.double(), cu, mask=mask, bootstrap=bootstrap.double(), gamma=0.97, lam=0.9,
                  backend="reference")
    assert got[0].isfinite().all()
    for mine, right in zip(got, want, strict=True):
        known = right.isfinite()
        assert_near(mine[known], right[known], torch.float32)
        assert torch.equal(mine.isnan(), right.isnan())


def test_gae_with_bad_boundaries(device, randn, word):
    x = randn(50)
    for cu in ([0, 60], [0, 30, 20, 50], [1, 50], [0, 2**30, 50], [0]):
        results = raw("gae", "fwd")(x, x, integers(*cu, device=device, dtype=torch.int32), None, None, 1.0, 0.9)
        assert all(t.isnan().all() for t in results) and int(word) == CODES["gae", "cu_seqlens"]
        word.zero_()


@pytest.mark.parametrize("size", (1, 5000, 9001))
def test_ppo_in_one_launch_and_in_two(size, device, randn, generator, monkeypatch):
    """Both ways agree with each other and with float64; so does the variance of values whose mean is far from 0."""
    mask = torch.rand(size, generator=generator, device=device) > 0.3
    old, advantages = randn(size) - 2, randn(size)
    logprobs = old + 0.3 * randn(size)
    values, old_values, returns = 1000 + randn(size), 1000 + randn(size), 1000 + randn(size)
    results = []
    for single in (ppo.SINGLE, 1024):
        monkeypatch.setattr(ppo, "SINGLE", single)
        results.append((*raw("ppo_policy_loss", "fwd")(logprobs, old, advantages, mask, 0.2),
                        *raw("ppo_value_loss", "fwd")(values, old_values, returns, mask, 0.5)))
    loss, stats = ik.ppo_policy_loss(logprobs.double(), old.double(), advantages.double(), mask, backend="reference")
    value_loss, value_stats = ik.ppo_value_loss(values.double(), old_values.double(), returns.double(), mask, clip=0.5,
                                                backend="reference")
    count = mask.sum()
    want = (loss, *stats.values(), count, value_loss, *value_stats.values(), count)
    for got in results:
        for mine, right in zip(got, want, strict=True):
            assert math.isclose(float(mine), float(right), rel_tol=2e-4, abs_tol=1e-5), (float(mine), float(right))
