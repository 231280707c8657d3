"""Correctly rounded division and square root in float32 and float64.

Triton's ``/`` and ``tl.sqrt`` are approximate in float32. These kernels wait for memory, so exactness costs nothing.
"""

import triton
import triton.language as tl


@triton.jit
def divide(x, y):
    x, y = tl.broadcast(x, y)
    return tl.div_rn(x, y) if x.dtype == tl.float32 else x / y


@triton.jit
def sqrt(x):
    return tl.sqrt_rn(x) if x.dtype == tl.float32 else tl.sqrt(x)
