"""FusedAdamW on FSDP2's DTensor parameters and two gloo ranks: one norm, the steps of the unsharded run, state in checkpoints.
"""

import copy
import math

import interpreter
import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from internlm2_kernels import FusedAdamW

CLIP = 0.01


class Model(torch.nn.Module):
    """A model whose weights have rows that two ranks cannot divide evenly. One rank has no part of the last weight, a single
    row.
    """

    def __init__(self, dtype):
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        draw = lambda *shape: torch.nn.Parameter((torch.randn(*shape, generator=generator) / 4).to(dtype))
        self.a, self.gain, self.b = draw(7, 6), draw(7), draw(1, 7)

    def forward(self, x):
        return torch.tanh(x @ self.a.T) * self.gain @ self.b.T


def groups(model):
    return [{"params": [model.a, model.b]}, {"params": [model.gain], "weight_decay": 0.0, "lr": 0.05}]


def optimizer_of(model, **options):
    # With a tiny eps Adam's steps would hardly depend on the size of the gradients, and so not show whether they were clipped.
    return FusedAdamW(groups(model), lr=0.02, eps=1e-2, max_grad_norm=CLIP, **options)


def batch(step, rank, dtype):
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(2 * step + rank)).to(dtype)


def train(model, optimizer, steps, ranks, dtype, poison=None):
    """Takes one step for each batch. The loss is the mean over the batches of `ranks`: one rank for a sharded run, where FSDP
    takes the mean over the group, and all of them for an unsharded one.
    """
    norms = []
    for step in steps:
        optimizer.zero_grad()
        (sum(model(batch(step, rank, dtype)).square().mean() for rank in ranks) / len(ranks)).backward()
        if poison is not None:
            poison(model)
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def states(optimizer):
    whole = lambda t: t.to_local() if isinstance(t, DTensor) else t
    return [whole(value).clone() for state in optimizer.state.values() for value in state.values()]


def sharded_model(dtype, mesh):
    model = Model(dtype)
    fully_shard(model, mesh=mesh)
    return model


def check(rank, mesh, dtype, options):
    found = {}
    whole, sharded = Model(dtype), sharded_model(dtype, mesh)
    one, many = optimizer_of(whole, **options), optimizer_of(sharded, **options)
    norms = train(whole, one, range(4), (0, 1), dtype), train(sharded, many, range(4), (rank,), dtype)
    found["norms"] = max(abs(a / b - 1) for a, b in zip(*norms, strict=True))
    found["clipped"] = min(norms[0]) > CLIP
    pairs = [(p.detach(), q.detach().full_tensor()) for p, q in zip(whole.parameters(), sharded.parameters(), strict=True)]
    found["weights"] = max(float((p - q).abs().max() / p.abs().max()) for p, q in pairs)
    kinds = [(name, isinstance(value, DTensor), value.dtype) for state in many.state.values() for name, value in state.items()]
    found["state"] = sorted({(name, sharded, str(kind)) for name, sharded, kind in kinds})
    found["empty"] = many.state[sharded.b]["exp_avg"].to_local().numel()

    # Both ranks skip the step if a gradient is not finite on one of them.
    def poison(model):
        local = model.gain.grad.to_local()
        if rank == 1:
            local[0] = math.inf

    before, weights = states(many), [p.to_local().clone() for p in sharded.parameters()]
    train(sharded, many, [9], (rank,), dtype, poison)
    kept = zip(states(many) + [p.to_local() for p in sharded.parameters()], before + weights, strict=True)
    found["skipped"] = int(many.skipped), all(torch.equal(x, y) for x, y in kept)
    found["resumed"] = resume(rank, mesh, dtype, options, sharded, many)
    return found


def resume(rank, mesh, dtype, options, model, optimizer):
    """Whether a run resumed through a distributed checkpoint, or through the optimizer's own state, has the bits of one that
    was not interrupted.
    """
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    named = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    own, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    others = []
    for load in (lambda m, o: set_optimizer_state_dict(m, o, named), lambda m, o: o.load_state_dict(own)):
        other = sharded_model(dtype, mesh)
        other.load_state_dict(copy.deepcopy(weights))
        again = optimizer_of(other, **options)
        load(other, again)
        others.append((other, again))
    same = []
    for m, o in ((model, optimizer), *others):
        train(m, o, range(4, 7), (rank,), dtype)
    everything = lambda m, o: states(o) + [p.to_local() for p in m.parameters()]
    for m, o in others:
        pairs = zip(everything(m, o), everything(model, optimizer), strict=True)
        same.append(all(torch.equal(a, b) for a, b in pairs))
    return same


