"""What is special to linear: a row has the same bits in every batch and on every number of threads, shards of the sum merge to
the bits of the whole, float32 weights beside 16-bit inputs, gradients that nobody needs.
"""

import pytest
import torch
from cells import variants
from shared import instruction_set

import internlm2_kernels as ik
from internlm2_kernels import OPS

SETS = [isa for backend, isa in variants("cpu", OPS["linear"]) if backend == "cpp"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KINDS = [("cpp", isa) for isa in SETS] + [("triton", None)]


def draw(generator, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=generator).to(dtype)


def on(backend, isa, function):
    if isa is None:
        return function(backend)
    with instruction_set(isa):
        return function(backend)


def both(x, weight, dy):
    """y and dx of a call on each of the backends, as a function of (backend)."""
    def run(backend):
        leaf = x.detach().requires_grad_()
        y = ik.linear(leaf, weight, backend=backend)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "isa"), KINDS)
def test_a_row_has_its_bits_in_every_batch(backend, isa, dtype, generator):
    """y and dx of a row are the same alone, first, last and in the middle of batches around all sizes of tiles."""
    rows, cols, out = (500, 1090, 200) if backend == "cpp" else (140, 100, 70)
    x, dy = draw(generator, rows, cols, dtype=dtype), draw(generator, rows, out, dtype=dtype)
    weight = draw(generator, out, cols, dtype=dtype)
    y, dx = on(backend, isa, both(x, weight, dy))
    for count in (1, 2, 6, 7, 8, 9, 13, 64, 129) if backend == "cpp" else (1, 129):
        for first in (0, rows - count):
            part = slice(first, first + count)
            got = on(backend, isa, both(x[part], weight, dy[part]))
            assert torch.equal(got[0], y[part]) and torch.equal(got[1], dx[part]), (count, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "isa"), KINDS)
def test_the_number_of_pieces(backend, isa, dtype, generator):
    """By default there are as many as the docstring says, in y and in dx; other numbers give other bits."""
    for inner, pieces in ((512, 1), (1024, 2), (2048, 4), (4096, 8)):
        x, weight = draw(generator, 2, inner, dtype=dtype), draw(generator, 3, inner, dtype=dtype)
        run = lambda count, x=x, weight=weight: on(backend, isa, lambda backend: ik.linear(
            x, weight, pieces=count, out_dtype=torch.float32, backend=backend))
        assert torch.equal(run(None), run(pieces)) and not torch.equal(run(pieces), run(8 if pieces < 8 else 4))
        if backend == "cpp":  # a row of a batch has the bits of the row alone, which another kernel computes
            many = draw(generator, 23, inner, dtype=dtype)
            got = on(backend, isa, lambda backend, many=many, weight=weight: ik.linear(many, weight, backend=backend))
            one = on(backend, isa, lambda backend, many=many, weight=weight: ik.linear(many[:1], weight, backend=backend))
            assert torch.equal(got[:1], one), inner
        zero = torch.zeros(2, 3, dtype=dtype)
        _, dx = on(backend, isa, both(zero, weight.T.contiguous(), x))
        assert torch.equal(dx, on(backend, isa, lambda backend, x=x, weight=weight: ik.linear(x, weight, backend=backend)))


