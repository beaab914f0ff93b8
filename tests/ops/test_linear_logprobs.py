"""linear_logprobs: whether a token is the arg-max, and the bits of a token at any place of any batch in Triton."""

import pytest
import torch
import torch.nn.functional as F
from shared import assert_bitwise

import internlm2_kernels as ik
from internlm2_kernels._registry import OPS

LOGPROBS, CROSS = OPS["linear_logprobs"], OPS["linear_cross_entropy"]
BACKENDS = ("reference", "cpp", "triton")


def usable(backend, device):
    if backend not in LOGPROBS.usable[device.type]:
        pytest.skip(f"no {backend} here")
    return backend


@pytest.fixture
def head(device, generator):
    def make(tokens, cols, vocab, dtype=torch.float32):
        draw = lambda *shape: torch.randn(*shape, generator=generator, device=device)
        return draw(tokens, cols).to(dtype), (draw(vocab, cols) * cols**-0.5).to(dtype)

    return make


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hits(backend, dtype, device, head):
    """`hits` says for each row whether its token has the largest logit. Every third row asks for the second-best token, the
    others for the best; the vocabulary has several blocks.
    """
    usable(backend, device)
    hidden, weight = head(40, 24, 1031, dtype)
    top = (hidden.double() @ weight.double().T).topk(2)
    best, second = top.indices.unbind(1)
    tokens = torch.where(torch.arange(40, device=device) % 3 == 0, second, best)
    distinct = top.values[:, 0] - top.values[:, 1] > 1e-4  # of float64 logits: closer ones may round to equal numbers
    assert distinct.sum() > 30
    weight.requires_grad_()
    logprobs, entropy, hits = ik.linear_logprobs(hidden, weight, tokens, temperature=0.7, return_entropy=True,
                                                 return_hits=True, backend=backend)
    assert hits.dtype == torch.bool and not hits.requires_grad and logprobs.requires_grad
    assert torch.equal(hits[distinct], (tokens == best)[distinct])
    plain = ik.linear_logprobs(hidden, weight, tokens, temperature=0.7, return_entropy=True, backend=backend)
    assert_bitwise({"logprobs": logprobs, "entropy": entropy}, dict(zip(("logprobs", "entropy"), plain, strict=True)))
    folded, same = ik.linear_logprobs(hidden.view(5, 8, -1), weight.detach(), tokens.view(5, 8), temperature=0.7,
                                      return_hits=True, backend=backend)
    assert folded.shape == (5, 8) and torch.equal(same, hits.view(5, 8))
    logprobs.sum().backward()
    assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_first_of_equal_logits_is_the_hit(backend, device):
    """Of tokens with equal logits only the first is a hit, whether the others lie in the same block of the vocabulary or in
    another one. A row of NaN has no hit.
    """
    usable(backend, device)
    weight = torch.zeros(2100, 16, device=device)
    weight[[300, 301, 2050]] = 1.0
    tokens = torch.tensor([300, 301, 2050, 0, 300, 0], device=device)
    hidden = torch.ones(6, 16, device=device)
    hidden[3], hidden[4:, 5] = 0, float("nan")  # all of row 3's logits are equal: its hit is token 0
    hits = ik.linear_logprobs(hidden, weight, tokens, return_hits=True, backend=backend)[1]
    assert hits.tolist() == [True, False, False, True, False, False]
    nothing = ik.linear_logprobs(hidden[:0], weight, tokens[:0], return_hits=True, backend=backend)[1]
    assert nothing.shape == (0,) and nothing.dtype == torch.bool


