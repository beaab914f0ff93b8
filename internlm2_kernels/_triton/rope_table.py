"""Rotary tables. Contract: ops/rope_table.py.

The kernel computes cos and sin in float64 from their Taylor series, after a reduction of the angle that is exact for angles up
to 2^45. It does not call the hardware's float32 functions, which have errors of 2^-21, or libdevice's float64 functions, which
need a stack frame for very large arguments.
"""

import torch
import triton
import triton.language as tl

from .common import launch

BLOCK = 512
# pi / 2 in three parts of 22, 22 and 53 bits. The kernel splits the number of quarter turns in an angle into two parts of at
# most 26 bits, so that their products with the first two parts of pi / 2 are exact in float64.
HALF_PI_A = tl.constexpr(float.fromhex("0x1.921fb0p+0"))
HALF_PI_B = tl.constexpr(float.fromhex("0x1.5110bp-22"))
HALF_PI_C = tl.constexpr(float.fromhex("0x1.18469898cc517p-44"))
TWO_OVER_PI = tl.constexpr(0.6366197723675814)


@triton.jit(do_not_specialize=["rows"])
def rope_table_fwd_kernel(positions_ptr, inv_freq_ptr, cos_ptr, sin_ptr, rows, half,
                          DIVISOR: tl.constexpr, MAGNITUDE: tl.constexpr, FLOAT32: tl.constexpr, BLOCK: tl.constexpr):
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = element < rows.to(tl.int64) * half
    position = tl.load(positions_ptr + element // half, mask=mask, other=0)
    frequency = tl.load(inv_freq_ptr + element % half, mask=mask, other=0.0)
    if FLOAT32:
        angle = (tl.div_rn(position.to(tl.float32), DIVISOR) * frequency.to(tl.float32)).to(tl.float64)
    else:
        angle = position.to(tl.float64) / DIVISOR * frequency
    quarters = tl.floor(angle * TWO_OVER_PI + 0.5)
    high = tl.floor(quarters * (1.0 / 67108864.0)) * 67108864.0
    low = quarters - high
    r = angle - high * HALF_PI_A - low * HALF_PI_A - high * HALF_PI_B - low * HALF_PI_B - quarters * HALF_PI_C
    # Taylor series for |r| <= pi / 4. The first omitted terms are r^13 / 13! < 1e-11 and r^14 / 14! < 1e-12.
    s = r * r
    sine = -1.0 / 39916800.0 * s + 1.0 / 362880.0
    sine = ((sine * s - 1.0 / 5040.0) * s + 1.0 / 120.0) * s - 1.0 / 6.0
    sine = (sine * s + 1.0) * r
    cosine = 1.0 / 479001600.0 * s - 1.0 / 3628800.0
    cosine = ((cosine * s + 1.0 / 40320.0) * s - 1.0 / 720.0) * s + 1.0 / 24.0
    cosine = (cosine * s - 0.5) * s + 1.0
    quadrant = quarters - tl.floor(quarters * 0.25) * 4.0
    swap = (quadrant == 1.0) | (quadrant == 3.0)
    cos = tl.where(swap, sine, cosine)
    sin = tl.where(swap, cosine, sine)
    cos = tl.where((quadrant == 1.0) | (quadrant == 2.0), -cos, cos)
    sin = tl.where(quadrant >= 2.0, -sin, sin)
    tl.store(cos_ptr + element, (cos * MAGNITUDE).to(tl.float32), mask=mask)
    tl.store(sin_ptr + element, (sin * MAGNITUDE).to(tl.float32), mask=mask)


def rope_table_fwd(positions, inv_freq, divisor, magnitude, float32_angles):
    rows, half = positions.shape[0], inv_freq.shape[0]
    cos = torch.empty((rows, half), dtype=torch.float32, device=positions.device)
    sin = torch.empty_like(cos)
    if cos.numel():
        launch(rope_table_fwd_kernel, triton.cdiv(cos.numel(), BLOCK), positions.device,
               dict(positions_ptr=positions, inv_freq_ptr=inv_freq, cos_ptr=cos, sin_ptr=sin, rows=rows, half=half,
                    DIVISOR=divisor, MAGNITUDE=magnitude, FLOAT32=float32_angles, BLOCK=BLOCK), num_warps=4)
    return cos, sin
