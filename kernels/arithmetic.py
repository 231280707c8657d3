"""Scalar functions, in float32 and float64, that keep the digits.

Triton's ``/`` and ``tl.sqrt`` are approximate in float32; these round correctly. The kernels wait for memory, so that
costs nothing.
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
def log1p_of_exp(small):
    """log(1 + small) for small in [0, 1], with small's digits: 2 artanh(small / (2 + small)) by its series."""
    x = divide(small, 2 + small)
    square = x * x
    series = square * 0
    for i in tl.static_range(37, 0, -2):  # x is 1/3 at most, and 9^-18 is past float64
        series = 1.0 / i + square * series
    return 2 * x * series


@triton.jit
def toward(mean, value, beta, complement):
    """beta * mean + complement * value; from the nearer end, so that beta = 0 gives the value exactly."""
    change = value - mean
    return tl.where(complement < 0.5, mean + complement * change, value - beta * change)
