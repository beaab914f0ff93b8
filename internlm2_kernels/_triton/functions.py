"""Elementary functions of float32, which give the same results compiled and interpreted.

`_fast_exp` and `_fast_tanh` take few instructions and are accurate enough for softmax. The other functions have errors of about
2 ulp. libdevice's functions are no alternative: they do not run in Triton's interpreter.
"""

import triton
import triton.language as tl


@triton.jit
def _fast_exp(x):
    """exp(x) in two instructions; tl.exp takes five, because its results may be subnormal. The error is about |x| / 2 ulp.
    Softmax and sigmoid tolerate it: where |x| is large, their results are close to 0 or 1."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def _fast_tanh(x, scale):
    """tanh(scale * x) with an absolute error of 2^-22, as 1 - 2 / (exp(2 * scale * x) + 1).

    The reciprocal is computed as the square of rsqrt, which takes two instructions; Triton's division takes seven.
    """
    root = tl.rsqrt(tl.exp2(x * (scale * 2.8853900817779268)) + 1.0)
    return tl.fma(root * root, -2.0, 1.0)


@triton.jit
def _tanh(x):
    """tanh(x) with an error of 1 ulp: an odd polynomial for |x| < 0.5477, and 1 - 2 / (exp(2 |x|) + 1) beyond."""
    a = tl.abs(x)
    s = x * x
    small = tl.fma(tl.fma(tl.fma(tl.fma(s, -0.00663105, 0.02132081), s, -0.05391137), s, 0.13333124), s, -0.33333332)
    small = tl.fma(a * s, small, a)
    large = 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)
    t = tl.where(a < 0.5477, small, large)
    return tl.where(x < 0, -t, t)


@triton.jit
def _series(r):
    """exp(r) - 1 for |r| <= 0.35 by its Taylor series; the truncation error is below 1e-9."""
    t = tl.fma(r, 1.0 / 5040, 1.0 / 720)
    t = tl.fma(t, r, 1.0 / 120)
    t = tl.fma(t, r, 1.0 / 24)
    t = tl.fma(t, r, 1.0 / 6)
    t = tl.fma(t, r, 0.5)
    return tl.fma(r * r, t, r)


@triton.jit
def _exponential(x):
    """exp(x) as 2^n * exp(r) with |r| <= ln(2) / 2. The result is 0 where it would be subnormal."""
    x = tl.where(x < -104.0, -104.0, x)  # tl.maximum would not propagate a NaN
    x = tl.where(x > 89.0, 89.0, x)
    n = tl.floor(tl.fma(x, 1.4426950408889634, 0.5))
    r = tl.fma(n, -0.693359375, x)  # x - n ln(2), with ln(2) in two parts; n times the first part is exact
    r = tl.fma(n, 2.12194440e-4, r)
    return (1.0 + _series(r)) * tl.exp2(n - 1.0) * 2.0  # 2^n in two factors: n may be 128, and 2^128 is infinite in float32


@triton.jit
def _expm1(x):
    """exp(x) - 1 without cancellation."""
    return tl.where(tl.abs(x) < 0.35, _series(x), _exponential(x) - 1.0)


@triton.jit
def _expm1_less_x(x):
    """exp(x) - 1 - x without cancellation near 0, where it is about x^2 / 2."""
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
    """log(1 + y) for 0 <= y <= 1 by the series of 2 atanh(y / (2 + y))."""
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
