"""A test's processes of one `torch.distributed` group on this machine."""

import socket

import torch.multiprocessing as mp


def run_ranks(rank_main, count):
    """What rank_main(rank, port, results) put into `results` in each of `count` processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(rank_main, (port, results), nprocs=count)
        return dict(results)
