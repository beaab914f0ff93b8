"""What is special to `sample`: the distribution it draws from, its independence of batch and instruction set, equality with
`linear_logprobs` bit for bit, ties, infinities, and its errors."""

import math

import pytest
import torch
from cells import SETS
from parameters import instruction_set

import internlm2_kernels as ik
from internlm2_kernels._registry import _C, OPS
from internlm2_kernels.ops._sampling import unpacked

BACKENDS = ("reference", "cpp")
EVERY = ("avx2", "avx512")
INF, NAN = math.inf, math.nan


def sets():
    best = _C.best_cpu_isa() if _C else ""
    return [isa for isa in EVERY if best and SETS.index(isa) <= SETS.index(best)]


def counters(rows, seed=5):
    return {"seeds": torch.full((rows,), seed), "positions": torch.arange(rows)}


# ------------------------------------------------------------------------------------------------------ distribution
VOCAB = 150
HISTORY = torch.tensor([[3, 3, 7, -1, 20, 20, 20, 149, 5, 1]])
FILTERS = {
    "none": {},
    "temperature": {"temperature": 0.6},
    "top_k": {"top_k": 20},
    "top_p": {"top_p": 0.8},
    "min_p": {"min_p": 0.08},
    "penalties": {"token_ids": HISTORY, "prompt_lengths": torch.tensor([4]), "repetition_penalty": 1.5, "presence_penalty": 0.4,
                  "frequency_penalty": 0.3},
    "bias": {"bias_ids": torch.tensor([[0, 9, 0, -1]]), "bias_values": torch.tensor([[1.5, -2.0, 0.5, 9.0]])},
    "mask": {"allowed": (torch.arange(VOCAB) % 3 != 0)[None]},
}
FILTERS["all"] = {name: value for options in FILTERS.values() for name, value in options.items()} | {"top_k": 60, "top_p": 0.9}


def probabilities(logits, *, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, token_ids=None, prompt_lengths=None,
                  repetition_penalty=1.0, presence_penalty=0.0, frequency_penalty=0.0, bias_ids=None, bias_values=None,
                  allowed=None):
    """The distribution of one row of logits, token by token in float64, in the words of the contract and no operator of it."""
    z = [float(x) for x in logits.double()]
    for i, value in zip(bias_ids[0].tolist(), bias_values[0].tolist(), strict=True) if bias_ids is not None else ():
        if i >= 0:
            z[i] += value
    history = token_ids[0].tolist() if token_ids is not None else []
    output = [i for i in history[int(prompt_lengths[0]) if prompt_lengths is not None else 0:] if i >= 0]
    for i in {i for i in history if i >= 0}:
        z[i] = z[i] / repetition_penalty if z[i] > 0 else z[i] * repetition_penalty
    for i in set(output):
        z[i] -= frequency_penalty * output.count(i) + presence_penalty
    z = [x / temperature if allowed is None or allowed[0, i] else -INF for i, x in enumerate(z)]
    order = sorted(range(len(z)), key=lambda i: -z[i])
    if top_k:
        order = [i for i in order if z[i] >= z[order[top_k - 1]]]
    weights = {i: math.exp(z[i] - z[order[0]]) for i in order}
    mass, kept = 0.0, []
    for i in order:
        if mass >= top_p * sum(weights.values()) and z[i] < z[kept[-1]]:
            break
        mass += weights[i]
        kept.append(i)
    kept = [i for i in kept if weights[i] >= min_p]
    total = sum(weights[i] for i in kept)
    p = torch.zeros(len(z), dtype=torch.float64)
    for i in kept:
        p[i] = weights[i] / total
    return p


def chi_square(tokens, p):
    """(the statistic, its degrees of freedom) of drawn tokens. Tokens expected less than 10 times count as one."""
    counts = torch.bincount(tokens, minlength=p.numel()).double()
    assert not counts[p == 0].any(), "a token was drawn that the filters exclude"
    expected = p * tokens.numel()
    often, rare = expected >= 10, (expected > 0) & (expected < 10)
    got = torch.cat((counts[often], counts[rare].sum()[None])) if rare.any() else counts[often]
    want = torch.cat((expected[often], expected[rare].sum()[None])) if rare.any() else expected[often]
    return float(((got - want).square() / want).sum()), got.numel() - 1


def drawn(logits, options, draws, backend):
    """Tokens of `draws` positions of one row, in calls of at most 4096 rows."""
    tokens = []
    for first in range(0, draws, 4096):
        rows = min(4096, draws - first)
        each = {n: v.expand(rows, *v.shape[1:]) if isinstance(v, torch.Tensor) else v for n, v in options.items()}
        tokens.append(ik.sample(logits.expand(rows, -1), seeds=torch.full((rows,), 77),
                                positions=torch.arange(first, first + rows), backend=backend, **each)[0])
    return torch.cat(tokens)


