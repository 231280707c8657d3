"""Times, launches and memory of a call, on a CPU or a CUDA GPU."""

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastwgan.backend import kernels as kernel_package
from fastwgan.graphs import capturing

__all__ = ["Peak", "capture", "host_time", "interleaved", "kernels", "median", "quantiles", "time_of", "wait"]

Call = Callable[[], object]
Quantiles = dict[str, float]

LEAST_ROUNDS = 5  # taken even when time is up, so that there is a median at all
SIDE_STREAM_CALLS = 3  # before a capture, as PyTorch's notes on CUDA graphs ask for


def wait(device: torch.device) -> None:
    """Until the device has done what it was asked to."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def time_of(call: Call, device: torch.device, repeats: int) -> float:
    """Milliseconds a call, of ``repeats`` back to back: by events on a GPU, from an empty queue to an empty one."""
    if device.type != "cuda":
        begun = time.perf_counter()
        for _ in range(repeats):
            call()
        return 1e3 * (time.perf_counter() - begun) / repeats
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    wait(device)
    first.record()
    for _ in range(repeats):
        call()
    last.record()
    last.synchronize()
    elapsed: float = first.elapsed_time(last)
    return elapsed / repeats


def host_time(call: Call, device: torch.device) -> float:
    """Milliseconds until a call returns, while the device is still at it."""
    wait(device)  # else a full queue would hold the call up
    begun = time.perf_counter()
    call()
    return 1e3 * (time.perf_counter() - begun)


def interleaved(samplers: Mapping[Any, Callable[[], float]], rounds: int, deadline: float) -> dict[Any, list[float]]:
    """Samples by name, one of each sampler a round, so that the machine's drift hits all alike.

    Args:
        samplers: each takes a sample.
        rounds: at most so many; fewer when ``deadline``, a ``time.monotonic()``, has passed.
        deadline: see ``rounds``.
    """
    samples: dict[Any, list[float]] = {name: [] for name in samplers}
    for i in range(rounds):
        if i >= LEAST_ROUNDS and time.monotonic() > deadline:
            break
        for name, sample in samplers.items():
            samples[name].append(sample())
    return samples


def quantiles(samples: Sequence[float]) -> Quantiles:
    """The 5, 25, 50, 75 and 95 % quantiles, and how many samples they are of."""
    shares = (5, 25, 50, 75, 95)
    values = np.quantile(samples, [share / 100 for share in shares])
    result = {f"q{share:02d}": float(f"{value:.5g}") for share, value in zip(shares, values, strict=True)}
    return {**result, "samples": len(samples)}


def median(samples: Iterable[float]) -> float:
    return statistics.median(samples)


def capture(call: Call, random: Iterable[torch.Generator] = ()) -> Call:
    """The replay of a CUDA graph of ``call``: its device work without the host's.

    Args:
        call: called a few times, then captured.
        random: generators of its own that it draws from.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(SIDE_STREAM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    # PyTorch's optimizers refuse a capture unless they keep their count of steps on the device, as a replay would go
    # on with the count it was captured at. The time is the same, and with the count on the device it would not be.
    unchecked = mock.patch.object(torch.optim.Optimizer, "_cuda_graph_capture_health_check", return_value=None)
    try:
        with unchecked, capturing(stream, torch.cuda.graph_pool_handle(), tuple(random)) as graph:
            call()
    finally:
        if kernel_package is not None:
            kernel_package.table.fill_pending()  # what our optimizers' launches read, which a capture keeps back
    return graph.replay


def kernels(call: Call, device: torch.device) -> int | None:
    """How many kernels and copies a call runs on a GPU, as the profiler counts them; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:  # else 2.11 warns
        call()
        wait(device)
    return len([event for event in profile.events() if event.device_type.name == "CUDA"])


class Peak:
    """The most memory that PyTorch had taken on a GPU since this was made, beyond what it had then."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.before = device, 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self.before = torch.cuda.memory_allocated(device)

    def mebibytes(self) -> float | None:
        """None on a CPU."""
        if self.device.type != "cuda":
            return None
        return round((torch.cuda.max_memory_allocated(self.device) - self.before) / 2**20, 1)
