"""Parameters of more than 2^31 elements through the cpp operators: heads of a large vocabulary, the optimizer; see large.py."""

from dataclasses import dataclass

import pytest
import torch
from large import COLS, ELEMENTS, PARTS, assert_adds_up, assert_repeats, covers, near, need, repeated, same_bits

import internlm2_kernels as ik
from internlm2_kernels.ops._philox import philox, stochastic_bfloat16
from internlm2_kernels.ops.adamw import STEP

WORDS, BLOCKS = 1536, 342  # the vocabulary is BLOCKS repeats of WORDS rows, each a whole number of the kernel's blocks

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("as_it_comes")]


# ------------------------------------------------------------------------------------------------- a large vocabulary
@dataclass(frozen=True)
class Head:
    """Four tokens and the two parts of a weight of more than 2^31 elements (see large.py), with the results to expect."""

    hidden: torch.Tensor
    parts: tuple[torch.Tensor, torch.Tensor]  # the rows of the weight: those that are repeated, and the last ones
    labels: torch.Tensor

    def size(self):
        """The largest sum of magnitudes of the terms of a logit. The terms may cancel, so it is the scale for the logits'
        errors.
        """
        return max(float((self.hidden.double().abs() @ part.double().abs().T).max()) for part in self.parts)

    def gold(self):
        """In float64: lse, the labels' logits and the probabilities of the two parts."""
        logits = [self.hidden.double() @ part.double().T for part in self.parts]
        sums = torch.stack((logits[0].logsumexp(-1) + torch.log(torch.tensor(BLOCKS - 1.0).double()),
                            logits[1].logsumexp(-1)), -1)
        assert (sums[:, 0] - sums[:, 1]).abs().max() < 5, "both parts must be seen"
        lse = sums.logsumexp(-1)
        row, far = self.labels % WORDS, self.labels >= (BLOCKS - 1) * WORDS
        label = torch.where(far, *(x.gather(1, row[:, None])[:, 0] for x in reversed(logits)))
        return lse, label, [(x - lse[:, None]).exp() for x in logits]


