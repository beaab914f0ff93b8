"""Tensors of more than 2^31 elements through the cpp operators of losses and rewards, one operator at a time; see large.py. The
large call has a power of two times the rows of the small one, so that their means differ by an exact factor.
"""

from dataclasses import dataclass, field

import pytest
import torch
from large import (
    COLS,
    ELEMENTS,
    PARTS,
    ROWS,
    TIMES,
    assert_adds_up,
    assert_repeats,
    covers,
    drawn,
    joined,
    near,
    need,
    repeated,
    same_bits,
)
from shared import OPS

import internlm2_kernels as ik
from internlm2_kernels.testing import run
from internlm2_kernels.workloads import Sample

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.usefixtures("as_it_comes")]


# ---------------------------------------------------------------------------------------------------- results row by row
@dataclass(frozen=True)
class Far:
    """The sizes for an operator that computes each row or element independently; `gib` is the memory that the results take."""

    op: str
    dims: dict
    gib: float
    times: int = PARTS
    shared: tuple[str, ...] = ()  # arguments without rows, whose gradients are sums over all rows
    options: dict = field(default_factory=dict)


BY_ROWS = [
    Far("cross_entropy", {"rows": ROWS, "cols": COLS}, 5, TIMES),
    Far("linear_cross_entropy", {"rows": ROWS, "cols": COLS, "vocab": 16}, 6, TIMES, ("weight",)),
    Far("linear_logprobs", {"rows": ROWS, "cols": COLS, "vocab": 16, "entropy": True}, 6, TIMES, ("weight",)),
    Far("focal_ranking_loss", {"rows": ELEMENTS}, 17),
    Far("log_barrier_penalty", {"rows": ELEMENTS}, 13),
    *(Far("kl_penalty", {"rows": ELEMENTS}, 17, options={"estimator": estimator}) for estimator in ("k1", "k2", "k3")),
]


@covers(*(far.op for far in BY_ROWS))
@pytest.mark.parametrize("far", BY_ROWS, ids=lambda far: " ".join((far.op, *far.options.values())))
def test_row_by_row(far, generator):
    need(far.gib)
    op = OPS[far.op]
    first, last = (Sample({**s.inputs, **far.options}, s.grad)
                   for s in drawn(far.op, far.dims, generator, shared=far.shared))
    large = joined(far.op, first, last, far.times)
    assert max(v.numel() for v in large.inputs.values() if isinstance(v, torch.Tensor)) > 2**31
    outputs = run(op, first, "cpp")
    up, last_up = ({n: size * torch.randn(v.shape, generator=generator) for n, v in outputs.items()}
                   for size in (1.0, far.times))
    want, want_last = run(op, first, "cpp", up), run(op, last, "cpp", last_up)
    got = run(op, large, "cpp", {n: repeated(up[n], far.times, last_up[n]) for n in up})
    for name in want:
        if name.removeprefix("d_") in far.shared:
            assert_adds_up(got[name], want[name], want_last[name], far.times, name)
        else:
            assert_repeats(got[name], want[name], want_last[name], name)


@covers("sample")
def test_sample(generator):
    need(5)
    dims = {"rows": ROWS, "cols": COLS, "temperature": "0.7", "filters": "numbers", "top": 2}
    first, last = drawn("sample", dims, generator)
    large = joined("sample", first, last, TIMES)
    assert large.inputs["logits"].numel() > 2**31
    want, want_last, got = (run(OPS["sample"], s, "cpp") for s in (first, last, large))
    for name in want:
        assert_repeats(got[name], want[name], want_last[name], name)


# ------------------------------------------------------------------------------------------ cross-entropy's other passes
def entropy_of(sample, logits, upstream, **options):
    leaf = logits.detach().requires_grad_()
    loss = ik.cross_entropy(leaf, sample.inputs["labels"], backend="cpp", **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]


def test_cross_entropy_mean(generator):
    """cross_entropy with reduction "mean": the pass that computes the loss and its gradient in the forward, and the pass that
    scales this gradient by the upstream gradient.
    """
    need(9)
    first, last = drawn("cross_entropy", {"rows": ROWS, "cols": COLS}, generator, 2.0, ("logits",))
    large = joined("cross_entropy", first, last, TIMES)
    loss, grad = entropy_of(large, large.inputs["logits"], torch.tensor(float(TIMES) / 2))
    small, last = (entropy_of(s, s.inputs["logits"], torch.tensor(0.5)) for s in (first, last))
    assert_repeats(grad, small[1], last[1])
    assert_adds_up(loss * TIMES, small[0], last[0], TIMES, "loss")


def test_cross_entropy_in_place(generator):
    """The gradient overwrites the logits, so the logits take real memory here."""
    need(5)
    first, last = drawn("cross_entropy", {"rows": ROWS, "cols": COLS}, generator)
    large = joined("cross_entropy", first, last, TIMES)
    options = {"reduction": "none", "inplace_backward": True}
    up, last_up = (torch.randn(ROWS, generator=generator) for _ in range(2))
    logits = large.inputs["logits"].clone()
    loss, grad = entropy_of(large, logits, repeated(up, TIMES, last_up), **options)
    assert grad.data_ptr() == logits.data_ptr()
    small, last = (entropy_of(s, s.inputs["logits"].clone(), u, **options) for s, u in ((first, up), (last, last_up)))
    for got, a, b in zip((loss, grad), small, last, strict=True):
        assert_repeats(got, a, b)