def bits(mesh):
    """Whether sharded weights equal the whole ones after steps with stochastic rounding, for shapes that the ranks cannot
    divide evenly.
    """
    found = {}
    for backend, last in (("reference", 9), ("cpp", 65_539), ("triton", 9)):
        shapes = (2, 512), (7, 6), (9, 5), (7,), (3, last)
        options = {"lr": 1e-2, "master_weights": False, "stochastic_rounding": True, "moment_dtype": torch.bfloat16,
                   "backend": backend}
        for dim in (0, 1):
            kept = [shape for shape in shapes if len(shape) > dim]
            whole = [torch.nn.Parameter(torch.ones(shape).bfloat16()) for shape in kept]
            split = lambda t, dim=dim: distribute_tensor(t.detach().clone(), mesh, [Shard(dim)])
            sharded = [torch.nn.Parameter(split(p)) for p in whole]
            optimizers = [FusedAdamW(params, **options) for params in (whole, sharded)]
            for _ in range(1 if backend == "triton" else 3):  # the interpreter takes seconds for a step
                for p, q in zip(whole, sharded, strict=True):
                    p.grad = torch.ones_like(p)
                    q.grad = split(p.grad)
                for optimizer in optimizers:
                    optimizer.step()
            got = [q.detach().full_tensor() for q in sharded]
            found[backend, dim] = [torch.equal(p, q) for p, q in zip(whole, got, strict=True)]
            halves = got[0].chunk(2, dim)
            found[backend, dim, "shared"] = float((halves[0] == halves[1]).float().mean())
    return found


CASES = {"float32": (torch.float32, {}), "bfloat16": (torch.bfloat16, {}),
         "stochastic": (torch.bfloat16, {"master_weights": False, "stochastic_rounding": True, "moment_dtype": torch.bfloat16})}


def _rank(rank, port, results):
    interpreter.install()
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    mesh = init_device_mesh("cpu", (2,))
    results[rank] = {name: check(rank, mesh, dtype, options) for name, (dtype, options) in CASES.items()}
    results[f"bits of {rank}"] = bits(mesh)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def everything():
    everything = run_ranks(_rank, 2)
    return everything


@pytest.fixture(scope="module")
def results(everything):
    return {rank: everything[rank] for rank in range(2)}


@pytest.mark.parametrize("case", CASES)
def test_sharded_steps_are_the_unsharded_ones(case, results):
    loose = {"float32": 1e-5, "bfloat16": 0.02, "stochastic": 0.05}[case]
    assert len(results) == 2
    for rank, found in ((rank, result[case]) for rank, result in results.items()):
        assert found["clipped"] and found["norms"] < max(loose, 1e-5) and found["weights"] < loose, found
        moments = "torch.bfloat16" if case == "stochastic" else "torch.float32"
        wanted = [("exp_avg", True, moments), ("exp_avg_sq", True, moments), ("step", False, "torch.float32")]
        assert found["state"] == sorted(wanted + [("master", True, "torch.float32")] * (case == "bfloat16"))
        assert found["empty"] == (7 if rank == 0 else 0)
        assert found["skipped"] == (1, True)


@pytest.mark.parametrize("backend", ("reference", "cpp", "triton"))
@pytest.mark.parametrize("rank", (0, 1))
def test_shards_round_as_the_whole_does(backend, rank, everything):
    """Weights and gradients are all 1, so that elements differ only by their random bits."""
    found = everything[f"bits of {rank}"]
    assert found[backend, 0] == [True] * 5, "rows have their places in the whole tensor"
    assert found[backend, 1].count(True) <= 1, "columns have numbers of their own"
    for dim in (0, 1):
        assert found[backend, dim, "shared"] < 0.8, "ranks share no bits"


@pytest.mark.parametrize("case", CASES)
def test_sharded_state_resumes_to_the_bit(case, results):
    for result in results.values():
        assert result[case]["resumed"] == [True, True]
