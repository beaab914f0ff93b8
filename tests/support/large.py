"""Helpers for the tests beyond 2^31 elements. A large tensor consists of `times` - 1 copies of some rows, followed by other
rows that lie beyond 2^31 elements (see `repeated`). An input takes only the memory of these two parts; results take real
memory. Results by row must have the bits of two small calls, one for each part. Sums and means must equal what the parts add up
to. The tolerance, two roundings (`testing.EPS_TERMS`) of the sum of magnitudes, is smaller than what the last rows contribute,
so that a call that leaves them out fails.
"""

import ctypes
import mmap
import os

import pytest
import torch
from shared import OPS, sample_of

from internlm2_kernels.testing import EPS_TERMS
from internlm2_kernels.workloads import Case, Sample

# The small number of rows is no power of two, so that an index that wrapped around would find another row's numbers.
ROWS, COLS, TIMES = 1026, 4096, 512  # for matrices: 2^31 + 2^22 elements
ELEMENTS, PARTS = 513 * 4096, 1024  # for vectors: the same number of elements
COVERED: set[str] = set()  # the operators that have such a test


def covers(*operators):
    """Decorator that records which operators a test beyond 2^31 elements covers."""
    COVERED.update(operators)
    return lambda test: test


libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long)
libc.memcmp.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
MAP_FIXED = 0x10


def repeated(first: torch.Tensor, times: int, last: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of `times` - 1 copies of `first` followed by `last`. Where each fills whole pages it takes the memory
    of the two only; a kernel may then write to it only what it would write to every copy.
    """
    size = first.numel() * first.element_size()
    assert first.shape == last.shape and first.dtype == last.dtype, (first.shape, last.shape)
    if size % mmap.PAGESIZE:
        return torch.cat((*[first] * (times - 1), last))
    pages = os.memfd_create("repeated")
    os.ftruncate(pages, 2 * size)
    both = torch.frombuffer(mmap.mmap(pages, 2 * size), dtype=torch.uint8).view(2, size)
    for row, value in zip(both, (first, last), strict=True):
        row.copy_(value.contiguous().view(torch.uint8).view(-1))
    reserved = torch.frombuffer(mmap.mmap(-1, times * size, flags=mmap.MAP_PRIVATE), dtype=torch.uint8)  # freeing it unmaps all
    for i in range(times):
        at = reserved.data_ptr() + i * size
        got = libc.mmap(at, size, mmap.PROT_READ | mmap.PROT_WRITE, mmap.MAP_SHARED | MAP_FIXED, pages,
                        size if i == times - 1 else 0)
        assert got == at, os.strerror(ctypes.get_errno())
    os.close(pages)
    return reserved.view(first.dtype).view(times * first.shape[0], *first.shape[1:])


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two contiguous tensors have equal bits. It runs at the speed of memory, where torch.equal takes seconds for a
    GiB.
    """
    assert a.is_contiguous() and b.is_contiguous() and a.dtype == b.dtype and a.shape == b.shape, (a.shape, b.shape)
    return libc.memcmp(a.data_ptr(), b.data_ptr(), a.numel() * a.element_size()) == 0


def need(gib: float) -> None:
    """Skips the test unless that much memory is free."""
    with open("/proc/meminfo") as file:
        free = next(int(line.split()[1]) for line in file if line.startswith("MemAvailable")) / 2**20
    if free < gib:
        pytest.skip(f"takes {gib} GiB of memory, {free:.0f} are free")


def joined(op, first: Sample, last: Sample, times: int) -> Sample:
    """The large sample: arguments with one entry for each row are repeated (`repeated`), the others are those of `first`."""
    same_rows = lambda v: isinstance(v, torch.Tensor) and v.dim() > 0
    batched = OPS[op].workload.batched
    inputs = {name: repeated(value, times, last.inputs[name]) if name in batched and same_rows(value) else value
              for name, value in first.inputs.items()}
    return Sample(inputs, first.grad)


def drawn(op, dims, generator, last_size=1.0, scaled=(), shared=(), dtype=torch.bfloat16):
    """Two samples: the rows to repeat, and the last rows. In the latter, arguments in `scaled` are multiplied by `last_size`,
    and those in `shared` are the first sample's.
    """
    first, last = (sample_of(OPS[op], Case("large", dims), dtype, "cpu", generator) for _ in range(2))
    inputs = {name: first.inputs[name] if name in shared else value * last_size if name in scaled else value
              for name, value in last.inputs.items()}
    return first, Sample(inputs, last.grad)


def assert_repeats(got, first, last, label=""):
    """`got` must consist of copies of `first` with `last` at its end, bit for bit."""
    rows, times = first.shape[0], got.shape[0] // first.shape[0]
    assert got.shape[0] == rows * times and got.dtype == first.dtype, (label, got.shape)
    for want in (first, last):
        assert want.isfinite().all() and want.any(), label
    for i in range(times):
        assert same_bits(got[i * rows: (i + 1) * rows], last if i == times - 1 else first), f"{label}, repeat {i}"


def assert_adds_up(got, first, last, times, label=""):
    """`got` must be (times - 1) * `first` + `last`, up to the rounding of the results."""
    terms = (times - 1) * first.double(), last.double()
    bound = EPS_TERMS * torch.finfo(got.dtype).eps * sum(term.abs() for term in terms).max()
    assert terms[1].abs().max() > 16 * bound, f"{label}: the last rows must be seen"
    error = (got.double() - sum(terms)).abs().max()
    assert error <= bound, f"{label}: {error:.3g} off, at most {bound:.3g}"


def near(got, gold, label, terms=1.0):
    """`got` must be within two roundings of `gold`. A rounding is eps times `terms`, the size of the terms that were added up,
    or times gold's largest element where that is larger.
    """
    bound = EPS_TERMS * torch.finfo(got.dtype).eps * max(float(gold.abs().max()), terms)
    error = float((got.double() - gold).abs().max())
    assert error <= bound, f"{label}: {error:.3g} off, at most {bound:.3g}"