# --------------------------------------------------------------------------------------------------------- reward models
@covers("reward_loss", "reward_loss_from_last")
@pytest.mark.parametrize("op", ("reward_loss", "reward_loss_from_last"))
def test_rewards(op, generator):
    """38 sequences of 27 tokens, or 1026 last tokens, repeated. Hidden states and the upstream gradient of the rewards are
    small integers, so that the gradient of the weight is an exact sum and can be compared bit for bit.
    """
    need(5)
    packed = op == "reward_loss"
    parts = [size * torch.randint(-2, 3, (ROWS, COLS), generator=generator).bfloat16() for size in (1, 4)]
    weight = torch.randn(COLS, generator=generator) * COLS**-0.5
    up, last_up = (torch.randint(-1, 2, (ROWS // 27 if packed else ROWS,), generator=generator).float() for _ in range(2))
    def both(hidden, scale, up):
        leaves = hidden.detach().requires_grad_(), weight.clone().requires_grad_()
        where = (torch.arange(0, hidden.shape[0] + 1, 27, dtype=torch.int32),) if packed else ()
        loss, rewards = getattr(ik, op)(*leaves, *where, backend="cpp")
        dweight = torch.autograd.grad(rewards, leaves[1], up, retain_graph=True)[0]
        return loss.detach(), rewards.detach(), dweight, torch.autograd.grad((loss, rewards), leaves[0], (scale, up))[0]
    first, last = both(parts[0], torch.tensor(1.0), up), both(parts[1], torch.tensor(1.0), last_up)
    hidden = repeated(parts[0], TIMES, parts[1])
    assert hidden.numel() > 2**31
    loss, rewards, dweight, dhidden = both(hidden, torch.tensor(float(TIMES)), repeated(up, TIMES, last_up))
    assert_repeats(rewards, first[1], last[1], "rewards")
    assert_repeats(dhidden, first[3], last[3], "dhidden")
    assert_adds_up(loss * TIMES, first[0], last[0], TIMES, "loss")
    assert torch.equal(dweight, (TIMES - 1) * first[2] + last[2]) and last[2].any()  # integers below 2^24


# -------------------------------------------------------------------------------------------------------------------- PPO
def moments(parts, masks):
    """Mean and variance in float64 of the elements that the masks keep: PARTS - 1 copies of the first part, and the last part.
    """
    kept = [part.double()[mask] for part, mask in zip(parts, masks, strict=True)]
    weigh = lambda f: (PARTS - 1) * f(kept[0]).sum() + f(kept[1]).sum()
    count = weigh(torch.ones_like)
    mean = weigh(lambda x: x) / count
    return mean, weigh(lambda x: (x - mean).square()) / count


@covers("ppo_policy_loss", "ppo_value_loss")
@pytest.mark.parametrize("op, options, scaled", (
    ("ppo_policy_loss", {"clip": 0.2}, ("advantages",)),
    ("ppo_value_loss", {"clip": 0.2}, ("values", "old_values", "returns")),
    ("ppo_value_loss", {}, ("values", "old_values", "returns")),
), ids=("policy", "value, clipped", "value"))
def test_ppo(op, options, scaled, generator):
    """The last part has the same mask as the first, so that the large call has exactly PARTS times the small call's unmasked
    elements, and the two means differ by a known factor.
    """
    need(5)
    size = float(PARTS if op == "ppo_policy_loss" else PARTS**0.5)
    first, last = drawn(op, {"targets": ELEMENTS, **options}, generator, size, scaled, ("mask",))
    large = joined(op, first, last, PARTS)
    up = {"loss": torch.tensor(1.0)}
    results = [run(OPS[op], s, "cpp", up) for s in (first, last)]
    got = run(OPS[op], large, "cpp", {"loss": torch.tensor(float(PARTS))})
    d = f"d_{first.grad[0]}"
    assert large.inputs[first.grad[0]].numel() > 2**31
    assert_repeats(got[d], results[0][d], results[1][d], d)
    assert_adds_up(got["loss"] * PARTS, results[0]["loss"], results[1]["loss"], PARTS, "loss")
    for name in ("clip_fraction", "approx_kl"):
        if name in got:  # a mean over all parts, each of which counts the same
            near(got[name], ((PARTS - 1) * results[0][name].double() + results[1][name].double()) / PARTS, name, 0.0)
    if op == "ppo_value_loss":
        both, masks = (first.inputs, last.inputs), [s.inputs["mask"] for s in (first, last)]
        spread = [moments([f(i) for i in both], masks)[1] for f in
                  (lambda i: i["returns"].double(), lambda i: i["returns"].double() - i["values"].double())]
        near(got["explained_variance"], 1 - spread[1] / spread[0], "explained variance")


@covers("gae")
def test_gae(generator):
    """2^31 - 1 tokens, the most that cu_seqlens in int32 can count, in sequences of 513; the last one is shorter."""
    need(17)
    tokens = 2**31 - 1
    whole, rest = divmod(tokens, ELEMENTS)
    parts = [{"rewards": torch.randn(ELEMENTS, generator=generator).bfloat16(),
              "values": torch.randn(ELEMENTS, generator=generator).bfloat16(),
              "mask": torch.rand(ELEMENTS, generator=generator) < 0.7} for _ in range(2)]
    ends = torch.arange(0, tokens, 513)
    cu = torch.cat((ends, torch.tensor([tokens]))).to(torch.int32)
    both = lambda inputs, cu: ik.gae(**inputs, cu_seqlens=cu, gamma=0.99, lam=0.95, backend="cpp")
    got = both({name: repeated(value, whole + 1, parts[1][name])[:tokens] for name, value in parts[0].items()}, cu)
    first = both(parts[0], cu[: ELEMENTS // 513 + 1])
    last = both({name: value[:rest] for name, value in parts[1].items()}, cu[whole * ELEMENTS // 513:] - whole * ELEMENTS)
    for large, a, b in zip(got, first, last, strict=True):
        assert_repeats(large[: whole * ELEMENTS], a, a)
        assert b.any() and same_bits(large[whole * ELEMENTS:], b)
