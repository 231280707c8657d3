"""Counter-based uniform numbers: a number is a pure function of (seed, index), so any block size draws the same.

Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011). The key is the 64-bit
seed; the counter is (index low, index high, 0, STREAM). PyTorch's own CUDA generator uses the same cipher with a
last counter word of 0, so equal seeds do not make ε repeat the latents.
"""

import triton
import triton.language as tl

STREAM = 0x57474150


@triton.jit
def uniform(seed, index, STREAM: tl.constexpr):
    """U[0, 1) in float32 for an int64 ``index``: the top 24 bits of the first Philox word, so exact in any order."""
    low = (index & 0xFFFFFFFF).to(tl.uint32)
    high = ((index >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox(seed, low, high, 0, STREAM)
    return (word >> 8).to(tl.float32) * (1.0 / (1 << 24))
