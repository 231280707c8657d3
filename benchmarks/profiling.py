"""Tell where a critic step's time goes on a GPU: python -m benchmarks.profiling --out DIR [--workloads NAME ...]

DIR/gpu-profile.json has for each workload the kernels of a step by name, without a graph and replayed; its matrix
products and convolutions by the layer they belong to; and the host's share: Python calls and milliseconds of a replayed
step, the replay alone, and a whole iteration beside the same steps one by one. Last come the products of the MLP's
generator, each done in several ways. On a CPU all of it runs as well, with operators in place of kernels.
"""

import cProfile
import pstats
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import timing
from benchmarks.record import environment, write
from benchmarks.steps import message, setting
from benchmarks.workloads import WORKLOADS
from fastwgan import Trainer
from fastwgan.cli.common import Parser
from fastwgan.engine import structure

PROFILED = ("mlp-clip", "mlp-penalty", "tabular-penalty", "dcgan-penalty")
N_CRITIC = 5
WARM_UP = 8  # calls: a trainer looks at the networks, warms up, and captures both of its steps and an iteration
CALLS = 10  # that the profiler counts
HOST_CALLS, SLOWEST = 100, 25  # calls in which the host is profiled, and how many of its functions are told
SAMPLES = 7

Record = dict[str, Any]
WAYS: dict[str, Record] = {"": {}, " TF32": {"tf32": True}} | {f" {x}": {"library": x} for x in ("cublas", "cublaslt")}


def kernels_by_name(call: Callable[[], object], device: torch.device) -> list[Record]:
    """Return the kernels of a call by name, the longest in all first: how many there are, and microseconds each."""
    gpu = device.type == "cuda"
    times: dict[str, list[float]] = {}
    for event in _events(call, device, ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU):
        if gpu and event.device_type.name == "CUDA":
            times.setdefault(event.name, []).append(event.time_range.elapsed_us())
        elif not gpu and event.self_cpu_time_total > 0:
            times.setdefault(event.name, []).append(event.self_cpu_time_total)
    rows = [{"kernel": name, "count": len(us) / CALLS, "us": _rounded(median(us))} for name, us in times.items()]
    return sorted(rows, key=lambda row: -row["count"] * row["us"])


def products(call: Callable[[], object], networks: dict[str, nn.Module], device: torch.device) -> list[Record]:
    """Return a call's matrix products and convolutions by operator and layer: how many, and microseconds each."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device.type == "cuda" else [])]
    with layers_named(networks):
        events = sorted(_events(call, device, *activities), key=lambda event: event.time_range.start)
    layers: dict[tuple[int, int], str] = {}  # by thread and autograd's sequence number
    found: dict[tuple[str, str, str], list[float]] = {}
    for event in events:
        layer = _layer(event, layers)
        if layer is not None and event.sequence_nr >= 0 and not event.fwd_thread:  # what autograd will go back to
            layers.setdefault((event.thread, event.sequence_nr), layer)
        if event.name in timing.NETWORK_OPS:
            us = sum(kernel.duration for kernel in event.kernels) if device.type == "cuda" else event.cpu_time_total
            found.setdefault((layer or "?", event.name, str(event.input_shapes)), []).append(us)
    rows = [
        {"layer": layer, "op": op, "shapes": shapes, "count": len(us) / CALLS, "us": _rounded(median(us))}
        for (layer, op, shapes), us in found.items()
    ]
    return sorted(rows, key=lambda row: -row["count"] * row["us"])


LAYER, BACKWARD = "layer ", "autograd::engine::evaluate_function"


@contextmanager
def layers_named(networks: dict[str, nn.Module]) -> Iterator[None]:
    """Have the profiler see the forward pass of each layer with a weight matrix as a range of the layer's name.

    The layers' classes are patched for it. Hooks would do, but a trainer may treat a network with hooks otherwise.
    """
    names = {
        id(m): f"{network}.{name}" for network, module in networks.items() for name, m in module.named_modules()
        if any(p.dim() > 1 for p in m.parameters(recurse=False))
    }  # fmt: skip
    modules = [m for module in networks.values() for m in module.modules() if id(m) in names]
    with ExitStack() as stack:
        for kind in {type(m) for m in modules}:

            def forward(self: nn.Module, *args: Any, original: Any = kind.forward) -> Any:
                with record_function(LAYER + names.get(id(self), "?")):
                    return original(self, *args)

            stack.enter_context(mock.patch.object(kind, "forward", forward))
        yield


def _layer(event: Any, layers: dict[tuple[int, int], str]) -> str | None:
    """Return the layer that an event is part of: of its forward pass, or of a backward pass of whatever order."""
    while event is not None:
        if event.name.startswith(LAYER):
            return str(event.name.removeprefix(LAYER))
        if event.name.startswith(BACKWARD):
            return layers.get((event.fwd_thread, event.sequence_nr))
        event = event.cpu_parent
    return None


def _events(call: Callable[[], object], device: torch.device, *activities: ProfilerActivity) -> list[Any]:
    timing.wait(device)
    with profile(activities=activities, record_shapes=True, acc_events=True) as found:
        for _ in range(CALLS):
            call()
        timing.wait(device)
    return list(found.events())


def host(call: Callable[[], object], device: torch.device) -> Record:
    """Return the host's share of a call: Python calls, milliseconds, and the functions that take the most of them."""
    host_ms = _median_host(call, device)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(HOST_CALLS):
        call()
    profiler.disable()
    timing.wait(device)
    stats: Any = pstats.Stats(profiler)
    slowest, us = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:SLOWEST], 1e6 / HOST_CALLS
    return {
        "python_calls": round(stats.total_calls / HOST_CALLS),
        "host_ms": host_ms,
        "functions": [
            {"function": f"{_place(file)}:{line} {name}", "calls": n / HOST_CALLS, "us": _rounded(own * us)}
            for (file, line, name), (_, n, own, *_) in slowest
        ],
    }  # fmt: skip


