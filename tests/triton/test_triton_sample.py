"""Bad input of `sample` on a device: the row has no token, `check()` reports the argument, and other rows keep their bits."""

import math

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels._device_errors import error_word

pytest.importorskip("triton")
FWD = torch.ops.internlm2.sample_fwd.triton
NAN, INF = math.nan, math.inf


@pytest.fixture
def clean_word(device):
    word = error_word(torch.device(device.type, 0) if device.type == "cuda" else device)
    word.zero_()
    yield word
    word.zero_()


def call(logits, device, **given):
    """The registered pass with tensors for all options; `given` replaces some of them."""
    rows = logits.shape[0]
    each = {"temperature": torch.ones(rows), "top_k": torch.full((rows,), 9), "top_p": torch.full((rows,), 0.9),
            "min_p": torch.full((rows,), 0.01), "repetition_penalty": torch.full((rows,), 1.1),
            "presence_penalty": torch.zeros(rows), "frequency_penalty": torch.zeros(rows),
            "token_ids": torch.tensor([[1, -1]] * rows), "bias_ids": torch.tensor([[5]] * rows),
            "bias_values": torch.ones(rows, 1), "allowed": torch.ones(rows, logits.shape[1], dtype=torch.bool), **given}
    each = {name: value.to(device) for name, value in each.items()}
    options = [part for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty", "presence_penalty",
                                 "frequency_penalty") for part in (each[name], 0 if name == "top_k" else 0.0)]
    counter = torch.arange(rows, device=device)
    return FWD(logits.to(device), counter, counter, *options, each["token_ids"], None, each["bias_ids"], each["bias_values"],
               each["allowed"], 2, True)


def changed(value, row, wrong):
    value = value.clone()
    value[row] = wrong
    return value


ONES, LOGITS = torch.ones(3), torch.randn(3, 40, generator=torch.Generator().manual_seed(2))
BAD = [
    ("logits", {"logits": changed(LOGITS, (1, 4), NAN)}), ("logits", {"logits": changed(LOGITS, (1, 4), INF)}),
    ("logits", {"logits": changed(LOGITS, 1, -INF)}),
    ("logits", {"allowed": changed(torch.ones(3, 40, dtype=torch.bool), 1, False)}),
    ("temperature", {"temperature": changed(ONES, 1, -1.0)}), ("temperature", {"temperature": changed(ONES, 1, NAN)}),
    ("top_k", {"top_k": torch.tensor([3, -1, 3])}), ("top_p", {"top_p": changed(ONES, 1, 0.0)}),
    ("top_p", {"top_p": changed(ONES, 1, NAN)}), ("min_p", {"min_p": changed(ONES / 9, 1, 1.5)}),
    ("repetition_penalty", {"repetition_penalty": changed(ONES, 1, 0.0)}),
    ("presence_penalty", {"presence_penalty": changed(ONES, 1, INF)}),
    ("frequency_penalty", {"frequency_penalty": changed(ONES, 1, NAN)}),
    ("token_ids", {"token_ids": torch.tensor([[1, 2], [40, 2], [3, 3]])}),
    ("bias_ids", {"bias_ids": torch.tensor([[1], [-2], [3]])}),
    ("bias_values", {"bias_values": torch.tensor([[1.0], [NAN], [0.5]])}),
]


@pytest.mark.parametrize("argument,given", BAD, ids=[f"{name} {i}" for i, (name, _) in enumerate(BAD)])
def test_bad_rows_are_reported(argument, given, device, clean_word):
    given = dict(given)
    logits = given.pop("logits", LOGITS)
    got = call(logits, device, **given)
    good = {name: value[[0, 2]] for name, value in given.items()}
    with pytest.raises(ValueError, match=f"^sample: {argument}: expected"):
        ik.check()
    ik.check()
    assert got[0].tolist()[1] == -1 and all(x[1].isnan().all() for x in (got[1], got[3], got[4]))
    assert (got[0][[0, 2]] >= 0).all() and all(x[[0, 2]].isfinite().all() for x in (got[1], got[3], got[4]))
    want = call(logits[[0, 2]], device, **good)
    assert torch.equal(got[1][0], want[1][0]) and got[0][0] == want[0][0]  # row 0 has the same seed and position in both
    ik.check()
