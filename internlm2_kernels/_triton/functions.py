"""Elementary functions of float32 to within about 2 ulp, written out so that compiled and interpreted kernels agree.

The hardware's exp2 of x * log2(e) is off by |x| / 2 ulp or so, which softmax does not feel (there large |x| means a small
result) but a ratio exp(x) does; libdevice's functions do not run in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def _series(r):
    """exp(r) - 1 for |r| <= 0.35: Taylor's series, whose rest is below 1e-9."""
    t = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    t = tl.fma(t, r, 1.0 / 120)
    t = tl.fma(t, r, 1.0 / 24)
    t = tl.fma(t, r, 1.0 / 6)
    t = tl.fma(t, r, 0.5)
    return tl.fma(r * r, t, r)


@triton.jit
def _exponential(x):
    """exp(x): a power of two times the series of the rest. 0 where the result would be subnormal."""
    x = tl.where(x < -104.0, -104.0, x)  # not tl.maximum, which would drop a NaN
    x = tl.where(x > 89.0, 89.0, x)
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, -0.693359375, x)  # ln 2 in two parts, the first of few enough bits for an exact product
    r = tl.fma(n, 2.12194440e-4, r)
    return (1.0 + _series(r)) * tl.exp2(n - 1.0) * 2.0  # in two steps: 2^128 is no float32


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 0.35, _series(x), _exponential(x) - 1.0)


@triton.jit
def _expm1_less_x(x):
    """exp(x) - 1 - x without cancellation: x^2 / 2 near 0."""
    t = tl.fma(x, 1.0 / 479001600, 1.0 / 39916800)
    t = tl.fma(t, x, 1.0 / 3628800)
    t = tl.fma(t, x, 1.0 / 362880)
    t = tl.fma(t, x, 1.0 / 40320)
    t = tl.fma(t, x, 1.0 / 5040)
    t = tl.fma(t, x, 1.0 / 720)
    t = tl.fma(t, x, 1.0 / 120)
    t = tl.fma(t, x, 1.0 / 24)
    t = tl.fma(t, x, 1.0 / 6)
    t = tl.fma(t, x, 0.5)
    return tl.where(tl.abs(x) < 1.0, x * x * t, _exponential(x) - 1.0 - x)


@triton.jit
def _log1p(y):
    """log(1 + y) for 0 <= y <= 1: 2 atanh(y / (2 + y)) as a series."""
    s = tl.div_rn(y, 2.0 + y)
    q = s * s
    t = tl.fma(q, 1.0 / 17, 1.0 / 15)
    t = tl.fma(t, q, 1.0 / 13)
    t = tl.fma(t, q, 1.0 / 11)
    t = tl.fma(t, q, 1.0 / 9)
    t = tl.fma(t, q, 1.0 / 7)
    t = tl.fma(t, q, 1.0 / 5)
    t = tl.fma(t, q, 1.0 / 3)
    return 2.0 * tl.fma(s * q, t, s)


@triton.jit
def _softplus(x):
    """log(1 + exp(x))."""
    return tl.where(x > 0.0, x, 0.0) + _log1p(_exponential(-tl.abs(x)))


@triton.jit
def _sigmoid(x):
    e = _exponential(-tl.abs(x))
    return tl.div_rn(tl.where(x < 0.0, e, 1.0), 1.0 + e)
