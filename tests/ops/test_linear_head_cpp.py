"""The C++ linear heads with a loss, which process tokens in chunks: the boundaries between chunks, the memory that a call
takes, and that labels are checked before anything is written.
"""

import pytest
import torch
from memory import peak_extra
from shared import assert_bitwise

import internlm2_kernels as ik

pytestmark = pytest.mark.skipif(ik._registry._C is None, reason="needs the compiled library")
OPTIONS = (-100, 0.1, 1e-3, 0.0)  # ignore_index, label_smoothing, z_loss, softcap
NONE, MEAN = 0, 1


def ops(name):
    return getattr(torch.ops.internlm2, name).cpp


def head(generator, tokens, cols, vocab, dtype):
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    hidden, weight = draw(tokens, cols).to(dtype), (draw(vocab, cols) * cols**-0.5).to(dtype)
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("float32", "bfloat16"))
def test_a_token_has_its_bits_across_chunks(dtype, generator):
    """The first and the last token have the same bits in calls of 1 to 4096 tokens: in loss, lse and the gradient of hidden,
    which must not depend on the other tokens or on the chunk.
    """
    hidden, weight, labels = head(generator, 4096, 18, 70, dtype)

    def both(chosen):
        h, y = hidden[chosen], labels[chosen]
        loss, _, lse = ops("linear_cross_entropy_fwd")(h, weight, y, None, *OPTIONS, NONE, False)
        ones = torch.ones_like(loss)
        dhidden, _ = ops("linear_cross_entropy_bwd")(ones, h, weight, y, None, lse, *OPTIONS, NONE, True, False)
        return {"loss": loss, "lse": lse, "dhidden": dhidden}

    token = torch.tensor([4095])
    alone = both(token)
    for count in (2, 3, 17, 4096):
        others = torch.randperm(4095, generator=generator)[: count - 1]
        for place, chosen in ((0, torch.cat((token, others))), (-1, torch.cat((others, token)))):
            got = both(chosen)
            assert_bitwise({n: v[place][None] for n, v in got.items()}, alone, f"{count} tokens, place {place}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
def test_gradients_across_chunks(dtype, generator):
    """The gradients of several chunks of tokens, of which the last is incomplete, add up to float64's. Both plans are run:
    gradients within the forward (three matrix products), and a separate backward that recomputes the scores (four).
    """
    tokens = 1300
    hidden, weight, labels = head(generator, tokens, 33, 450, dtype)
    wide = [t.double().requires_grad_() for t in (hidden, weight)]
    want = ik.linear_cross_entropy(*wide, labels, label_smoothing=0.1, z_loss=1e-3, backend="reference")
    want.backward()
    one = ops("linear_cross_entropy_grad_fwd")(hidden, weight, labels, None, *OPTIONS, MEAN, False, True, True)
    _, _, lse = ops("linear_cross_entropy_fwd")(hidden, weight, labels, None, *OPTIONS, MEAN, False)
    unit = torch.full((), 64.0, dtype=lse.dtype)
    two = ops("linear_cross_entropy_bwd")(unit, hidden, weight, labels, None, lse, *OPTIONS, MEAN, True, True)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}[dtype]
    torch.testing.assert_close(one[0].double(), want.detach(), rtol=tolerance, atol=0)
    for got, factor in ((one[2:], 1), (two, 64)):
        for value, leaf in zip(got, wide, strict=True):
            worst = (value.double() / factor - leaf.grad).abs().max() / leaf.grad.abs().max()
            assert worst < tolerance, (dtype, factor, float(worst))


def test_memory_does_not_grow_with_tokens(generator):
    """In addition to the results the call takes one chunk of scores; the logits of 4,224 tokens alone would take 277 MB in
    float32.
    """
    vocab, cols, growth = 16384, 32, {}
    for tokens in (1056, 4224):
        hidden, weight, labels = head(generator, tokens, cols, vocab, torch.bfloat16)
        call = lambda: ops("linear_cross_entropy_grad_fwd")(hidden, weight, labels, None, *OPTIONS, MEAN, False, True, True)  # noqa: B023
        deterministic = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(False)  # that mode fills fresh memory, even pages never used
        try:
            call()
            results, growth[tokens] = peak_extra(call)
        finally:
            torch.use_deterministic_algorithms(deterministic, warn_only=True)
        growth[tokens] -= sum(t.numel() * t.element_size() for t in results)
    assert growth[4224] < 32 << 20 and growth[4224] < growth[1056] + (6 << 20), growth


@pytest.mark.parametrize("bad", (-1, 40, 2**31))
def test_labels_are_refused_before_anything_is_written(bad, generator):
    logits, labels = torch.randn(6, 40, generator=generator), torch.tensor([1, 2, 3, 4, bad, 5])
    before, lse = logits.clone(), torch.zeros(6)
    expected = f"ValueError: cross_entropy: labels: expected values from 0 to 39 or ignore_index, got {bad}"
    with pytest.raises(RuntimeError, match=expected):
        ops("cross_entropy_bwd_")(torch.ones(()), logits, labels, lse, *OPTIONS, MEAN)
    assert_bitwise({"logits": logits}, {"logits": before})
    hidden, weight, _ = head(generator, 6, 8, 40, torch.float32)
    with pytest.raises(ValueError, match="labels"):
        ik.linear_cross_entropy(hidden, weight, labels, backend="cpp")
    with pytest.raises(ValueError, match="tokens"):
        ik.linear_logprobs(hidden, weight, labels, backend="cpp")
