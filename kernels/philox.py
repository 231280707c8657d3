"""Counter-based random numbers: a number is a pure function of (seed, index), so any block size draws the same.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the 64-bit seed; the
counter is (index low, index high, place, stream). Uniform numbers are at place 0 of STREAM, one to an index; normal
ones are in NOISE, four to a place. PyTorch's CUDA generator has 0 for a stream: equal seeds do not repeat latents.
"""

import triton
import triton.language as tl

from .arithmetic import cos_and_sin_of_turns, sqrt

STREAM, NOISE = tl.constexpr(0x57474150), tl.constexpr(0x57474151)


@triton.jit
def uniform(seed, index):
    """U[0, 1) in float32 for an int64 ``index``: the top 24 bits of the first Philox word, so exact in any order."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, 0, STREAM)
    return (word >> 8).to(tl.float32) * (1.0 / (1 << 24))


@triton.jit
def _box_muller(a, b, acc: tl.constexpr):
    """Two normal numbers of two words, by their top 24 bits: of u in (0, 1] and v in [0, 1)."""
    radius = sqrt(-2.0 * tl.log(((a >> 8) + 1).to(acc) * (1.0 / (1 << 24))))
    cos, sin = cos_and_sin_of_turns((b >> 8).to(acc) * (1.0 / (1 << 24)))
    return radius * cos, radius * sin


@triton.jit
def normals(seed, index, places, acc: tl.constexpr):
    """N(0, 1) in ``acc``, four for each of the int32 ``places`` [n] of an int64 ``index``: [4 n].

    Of the four words the first two make the first two numbers (Box and Muller, 1958), the others the rest.
    """
    zero = places.to(tl.uint32) * 0
    low = zero + (index & 0xFFFFFFFF).to(tl.uint32)
    high = zero + ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    a, b, c, d = tl.philox(seed, low, high, places.to(tl.uint32), zero + NOISE)
    first, second = _box_muller(a, b, acc)
    third, fourth = _box_muller(c, d, acc)
    return tl.interleave(tl.interleave(first, third), tl.interleave(second, fourth))
