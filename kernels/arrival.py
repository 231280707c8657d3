"""Finding the last program of a launch, so that a reduction over many programs needs no second launch.

Every program writes its partial result and then arrives at an integer counter. The program that arrives last
sees all partials and adds them in index order, so the result does not depend on the order of arrival and needs no
floating-point atomics. It also puts the counter back to zero, which lets a CUDA graph replay the launch.
"""

import torch
import triton
import triton.language as tl

_counters: dict[tuple[torch.device, int], torch.Tensor] = {}


@triton.jit
def is_last(counter_ptr):
    """True in exactly one program: the last to arrive. What others stored before arriving is then visible to it."""
    tl.debug_barrier()  # the arrival below is one thread's; order every thread's stores before it
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel")
    last = arrived == tl.num_programs(0) - 1
    if last:
        tl.store(counter_ptr, 0)
    return last


def counter(device: torch.device) -> torch.Tensor:
    """The arrival counter (int32, zero between launches) of the current stream, for kernels ordered by it."""
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    key = (device, stream)
    if key not in _counters:
        _counters[key] = torch.zeros(1, dtype=torch.int32, device=device)
    return _counters[key]
