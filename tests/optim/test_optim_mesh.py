"""FusedAdamW on FSDP2 with tensor parallelism, a mesh of two times two gloo ranks: the norm, the decision to skip a step and
the random bits must be those of the unsharded model.
"""

import math

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from internlm2_kernels import FusedAdamW
from internlm2_kernels._shards import _elements_before

RANKS, CLIP = 4, 0.01
RANDOM = {"master_weights": False, "stochastic_rounding": True, "moment_dtype": torch.bfloat16, "backend": "cpp"}


class Model(torch.nn.Module):
    def __init__(self, fill=None):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.up, self.down = torch.nn.Linear(8, 16, bias=False), torch.nn.Linear(16, 8, bias=False)
        for p in self.parameters():
            p.data = torch.randn(p.shape, generator=generator) / 4 if fill is None else torch.full(p.shape, fill).bfloat16()

    def forward(self, x):
        return self.down(torch.tanh(self.up(x)))


def split_model(mesh, fill=None):
    model = parallelize_module(Model(fill), mesh["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return fully_shard(model, mesh=mesh["dp"])


def loss_of(model):
    return model(torch.randn(6, 8, generator=torch.Generator().manual_seed(5))).square().mean()


def locals_of(optimizer):
    parts = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    parts += [t for state in optimizer.state.values() for t in state.values()]
    return [t.to_local().clone() if isinstance(t, DTensor) else t.clone() for t in parts]


def steps_and_norms(rank, mesh):
    """Results of clipped steps of the sharded and of the whole model, then of one step with an infinite gradient on the last
    rank only, which all ranks must skip.
    """
    whole, split = Model(), split_model(mesh)
    one, many = (FusedAdamW(m.parameters(), lr=0.1, eps=1e-2, max_grad_norm=CLIP) for m in (whole, split))
    norms = []
    for _ in range(3):
        for model, optimizer in ((whole, one), (split, many)):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
        norms.append((float(one.grad_norm), float(many.grad_norm)))
    pairs = [(p.detach(), q.detach().full_tensor()) for p, q in zip(whole.parameters(), split.parameters(), strict=True)]
    before = locals_of(many)
    many.zero_grad()
    loss_of(split).backward()
    if rank == RANKS - 1:
        split.up.weight.grad.to_local()[0, 0] = math.inf
    many.step()
    kept = all(torch.equal(a, b) for a, b in zip(locals_of(many), before, strict=True))
    return {"norms": norms, "weights": max(float((p - q).abs().max()) for p, q in pairs), "skipped": (int(many.skipped), kept),
            "resumed": resumed(mesh, split, many), "kind": [type(p).__name__ for p in split.up.weight.placements]}


def resumed(mesh, split, optimizer):
    """Whether a distributed checkpoint restores the bits of the state, and the number of skipped steps that it restores."""
    named = get_optimizer_state_dict(split, optimizer)
    model = split_model(mesh)
    model.load_state_dict(split.state_dict())
    other = FusedAdamW(model.parameters(), lr=0.1, max_grad_norm=CLIP)
    set_optimizer_state_dict(model, other, named)
    same = all(torch.equal(a, b) for a, b in zip(locals_of(other), locals_of(optimizer), strict=True))
    return same, int(other.skipped), "skipped" in other.param_groups[0]


def bits(mesh):
    """Weights and gradients are all 1, so that elements differ only by their random bits."""
    whole, split = Model(1.0), split_model(mesh, 1.0)
    for model in (whole, split):
        optimizer = FusedAdamW(model.parameters(), lr=1e-2, **RANDOM)
        for _ in range(3):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            optimizer.step()
    found = {}
    for name in ("up", "down"):
        p, q = getattr(whole, name).weight.detach(), getattr(split, name).weight.detach().full_tensor()
        quarters = [half.chunk(2, 0) for half in q.chunk(2, 0 if name == "up" else 1)]
        parts = [part.flatten() for pair in quarters for part in pair]
        shared = [float((a == b).float().mean()) for i, a in enumerate(parts) for b in parts[:i]]
        found[name] = torch.equal(p, q), max(shared)
    return found


def refusals(mesh):
    """What happens with parameters of placement Partial and with shards of rows that do not follow each other, which must raise
    errors, and with gradients of placement Partial, which must be added up.
    """
    found, local = {}, torch.ones(4, 6)
    make = lambda *placements: torch.nn.Parameter(DTensor.from_local(local.clone(), mesh, placements))
    try:
        FusedAdamW([make(Partial(), Replicate())])
    except ValueError as error:
        found["partial"] = str(error)
    p = make(Replicate(), Shard(0))
    p.grad = DTensor.from_local(local.clone(), mesh, (Partial(), Shard(0)))
    optimizer = FusedAdamW([p])
    optimizer.step()
    found["norm"] = float(optimizer.grad_norm)
    strided = split_model(mesh).up.weight.placements[0]
    for options in ({}, RANDOM):
        spread = distribute_tensor(torch.ones(8, 6).bfloat16(), mesh, [strided, Replicate()])  # rows 0, 1, 4, 5 and 2, 3, 6, 7
        p = torch.nn.Parameter(spread)
        p.grad = torch.ones_like(spread)
        optimizer = FusedAdamW([p], **options)
        try:
            optimizer.step()
            found["spread"] = float(optimizer.grad_norm)
        except ValueError as error:
            found["refused"] = str(error), bool((p.to_local() == 1).all()) and not optimizer.state
    return found


def _rank(rank, port, results):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    results[rank] = steps_and_norms(rank, mesh) | {"bits": bits(mesh), "refusals": refusals(mesh)}
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def results():
    results = run_ranks(_rank, RANKS)
    assert len(results) == RANKS
    return results


def test_one_norm_and_the_whole_models_steps(results):
    for found in results.values():
        assert found["kind"] == ["_StridedShard", "Shard"]
        for whole, split in found["norms"]:
            assert whole > CLIP and abs(split / whole - 1) < 1e-5
        assert found["weights"] < 1e-5
    assert len({split for found in results.values() for _, split in found["norms"][:1]}) == 1, "ranks have one norm"


def test_all_ranks_skip_what_one_cannot_take(results):
    assert [found["skipped"] for found in results.values()] == [(1, True)] * RANKS


def test_checkpoints_keep_state_and_count(results):
    assert [found["resumed"] for found in results.values()] == [(True, 1, False)] * RANKS


def test_rows_round_as_the_whole_does_and_ranks_share_no_bits(results):
    for found in results.values():
        assert found["bits"]["up"][0], "rows have their places in the whole tensor"
        assert not found["bits"]["down"][0], "rows and columns have numbers of their own"
        assert all(shared < 0.8 for _, shared in found["bits"].values()), found["bits"]


def test_placements_that_are_added_up_or_refused(results):
    for found in (result["refusals"] for result in results.values()):
        assert found["partial"].startswith("FusedAdamW: params: expected DTensors that are sharded or replicated (")
        assert found["norm"] == pytest.approx(math.sqrt(2 * 24 * 4))  # gradients of 1 + 1 in two shards of 24 elements
        assert found["spread"] == pytest.approx(math.sqrt(48))
        message, untouched = found["refused"]
        assert message.startswith("FusedAdamW: params: expected shards of consecutive rows, ") and untouched


class Mesh:
    """Stands for a DeviceMesh: its shape and this rank's coordinate, from which the places of shards are computed."""

    def __init__(self, shape, coordinate):
        self.size, self.get_coordinate = shape.__getitem__, lambda: coordinate


@pytest.mark.parametrize("rows,tp,dp", ((16, 2, 2), (7, 2, 3), (11, 4, 3), (1, 2, 2), (23, 3, 5)))
def test_rows_that_ranks_share_unevenly(rows, tp, dp):
    """Rows are divided by tensor parallelism (tp) and each part again by data parallelism (dp), unevenly. The computed place of
    each shard must be where its rows begin in the whole; other ways of dividing are refused.
    """
    placements = torch.distributed.tensor.placement_types._StridedShard(0, split_factor=tp), Shard(0)
    places, parts = [], [part.chunk(dp) for part in torch.arange(rows).chunk(tp)]
    for j, part in enumerate(parts):
        for i, held in enumerate(part):
            mesh = Mesh((dp, tp), (i, j))
            first = _elements_before((rows, 5), (len(held), 5), mesh, placements, (0, 1))
            assert first == 5 * int(held[0])
            places += range(first, first + 5 * len(held))
            with pytest.raises(ValueError, match="expected shards of consecutive rows"):
                _elements_before((rows, 5), (len(held) + 1, 5), mesh, placements, (0, 1))
    assert sorted(places) == list(range(rows * 5))
