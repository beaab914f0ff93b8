"""A vocabulary sharded over two gloo ranks: loss and gradients are those of one process, within the error ladder."""

from importlib.util import find_spec

import interpreter
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from internlm2_kernels import OPS, linear_cross_entropy
from internlm2_kernels.distributed import vocab_parallel, vocab_parallel_linear_cross_entropy
from internlm2_kernels.testing import Draw, ladder, ladder_table
from internlm2_kernels.workloads import Sample

VOCAB = 131
ROWS = ((0, 50), (50, 131))  # uneven shards
OPTIONS = ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "return_z_loss": True}, {"softcap": 3.0, "reduction": "sum"},
           {"reduction": "none"}, {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "weighted": True},
           {"reduction": "none", "weighted": True, "z_loss": 1e-3, "return_z_loss": True}, {"all ignored": True}, {"tokens": 0})


def draw(options, dtype):
    """Inputs and upstream that are the same on both ranks."""
    generator = torch.Generator().manual_seed(5)
    tokens = options.get("tokens", 21)
    hidden = torch.randn(tokens, 24, generator=generator).to(dtype)
    weight = (2 * torch.randn(VOCAB, 24, generator=generator) * 24**-0.5).to(dtype)
    labels = torch.randint(VOCAB, (tokens,), generator=generator)
    labels[1::4] = -100
    if "all ignored" in options:
        labels[:] = -100
    keywords = {key: options[key] for key in ("label_smoothing", "z_loss", "return_z_loss", "softcap") if key in options}
    keywords["reduction"] = options.get("reduction", "mean")
    if "weighted" in options:
        keywords["token_weights"] = torch.rand(tokens, generator=generator)
    shape = (tokens,) if keywords["reduction"] == "none" else ()
    return {"hidden": hidden, "weight": weight, "labels": labels, **keywords}, torch.randn(shape, generator=generator)


def sharded(rank, inputs, upstream):
    """The results of the sharded call whose errors are compared with PyTorch's: the loss, the z-loss where it is returned,
    dhidden, and the whole dweight, gathered from both ranks.
    """
    begin, end = ROWS[rank]
    hidden, shard = inputs["hidden"].clone().requires_grad_(), inputs["weight"][begin:end].clone().requires_grad_()
    rest = {key: value for key, value in inputs.items() if key not in ("hidden", "weight")}
    result = vocab_parallel_linear_cross_entropy(hidden, shard, vocab_start=begin, vocab_size=VOCAB, **rest)
    loss, *z_loss = result if rest.get("return_z_loss") else (result,)
    assert not any(z.requires_grad for z in z_loss)
    loss.backward(upstream)
    dweight = torch.zeros(VOCAB, shard.shape[1], dtype=torch.float32)
    dweight[begin:end] = shard.grad.float()
    dist.all_reduce(dweight)
    losses = dict(zip(("loss", "z_loss"), (loss.detach(), *z_loss), strict=False))
    return losses | {"d_hidden": hidden.grad, "d_weight": dweight.to(shard.dtype)}


def _bad_label(rank):
    """Which tokens have NaN in loss and dhidden where some labels are out of range. It runs as on CUDA, where labels are not
    read before the kernels run, so that no error can be raised.
    """
    if find_spec("triton") is None:
        return None
    inputs, _ = draw({"tokens": 4}, torch.float32)
    begin, end = ROWS[rank]
    labels, nans = torch.tensor([1, VOCAB + 400, 100, -3]), {}
    for smoothing in (0.0, 0.1):
        hidden, shard = inputs["hidden"].clone().requires_grad_(), inputs["weight"][begin:end].clone().requires_grad_()
        losses, _ = vocab_parallel._Losses.apply(hidden, shard, labels, smoothing, 0.0, 0.0, begin, VOCAB, None, "triton")
        losses.sum().backward()
        nans[smoothing] = losses.isnan().tolist(), hidden.grad.isnan().all(1).tolist(), hidden.grad.isnan().any(1).tolist()
    return nans


def _ignored_and_not_finite(rank):
    """For several options, where an ignored row of hidden holds infinity or NaN: the largest difference between dhidden of the
    sharded call and of one process with the whole weight, and the latter's largest element.
    """
    begin, end = ROWS[rank]
    off = {}
    for bad in (float("inf"), float("nan")):
        for options in ({}, {"z_loss": 1e-2}, {"label_smoothing": 0.1}, {"z_loss": 1e-2, "softcap": 5.0, "weighted": True}):
            inputs, _ = draw(options, torch.float32)
            inputs["hidden"][1] = bad
            if "weighted" in options:
                inputs["token_weights"][2], inputs["hidden"][2] = 0, bad
            hidden, whole = (inputs.pop("hidden").requires_grad_(), inputs.pop("weight"))
            rest = {"labels": inputs.pop("labels"), **inputs}
            loss = vocab_parallel_linear_cross_entropy(hidden, whole[begin:end], vocab_start=begin, vocab_size=VOCAB, **rest)
            losses = loss, linear_cross_entropy(hidden, whole, **rest)
            got, want = (torch.autograd.grad(x, hidden)[0] for x in losses)
            off[f"{bad} {options}"] = float((got - want).abs().max()), float(want.abs().max())
    return off