@pytest.mark.parametrize("entropy", (False, True))
@pytest.mark.parametrize("backend", BACKENDS)
def test_hits_compiled(backend, entropy, device, head):
    usable(backend, device)
    hidden, weight = head(9, 16, 300)
    tokens = (hidden @ weight.T).argmax(1)
    tokens[::2] = 7
    options = {"return_entropy": entropy, "return_hits": True, "backend": backend}
    torch._dynamo.reset()
    compiled = torch.compile(lambda h, w: ik.linear_logprobs(h, w, tokens, **options), fullgraph=True, backend="aot_eager")
    for grad in (False, True):
        leaves = [hidden.clone().requires_grad_(grad), weight.clone().requires_grad_(grad)]
        got, want = compiled(*leaves), ik.linear_logprobs(*leaves, tokens, **options)
        assert_bitwise(dict(enumerate(got)), dict(enumerate(want)))
        assert got[-1].any() and not got[-1].all()
        if grad:
            got[0].sum().backward()
            assert leaves[0].grad.any()


@pytest.mark.parametrize("counts", ((2, 3, 17, 150), pytest.param((4096,), marks=pytest.mark.slow)), ids=str)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_token_has_its_bits_in_any_batch(dtype, counts, device, generator, head):
    """In Triton a token has the same bits alone and as the first or last of 2 to 4096 tokens, which fill up to several tiles.
    The gradient of hidden is not compared: its product is computed by a library.
    """
    usable("triton", device)
    hidden, weight = head(4096, 18, 70, dtype)
    labels = torch.randint(70, (4096,), generator=generator, device=device)

    def both(chosen):
        x = hidden[chosen], weight, labels[chosen]
        loss, _, lse = CROSS.overloads["fwd"]["triton"](*x, None, -100, 0.1, 1e-3, 0.0, 0, False)
        rest = LOGPROBS.overloads["fwd"]["triton"](*x, 1.25, 0.0, 0, 70, True, True, True)
        return dict(zip(("loss", "lse", "logprobs", "its lse", "entropy", "hits", "sum"), (loss, lse, *rest), strict=True))

    token = torch.tensor([4095], device=device)
    alone = both(token)
    for count in counts:
        others = torch.randperm(4095, generator=generator, device=device)[: count - 1]
        for place, chosen in ((0, torch.cat((token, others))), (-1, torch.cat((others, token)))):
            got = both(chosen)
            assert_bitwise({n: v[place][None] for n, v in got.items()}, alone, f"{count} tokens, place {place}")


@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_certain_tokens_keep_their_digits(backend, device, generator):
    """Tokens of probability close to 1, with float32 losses of 1e-6 to 1e-3 and an lse of 20 to 70. A unit in the last place of
    that lse is as large as the loss, so the loss must not be computed as a difference from the rounded lse. The median errors
    of loss and gradient of hidden are at most those of log_softmax on the same logits.
    """
    usable(backend, device)
    draw = lambda *shape: torch.randn(*shape, generator=generator, device=device, dtype=torch.float64)
    weight, labels = draw(500, 64), torch.randint(500, (400,), generator=generator, device=device)
    sizes = torch.linspace(0.35, 0.7, 400, device=device, dtype=torch.float64)[:, None]
    wide = [t.float().double().requires_grad_() for t in (sizes * weight[labels] + 0.4 * draw(400, 64), weight)]
    gold = F.cross_entropy(wide[0] @ wide[1].T, labels, reduction="none")
    certain = (gold > 1e-6) & (gold < 1e-3)
    assert int(certain.sum()) > 100
    gold.sum().backward()

    def errors(form):
        x = [t.detach().float().requires_grad_() for t in wide]
        loss = form(*x)
        loss.sum().backward()
        row = (x[0].grad - wide[0].grad)[certain].norm(dim=1) / wide[0].grad[certain].norm(dim=1)
        return (loss.double() - gold).abs()[certain].div(gold[certain]).median() if loss.dim() else None, row.median()

    eager = errors(lambda h, w: F.cross_entropy(F.linear(h, w), labels, reduction="none"))
    options = {"backend": backend}
    for form in (lambda h, w: ik.linear_cross_entropy(h, w, labels, reduction="none", **options),
                 lambda h, w: ik.linear_cross_entropy(h, w, labels, reduction="sum", **options),
                 lambda h, w: -ik.linear_logprobs(h, w, labels, **options)):
        for mine, theirs in zip(errors(form), eager, strict=True):
            assert mine is None or mine <= 1.25 * theirs, (float(mine), float(theirs))
