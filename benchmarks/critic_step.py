"""Time one critic step against the textbook's, in one run: python -m benchmarks.critic_step [--json F].

The workloads are those of tests/cases.py, at their papers' sizes, batch 64, float32. The textbook step is
``reference.textbook_critic_step`` with torch.optim and, as popular code has it, a graph through the generator. Both
start from the same weights and are first checked, in float64, to reach the same ones; then their steps alternate, and
the figure is the ratio of the medians.
"""

import argparse
import json
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cases import WORKLOADS, Workload
from torch import nn

from fastwgan import Trainer, WeightClip, reference

BATCH, WIDTH = 64, 64


def _networks(workload: Workload, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return workload.generator(WIDTH).to(device, dtype), workload.critic(WIDTH).to(device, dtype)


def _steps(name: str, device: torch.device, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """The two implementations on the same data, latents and eps; each call is one step.

    In float64 they must reach the same weights. In float32 rounding alone would tell them apart: Adam moves a weight
    by the learning rate however small its gradient, so one that rounds to the other side of zero goes the other way.
    """
    workload = WORKLOADS[name]
    pairs = [_networks(workload, device, dtype) for _ in range(2)]
    real = torch.rand(BATCH, *workload.shape, device=device, dtype=dtype) * 2 - 1
    latents = [torch.Generator(device).manual_seed(1) for _ in range(2)]

    def draw(i: int) -> torch.Tensor:
        return torch.randn(BATCH, workload.latent, generator=latents[i], device=device, dtype=dtype)

    generator, critic = pairs[0]
    if isinstance(workload.constraint, WeightClip):
        optimizer: torch.optim.Optimizer = torch.optim.RMSprop(critic.parameters(), lr=5e-5)
        options = {"clip": 0.01}
    else:
        optimizer = torch.optim.Adam(critic.parameters(), lr=1e-4, betas=(0.0, 0.9))
        options = {"penalty_weight": 10.0}
    trainer = Trainer(*pairs[1], latent=lambda n, d: draw(1), constraint=workload.constraint)
    same_eps = [reference.uniform(0, BATCH * i, BATCH, device).to(dtype) for i in range(3)]

    def textbook() -> object:
        eps = same_eps.pop(0) if same_eps else None  # torch.rand draws its own after the comparison
        return reference.textbook_critic_step(
            generator, critic, optimizer, real, draw(0), eps=eps, detach=False, **options
        )

    for _ in range(3):
        textbook()
        trainer.critic_step(real)
    expected, actual = (nn.utils.parameters_to_vector(c.parameters()) for _, c in pairs)
    if dtype == torch.float64 and (actual - expected).norm() > 1e-9 * expected.norm():
        raise RuntimeError(f"{name}: the two steps give different weights")
    return {"textbook": textbook, "fastwgan": lambda: trainer.critic_step(real)}


def _time(step: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    begun = time.perf_counter()
    step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun


def measure(workloads: list[str], device: torch.device, rounds: int) -> dict[str, dict[str, float]]:
    """Median milliseconds of both implementations and their ratio, for each workload."""
    results = {}
    for workload in workloads:
        _steps(workload, device, torch.float64)  # raises if they are not the same step
        steps = _steps(workload, device, torch.float32)
        times: dict[str, list[float]] = {name: [] for name in steps}
        for i in range(rounds + 20):
            for name, step in steps.items():
                elapsed = _time(step, device)
                if i >= 20:  # warm-up
                    times[name].append(1e3 * elapsed)
        medians = {f"{name}_ms": round(statistics.median(values), 3) for name, values in times.items()}
        ratio = medians["textbook_ms"] / medians["fastwgan_ms"]
        results[workload] = {**medians, "ratio": round(ratio, 2)}
        print(f"{workload:<14} {medians} textbook / fastwgan = {ratio:.2f}")
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["mlp-clip", "mlp-penalty"])
    parser.add_argument("--rounds", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = measure(args.workload, args.device, args.rounds)
    if args.json:
        commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
        gpu = torch.cuda.get_device_name(args.device) if args.device.type == "cuda" else None
        environment = {
            "commit": commit.stdout.strip(),
            "date": time.strftime("%Y-%m-%d"),
            "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "python": platform.python_version(),
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({"environment": environment, "critic_step": results}, indent=2) + "\n")


if __name__ == "__main__":
    main()
