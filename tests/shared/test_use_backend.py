"""`use_backend` blocks that end in any order, as those of several threads do."""

import itertools
import threading

import pytest
import torch

import internlm2_kernels as ik
from internlm2_kernels import OPS, _registry, use_backend

TENSOR = torch.ones(2, 8)


def chosen():
    return OPS["swiglu"].select(TENSOR, None)


@pytest.mark.parametrize("order", tuple(itertools.permutations(range(3))), ids=str)
def test_blocks_that_end_in_any_order_leave_nothing(order):
    """After each end the youngest block that is still open decides the backend; after the last end none is forced."""
    before = chosen()
    names = ("reference", "cpp", "reference")
    blocks = [use_backend(name) for name in names]
    for block, name in zip(blocks, names, strict=True):
        block.__enter__()
        assert chosen() == name
    left = list(range(3))
    for i in order:
        blocks[i].__exit__(None, None, None)
        left.remove(i)
        assert chosen() == (names[left[-1]] if left else before)
    assert _registry._entries == [] and chosen() == before


def test_one_object_may_open_several_blocks():
    """Inside one another, one after the other, and as a decorator."""
    before, block = chosen(), use_backend("reference")
    for _ in range(2):
        with block:
            with use_backend("cpp"), block:
                assert chosen() == "reference"
            assert chosen() == "reference"
        assert chosen() == before
    assert use_backend("reference")(chosen)() == "reference"
    assert _registry._entries == [] and chosen() == before


def test_threads(monkeypatch):
    before = _registry._forced

    def work(name):
        for _ in range(300):
            with use_backend(name):
                ik.swiglu(TENSOR)

    threads = [threading.Thread(target=work, args=(name,)) for name in ("reference", "cpp", "reference", "cpp")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _registry._forced == before and _registry._entries == []


def test_an_exception_ends_the_block():
    before = chosen()
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert chosen() == before
