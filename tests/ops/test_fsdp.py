"""FSDP2 on two gloo ranks: sharded parameters give the gradients of the unsharded module."""

import copy

import torch
import torch.distributed as dist
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from internlm2_kernels import nn


class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp, self.last = nn.RMSNorm(16), nn.SwiGLU(16, 24), nn.RMSNorm(16)

    def forward(self, x):
        y, h = self.norm(x, x)
        return self.last(self.mlp(y), h)[0]


def _rank(rank: int, port: int, results) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.manual_seed(0)
    whole = Block()
    sharded = copy.deepcopy(whole)
    mesh = init_device_mesh("cpu", (2,))
    for module in (sharded.norm, sharded.mlp, sharded):
        fully_shard(module, mesh=mesh)
    batches = torch.randn(2, 6, 16)
    sharded(batches[rank]).square().mean().backward()
    (sum(whole(batch).square().mean() for batch in batches) / 2).backward()
    worst = max(float((p.grad.full_tensor() - q.grad).abs().max() / q.grad.abs().max())
                for p, q in zip(sharded.parameters(), whole.parameters(), strict=True))
    results[rank] = worst
    dist.destroy_process_group()


def test_gradients_under_fsdp2_equal_the_whole():
    results = run_ranks(_rank, 2)
    assert len(results) == 2 and max(results.values()) < 1e-5, results
