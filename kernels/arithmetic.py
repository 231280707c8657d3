"""Scalar functions, in float32 and float64, that keep the digits.

Triton's ``/`` and ``tl.sqrt`` are approximate in float32; these round correctly, which the wait for memory hides.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    x, y = tl.broadcast(x, y)
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def mean(total, count):
    """total / count for a scalar and an integer."""
    return divide(total, tl.full([], count, total.dtype))


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)


@triton.jit
def one_minus_power(log_base, exponent):
    """1 - base^exponent for base in [0, 1), to rounding even where the power is close to one."""
    x = log_base * exponent
    half = tl.where(x > -0.5, 0.5 * x, 0)
    series = half * 0 + 1
    for i in tl.static_range(13, 1, -1):  # expm1(half) / half by Horner; 13 terms reach float64 rounding at -0.25
        series = 1 + series * half * (1.0 / i)
    root = half * series
    return tl.where(x > -0.5, -root * (root + 2), 1 - tl.exp(x))  # expm1(2 y) = expm1(y) (expm1(y) + 2)


@triton.jit
def cos_and_sin_of_turns(turns):
    """cos and sin of 2 pi turns for turns in [0, 1). A quarter of a turn is exact, so the rest is, and it is small."""
    quarter = (4 * turns + 0.5).to(tl.int32)
    x = (turns - 0.25 * quarter.to(turns.dtype)) * 6.283185307179586  # |x| <= pi / 4
    square = x * x
    cos, sin = square * 0, square * 0
    for i in tl.static_range(16, 0, -2):  # the series by Horner; 8 terms leave 2e-15
        cos = 1 - square * cos * (1.0 / (i * (i - 1)))
        sin = 1 - square * sin * (1.0 / (i * (i + 1)))
    sin *= x
    odd = quarter % 2 == 1
    near, far = tl.where(odd, -sin, cos), tl.where(odd, cos, sin)
    return tl.where(quarter // 2 == 1, -near, near), tl.where(quarter // 2 == 1, -far, far)


@triton.jit
def toward(mean, value, beta, complement):
    """beta * mean + complement * value; from the nearer end, so that beta = 0 gives the value exactly."""
    change = value - mean
    return tl.where(complement < 0.5, mean + complement * change, value - beta * change)