def check_distribution(name, draws, backend):
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(len(name)))
    p = probabilities(logits, **FILTERS[name])
    statistic, freedom = chi_square(drawn(logits, FILTERS[name], draws, backend), p)
    # Far out in its tail: the mean is `freedom`, the standard deviation is its root times the root of 2.
    assert statistic < freedom + 5 * math.sqrt(2 * freedom), f"{name}: {statistic:.1f} with {freedom} degrees of freedom"


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FILTERS)
def test_distribution(name, backend):
    check_distribution(name, 40_000, backend)


@pytest.mark.slow
@pytest.mark.parametrize("name", FILTERS)
def test_distribution_of_a_million_draws(name):
    check_distribution(name, 1_000_000, "cpp")


def test_the_distribution_test_can_fail():
    """Draws of another temperature, and of a filter that keeps one token too many, are found."""
    logits = 2 * torch.randn(VOCAB, generator=torch.Generator().manual_seed(1))
    tokens = drawn(logits, {"temperature": 1.05}, 40_000, "cpp")
    statistic, freedom = chi_square(tokens, probabilities(logits))
    assert statistic > freedom + 10 * math.sqrt(2 * freedom)
    with pytest.raises(AssertionError, match="exclude"):
        chi_square(drawn(logits, {"top_k": 21}, 40_000, "cpp"), probabilities(logits, top_k=20))


@pytest.mark.parametrize("backend", BACKENDS)
def test_seed_and_position_decide(backend):
    """Equal (seed, position) draw equal tokens wherever the row is; another seed or position draws independently."""
    logits = torch.zeros(1, 1000).expand(2000, -1)
    one = ik.sample(logits, seeds=torch.full((2000,), 3), positions=torch.full((2000,), 2**40), backend=backend)[0]
    assert (one == one[0]).all()
    both = [ik.sample(logits, seeds=torch.full((2000,), s), positions=torch.arange(2000) + at, backend=backend)[0]
            for s, at in ((3, 0), (4, 0), (3 + 2**32, 0), (3, 2**32))]
    for i, a in enumerate(both):
        for b in both[:i]:
            assert (a == b).sum() < 15  # 2 are expected


# ------------------------------------------------------------------------------------------- bits of log-probabilities
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("isa", sets())
@pytest.mark.parametrize("vocab", (1, 63, 64, 255, 256, 321, 5000))
def test_logprobs_are_those_of_linear_logprobs(vocab, isa, dtype, generator):
    """A head of one column makes logits without rounding: weight times 1. Extreme logits, and blocks of nothing but -inf."""
    logits = 6 * torch.randn(5, vocab, generator=generator)
    logits[1] *= 30
    logits[2, : vocab // 2] = -INF
    logits[3] = torch.where(torch.rand(vocab, generator=generator) < 0.9, logits[3] - 86, logits[3])
    logits = logits.to(dtype)
    with instruction_set(isa):
        for temperature in (1.0, 0.7, 0.013, 3.0):
            tokens, got, ids, best = ik.sample(logits, temperature=temperature, num_top=min(vocab, 4), **counters(5))
            for row in range(5):
                want = ik.linear_logprobs(torch.ones(1, 1), logits[row, :, None].float(), tokens[row: row + 1],
                                          temperature=temperature)
                assert torch.equal(got[row: row + 1], want), (row, temperature)
                tops = ik.linear_logprobs(torch.ones(ids.shape[1], 1), logits[row, :, None].float(), ids[row],
                                          temperature=temperature)
                assert torch.equal(best[row], tops), (row, temperature)
        greedy, at_one = ik.sample(logits, temperature=0)
        want = ik.linear_logprobs(torch.ones(1, 1), logits[0, :, None].float(), greedy[:1])
        assert torch.equal(at_one[:1], want)


def test_every_instruction_set_draws_the_same_bits(generator):
    if len(sets()) < 2:
        pytest.skip("one instruction set")
    op = OPS["sample"]
    for case in (c for c in op.workload.cases if c.kind in ("smoke", "edge")):
        for dtype in op.dtypes:
            sample = op.workload.sample(case, dtype, torch.device("cpu"), generator)
            results = []
            for isa in sets():
                with instruction_set(isa):
                    results.append(ik.sample(**sample.inputs, backend="cpp"))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True)), case


# ------------------------------------------------------------------------------------------------- ties and infinities
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("vocab", (7, 64, 200, 1000))
def test_greedy_takes_the_lowest_of_equal_ids(vocab, backend, generator):
    logits = torch.randint(-3, 1, (40, vocab), generator=generator).float()
    logits[0] = torch.where(torch.arange(vocab) % 2 == 0, 0.0, -0.0)
    tokens, _, ids, _ = ik.sample(logits, temperature=0, num_top=min(vocab, 6), backend=backend)
    for row in range(40):
        values = logits[row].tolist()
        assert tokens[row] == values.index(max(values))
        assert ids[row].tolist() == sorted(range(vocab), key=lambda i: -values[i])[: ids.shape[1]]  # sorted() is stable