@pytest.fixture
def head(generator):
    draw = lambda rows, size: (size * torch.randn(rows, COLS, generator=generator)).bfloat16()
    hidden, parts = draw(4, 1), (draw(WORDS, 2 * COLS**-0.5), draw(WORDS, 4 * COLS**-0.5))
    return Head(hidden, parts, torch.tensor([5, BLOCKS // 2 * WORDS + 7, (BLOCKS - 1) * WORDS, BLOCKS * WORDS - 1]))


def assert_head_gradients(head, dhidden, dweight, slopes):
    """Checks the gradients of a loss whose derivative by the logit of token t and word j is slopes[t] * (p[t, j] - [j is t's
    label]), where p is the softmax of the logits.
    """
    _, _, parts = head.gold()
    by_row = [(p * slopes[:, None]).T @ head.hidden.double() for p in parts]  # without the labels' own terms
    gold = (BLOCKS - 1) * (parts[0] * slopes[:, None]) @ head.parts[0].double()
    gold += (parts[1] * slopes[:, None]) @ head.parts[1].double()
    everywhere = torch.ones(BLOCKS * WORDS, dtype=torch.bool)
    everywhere[head.labels] = False
    for t, j in enumerate(head.labels.tolist()):
        far = j >= (BLOCKS - 1) * WORDS
        gold[t] -= slopes[t] * head.parts[far][j % WORDS].double()
        near(dweight[j], by_row[far][j % WORDS] - slopes[t] * head.hidden[t].double(), f"dweight of label {t}")
    near(dhidden, gold, "dhidden", 0.0)
    blocks, kept = dweight.view(BLOCKS, WORDS, COLS), everywhere.view(BLOCKS, WORDS)
    for i in (0, BLOCKS - 1):
        near(blocks[i][kept[i]], by_row[i > 0][kept[i]], f"dweight, part {i}", 0.0)
    sample = blocks[1].contiguous()
    for i in range(BLOCKS - 1):
        if kept[i].all():
            assert same_bits(blocks[i], sample), f"dweight, repeat {i}"
        else:
            assert torch.equal(blocks[i][kept[i]], sample[kept[i]]), f"dweight, repeat {i}"


def test_linear_cross_entropy_of_a_large_weight(head):
    """The test takes 17 GiB, since the weight's gradient is summed in float32: 8 GiB in addition to the 4 GiB of the
    gradient.
    """
    need(17)
    hidden, weight = head.hidden.clone().requires_grad_(), repeated(head.parts[0], BLOCKS, head.parts[1]).requires_grad_()
    assert weight.numel() > 2**31
    loss = ik.linear_cross_entropy(hidden, weight, head.labels, backend="cpp")
    dhidden, dweight = torch.autograd.grad(loss, (hidden, weight), torch.tensor(2.0))
    lse, label, _ = head.gold()
    near(loss.detach(), (lse - label).mean(), "loss", head.size())
    assert_head_gradients(head, dhidden, dweight, torch.full((4,), 0.5, dtype=torch.float64))


def test_linear_logprobs_of_a_large_weight(head):
    need(17)
    hidden, weight = head.hidden.clone().requires_grad_(), repeated(head.parts[0], BLOCKS, head.parts[1]).requires_grad_()
    logprobs, entropy = ik.linear_logprobs(hidden, weight, head.labels, return_entropy=True, backend="cpp")
    up = torch.tensor([1.0, -0.5, 2.0, 0.25])
    dhidden, dweight = torch.autograd.grad(logprobs, (hidden, weight), up)
    lse, label, parts = head.gold()
    near(logprobs.detach(), label - lse, "logprobs", head.size())
    gold = -sum(times * (p * p.log()).sum(-1) for times, p in zip((BLOCKS - 1, 1), parts, strict=True))
    near(entropy.detach(), gold, "entropy", head.size())
    assert_head_gradients(head, dhidden, dweight, -up.double())


# -------------------------------------------------------------------------------------------------------------- optimizer
@covers("squared_norm")
def test_squared_norm(generator):
    need(1)
    first, last = (size * torch.randn(ELEMENTS, generator=generator).bfloat16() for size in (1.0, PARTS**0.5))
    large = repeated(first, PARTS, last)
    assert large.numel() > 2**31
    squares = [part.double().square().sum() for part in (first, last)]
    assert_adds_up(ik.squared_norm(large, backend="cpp"), *squares, PARTS, "one")
    assert_adds_up(ik.squared_norm([first, large], backend="cpp"), *squares, PARTS + 1, "list")


SEED, INDEX = 2**40 + 7, 5


def step(param, grad, master, exp_avg, exp_avg_sq, stochastic_rounding=False):
    """One step in place with betas of 0, which forgets the moments, so that every repeat may share their memory."""
    scalar = lambda value, dtype=torch.float32: torch.full((), value, dtype=dtype)
    STEP["cpp"]([param], [grad], [] if master is None else [master], [exp_avg], [exp_avg_sq], [scalar(2.0)],
                scalar(0, torch.int64), None, None, None, scalar(1e-2), 0.0, 0.0, 1e-8, 0.1, 0.0, stochastic_rounding, False,
                SEED, [INDEX])


def eighths(most, generator):
    return torch.randint(-most, most + 1, (ELEMENTS,), generator=generator) / 8


@covers("adamw")
def test_adamw(generator):
    """bfloat16 moments are rounded stochastically, with other random bits in each repeated part. The inputs are chosen so that
    the new moments need no rounding, and all repeats must be equal.
    """
    need(13)
    draw = lambda: {"param": torch.randn(ELEMENTS, generator=generator).bfloat16(),
                    "grad": eighths(8, generator).bfloat16(), "exp_avg": eighths(8, generator).bfloat16(),
                    "exp_avg_sq": (eighths(8, generator).abs() / 8).bfloat16()}
    first, last = draw(), draw()
    both = lambda inputs: ik.adamw(**inputs, step=3, betas=(0.5, 0.5), backend="cpp")
    small, small_last = both(first), both(last)
    exact = (first["exp_avg"].double() + first["grad"].double()) / 2
    assert torch.equal(small[1].double(), exact) and torch.equal(
        small[2].double(), (first["exp_avg_sq"].double() + first["grad"].double().square()) / 2), "no rounding was meant"
    large = {name: repeated(value, PARTS, last[name]) for name, value in first.items()}
    assert large["param"].numel() > 2**31
    for name, got, a, b in zip(("param", "exp_avg", "exp_avg_sq"), both(large), small, small_last, strict=True):
        assert_repeats(got, a, b, name)


def test_adamw_with_a_master(generator):
    """Parameter and master take 12 GiB; float32 moments would take 16 more if the repeats did not share them."""
    need(14)
    draw = lambda: [torch.randn(ELEMENTS, generator=generator) for _ in range(2)]
    parts = [(master.bfloat16(), grad.bfloat16(), master) for master, grad in (draw(), draw())]
    large = [repeated(a, PARTS, b) for a, b in zip(*parts, strict=True)]
    param, master = torch.empty_like(large[0]), large[2].clone()  # the step writes the parameter without reading it
    zeros = torch.zeros(ELEMENTS)
    step(param, large[1], master, repeated(zeros, PARTS, zeros), repeated(zeros, PARTS, zeros))
    for part, grad, wide in parts:
        step(part, grad, wide, zeros.clone(), zeros.clone())
    assert_repeats(param, parts[0][0], parts[1][0], "param")
    assert_repeats(master, parts[0][2], parts[1][2], "master")


def test_adamw_rounds_by_the_element(generator):
    """Stochastic rounding of the last part uses the random bits of its own element indices, which are beyond 2^31."""
    need(5)
    draw = lambda: (torch.randn(ELEMENTS, generator=generator).bfloat16(), eighths(8, generator).bfloat16())
    (first, grad), (last, last_grad) = draw(), draw()
    param, zeros = repeated(first, PARTS, last).clone(), torch.zeros(ELEMENTS)
    step(param, repeated(grad, PARTS, last_grad), None, repeated(zeros, PARTS, zeros), repeated(zeros, PARTS, zeros), True)
    for values, slope, at in ((first, grad, 0), (first, grad, PARTS - 2), (last, last_grad, PARTS - 1)):
        wide = values.float()
        step(wide, slope.float(), None, zeros.clone(), zeros.clone())
        e = torch.arange(at * ELEMENTS // 8, (at + 1) * ELEMENTS // 8)
        other = lambda value, e=e: torch.full_like(e, value)
        words = philox((e, other(0), other(4 * INDEX), other(3)), (SEED & 0xFFFFFFFF, SEED >> 32))
        random = torch.stack([part for word in words for part in (word & 0xFFFF, word >> 16)], 1).flatten()
        got, want = param[at * ELEMENTS: (at + 1) * ELEMENTS], stochastic_bfloat16(wide, random)
        assert same_bits(got, want), f"part {at}: {int((got != want).sum())} of {ELEMENTS} differ"
        assert not torch.equal(got, stochastic_bfloat16(wide, random.flip(0))), "the bits must matter"
