"""Every module and the optimizer can be pickled, saved and copied, and is freed when the last reference goes."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch

from internlm2_kernels import FusedAdamW, nn

MODULES = {
    "RMSNorm": lambda: nn.RMSNorm(8),
    "SwiGLU": lambda: nn.SwiGLU(8, 16),
    "RotaryEmbedding": lambda: nn.RotaryEmbedding(8, 16, scaling={"type": "linear", "factor": 2.0}, angles="float32"),
    "FlashAttention": lambda: nn.FlashAttention(causal=True, window=(4, 0)),
}


def saved(module):
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@torch.no_grad()
def result(module):
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator)
    if isinstance(module, nn.RotaryEmbedding):
        return torch.cat([t.flatten() for t in module(draw(2, 5, 3, 8), draw(2, 5, 1, 8))])
    if isinstance(module, nn.FlashAttention):
        return module(draw(1, 5, 2, 32), draw(1, 5, 1, 32), draw(1, 5, 1, 32)).flatten()
    return module(draw(3, 8)).flatten()


@pytest.mark.parametrize("again", (lambda m: pickle.loads(pickle.dumps(m)), saved, copy.deepcopy),
                         ids=("pickle", "torch.save", "deepcopy"))
@pytest.mark.parametrize("name", MODULES)
def test_a_copy_computes_the_same(name, again):
    module = MODULES[name]()
    assert torch.equal(result(again(module)), result(module))


@pytest.mark.parametrize("name", MODULES)
def test_a_deep_copy_shares_nothing(name):
    """A deep copy shares no memory with the original and does not keep it alive; moving one leaves the other unchanged."""
    module = MODULES[name]()
    tensors = [*module.parameters(), *module.buffers()]
    twin = copy.deepcopy(module)
    assert not {t.data_ptr() for t in tensors} & {t.data_ptr() for t in (*twin.parameters(), *twin.buffers())}
    watched, want = [weakref.ref(t) for t in tensors], result(module)
    del module, tensors
    gc.collect()
    assert all(ref() is None for ref in watched)
    assert torch.equal(result(twin), want)
    twin.to("meta")


@pytest.mark.parametrize("name", (*MODULES, "FusedAdamW"))
def test_freed_without_the_cycle_collector(name):
    def make():
        if name != "FusedAdamW":
            module = MODULES[name]()
            result(module).sum()
            return module
        parameter = torch.nn.Parameter(torch.ones(4))
        parameter.grad = torch.ones(4)
        optimizer = FusedAdamW([parameter])
        optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
        return optimizer

    make()  # modules that torch imports at a first use hold references for a while
    gc.collect()
    gc.disable()
    try:
        made = make()
        watched = weakref.ref(made)
        del made
        assert watched() is None
    finally:
        gc.enable()


# ------------------------------------------------------------------------------------------------- as torch.nn.RMSNorm
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16, torch.float64), ids=str)
@pytest.mark.parametrize("arguments", ((48,), ((6, 8),), ((6, 8), 1e-5), (48, 1e-6, False), ((2, 3, 8), None, False)), ids=str)
def test_rms_norm_is_a_drop_in_for_torchs(arguments, dtype, generator):
    """The same constructor, state and results; small inputs, for which eps matters, included."""
    ours, theirs = nn.RMSNorm(*arguments, dtype=dtype), torch.nn.RMSNorm(*arguments, dtype=dtype)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    if theirs.weight is not None:
        with torch.no_grad():
            theirs.weight.copy_(1 + 0.1 * torch.randn(theirs.weight.shape, generator=generator))
        ours.load_state_dict(theirs.state_dict())
    for size in (1.0, 1e-3):
        x = (size * torch.randn(5, *theirs.normalized_shape, generator=generator)).to(dtype)
        mine, other = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, want = ours(mine), theirs(other)
        tolerance = 2 * torch.finfo(dtype).eps
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)
        got.sum().backward(), want.sum().backward()
        scale = float(other.grad.abs().max())
        torch.testing.assert_close(mine.grad, other.grad, rtol=2 * tolerance, atol=8 * tolerance * scale)


def test_rms_norm_over_several_dimensions_with_a_residual(generator):
    module = nn.RMSNorm((3, 8))
    x, residual = torch.randn(5, 3, 8, generator=generator), torch.randn(5, 3, 8, generator=generator)
    y, stream = module(x, residual)
    assert torch.equal(stream, x + residual)
    torch.testing.assert_close(y, torch.nn.RMSNorm((3, 8))(x + residual))


@pytest.mark.parametrize("shape", ((5, 3, 7), (8,), (5, 8, 3)))
def test_rms_norm_names_a_wrong_shape(shape):
    with pytest.raises(ValueError, match=r"RMSNorm: x: expected last dimensions \[3, 8\], got"):
        nn.RMSNorm((3, 8))(torch.ones(shape))