def _place(file: str) -> str:
    """Return a file's path from its package on, so that a record does not depend on where it was made."""
    parts = Path(file).parts
    names = [name for name in ("site-packages", "dist-packages", "fastwgan", "benchmarks") if name in parts]
    return "/".join(parts[parts.index(names[0]) + names[0].endswith("-packages") :]) if names else Path(file).name


def milliseconds(call: Callable[[], object], device: torch.device, repeats: int = 10) -> float:
    return _rounded(median(timing.time_of(call, device, repeats) for _ in range(SAMPLES)))


def _median_host(call: Callable[[], object], device: torch.device) -> float:
    return _rounded(median(timing.host_time(call, device) for _ in range(HOST_CALLS)))


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


def workload(name: str, device: torch.device) -> Record:
    """Return the figures of a workload's critic step, and of its iteration, without a graph and replayed from one."""
    forms = ("eager", "graph") if device.type == "cuda" else ("eager",)
    return {"workload": name} | {form: _figures(name, device, cuda_graph=form == "graph") for form in forms}


def _figures(name: str, device: torch.device, *, cuda_graph: bool) -> Record:
    given = WORKLOADS[name]
    made = setting(given, device, torch.float32)
    known = structure.layers(made.critic, made.real.dim()) is not None  # which patched classes hide
    trainer = Trainer(
        made.generator, made.critic, latent=given.latent, constraint=given.constraint, cuda_graph=cuda_graph,
        independent_samples=known,
    )  # fmt: skip
    batches = [made.real] * N_CRITIC

    def step() -> None:
        trainer.critic_step(made.real)

    def steps() -> None:
        for real in batches:
            trainer.step(real)

    def iteration() -> None:
        trainer.iteration(batches)

    for call in (steps, iteration, step):
        for _ in range(WARM_UP):
            call()
    figures: Record = {"step_ms": milliseconds(step, device)} | host(step, device)
    figures["kernels"] = kernels_by_name(step, device)
    if not cuda_graph:
        figures["products"] = products(step, {"generator": made.generator, "critic": made.critic}, device)
    trainer.generator_step(len(made.real))  # so that the next critic step is an iteration's first
    figures["steps_ms"], figures["iteration_ms"] = (milliseconds(call, device, 2) for call in (steps, iteration))
    return figures | replayed(trainer, device) if cuda_graph else figures