def _rank(rank, port, results):
    interpreter.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    op, red, same = OPS["linear_cross_entropy"], [], []
    for dtype in (torch.float32, torch.bfloat16):
        for options in OPTIONS:
            inputs, upstream = draw(options, dtype)
            got = sharded(rank, inputs, upstream)
            rungs = ladder(op, [Draw(Sample(inputs, ("hidden", "weight")), got, {"loss": upstream})])
            if not all(r.ok for r in rungs):
                red.append(f"{dtype} {options}\n{ladder_table(rungs)}")
            other = got["loss"].clone()
            dist.broadcast(other, 0)
            same.append(torch.equal(other, got["loss"]))

    inputs, _ = draw({}, torch.float32)
    begin, end = ROWS[rank]
    arguments = dict(vocab_start=begin, vocab_size=VOCAB, ignore_index=-100)
    hidden, shard = inputs["hidden"].clone(), inputs["weight"][begin:end].clone().requires_grad_()
    vocab_parallel_linear_cross_entropy(hidden, shard, inputs["labels"], **arguments).backward()
    frozen = hidden.grad is None and shard.grad.abs().sum() > 0
    errors = []
    for change in ({"labels": inputs["labels"] + VOCAB}, {"vocab_start": begin + 100}, {"vocab_size": True},
                   {"backend": "reference"}):
        call = {"labels": inputs["labels"], **arguments, **change}
        try:
            vocab_parallel_linear_cross_entropy(hidden, shard, call.pop("labels"), **call)
        except ValueError as error:
            errors.append(str(error))
    uncovered = []
    for begin, end in ((0, 65 + rank), (10 * rank, 50 + 81 * rank), (60 * rank, 50 + 81 * rank), (0, VOCAB)):
        try:
            vocab_parallel_linear_cross_entropy(hidden, inputs["weight"][begin:end], inputs["labels"], vocab_start=begin,
                                                vocab_size=VOCAB)
        except ValueError as error:
            uncovered.append(str(error))
    try:
        vocab_parallel_linear_cross_entropy(hidden, shard, inputs["labels"], token_weights=torch.ones(3), **arguments)
    except ValueError as error:
        errors.append(str(error))
    results[rank] = {"red": red, "same": all(same), "frozen": bool(frozen), "errors": errors, "uncovered": uncovered,
                     "bad label": _bad_label(rank), "ignored": _ignored_and_not_finite(rank)}
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    return run_ranks(_rank, 2)


def test_two_ranks_are_one(results):
    assert len(results) == 2
    for rank, result in results.items():
        assert not result["red"], f"rank {rank}\n" + "\n".join(result["red"])
        assert result["same"] and result["frozen"]


def test_wrong_input_raises_on_every_rank_before_anything_is_sent(results):
    """Every rank raises: a rank that waited for one that raised would hang."""
    name = "vocab_parallel_linear_cross_entropy"
    for rank, result in results.items():
        smallest = VOCAB - (ROWS[rank][1] - ROWS[rank][0])
        assert len(result["errors"]) == 5
        assert result["errors"][0].startswith(f"{name}: labels: expected values from 0 to {VOCAB - 1} or ignore_index, got ")
        assert result["errors"][1] == (f"{name}: vocab_start: expected at most vocab_size - V_local = {smallest}, "
                                       f"got {ROWS[rank][0] + 100}")
        assert result["errors"][2] == f"{name}: vocab_size: expected an integer >= 0, got True"
        assert result["errors"][3] == f"{name}: backend: expected a compiled one, got 'reference'"
        assert result["errors"][4] == f"{name}: token_weights: expected the shape of labels, [21], got [3]"


def test_shards_that_do_not_cover_raise_on_every_rank(results):
    """Shards that do not divide the vocabulary raise an error on every rank: both starting at 0, an overlap, a gap, and the
    whole vocabulary on both ranks.
    """
    for result in results.values():
        assert len(result["uncovered"]) == 4
        for message in result["uncovered"]:
            assert f"vocab_start: expected the ranks' rows to follow each other from 0 to {VOCAB}, got [" in message


def test_an_ignored_row_may_hold_anything(results):
    for result in results.values():
        assert len(result["ignored"]) == 8
        for case, (off, size) in result["ignored"].items():
            assert size > 0.01 and off < 1e-5 * size, (case, off, size)


def test_a_bad_label_on_a_device_is_nan(results):
    """A token whose label is out of range has NaN as its loss and in its row of dhidden; all other tokens have none."""
    pytest.importorskip("triton")
    for result in results.values():
        for nans in result["bad label"].values():
            assert nans == ([False, True, False, True],) * 3
