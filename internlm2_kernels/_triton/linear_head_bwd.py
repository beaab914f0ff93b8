"""The backward of linear_cross_entropy and linear_logprobs. Forward: linear_head.py.

The backward works on chunks of rows and has two steps:
1. d loss / d logits of the chunk, rounded to the dtype of the inputs. `gradient_of_logits` computes the logits again from
   the saved log-sum-exp. If loss and gradient are wanted in one call, the forward stores exp(logit - maximum of the tile)
   instead, and the memory-bound kernel of `gradient_of_stored` converts it in place; this saves one of four matrix products.
   With a soft-cap the forward stores logit - maximum, because the derivative of the cap needs the logit.
2. The products with weight, for dhidden, and with hidden, for dweight. cuBLAS (torch.mm) computes both for float32, and
   dhidden for bfloat16. The kernel here computes the others: it accumulates the chunks of dweight in float32, and it scales
   the products of float16.

The chunk size follows from CHUNK_BYTES and the number of rows alone. float16 cannot represent a gradient that has been divided
by thousands of tokens. For float16 the coefficients of a chunk (see below) are therefore divided by the largest of their
absolute values, the peak, and the products are multiplied by the peak again in float32.

Coefficients: d loss / d logit_j = p_j (a - b (logit_j - lse)) + c for every column j but the label's, and
a (p_j - 1) - b p_j (logit_j - lse) + c + s for the label's column. Each operator computes the four coefficients a, b, c, s of
every row; b is 0 unless an entropy has an upstream gradient. If all four are 0, the gradient is 0 for any logits.
"""

import torch
import triton
import triton.language as tl

from .common import architecture, launch
from .functions import _expm1, _fast_exp
from .linear_head import _labels_in, _logits, _place, _product, block_sizes, gradient_chunks, scores_tile, tile_config
from .losses import _cap_slope, _load_lse

COEFFICIENTS = 4


@triton.jit
def _coefficients(coefficients_ptr, peak_ptr, row, stride, mask):
    """(a, b, c, s, whether all four are 0) of each row: the coefficients that the top of this file defines, divided by the peak
    if there is one."""
    a = tl.load(coefficients_ptr + row, mask=mask, other=0.0)
    b = tl.load(coefficients_ptr + stride + row, mask=mask, other=0.0)
    c = tl.load(coefficients_ptr + 2 * stride + row, mask=mask, other=0.0)
    s = tl.load(coefficients_ptr + 3 * stride + row, mask=mask, other=0.0)
    is_zero = (a == 0.0) & (b == 0.0) & (c == 0.0) & (s == 0.0)
    if peak_ptr is not None:
        peak = tl.load(peak_ptr)
        a = tl.div_rn(a, peak)
        b = tl.div_rn(b, peak)
        c = tl.div_rn(c, peak)
        s = tl.div_rn(s, peak)
    return a, b, c, s, is_zero


