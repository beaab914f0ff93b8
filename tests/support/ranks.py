"""Starts the processes of one `torch.distributed` group on this machine, for tests with several ranks."""

import socket

import torch.multiprocessing as mp


def run_ranks(rank_main, count):
    """Runs rank_main(rank, port, results) in `count` processes and returns what they stored in `results`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (port, results), nprocs=count)
        return dict(results)
