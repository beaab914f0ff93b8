"""Under autocast every operator follows one rule (internlm2_kernels/_autocast.py), on every backend that runs here."""

import pytest
import torch
from shared import assert_bitwise, replaced, sample_of, smoke_cases

import internlm2_kernels as ik
from internlm2_kernels import OPS
from internlm2_kernels.testing import draw_upstream, flat, run

# Per operator the arguments that may differ in dtype under autocast: all are converted to the dtype that they promote to.
MIXED = {
    "rms_norm": ("x", "residual"), "swiglu": ("gate", "up"), "apply_rope": ("q", "k"),
    "focal_ranking_loss": ("chosen", "rejected"), "kl_penalty": ("logprobs", "ref_logprobs"), "gae": ("rewards", "values"),
    "ppo_policy_loss": ("logprobs", "old_logprobs", "advantages"), "ppo_value_loss": ("values", "old_values", "returns"),
    # a float32 head with 16-bit hidden states is accepted without autocast too
    "reward_loss": ("head_weight",), "reward_loss_from_last": ("head_weight",),
}
WIDE = {"cross_entropy", "focal_ranking_loss", "kl_penalty", "gae", "ppo_policy_loss", "ppo_value_loss", "log_barrier_penalty",
        "reward_loss", "reward_loss_from_last", "linear_cross_entropy", "linear_logprobs", "rope_table", "sample"}
BACKENDS = ("reference", "cpp")


def under(op, backend, dtype=torch.bfloat16):
    def call(**inputs):
        with torch.autocast("cpu", dtype=dtype):
            return op.public(**inputs, backend=backend)

    return call


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("other", (torch.bfloat16, torch.float16), ids=("bfloat16", "float16"))
@pytest.mark.parametrize("name", MIXED)
def test_mixed_dtypes_promote(name, other, backend, generator):
    """Under autocast one argument of MIXED may be in a 16-bit dtype and the rest in float32: the results are those of float32
    arguments, and each gradient has the dtype of its argument. Without autocast such a call raises an error.
    """
    op = OPS[name]
    case = next(c for c in smoke_cases(op) if name != "rms_norm" or c.dims.get("residual"))
    sample = sample_of(op, case, torch.float32, torch.device("cpu"), generator)
    for narrow in MIXED[name]:
        low = replaced(sample, **{narrow: sample.inputs[narrow].to(other)})
        wide = replaced(sample, **{narrow: low.inputs[narrow].float()})
        upstream = draw_upstream(op, wide, 1.0, generator)
        want = run(op, wide, backend, upstream)
        want = {n: v.to(other) if n == f"d_{narrow}" else v for n, v in want.items()}
        assert_bitwise(run(op, low, under(op, backend), upstream), want, narrow)
        with pytest.raises(TypeError, match=f"{name}: .*: expected"):
            run(op, low, backend, upstream)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", OPS)
def test_dtype_of_every_output(name, backend, generator):
    op = OPS[name]
    if name in ("adamw", "squared_norm"):
        pytest.skip("autocast changes nothing there")
    for dtype in op.dtypes[:2]:
        sample = sample_of(op, smoke_cases(op)[0], dtype, torch.device("cpu"), generator)
        if name == "paged_attention":  # the cache must have autocast's dtype: it is not cast
            sample = replaced(sample, **{n: sample.inputs[n].bfloat16() for n in ("k_cache", "v_cache")})
        expected = torch.float32 if name in WIDE else torch.bfloat16 if op.autocast else dtype
        outputs = dict(zip(op.outputs, flat(under(op, backend)(**sample.inputs)), strict=False))
        for output, value in outputs.items():
            if not value.is_floating_point():  # tokens
                assert value.dtype == torch.int64, output
                continue
            assert value.dtype == (torch.float32 if output == "lse" else expected), (output, value.dtype)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_float32_stream_stays_float32(backend, generator):
    """A float32 model under autocast: the residual is float32 while the linear layer's output is bfloat16."""
    x, residual = torch.randn(5, 64, generator=generator).bfloat16(), torch.randn(5, 64, generator=generator)
    for weight in (torch.ones(64), torch.ones(64, dtype=torch.bfloat16)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, stream = ik.rms_norm(x, weight, residual=residual, backend=backend)
        assert y.dtype == stream.dtype == torch.float32
        assert torch.equal(stream, x + residual)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_norms_weight_never_changes_the_dtype(backend, generator):
    x = torch.randn(5, 64, generator=generator)
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        for weight in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = ik.rms_norm(x.to(dtype), torch.full((64,), 0.5, dtype=weight), backend=backend)
            assert y.dtype == dtype
