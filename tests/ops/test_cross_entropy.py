"""What is special to the cross-entropies and log-probabilities: formulas by hand, ignored labels, bits at any place in a
batch.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from head_inputs import BACKENDS, NATIVE, draw, head
from shared import OPS, assert_bitwise, instruction_set

import internlm2_kernels as ik

ISAS = ("avx2", "avx512", "avx512_bf16", "amx")


def builds(op):
    """The builds of `op` for instruction sets that this processor has."""
    best = ISAS.index(ik._registry._C.best_cpu_isa())
    return [isa for isa in OPS[op].isas if ISAS.index(isa) <= best]


# ------------------------------------------------------------------------------------------------- formulas by hand
def by_hand(row, label, smoothing, z_loss, softcap):
    """Loss and gradient of one row of logits in plain Python."""
    capped = [softcap * math.tanh(x / softcap) if softcap else x for x in row]
    top = max(capped)
    lse = top + math.log(sum(math.exp(x - top) for x in capped))
    mean = sum(capped) / len(row)
    loss = (1 - smoothing) * (lse - capped[label]) + smoothing * (lse - mean) + z_loss * lse**2
    slopes = []
    for j, x in enumerate(capped):
        slope = math.exp(x - lse) * (1 + 2 * z_loss * lse) - (1 - smoothing) * (j == label) - smoothing / len(row)
        slopes.append(slope * (1 - (x / softcap) ** 2 if softcap else 1))
    return loss, slopes


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("options", ({}, {"label_smoothing": 0.2}, {"z_loss": 0.03}, {"softcap": 2.0},
                                     {"label_smoothing": 0.1, "z_loss": 0.01, "softcap": 5.0}), ids=str)
def test_loss_and_gradient_by_hand(backend, options, generator):
    dtype, tolerance = (torch.float32, 3e-6) if backend == "triton" else (torch.float64, 1e-13)
    logits = draw(generator, 4, 9, scale=2.0, dtype=dtype).requires_grad_()
    labels = torch.tensor([3, -100, 0, 8])
    smoothing, z_loss, softcap = (options.get(k, 0.0) for k in ("label_smoothing", "z_loss", "softcap"))
    rows = [by_hand(row, int(label), smoothing, z_loss, softcap) if label >= 0 else (0.0, [0.0] * 9)
            for row, label in zip(logits.double().tolist(), labels, strict=True)]
    losses, slopes = (torch.tensor(x, dtype=torch.float64) for x in zip(*rows, strict=True))
    for reduction, factor, want in (("none", 1, losses), ("sum", 1, losses.sum()), ("mean", 3, losses.sum() / 3)):
        loss = ik.cross_entropy(logits, labels, reduction=reduction, backend=backend, **options)
        (grad,) = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(loss.double(), want, rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(grad.double(), slopes / factor, rtol=tolerance, atol=tolerance)
    identity = torch.eye(9, dtype=dtype)  # with this weight the linear form has the logits as its hidden states
    linear = ik.linear_cross_entropy(logits, identity, labels, backend=backend, **options)
    (grad,) = torch.autograd.grad(linear, logits)
    torch.testing.assert_close(linear.double(), losses.sum() / 3, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(grad.double(), slopes / 3, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype,tolerance", ((torch.float32, 1e-4), (torch.bfloat16, 2**-8)), ids=("float32", "bfloat16"))
def test_a_certain_label_keeps_its_gradient(backend, dtype, tolerance):
    """A label of probability p = 0.96: in bfloat16 its gradient is -(1 - p) rounded once. Had p been rounded before, 1 - p
    would have lost most of its digits.
    """
    logits = torch.zeros(3, 129, dtype=dtype)
    logits[:, 5] = 8.0
    logits.requires_grad_()
    ik.cross_entropy(logits, torch.full((3,), 5), reduction="sum", backend=backend).backward()
    others = math.exp(-8) / (1 + 128 * math.exp(-8))
    torch.testing.assert_close(logits.grad[:, 7].float(), torch.full((3,), others), rtol=tolerance, atol=0)
    torch.testing.assert_close(logits.grad[:, 5].float(), torch.full((3,), -128 * others), rtol=tolerance, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_the_z_loss_apart(backend, reduction, generator):
    """return_z_loss gives the weighted term z lse^2 that the loss contains, reduced like the loss and without a gradient."""
    dtype, tolerance = (torch.float32, 3e-6) if backend == "triton" else (torch.float64, 1e-13)
    logits, labels = draw(generator, 6, 70, scale=3.0, dtype=dtype).requires_grad_(), torch.tensor([3, -100, 0, 69, 5, 8])
    weights = torch.tensor([1.0, 7.0, 0.5, 0.0, 2.0, 1.0], dtype=dtype)
    identity = torch.eye(70, dtype=dtype)  # with this weight the linear form has the logits as its hidden states
    options = dict(z_loss=0.03, label_smoothing=0.1, reduction=reduction, backend=backend)
    for counted, call in ((torch.ones(6), lambda **o: ik.cross_entropy(logits, labels, **options, **o)),
                          (torch.ones(6), lambda **o: ik.cross_entropy(logits, labels, inplace_backward=True, **options, **o)),
                          (weights, lambda **o: ik.linear_cross_entropy(logits, identity, labels, token_weights=weights,
                                                                        **options, **o))):
        counted = counted.double() * (labels != -100)
        each = counted * 0.03 * torch.logsumexp(logits.detach().double(), -1).square()
        want = each if reduction == "none" else each.sum() / (counted.sum() if reduction == "mean" else 1)
        loss, z_loss = call(return_z_loss=True)
        torch.testing.assert_close(z_loss.double(), want, rtol=tolerance, atol=tolerance)
        assert not z_loss.requires_grad and torch.equal(loss, call())
        with torch.no_grad():
            alone = call(return_z_loss=True)
        torch.testing.assert_close(alone[1], z_loss, rtol=tolerance, atol=tolerance)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: ik.cross_entropy(x, labels, return_z_loss=True, **options), fullgraph=True,
                             backend="aot_eager")
    for got, plain in zip(compiled(logits), ik.cross_entropy(logits, labels, return_z_loss=True, **options), strict=True):
        assert torch.equal(got, plain) and got.requires_grad == plain.requires_grad


@pytest.mark.parametrize("dtype,shift", ((torch.float32, 2.0**20), (torch.float64, 2.0**49)), ids=("float32", "float64"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shift_of_all_logits_changes_no_gradient(backend, dtype, shift, generator):
    """A constant added to all logits cancels in the softmax. The logits are multiples of 1/8, which stay exact under the shift,
    while lse is rounded to 1/8: the gradient must not be computed from the rounded lse.
    """
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("takes no float64")
    logits = (draw(generator, 6, 70, scale=24.0, dtype=dtype).round() / 8).requires_grad_()
    labels = torch.randint(70, (6,), generator=generator)
    for options in ({}, {"label_smoothing": 0.1}):
        for reduction in ("none", "sum"):
            losses = [ik.cross_entropy(x, labels, reduction=reduction, backend=backend, **options)
                      for x in (logits, logits + shift)]
            want, got = (torch.autograd.grad(loss.sum(), logits)[0] for loss in losses)
            torch.testing.assert_close(got, want, rtol=16 * torch.finfo(dtype).eps, atol=2 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", (math.nan, math.inf))
def test_an_ignored_row_takes_no_upstream(backend, bad, generator):
    """An upstream gradient of NaN or infinity does not reach an ignored row: its gradient is 0, although 0 times the upstream
    would be NaN. The other rows keep their gradients. The same holds for a token of weight 0.
    """
    hidden, weight, labels = head(generator)
    logits = draw(generator, 7, 40).requires_grad_()
    labels, upstream = labels % 40, torch.ones(7)
    weightless = ik.linear_cross_entropy(hidden, weight, labels.clone(), token_weights=torch.arange(7.0) - 3, reduction="none",
                                         backend=backend)
    labels[3] = -100
    losses = (ik.cross_entropy(logits, labels, reduction="none", backend=backend),
              ik.linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend))
    gradients = lambda: (*torch.autograd.grad(losses, (logits, hidden, weight), (upstream, upstream), retain_graph=True),
                         *torch.autograd.grad(weightless, (hidden, weight), upstream, retain_graph=True))
    want = gradients()
    upstream[3] = bad
    for got, right in zip(gradients(), want, strict=True):
        assert torch.equal(got, right)
    poisoned = torch.where(torch.arange(7)[:, None] == 3, bad, hidden.detach()).requires_grad_()
    for reduction in ("none", "mean"):
        loss = ik.linear_cross_entropy(poisoned, weight, labels.clamp(min=0), token_weights=(torch.arange(7.0) - 3).abs(),
                                       reduction=reduction, backend=backend)
        (dhidden,) = torch.autograd.grad(loss.sum(), poisoned)
        assert loss.isfinite().all() and dhidden.isfinite().all() and not dhidden[3].any(), reduction
    assert not want[0][3].any() and not want[1][3].any() and not want[3][3].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_vocabulary_and_large_logits(backend, generator):
    logits = draw(generator, 3, 70, scale=1e4)
    logits[:, 20:50] = -math.inf
    logits[2] = 0.0  # a row of equal logits
    logits.requires_grad_()
    loss = ik.cross_entropy(logits, torch.tensor([3, 60, 0]), reduction="none", backend=backend)
    torch.testing.assert_close(loss, F.cross_entropy(logits, torch.tensor([3, 60, 0]), reduction="none"), rtol=1e-6, atol=1e-3)
    loss.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[:2, 20:50].any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("none", "sum", "mean"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_all_labels_ignored(backend, reduction, dtype, generator):
    """Loss and gradients are 0 even for a mean, which would be 0 / 0; an ignored row may hold NaN."""
    hidden, weight, labels = head(generator, dtype=dtype)
    logits = draw(generator, 7, 40, dtype=dtype)
    logits[2, 3] = math.nan
    logits.requires_grad_()
    labels.fill_(-100)
    loss = ik.cross_entropy(logits, labels, reduction=reduction, backend=backend)
    linear = ik.linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend)
    (loss.sum() + linear.sum()).backward()
    for tensor in (loss, linear, logits.grad, hidden.grad, weight.grad):
        assert (tensor == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_token_weights_whose_sum_is_0(backend, reduction, generator):
    """Where the token weights add up to 0 the mean divides by 1 instead, in the loss and in the gradients."""
    hidden, weight, labels = head(generator, tokens=5)
    labels[4] = -100
    losses = ik.linear_cross_entropy(hidden, weight, labels, reduction="none", backend="reference")
    want = losses[0] - losses[1] + losses[2] - losses[3]
    loss = ik.linear_cross_entropy(hidden, weight, labels, token_weights=torch.tensor([1.0, -1, 1, -1, 3]),
                                   reduction=reduction, backend=backend)
    torch.testing.assert_close(loss, want, rtol=1e-4, atol=1e-5)
    for got, other in zip(*(torch.autograd.grad(x, (hidden, weight)) for x in (loss, want)), strict=True):
        torch.testing.assert_close(got, other, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_weights(backend, generator):
    hidden, weight, labels = head(generator)
    labels[3] = -100
    weights = torch.rand(7, generator=generator).requires_grad_()
    each = ik.linear_cross_entropy(hidden, weight, labels, reduction="none", backend=backend)
    got = ik.linear_cross_entropy(hidden, weight, labels, token_weights=weights, backend=backend)
    counted = labels != -100
    torch.testing.assert_close(got, (each * weights).sum() / weights[counted].sum())
    got.backward()
    assert weights.grad is None
    none = ik.linear_cross_entropy(hidden, weight, labels, token_weights=torch.zeros(7), backend=backend)
    hidden.grad = weight.grad = None
    none.backward()
    assert none == 0 and not hidden.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_logprobs_and_entropy(backend, generator):
    hidden, weight, tokens = head(generator)
    distribution = torch.distributions.Categorical(logits=hidden.double() @ weight.double().T / 0.6)
    logprobs, entropy = ik.linear_logprobs(hidden, weight, tokens, temperature=0.6, return_entropy=True, backend=backend)
    torch.testing.assert_close(logprobs, distribution.log_prob(tokens).float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy, distribution.entropy().float(), rtol=1e-5, atol=1e-5)
    loss = ik.linear_cross_entropy(hidden / 0.6, weight, tokens, reduction="none", backend=backend)
    torch.testing.assert_close(-logprobs, loss, rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------ a token's bits in any batch
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("op", ("cross_entropy", "linear_cross_entropy", "linear_logprobs"))
def test_a_token_has_its_bits_in_any_batch(op, dtype, generator):
    """A token's results have the same bits at the first and at the last place of a batch of 1, 2, 3, 17 or 4096 tokens."""
    cols, vocab = 40, 261
    hidden, weight = draw(generator, 4096, cols, dtype=dtype), draw(generator, vocab, cols, scale=0.3, dtype=dtype)
    logits = draw(generator, 4096 if op == "cross_entropy" else 1, vocab, scale=3.0, dtype=dtype)
    labels = torch.randint(vocab, (4096,), generator=generator)
    values = {"cross_entropy": lambda at: (ik.cross_entropy(logits[at], labels[at], reduction="none", backend="cpp"),),
              "linear_cross_entropy": lambda at: (
                  ik.linear_cross_entropy(hidden[at], weight, labels[at], reduction="none", backend="cpp"),),
              "linear_logprobs": lambda at: ik.linear_logprobs(hidden[at], weight, labels[at], return_entropy=True,
                                                               backend="cpp")}[op]
    for isa in builds(op):
        with instruction_set(isa):
            for token in (1234, 4095):
                alone = values(slice(token, token + 1))
                for count in (2, 3, 17, 4096):
                    others = [t for t in range(4096) if t != token][: count - 1]
                    for place, order in ((0, [token, *others]), (count - 1, [*others, token])):
                        got = values(torch.tensor(order))
                        assert_bitwise(dict(enumerate(v[place] for v in got)), dict(enumerate(v[0] for v in alone)),
                                       f"{isa} token {token} place {place} of {count}")