@pytest.mark.parametrize("backend", BACKENDS)
def test_equal_logits_are_kept_together(backend):
    """Top-k, top-p and min-p keep or drop tokens of equal logits together."""
    logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0] + [-9.0] * 200]).expand(3000, -1)
    for options in ({"top_k": 2}, {"top_p": 0.6}, {"min_p": math.exp(-1.0) * 0.999}):
        tokens = ik.sample(logits, **counters(3000), **options, backend=backend)[0]
        assert set(tokens.tolist()) == {0, 1, 2, 3}, options


@pytest.mark.parametrize("backend", BACKENDS)
def test_masks_of_both_forms_agree(backend, generator):
    for vocab in (31, 64, 97, 1000):
        logits = torch.randn(20, vocab, generator=generator)
        words = torch.randint(-2**31, 2**31, (20, (vocab + 31) // 32), generator=generator).to(torch.int32)
        words[:, 0] |= 1
        packed = ik.sample(logits, **counters(20), allowed=words, return_filtered_logprob=True, backend=backend)
        plain = ik.sample(logits, **counters(20), allowed=unpacked(words, vocab), return_filtered_logprob=True, backend=backend)
        for a, b in zip(packed, plain, strict=True):
            assert torch.equal(a, b)
        assert unpacked(words, vocab).gather(1, packed[0][:, None]).all()
        one = unpacked(words, vocab)[:1].expand(20, -1)  # one mask for all rows
        assert torch.equal(ik.sample(logits, **counters(20), allowed=one, backend=backend)[0],
                           ik.sample(logits, **counters(20), allowed=one.contiguous(), backend=backend)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_one_finite_logit_is_certain(backend):
    logits = torch.full((3, 500), -INF)
    logits[torch.arange(3), torch.tensor([0, 333, 499])] = torch.tensor([-1e30, 0.0, 3e38])
    for options in ({}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 1.0}, {"temperature": 0}):
        tokens, logprobs, filtered = ik.sample(logits, **counters(3), return_filtered_logprob=True, backend=backend, **options)
        assert tokens.tolist() == [0, 333, 499] and not logprobs.any() and not filtered.any()


@pytest.mark.parametrize("top_k", (1, 2, 63, 64, 65, 700, 9999, 10000, 2**62))
def test_top_k_of_any_size(top_k, generator):
    """On either side of the number of blocks, where the bound from the blocks' largest logits ends."""
    for logits in (torch.randn(8, 10000, generator=generator), torch.randn(8, 10000, generator=generator).bfloat16(),
                   torch.zeros(8, 10000)):
        options = {**counters(8), "top_k": top_k, "top_p": 0.95, "return_filtered_logprob": True}
        got, want = (ik.sample(logits, **options, backend=backend) for backend in ("cpp", "reference"))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[2], want[2], rtol=1e-5, atol=1e-5)


# --------------------------------------------------------------------------------------------------------------- errors
LOGITS = torch.randn(3, 40)
ROWS = {"seeds": torch.arange(3), "positions": torch.arange(3)}


def spoilt(row, value, column=7):
    logits = LOGITS.clone()
    logits[row, column] = value
    return logits


def each(*values, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype)


FINITE = "sample: logits: expected finite numbers, or -inf, also {}, got NaN or infinity in row {}"
HEATED = "after the division by temperature"
NOTHING = "sample: logits: expected at least one token that is allowed and not -inf, got none in row {}"
CASES = [
    ({"logits": spoilt(1, NAN)}, ValueError, FINITE.format(HEATED, 1)),
    ({"logits": spoilt(2, INF)}, ValueError, FINITE.format(HEATED, 2)),
    ({"logits": spoilt(0, NAN), "temperature": 0.0}, ValueError, FINITE.format(HEATED, 0)),
    ({"logits": spoilt(0, 1e38), "temperature": 0.01}, ValueError, FINITE.format(HEATED, 0)),
    ({"logits": spoilt(0, 3e38), "bias_ids": each(7, dtype=torch.int64).expand(3, 1), "bias_values": torch.full((3, 1), 3e38)},
     ValueError, FINITE.format("with penalties and bias", 0)),
    ({"logits": torch.full((3, 40), -INF)}, ValueError, NOTHING.format(0)),
    ({"allowed": torch.arange(3)[:, None].expand(3, 40) != 1}, ValueError, NOTHING.format(1)),
    ({"allowed": torch.zeros(3, 2, dtype=torch.int32), "temperature": 0}, ValueError, NOTHING.format(0)),
    ({"logits": LOGITS.double()}, TypeError, "sample: logits: expected float32, bfloat16 or float16, got torch.float64"),
    ({"logits": LOGITS[:, :0]}, ValueError, "sample: logits: expected a last dimension from 1 to 2^31 - 1, got [3, 0]"),
    *(({"temperature": x}, ValueError, f"sample: temperature: expected 0 or a number from 1e-6 to 1e6, or a tensor, got {x!r}")
      for x in (-1.0, NAN, 1e-9, "a")),
    ({"temperature": each(1, 0, -0.5)}, ValueError,
     "sample: temperature: expected 0 or a number from 1e-6 to 1e6, got -0.5 in row 2"),
    ({"temperature": each(1, NAN, 1)}, ValueError,
     "sample: temperature: expected 0 or a number from 1e-6 to 1e6, got nan in row 1"),
    *(({"top_p": x}, ValueError, f"sample: top_p: expected a number above 0 and at most 1, or a tensor, got {x!r}")
      for x in (0.0, 1.5, -0.1, NAN)),
    ({"top_p": each(0.5, 1, 1.25)}, ValueError, "sample: top_p: expected a number above 0 and at most 1, got 1.25 in row 2"),
    ({"top_k": -1}, ValueError, "sample: top_k: expected an integer from 0 (all tokens) to 2^63 - 1, or a tensor, got -1"),
    ({"top_k": each(1, -2, 3, dtype=torch.int64)}, ValueError,
     "sample: top_k: expected 0 (all tokens) or more, got -2 in row 1"),
    ({"top_k": each(1, 2, 3)}, TypeError,
     "sample: top_k: expected a number, or a tensor of torch.int64 or torch.int32, got torch.float32"),
    ({"min_p": 1.1}, ValueError, "sample: min_p: expected a number from 0 to 1, or a tensor, got 1.1"),
    ({"repetition_penalty": 0.0}, ValueError,
     "sample: repetition_penalty: expected a number from 1e-6 to 1e6, or a tensor, got 0.0"),
    ({"presence_penalty": each(0, INF, 0)}, ValueError,
     "sample: presence_penalty: expected a finite number, got inf in row 1"),
    ({"token_ids": each([1], [40], [2], dtype=torch.int64)}, ValueError,
     "sample: token_ids: expected values from -1 to 39, got 40"),
    ({"token_ids": each([1], [2], dtype=torch.int64)}, ValueError, "sample: token_ids: expected shape [3, L], got [2, 1]"),
    ({"prompt_lengths": torch.arange(3)}, ValueError, "sample: prompt_lengths: expected None without token_ids, got a tensor"),
    ({"bias_ids": each([1], [-2], [2], dtype=torch.int32), "bias_values": torch.zeros(3, 1)}, ValueError,
     "sample: bias_ids: expected values from -1 to 39, got -2"),
    ({"bias_ids": each([1], [1], [2], dtype=torch.int32), "bias_values": each([0], [NAN], [0])}, ValueError,
     "sample: bias_values: expected finite numbers or -inf, got nan in row 1"),
    ({"bias_ids": each([1], [1], [2], dtype=torch.int32)}, ValueError,
     "sample: bias_values: expected a tensor with bias_ids, None without, got None"),
    ({"allowed": torch.ones(3, 39, dtype=torch.bool)}, ValueError,
     "sample: allowed: expected shape [3, 40] (one bool, or one bit of 32, for each logit), got [3, 39]"),
    ({"seeds": None}, ValueError,
     "sample: seeds: expected an int64 tensor of the leading dimensions of logits, unless temperature is 0, got None"),
    ({"positions": torch.arange(3.0)}, TypeError, "sample: positions: expected torch.int64, got torch.float32"),
    ({"num_top": 41}, ValueError, "sample: num_top: expected an integer from 0 to 40, got 41"),
    ({"return_filtered_logprob": 1}, TypeError, "sample: return_filtered_logprob: expected True or False, got 1"),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options,kind,message", CASES, ids=[message[:110] for *_, message in CASES])
def test_wrong_input(options, kind, message, backend):
    with pytest.raises(kind) as caught:
        ik.sample(**{"logits": LOGITS, **ROWS, **options}, backend=backend)
    assert type(caught.value) is kind and str(caught.value) == message


def test_every_weird_nan_is_found():
    """NaN with any payload, in whole blocks, single ones and the last columns: none draws a token."""
    for payload in (1, 2, 255, 0x3FFFFF, 0x400000, 0x400001, 0x7FFFFF, 0x4000FF):
        for column in (0, 63, 100, 299):
            for sign in (0, -2**31):
                logits = torch.zeros(2, 300)
                logits.view(torch.int32)[1, column] = (0x7F800000 | payload) + sign
                for isa in sets():
                    with instruction_set(isa), pytest.raises(ValueError, match="in row 1"):
                        ik.sample(logits, temperature=0, backend="cpp")
