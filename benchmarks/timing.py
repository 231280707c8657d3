"""Times, launches and memory of a call, on a CPU or a CUDA GPU."""

import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch

from fastwgan.backend import kernels as kernel_package
from fastwgan.engine.graphs import capturing

__all__ = [
    "Peak", "capture", "clocks", "host_time", "interleaved", "kernels", "network_time", "output", "quantiles",
    "time_of", "unchecked", "wait",
]  # fmt: skip

Call = Callable[[], object]
Quantiles = dict[str, float]

LEAST_ROUNDS = 5  # taken even when time is up, so that there is a median at all
SIDE_STREAM_CALLS = 3  # before a capture, as PyTorch's notes on CUDA graphs ask for
# What a network's own work is: matrix products and convolutions, by the names of the ops that launch their kernels.
NETWORK_OPS = {
    f"aten::{name}"
    for name in (
        "mm", "addmm", "_addmm_activation", "bmm", "baddbmm", "cudnn_convolution", "cudnn_convolution_transpose",
        "convolution_backward", "_conv_depthwise2d", "_slow_conv2d_forward", "miopen_convolution",
    )
}  # fmt: skip
PROFILED_CALLS = 3
# The method by which an optimizer of PyTorch's refuses to be captured has had both of these names.
CAPTURE_CHECKS = ("_accelerator_graph_capture_health_check", "_cuda_graph_capture_health_check")
CLOCKS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu")


def output(*command: str) -> str | None:
    """What a command prints, or None where it cannot be run or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


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


def capture(call: Call, random: Iterable[torch.Generator] = (), *, repeats: int = 1) -> Call:
    """The replay of a CUDA graph of ``call``: its device work without the host's.

    Args:
        call: called a few times, then captured.
        random: generators of its own that it draws from.
        repeats: how many calls to a replay; one of a few microseconds waits for the host to ask for the next.

    Raises:
        RuntimeError: it cannot be captured.
    """
    stream: torch.cuda.Stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(SIDE_STREAM_CALLS):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    try:
        with unchecked(), capturing(stream, torch.cuda.graph_pool_handle(), tuple(random)) as graph:
            for _ in range(repeats):
                call()
    finally:
        if kernel_package is not None:
            kernel_package.table.fill_pending()  # what our optimizers' launches read, which a capture keeps back
    return partial(_replay, graph, call)


@contextmanager
def unchecked() -> Iterator[None]:
    """Let any of PyTorch's optimizers be captured.

    They refuse that unless they keep their count of steps on the device, as a replay would go on with the count it was
    captured at. The time is the same, and with the count on the device it would not be.
    """
    with ExitStack() as stack:
        for name in CAPTURE_CHECKS:
            if hasattr(torch.optim.Optimizer, name):
                stack.enter_context(mock.patch.object(torch.optim.Optimizer, name))
        yield


def _replay(graph: torch.cuda.CUDAGraph, call: Call) -> None:
    """Replay a graph. The call that was captured comes along to keep alive what the graph reads."""
    graph.replay()


def kernels(call: Call, device: torch.device) -> int | None:
    """How many kernels and copies a call runs on a GPU, as the profiler counts them; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        wait(device)
    return len([event for event in profile.events() if event.device_type.name == "CUDA"])


def network_time(call: Call, device: torch.device) -> float | None:
    """Milliseconds of a call's matrix products and convolutions: what a step cannot be faster than by other kernels.

    As the profiler assigns kernels to the ops that launched them, so None for a call that replays a graph, on a CPU,
    and where there are none.
    """
    if device.type != "cuda":
        return None
    wait(device)
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities, acc_events=True) as profile:
        for _ in range(PROFILED_CALLS):
            call()
        wait(device)
    return network_share(profile.key_averages(), PROFILED_CALLS)


def network_share(averages: Iterable[Any], calls: int) -> float | None:
    """Of the profiler's rows, whose times are microseconds."""
    total = sum(row.self_device_time_total for row in averages if row.key in NETWORK_OPS)
    return float(f"{total / calls / 1e3:.5g}") if total else None


def clocks(device: torch.device) -> dict[str, float] | None:
    """A GPU's clocks (MHz), power (W) and temperature (C) under a load of copies; None on a CPU, or if it won't say.

    The half second of copies is also what brings an idle GPU's clocks up.
    """
    if device.type != "cuda":
        return None
    source = torch.rand(2**27, device=device)
    target = torch.empty_like(source)
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.5:
        for _ in range(200):
            target.copy_(source)
        wait(device)
    for _ in range(800):  # less than a queue holds, and some tenths of a second
        target.copy_(source)
    query = f"--query-gpu={','.join(CLOCKS)}"
    found = output("nvidia-smi", query, "--format=csv,noheader,nounits", "-i", str(device.index or 0))
    wait(device)
    return None if found is None else clocks_of(found)


def clocks_of(line: str) -> dict[str, float]:
    """nvidia-smi's numbers by name, without those it does not know."""
    pairs = zip(CLOCKS, line.split(","), strict=True)
    return {name: float(value) for name, value in pairs if value.strip().replace(".", "", 1).isdigit()}


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
