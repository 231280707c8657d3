"""Reductions over many programs in one launch: a program's share of an array, and the last program of a launch.

Every program writes its partial result and then arrives at an integer counter. The program that arrives last sees all
partials and adds them in index order, so the result does not depend on the order of arrival and needs no floating-point
atomics. It also puts the counter back to zero, which lets a CUDA graph replay the launch.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import mean

MAX_PROGRAMS = 512  # that share a sum: several per multiprocessor on any current GPU; also the width of the final sum
SPARES = 128  # counters set aside for captured launches

_zeros: dict[tuple[torch.device, int, torch.dtype], torch.Tensor] = {}
_spares: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
_captured: list[torch.Tensor] = []  # graphs count on these for as long as they live


@triton.jit
def blocks_of_program(programs, BLOCK: tl.constexpr):
    """Return the start of this program's first block in an array that ``programs`` share, its stride, and the lanes."""
    program = tl.program_id(0)
    first = program.to(tl.int64) * BLOCK
    tl.static_assert(first.dtype == tl.int64)  # and so is what counts from it, past 2^31 elements
    return first, programs * BLOCK, tl.arange(0, BLOCK).to(tl.int64)


@triton.jit
def is_last(counter_ptr):
    """True in exactly one program: the last to arrive. Scalars that others stored before arriving are visible to it."""
    tl.debug_barrier()  # the arrival below is one thread's; order every thread's stores before it
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


@triton.jit
def mean_of_partials(partial_ptr, count, MAX_PROGRAMS: tl.constexpr):
    """In the last program: the sum of what each of up to MAX_PROGRAMS programs stored, over ``count``."""
    slots = tl.arange(0, MAX_PROGRAMS)
    used = slots < tl.num_programs(0)
    return mean(tl.sum(tl.load(partial_ptr + slots, used, other=0, cache_modifier=".cg"), axis=0), count)


@triton.jit
def store_share(share_ptr, count_ptr, total, skip):
    """In the last program: store what all programs counted over ``total``, and put the count back to zero."""
    share = mean(tl.atomic_xchg(count_ptr, 0, sem="relaxed").to(tl.float32), total)
    tl.store(share_ptr, tl.where(skip, float("nan"), share))  # NaN: the step was left out, nothing was counted


def stream_of(device: torch.device) -> int:
    """The current stream of ``device``, as a number; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def zero(device: torch.device, dtype: torch.dtype = torch.int32, *, capture: bool | None = None) -> torch.Tensor:
    """A [1] integer that is zero between launches, for the kernels of the current stream, which come one by one.

    A captured launch gets one of its own, as its graph may be replayed beside others or on another stream. It was
    allocated and zeroed before the capture: zeroing it inside would add a kernel to every replay.
    """
    spares = _spares.setdefault((device, dtype), [])
    if capturing(device) if capture is None else capture:
        if not spares:  # memory of the graph's, which is given back with it
            return torch.zeros(1, dtype=dtype, device=device)
        _captured.append(spares.pop())
        return _captured[-1]
    if len(spares) < SPARES:  # 16 bytes apart: Triton compiles another kernel for pointers not aligned to 16
        spares.extend(torch.zeros(SPARES, 16 // dtype.itemsize, dtype=dtype, device=device)[:, :1].unbind())
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream, dtype)
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=dtype, device=device)
    return _zeros[key]
