"""Starts the processes of one `torch.distributed` group on this machine, for tests with several ranks."""

import multiprocessing
import socket

import torch.multiprocessing as mp

# Ranks are forked from a server that has imported these once: in a new process the imports take ten times as long as the tests.
IMPORTED = ("torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch.distributed.checkpoint.state_dict",
            "torch._dynamo", "triton")


def run_ranks(rank_main, count):
    """Runs rank_main(rank, port, results) in `count` processes and returns what they stored in `results`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(list(IMPORTED))
    with mp.Manager() as manager:
        results = manager.dict()
        mp.start_processes(rank_main, (port, results), nprocs=count, start_method="forkserver")
        return dict(results)