def replayed(trainer: Trainer, device: torch.device) -> Record:
    """Return the milliseconds that the graphs of a critic step and of an iteration take by themselves, and the host's.

    Raises:
        RuntimeError: one of the two has not been captured.
    """
    assert trainer._steps.graphs is not None
    graphs: Any = trainer._steps.graphs._graphs
    found = {key[0]: graph.replay for key, graph in graphs.items() if graph.replay is not None}
    figures: Record = {}
    for name, work in (("replay", trainer._steps._critic_step), ("iteration_replay", trainer._steps._iteration)):
        if work.__name__ not in found:
            raise RuntimeError(f"{work.__name__}: expected a graph of it after {WARM_UP} calls, got none")
        replay = found[work.__name__]
        figures[f"{name}_ms"] = milliseconds(replay, device)
        figures[f"{name}_host_ms"] = _median_host(replay, device)
    return figures


def network_products(device: torch.device) -> list[Record]:
    """Return microseconds of each product of the penalised MLP's forward passes, in each way that PyTorch has for it.

    The critic's have real samples, fake ones and the penalty's points in one batch.
    """
    given = WORKLOADS["mlp-penalty"]
    made, rows = setting(given, device, torch.float32), []
    batches = ((made.generator, "generator", given.batch), (made.critic, "critic", 3 * given.batch))
    layers = [(f"{of}.{name}", m, n) for network, of, n in batches for name, m in network.named_modules()]
    for name, layer, batch in layers:
        if not isinstance(layer, nn.Linear):
            continue
        x = torch.randn(batch, layer.in_features, device=device)
        weight, bias = layer.weight.detach(), layer.bias.detach()

        def addmm(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return torch.addmm(bias, x, weight.t())

        def mm(x: Tensor = x, weight: Tensor = weight, bias: Tensor = bias) -> Tensor:
            return torch.mm(x, weight.t()) + bias

        ways: Record = {}
        for (name_of, call), (by, options) in product((("addmm", addmm), ("mm+bias", mm)), WAYS.items()):
            with products_by(**options):
                repeats = 20 if device.type == "cuda" else 1
                timed: timing.Call = timing.capture(call, repeats=repeats) if device.type == "cuda" else call
                ways[name_of + by] = _rounded(1e3 * milliseconds(timed, device) / repeats)
        rows.append({"layer": name, "shape": [batch, layer.in_features, layer.out_features], "us": ways})
    return rows


@contextmanager
def products_by(library: str | None = None, *, tf32: bool = False) -> Iterator[None]:
    """Have products done by a library, and in TF32 if wanted; both are of no effect on a CPU."""
    chosen, allowed = None, torch.backends.cuda.matmul.allow_tf32
    if library is not None and torch.cuda.is_available():
        chosen = torch.backends.cuda.preferred_blas_library()
        torch.backends.cuda.preferred_blas_library(library)
    torch.backends.cuda.matmul.allow_tf32 = tf32
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed
        if chosen is not None:
            torch.backends.cuda.preferred_blas_library(chosen)


def run(workloads: Iterable[str], device: torch.device, path: Path) -> Record:
    """Measure all, write the record after each part, and return it."""
    record: Record = {"environment": environment(device), "workloads": [], "left_out": []}

    def add(name: str) -> None:
        record["workloads"].append(workload(name, device))

    jobs: list[tuple[str, Callable[[], None]]] = [(name, partial(add, name)) for name in workloads]
    # Not last, as it is short and the time may be over by then.
    jobs.insert(1, ("network_products", lambda: record.update(network_products=network_products(device))))
    for name, job in jobs:
        try:
            job()
        except Exception as error:  # whatever it is, the others can still be measured
            record["left_out"].append(f"{name}: {message(error)}")
        write(path, record)
    return record


def main(argv: list[str] | None = None) -> int:
    parser = Parser(prog="python -m benchmarks.profiling", description="Where a step's time goes.")
    parser.add_argument("--out", type=Path, required=True, help="directory of the record")
    parser.add_argument("--workloads", nargs="+", choices=WORKLOADS, default=PROFILED, metavar="NAME")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    record = run(args.workloads, device, args.out / "gpu-profile.json")
    for left in record["left_out"]:
        print(f"left out: {left}")
    return int(bool(record["left_out"]))


if __name__ == "__main__":
    sys.exit(main())
