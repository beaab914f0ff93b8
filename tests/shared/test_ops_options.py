"""Every operator under torch.compile(fullgraph=True), with options that change from call to call and with symbolic sizes."""

import inspect

import parameters
import pytest
import torch
from shared import OPS, assert_bitwise, replaced, sample_of, smoke_cases

import internlm2_kernels as ik
from internlm2_kernels.testing import draw_upstream, run

pytest_generate_tests = parameters.pytest_generate_tests
NUMBERS = ("scale", "clip")  # numbers whose default is None
# The values of options that do not take (0.3, 0.2, 0.4), which all others are called with.
VALUES = {"base": (1e4, 2e4, 3e4), "betas": ((0.9, 0.95), (0.8, 0.9), (0.7, 0.99))}


def float_options(op):
    given = inspect.signature(getattr(ik, op.name)).parameters.values()
    return [p.name for p in given if isinstance(p.default, float) or p.name in (*NUMBERS, "betas")]


def drawn(op, device, generator):
    dtype = torch.bfloat16 if torch.bfloat16 in op.dtypes else torch.float32
    sample = sample_of(op, smoke_cases(op)[0], dtype, device, generator)
    return sample, draw_upstream(op, sample, 1.0, generator)


def compiled(op, **options):
    torch._dynamo.reset()
    public = op.public  # the property imports at its first use, which torch.compile cannot trace
    return torch.compile(lambda **inputs: public(**inputs), fullgraph=True, backend="aot_eager", **options)


def test_there_are_options():
    assert {"softcap", "temperature", "clip", "lam", "eps"} <= {name for op in OPS.values() for name in float_options(op)}


def test_dynamic(op, device, generator):
    """Compiled with dynamic=True, where sizes and numbers are symbolic, the function gives the bits of the eager call."""
    sample, upstream = drawn(op, device, generator)
    function = compiled(op, dynamic=True)
    assert_bitwise(run(op, sample, lambda **inputs: function(**inputs), upstream), run(op, sample, None, upstream), "dynamic")


def test_options_that_change(op, device, generator):
    """An option that changes during training, such as a clip or a temperature: from its second value on torch.compile makes it
    symbolic, and the results must keep the bits of the eager call.
    """
    sample, upstream = drawn(op, device, generator)
    for option in float_options(op):
        function = compiled(op)
        for value in VALUES.get(option, (0.3, 0.2, 0.4)):
            changed = replaced(sample, **{option: value})
            got = run(op, changed, lambda **inputs: function(**inputs), upstream)  # noqa: B023
            assert_bitwise(got, run(op, changed, None, upstream), f"{option} {value}")


def one_tensor_twice(name, x):
    """A loss as a function of x in which two arguments are the same tensor object."""
    other, mask, labels = x.detach().neg(), torch.ones_like(x, dtype=torch.bool), torch.arange(8, device=x.device)
    return {
        "ppo_value_loss": lambda x: ik.ppo_value_loss(x, other, other, mask, clip=0.2)[0],  # first epoch
        "ppo_value_loss, values": lambda x: ik.ppo_value_loss(x, x, other, mask)[0],
        "ppo_policy_loss": lambda x: ik.ppo_policy_loss(x, other, other, mask)[0],
        "ppo_policy_loss, logprobs": lambda x: ik.ppo_policy_loss(x, x, other, mask)[0],
        "linear_cross_entropy": lambda x: ik.linear_cross_entropy(x, x, labels),
        "linear_cross_entropy, none": lambda x: ik.linear_cross_entropy(x, x, labels, reduction="none").sum(),
        "linear_logprobs": lambda x: ik.linear_logprobs(x, x, labels).sum(),
        "kl_penalty": lambda x: ik.kl_penalty(x, x, estimator="k3").sum(),
        "focal_ranking_loss": lambda x: ik.focal_ranking_loss(x, x).sum(),
        "swiglu": lambda x: ik.swiglu(x, x).square().sum(),
        "rms_norm": lambda x: ik.rms_norm(x, x[0].detach(), residual=x)[0].square().sum(),
        "apply_rope": lambda x: ik.apply_rope(*[x.view(2, 1, 32)] * 2, *ik.rope_table(2, 32))[1].square().sum(),
        "flash_attention": lambda x: ik.flash_attention(other.view(1, 2, 1, 32), *[x.view(1, 2, 1, 32)] * 2).square().sum(),
    }[name]


@pytest.mark.parametrize("name", ("ppo_value_loss", "ppo_value_loss, values", "ppo_policy_loss", "ppo_policy_loss, logprobs",
                                  "linear_cross_entropy", "linear_cross_entropy, none", "linear_logprobs", "kl_penalty",
                                  "focal_ranking_loss", "swiglu", "rms_norm", "apply_rope", "flash_attention"))
def test_one_tensor_twice(name, device, generator):
    x = torch.randn(8, 8, generator=generator, device=device, requires_grad=True)
    function = one_tensor_twice(name, x)
    torch._dynamo.reset()
    losses = [f(x) for f in (torch.compile(function, fullgraph=True, backend="aot_eager"), function)]
    got, want = ({"loss": loss, "d_x": torch.autograd.grad(loss, x)[0]} for loss in losses)
    assert_bitwise(got, want)