@triton.jit(do_not_specialize=["rows", "first_token", "coefficient_stride"])
def linear_head_gradient_kernel(hidden_ptr, weight_ptr, labels_ptr, lse_ptr, coefficients_ptr, peak_ptr, gradient_ptr,
                                rows, vocab, depth, hidden_stride, weight_stride, gradient_stride, coefficient_stride,
                                first_token, scale, softcap,
                                SOFTCAP: tl.constexpr, ENTROPY: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
                                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Computes the logits of a tile again and stores d loss / d (hidden . weight), the gradient before soft-cap and scale."""
    block_n, row, col, logit = _logits(hidden_ptr, weight_ptr, rows, vocab, depth, hidden_stride, weight_stride, scale, softcap,
                                       SOFTCAP, EVEN, GROUP, BLOCK_M, BLOCK_N, BLOCK_K)
    mask = row < rows
    a, b, c, s, is_zero = _coefficients(coefficients_ptr, peak_ptr, row, coefficient_stride, mask)
    top, log_z = _load_lse(lse_ptr, row, mask)
    _, own = _labels_in(block_n, labels_ptr, row, col, mask, first_token, vocab, BLOCK_N)
    y = (tl.sum(tl.where(own, logit, 0.0), axis=1) - top) - log_z
    entry = a * _expm1(y) + (c + s)
    x = (logit - top[:, None]) - log_z[:, None]
    p = _fast_exp(x)
    if ENTROPY:
        entry -= b * tl.where(y == float("-inf"), 0.0, _fast_exp(y) * y)
        px = tl.where(x == float("-inf"), 0.0, p * x)
        d = tl.fma(px, -b[:, None], tl.fma(p, a[:, None], c[:, None]))
    else:
        d = tl.fma(p, a[:, None], c[:, None])
    d = tl.where(own, entry[:, None], d)
    if SOFTCAP:
        d = d * _cap_slope(logit, softcap)
    if scale is not None:
        d = d * scale
    d = tl.where(is_zero[:, None], 0.0, d)
    at = gradient_ptr + row.to(tl.int64)[:, None] * gradient_stride + col[None, :]
    tl.store(at, d.to(gradient_ptr.dtype.element_ty), mask=mask[:, None] & (col < vocab)[None, :])


@triton.jit(do_not_specialize=["coefficient_stride"])
def linear_head_stored_kernel(stored_ptr, labels_ptr, top_ptr, label_ptr, lse_ptr, coefficients_ptr, peak_ptr, vocab,
                              stored_stride, stride, coefficient_stride, softcap,
                              SOFTCAP: tl.constexpr, TILES: tl.constexpr, BLOCK_N: tl.constexpr):
    """Converts TILES blocks of one row, in place: from what the forward stored (exp(logit - block maximum), or with a soft-cap
    logit - block maximum) to d loss / d logit. The coefficient b (see the top of this file) is 0 here, because only
    linear_logprobs has an entropy, and it computes the logits again."""
    blocks = tl.cdiv(vocab, TILES * BLOCK_N)
    row = tl.program_id(0).to(tl.int64) // blocks
    tile = tl.program_id(0) % blocks * TILES + tl.arange(0, TILES)
    col = tile[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
    at = stored_ptr + row * stored_stride + col
    stored = tl.load(at, mask=col < vocab, other=0.0).to(tl.float32)
    block_top = tl.load(top_ptr + row + tile.to(tl.int64) * stride, mask=tile * BLOCK_N < vocab, other=0.0)
    top, log_z = _load_lse(lse_ptr, row, row >= 0)
    a, b, c, s, is_zero = _coefficients(coefficients_ptr, peak_ptr, row, coefficient_stride, row >= 0)
    label = tl.load(labels_ptr + row).to(tl.int64)
    known = (label >= 0) & (label < vocab)
    x = (tl.load(label_ptr + row, mask=known, other=0.0) - top) - log_z
    entry = a * _expm1(x) + (c + s)
    if SOFTCAP:
        logit = stored + tl.where(block_top == float("-inf"), 0.0, block_top)[:, None]
        d = tl.where(col == label, entry, tl.fma(_fast_exp((logit - top) - log_z), a, c))
        d = d * _cap_slope(logit, softcap)
    else:
        factor = a * _fast_exp((block_top - top) - log_z)
        d = tl.where(col == label, entry, tl.fma(stored, factor[:, None], c))
    d = tl.where(is_zero, 0.0, d)
    tl.store(at, d.to(stored_ptr.dtype.element_ty), mask=col < vocab)


@triton.jit(do_not_specialize=["size"])
def linear_head_peak_kernel(x_ptr, peak_ptr, size, BLOCK: tl.constexpr):
    """Stores in `peak` the largest finite |x|, or 1 if that is 0, so that x can be divided by it."""
    peak = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        index = start + tl.arange(0, BLOCK).to(tl.int64)
        x = tl.abs(tl.load(x_ptr + index, mask=index < size, other=0.0))
        peak = tl.maximum(peak, tl.where(x < float("inf"), x, 0.0))
    largest = tl.max(peak, axis=0)
    tl.store(peak_ptr, tl.where(largest == 0.0, 1.0, largest))


@triton.jit
def linear_head_product_kernel(a_ptr, b_ptr, add_ptr, out_ptr, peak_ptr, rows, cols, inner, a_row, a_inner, b_inner, out_row,
                               EVEN: tl.constexpr, GROUP: tl.constexpr,
                               BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """out = add + peak * (a @ b), rounded once. `add` None stands for 0 and `peak` None for 1. `add` and `out` have the same
    layout and may be the same tensor."""
    block_m, block_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N), GROUP)
    row = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    col = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    at = row.to(tl.int64)[:, None] * out_row + col[None, :]
    mask = (row < rows)[:, None] & (col < cols)[None, :]
    x = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if add_ptr is not None:  # the accumulator starts with add / peak, because the sum is multiplied by peak
        x = tl.load(add_ptr + at, mask=mask, other=0.0)
        if peak_ptr is not None:
            x = x / tl.load(peak_ptr)
    x = _product(x, a_ptr, b_ptr, row, col, rows, cols, inner, a_row, a_inner, b_inner, 1, EVEN, BLOCK_M, BLOCK_N, BLOCK_K)
    if peak_ptr is not None:
        x = x * tl.load(peak_ptr)
    tl.store(out_ptr + at, x.to(out_ptr.dtype.element_ty), mask=mask)


# --- launchers ---


def chunk_buffer(ranges: list[tuple[int, int]], weight: torch.Tensor) -> torch.Tensor:
    """Memory for one chunk of d loss / d logits: [rows, V rounded up to 16], so that rows are aligned to 16 bytes.

    The padding is set to 0. PyTorch's bfloat16 product on a CPU reads it, multiplies it by 0 and adds it to the sums, and
    uninitialised memory may contain NaN.
    """
    longest, vocab = max(end - begin for begin, end in ranges), weight.shape[0]
    buffer = torch.empty((longest, -(-vocab // 16) * 16), dtype=weight.dtype, device=weight.device)
    buffer[:, vocab:] = 0
    return buffer


def peak_of(coefficients, dtype):
    """The peak: the largest absolute value of the coefficients, float32 [1], if the dtype is float16; None otherwise."""
    if dtype != torch.float16:
        return None
    peak = torch.empty(1, dtype=torch.float32, device=coefficients.device)
    launch(linear_head_peak_kernel, 1, coefficients.device,
           dict(x_ptr=coefficients, peak_ptr=peak, size=coefficients.numel(), BLOCK=4096), num_warps=16)
    return peak


def gradient_of_logits(hidden, weight, labels, lse, coefficients, peak, gradient, scale, softcap, first_token, entropy):
    """Fills `gradient` [rows, V] with d loss / d (hidden . weight), from logits that are computed again. `coefficients`
    [4, rows] (a, b, c, s) may be a slice of a wider tensor."""
    (rows, depth), vocab = hidden.shape, weight.shape[0]
    tile = scores_tile(hidden, softcap)
    launch(linear_head_gradient_kernel, triton.cdiv(rows, tile.rows) * triton.cdiv(vocab, tile.cols), hidden.device,
           dict(hidden_ptr=hidden, weight_ptr=weight, labels_ptr=labels, lse_ptr=lse, coefficients_ptr=coefficients,
                peak_ptr=peak, gradient_ptr=gradient, rows=rows, vocab=vocab, depth=depth, hidden_stride=hidden.stride(0),
                weight_stride=weight.stride(0), gradient_stride=gradient.stride(0),
                coefficient_stride=coefficients.stride(0), first_token=first_token, scale=scale, softcap=softcap,
                SOFTCAP=softcap > 0, ENTROPY=entropy, **block_sizes(tile, depth)),
           num_warps=tile.num_warps, num_stages=tile.num_stages)


def gradient_of_stored(stored, labels, blocks, lse, coefficients, peak, vocab, softcap):
    """Converts `stored`, in place, to the gradient of the logits. `linear_head.forward` has put into it
    exp(logit - block maximum), or with a soft-cap logit - block maximum."""
    rows = labels.shape[0]
    cols = scores_tile(stored, softcap).cols
    tiles = 4096 // cols
    launch(linear_head_stored_kernel, rows * triton.cdiv(vocab, tiles * cols), stored.device,
           dict(stored_ptr=stored, labels_ptr=labels, top_ptr=blocks.top, label_ptr=blocks.label, lse_ptr=lse,
                coefficients_ptr=coefficients, peak_ptr=peak, vocab=vocab, stored_stride=stored.stride(0),
                stride=blocks.top.shape[1], coefficient_stride=coefficients.stride(0), softcap=softcap,
                SOFTCAP=softcap > 0, TILES=tiles, BLOCK_N=cols), num_warps=8)


def _multiply(a, b, add, out, peak):
    (rows, inner), cols = a.shape, b.shape[1]
    arch = architecture(b.device)
    tile = tile_config(b.element_size(), arch, add is not None and arch >= 100)
    launch(linear_head_product_kernel, triton.cdiv(rows, tile.rows) * triton.cdiv(cols, tile.cols), b.device,
           dict(a_ptr=a, b_ptr=b, add_ptr=add, out_ptr=out, peak_ptr=peak, rows=rows, cols=cols, inner=inner,
                a_row=a.stride(0), a_inner=a.stride(1), b_inner=b.stride(0), out_row=out.stride(0), **block_sizes(tile, inner)),
           num_warps=tile.num_warps, num_stages=tile.num_stages)


class Gradients:
    """Accumulates dhidden and dweight (None: not wanted) over the chunks of the gradient of the logits.

    dweight of a 16-bit dtype is rounded once, from a float32 sum over the chunks.
    """

    def __init__(self, hidden, weight, dhidden, dweight, ranges):
        self.hidden, self.weight, self.dhidden, self.dweight, self.last = hidden, weight, dhidden, dweight, ranges[-1]
        self.total = dweight
        if dweight is not None and dweight.dtype != torch.float32 and len(ranges) > 1:
            self.total = torch.empty(dweight.shape, dtype=torch.float32, device=dweight.device)

    def add(self, begin, end, gradient, peak):
        """Adds what the rows begin to end contribute. `gradient` [end - begin, V] is that of their logits, divided by `peak` if
    one is given."""
        hidden, is_float32 = self.hidden[begin:end], gradient.dtype == torch.float32
        if self.dhidden is not None:
            if self.dhidden.dtype == gradient.dtype and peak is None:
                torch.mm(gradient, self.weight, out=self.dhidden[begin:end])
            else:
                _multiply(gradient, self.weight, None, self.dhidden[begin:end], peak)
        if self.dweight is None:
            return
        if is_float32 and begin == 0:
            torch.mm(gradient.t(), hidden, out=self.dweight)
        elif is_float32:
            torch.addmm(self.dweight, gradient.t(), hidden, out=self.dweight)
        else:
            out = self.dweight if (begin, end) == self.last else self.total
            _multiply(gradient.t(), hidden, None if begin == 0 else self.total, out, peak)


def backward(hidden, weight, labels, lse, coefficients, dhidden, dweight, scale, softcap, first_token, entropy):
    """Fills dhidden and dweight (None: not wanted) from the coefficients [4, T], chunk by chunk."""
    vocab, ranges = weight.shape[0], gradient_chunks(hidden.shape[0], weight.shape[0], hidden.element_size())
    buffer, gradients = chunk_buffer(ranges, weight), Gradients(hidden, weight, dhidden, dweight, ranges)
    peak = peak_of(coefficients, hidden.dtype)
    for begin, end in ranges:
        gradient = buffer[: end - begin, :vocab]
        gradient_of_logits(hidden[begin:end], weight, labels[begin:end], lse[begin:end], coefficients[:, begin:end], peak,
                           gradient, scale, softcap, first_token, entropy)
        gradients.add(begin, end, gradient, peak)
