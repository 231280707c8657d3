"""Finding the last program of a launch, so that a reduction over many programs needs no second launch.

Every program writes its partial result and then arrives at an integer counter. The program that arrives last
sees all partials and adds them in index order, so the result does not depend on the order of arrival and needs no
floating-point atomics. It also puts the counter back to zero, which lets a CUDA graph replay the launch.
"""

import torch
import triton
import triton.language as tl

from .arithmetic import mean

SPARES = 128  # counters set aside for captured launches

_zeros: dict[tuple[torch.device, int, torch.dtype], torch.Tensor] = {}
_spares: dict[tuple[torch.device, torch.dtype], list[torch.Tensor]] = {}
_captured: list[torch.Tensor] = []  # graphs count on these for as long as they live


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


def stream_of(device: torch.device) -> int:
    """The current stream of ``device``, as a number; 0 on a CPU."""
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def zero(device: torch.device, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    """A [1] integer that is zero between launches, for the kernels of the current stream, which come one by one.

    A captured launch gets one of its own, as its graph may be replayed beside others or on another stream. It was set
    aside and zeroed before the capture, in which that would be a kernel more at each replay.
    """
    spares = _spares.setdefault((device, dtype), [])
    if capturing(device):
        if not spares:  # memory of the graph's, which is given back with it
            return torch.zeros(1, dtype=dtype, device=device)
        _captured.append(spares.pop())
        return _captured[-1]
    if len(spares) < SPARES:  # 16 bytes for each, as a pointer that is no multiple of that is another kernel to Triton
        spares.extend(torch.zeros(SPARES, 16 // dtype.itemsize, dtype=dtype, device=device)[:, :1].unbind())
    key = (device, stream_of(device), dtype)
    if key not in _zeros:
        _zeros[key] = torch.zeros(1, dtype=dtype, device=device)
    return _zeros[key]
