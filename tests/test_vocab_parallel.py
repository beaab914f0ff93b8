"""A vocabulary on two gloo ranks: loss and gradients of the sharded head are those of one process, within the error ladder."""

import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from internlm2_kernels import OPS
from internlm2_kernels._registry import Sample
from internlm2_kernels.distributed import vocab_parallel_linear_cross_entropy
from internlm2_kernels.testing import ladder, ladder_table

VOCAB = 131
ROWS = ((0, 50), (50, 131))  # uneven shards
OPTIONS = ({}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"softcap": 3.0, "reduction": "sum"}, {"reduction": "none"},
           {"label_smoothing": 0.2, "z_loss": 1e-3, "softcap": 5.0, "weighted": True},
           {"reduction": "none", "weighted": True, "z_loss": 1e-3}, {"all ignored": True}, {"tokens": 0})


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
    keywords = {key: options[key] for key in ("label_smoothing", "z_loss", "softcap") if key in options}
    keywords["reduction"] = options.get("reduction", "mean")
    if "weighted" in options:
        keywords["token_weights"] = torch.rand(tokens, generator=generator)
    shape = (tokens,) if keywords["reduction"] == "none" else ()
    return {"hidden": hidden, "weight": weight, "labels": labels, **keywords}, torch.randn(shape, generator=generator)


def sharded(rank, inputs, upstream):
    """What the ladder looks at: the loss, dhidden and the whole dweight."""
    begin, end = ROWS[rank]
    hidden, shard = inputs["hidden"].clone().requires_grad_(), inputs["weight"][begin:end].clone().requires_grad_()
    rest = {key: value for key, value in inputs.items() if key not in ("hidden", "weight")}
    loss = vocab_parallel_linear_cross_entropy(hidden, shard, vocab_start=begin, vocab_size=VOCAB, **rest)
    loss.backward(upstream)
    dweight = torch.zeros(VOCAB, shard.shape[1], dtype=torch.float32)
    dweight[begin:end] = shard.grad.float()
    dist.all_reduce(dweight)
    return {"loss": loss.detach(), "d_hidden": hidden.grad, "d_weight": dweight.to(shard.dtype)}


def _rank(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    op, red, same = OPS["linear_cross_entropy"], [], []
    for dtype in (torch.float32, torch.bfloat16):
        for options in OPTIONS:
            inputs, upstream = draw(options, dtype)
            got = sharded(rank, inputs, upstream)
            rungs = ladder(op, Sample(inputs, ("hidden", "weight")), got, {"loss": upstream})
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
    results[rank] = {"red": red, "same": all(same), "frozen": bool(frozen), "errors": errors}
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        shared = manager.dict()
        mp.spawn(_rank, (port, shared), nprocs=2)
        return dict(shared)


def test_two_ranks_are_one(results):
    assert len(results) == 2
    for rank, result in results.items():
        assert not result["red"], f"rank {rank}\n" + "\n".join(result["red"])
        assert result["same"] and result["frozen"]


def test_wrong_input_raises_on_every_rank_before_anything_is_sent(results):
    """A rank that waits for one that has raised would hang."""
    name = "vocab_parallel_linear_cross_entropy"
    for rank, result in results.items():
        smallest = VOCAB - (ROWS[rank][1] - ROWS[rank][0])
        assert len(result["errors"]) == 4
        assert result["errors"][0].startswith(f"{name}: labels: expected values from 0 to {VOCAB - 1} or ignore_index, got ")
        assert result["errors"][1] == (f"{name}: vocab_start: expected at most vocab_size - V_local = {smallest}, "
                                       f"got {ROWS[rank][0] + 100}")
        assert result["errors"][2] == f"{name}: vocab_size: expected an integer >= 0, got True"
        assert result["errors"][3] == f"{name}: backend: expected a compiled one, got 'reference'"