@pytest.mark.parametrize("backend", NATIVE)
def test_rows_of_words_that_are_no_label(backend, generator):
    """Rows of dweight that belong to no label are small compared with those of labels. In bfloat16 too, each row must be
    accurate relative to its own size.
    """
    hidden, weight, labels = head(generator, tokens=48, cols=64, vocab=300, dtype=torch.bfloat16)
    labels %= 20
    for reduction in ("mean", "none"):
        loss = ik.linear_cross_entropy(hidden, weight, labels, reduction=reduction, backend=backend)
        (got,) = torch.autograd.grad(loss.mean(), weight)
        wide = weight.detach().double().requires_grad_()
        (want,) = torch.autograd.grad(F.cross_entropy(hidden.detach().double() @ wide.T, labels), wide)
        error = (got.double() - want).norm(dim=1) / want.norm(dim=1)
        assert error.max() < 0.02, (reduction, float(error.max()), int(error.argmax()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("size", (1e20, 3e38))
def test_logits_whose_square_overflows_need_no_z_loss(size, backend):
    """Without a z-loss the square of the log-sum-exp has no influence, even where float32 does not hold it."""
    logits = torch.tensor([[size, 0.0, -size], [0.0, size, 1.0]], requires_grad=True)
    loss = ik.cross_entropy(logits, torch.tensor([0, 1]), backend=backend)
    (gradient,) = torch.autograd.grad(loss, logits)
    assert float(loss) == 0 and not gradient.any()
