"""Small random inputs for the tests of cross-entropies and log-probabilities."""

import torch

BACKENDS = "reference", "cpp", "triton"
NATIVE = "cpp", "triton"


def draw(generator, *shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=generator)).to(dtype)


def head(generator, tokens=7, cols=24, vocab=131, dtype=torch.float32):
    """hidden and weight, which require gradients, and labels."""
    hidden = draw(generator, tokens, cols, dtype=dtype).requires_grad_()
    weight = draw(generator, vocab, cols, scale=2 * cols**-0.5, dtype=dtype).requires_grad_()
    return hidden, weight, torch.randint(vocab, (tokens,), generator=generator)