@pytest.mark.parametrize("isa", SETS)
def test_bits_do_not_depend_on_threads(isa, generator):
    x, weight, dy = draw(generator, 77, 300), draw(generator, 260, 300), draw(generator, 77, 260)
    results = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        with instruction_set(isa):
            y = ik.linear(*leaves, backend="cpp")
            results.append((y, *torch.autograd.grad(y, leaves, dy)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("ranks", (2, 4, 8))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("backend", "isa"), KINDS)
def test_shards_of_the_sum_have_the_bits_of_the_whole(backend, isa, dtype, ranks, generator):
    """Each rank holds a part of K and computes 8 / ranks pieces. Their float32 results, added in the same tree, are those of
    one rank."""
    cols = 1024 if backend == "cpp" else 512
    rows = 21 if backend == "cpp" else 9  # more than the kernel for few rows takes
    x, weight = draw(generator, rows, cols, dtype=dtype), draw(generator, 40, cols, dtype=dtype)

    def shards(backend):
        each = cols // ranks
        parts = [ik.linear(x[:, i : i + each], weight[:, i : i + each], out_dtype=torch.float32, pieces=8 // ranks,
                           backend=backend) for i in range(0, cols, each)]
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    whole = on(backend, isa, lambda backend: ik.linear(x, weight, out_dtype=torch.float32, pieces=8, backend=backend))
    assert torch.equal(on(backend, isa, shards), whole)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize(("backend", "isa"), KINDS)
def test_float32_weights_beside_16_bit_inputs(backend, isa, dtype, generator):
    """The weight is rounded as it is read: y and dx have the bits of a weight that was rounded before. dweight is float32 and
    not rounded, so it rounds to the other call's."""
    x, dy = draw(generator, 21, 75, dtype=dtype), draw(generator, 21, 33, dtype=dtype)
    wide, bias = draw(generator, 33, 75), draw(generator, 33)

    def run(weight, backend):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ik.linear(*leaves, backend=backend)
        return (y.detach(), *torch.autograd.grad(y, leaves, dy))

    got = on(backend, isa, lambda backend: run(wide, backend))
    plain = run(wide, "reference")
    torch.testing.assert_close(got[2], plain[2], rtol=1e-5, atol=1e-4)
    assert (plain[2] != plain[2].to(dtype).float()).any()
    want = on(backend, isa, lambda backend: run(wide.to(dtype), backend))
    assert got[2].dtype == torch.float32 and want[2].dtype == dtype and (got[2] != want[2].float()).any()
    assert torch.equal(got[0], want[0]) and torch.equal(got[1], want[1]) and torch.equal(got[2].to(dtype), want[2])
    assert got[3].dtype == torch.float32 and torch.equal(got[3], want[3])


@pytest.mark.parametrize("backend", ("cpp", "triton"))
def test_unrounded_sums(backend, generator):
    x, weight = draw(generator, 5, 40, dtype=torch.bfloat16), draw(generator, 12, 40, dtype=torch.bfloat16)
    wide = ik.linear(x, weight, out_dtype=torch.float32, backend=backend)
    assert wide.dtype == torch.float32 and torch.equal(wide.bfloat16(), ik.linear(x, weight, backend=backend))
    gold = x.double() @ weight.double().T
    assert (wide - gold).abs().max() < 1e-4 and (wide != wide.bfloat16().float()).any()


@pytest.mark.parametrize("isa", SETS)
@pytest.mark.parametrize(("dtype", "weight_dtype", "cols"), (
    (torch.bfloat16, torch.float32, 512), (torch.bfloat16, torch.bfloat16, 511), (torch.float32, torch.float32, 512)), ids=str)
def test_a_last_chunk_of_few_rows(isa, dtype, weight_dtype, cols, generator):
    """Rows are computed in chunks of nearly equal size. Numbers of rows whose last chunk is far smaller than the others."""
    x, weight = draw(generator, 20161, cols, dtype=dtype), draw(generator, 24, cols, dtype=weight_dtype)
    dy = draw(generator, 20161, 24, dtype=dtype)
    last = on("cpp", isa, both(x[-1:], weight, dy[-1:]))
    for rows in (4333, 8184, 20161):
        got = on("cpp", isa, both(x[-rows:], weight, dy[-rows:]))
        assert torch.equal(got[0][-1:], last[0]) and torch.equal(got[1][-1:], last[1]), rows


def test_empty_sums_and_rows(generator):
    """Without columns y is bias and residual, under any leading dimensions."""
    bias, residual = draw(generator, 4), draw(generator, 2, 3, 4)
    for backend in ("reference", "cpp", "triton"):
        empty = torch.zeros(2, 3, 0, requires_grad=True)
        y = ik.linear(empty, torch.zeros(4, 0), bias, residual=residual, backend=backend)
        assert torch.equal(y, bias + residual) and torch.autograd.grad(y.sum(), empty)[0].shape == (2, 3, 0)
        assert ik.linear(torch.zeros(2, 5), torch.zeros(0, 5), backend=backend).shape == (2, 0)


def test_residual_and_unrounded_sums_under_autocast(generator):
    x, weight, residual = draw(generator, 3, 8), draw(generator, 4, 8), draw(generator, 3, 4)
    with torch.autocast("cpu", torch.bfloat16):
        y = ik.linear(x, weight, residual=residual, out_dtype=torch.float32)
    assert torch.equal(y, ik.linear(x.bfloat16(), weight.bfloat16(), residual=residual, out_dtype=torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", SETS)
def test_the_heads_logits_are_linears(isa, dtype, generator):
    """The log-probability that `sample` reports for unrounded logits of `linear` has the bits of `linear_logprobs`."""
    for cols in (33, 1024, 2049, 4100):
        hidden, weight = draw(generator, 3, cols, dtype=dtype), (draw(generator, 130, cols) * cols**-0.5).to(dtype)
        with instruction_set(isa):
            logits = ik.linear(hidden, weight, out_dtype=torch.float32, backend="cpp")
            tokens, logprobs = ik.sample(logits, temperature=0.0, backend="cpp")
            assert torch.equal(logprobs, ik.linear_logprobs(hidden, weight, tokens, backend="cpp")), cols


def test_a_frozen_operand_is_not_saved(generator):
    """What is kept for the backward: x only for the gradient of the weight, the weight only for that of x."""
    x, weight = draw(generator, 4, 16), draw(generator, 8, 16)
    for needs_x, needs_weight in ((True, False), (False, True)):
        leaves = x.clone().requires_grad_(needs_x), weight.clone().requires_grad_(needs_weight)
        kept = []
        keep = lambda t, kept=kept: kept.append(tuple(t.shape)) or t
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
            y = ik.linear(*leaves, backend="cpp")
        assert kept == [(8, 16) if needs_x else (4, 16)]
        y.sum().backward()
        assert (leaves[0].grad is not None, leaves[1].grad is not None) == (needs_x, needs_weight)


def test_module_is_torchs(generator):
    ours, theirs = ik.nn.Linear(24, 10), torch.nn.Linear(24, 10)
    assert isinstance(ours, torch.nn.Linear)
    ours.load_state_dict(theirs.state_dict())
    x, residual = draw(generator, 2, 3, 24), draw(generator, 2, 3, 10)
    torch.testing.assert_close(ours(x), theirs(x))
    torch.testing.assert_close(ours(x, residual), theirs(x) + residual)


@pytest.mark.parametrize("rows", (1, 5, 600))
def test_views(rows, generator):
    """Rows of larger tensors, expanded rows and transposed tensors give what their copies give."""
    base, weight = draw(generator, rows, 3, 50), draw(generator, 20, 90)
    for x, w in ((base[:, 1], weight[:, 20:70]), (base[:, 1, :20], weight[:, 1:21]),
                 (base[:1, 0].expand(rows, 50), weight[:, :50]), (draw(generator, 50, rows).T, draw(generator, 50, 20).T)):
        assert torch.equal(ik.linear(x, w, backend="cpp"), ik.linear(x.contiguous(), w.contiguous(), backend="cpp"))
