"""What ``fastwgan verify`` runs: the built-in networks or a user's, under each constraint, and what it prints."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan import models
from fastwgan.backend import Backend
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.plain import Constraint
from fastwgan.report import HEADER, WORDS, Report
from fastwgan.verify import verify

__all__ = ["BUILT_IN", "CONSTRAINTS", "run"]

CONSTRAINTS: dict[str, Constraint] = {
    "clip": WeightClip(),
    "norm-clip": NormClip(
        0.5
    ),  # below the 0.58 that PyTorch's layers start with, so that there is something to project
    "penalty": GradientPenalty(),
    "dragan": GradientPenalty(at="perturbed"),
}
ARGUMENTS = tuple(inspect.signature(verify).parameters)
PACK, CLASSES = 10, 10

Arguments = dict[str, Any]  # verify's


def _normalised(critic: nn.Sequential, width: int) -> nn.Sequential:
    """Return WGAN-GP's residual critic with the layer normalisation that its paper recommends where one is wanted."""
    for name, m in critic.named_children():
        if isinstance(m, models.Residual):
            for norm in ("norm1", "norm2")[name == "0" :]:  # an image is not normalised
                m.add_module(norm, nn.GroupNorm(1, width))  # in one group: LayerNorm
    return critic


class _Labelled(nn.Module):
    """A network that gets an embedding of its labels beside its input."""

    def __init__(self, network: nn.Module, width: int) -> None:
        super().__init__()
        self.embedding, self.network = nn.Embedding(CLASSES, width), network

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = self.network(torch.cat((x, self.embedding(labels)), dim=1))
        return result


# Each makes networks and samples: smaller ones on a CPU, and a critic without BatchNorm, which mixes samples, for a
# penalty.
BUILT_IN: dict[str, Callable[[bool, bool], Arguments]] = {
    "mlp": lambda gpu, penalised: {
        "generator": models.mlp([100, 128, 256, 512, 1024, 784], slope=0.2, norm=True, tanh=True),
        "critic": models.mlp([784, 512, 256, 1], slope=0.2),
        "real": torch.randn(64, 784),
        "latent": 100,
    },
    "dcgan": lambda gpu, penalised: {
        "generator": models.dcgan_generator(100, width=64 if gpu else 8),
        "critic": models.dcgan_critic(width=64 if gpu else 8, norm=not penalised),
        "real": torch.randn(64 if gpu else 8, 3, 64, 64),
        "latent": 100,
    },
    "resnet": lambda gpu, penalised: {
        "critic": _normalised(models.resnet_critic(width=128 if gpu else 16), 128 if gpu else 16),
        "generator": models.resnet_generator(128, width=128 if gpu else 16),
        "real": torch.randn(64 if gpu else 8, 3, 32, 32),
        "latent": 128,
    },
    "tabular": lambda gpu, penalised: {  # CTGAN's, whose critic here puts rows together itself
        "critic": nn.Sequential(nn.Unflatten(0, (-1, PACK)), nn.Flatten(), models.ctgan_critic(128, pack=PACK)),
        "generator": models.ctgan_generator(128, 128, pack=1),
        "real": torch.randn(500 if gpu else 100, 128),
        "latent": 128,
        "pack": PACK,
    },
    "conditional": lambda gpu, penalised: {
        "generator": _Labelled(models.mlp([32 + 8, 128, 64], norm=True), 8),
        "critic": _Labelled(models.mlp([64 + 8, 128, 128, 1], slope=0.2), 8),
        "cond": (torch.randint(CLASSES, (64,)),),
        "real": torch.randn(64, 64),
        "latent": 32,
    },
}


def load(name: str) -> Arguments:
    """What a user's factory, MODULE:FACTORY, has made; modules are looked for in the working directory, too."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ValueError(f"--networks: expected MODULE:FACTORY, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        factory = getattr(import_module(path), attribute)
        made = factory()
    except Exception as error:  # whatever the user's code raises
        raise ValueError(f"--networks: {name} raised {error!r}") from error
    if isinstance(made, tuple) and len(made) == 3:
        made = dict(zip(ARGUMENTS, made, strict=False))
    if not isinstance(made, dict) or not {"generator", "critic", "real"} <= made.keys() <= set(ARGUMENTS):
        got = ", ".join(map(str, made)) if isinstance(made, dict) else type(made).__name__
        expected = f"(generator, critic, real) or a dict of them and of {', '.join(ARGUMENTS[3:])}"
        raise ValueError(f"--networks: expected {name} to return {expected}, got {got}")
    return made


def _moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, (Tensor, nn.Module)):
        return value.to(device)
    return type(value)(_moved(each, device) for each in value) if type(value) in (tuple, list) else value


def _jobs(
    names: Sequence[str], networks: str | None, constraints: Sequence[str], device: torch.device | None, seed: int
) -> Iterator[tuple[str, Arguments]]:
    """(name, verify's arguments) one by one, so that networks which are done with need not be kept."""
    gpu = device is not None and device.type == "cuda"
    makers: dict[str, Callable[[bool], Arguments]]
    if networks is None:
        makers = {name: partial(BUILT_IN[name], gpu) for name in names}
    else:
        makers = {networks: lambda penalised: load(networks)}
    for name, make in makers.items():
        for constraint in constraints:
            torch.manual_seed(seed)
            arguments = {"seed": seed} | make(isinstance(CONSTRAINTS[constraint], GradientPenalty))
            if device is not None:
                arguments = {key: _moved(value, device) for key, value in arguments.items()}
            if "constraint" in arguments:  # the factory's own
                yield name, arguments
                break
            yield f"{name}-{constraint}", arguments | {"constraint": CONSTRAINTS[constraint]}


def _show(name: str, report: Report) -> None:
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        print(f"{name}: {report}\n", flush=True)
        return
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for column in HEADER:
        table.add_column(column, justify="left" if column in WORDS else "right", no_wrap=column != "worst")
    for line in report.lines():
        table.add_row(*line, style="bold red" if line[-1] != "ok" else None)
    console = Console(highlight=False, markup=False)
    console.print(f"{name}: {report.title}")
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}")
    console.print(report.verdict, "\n", style=None if report.passed else "bold red")


def run(
    names: Sequence[str], networks: str | None, constraints: Sequence[str], device: torch.device | None,
    *, backend: Backend, seed: int, path: Path | None, **options: float,
) -> bool:  # fmt: skip
    """Verify networks, print a table for each, and write ``path``; return whether all passed.

    Args:
        names: of built-in networks, where ``networks`` is None.
        networks: MODULE:FACTORY; the factory takes nothing and returns (generator, critic, real), or a dict of
            :func:`verify`'s arguments.
        constraints: names in CONSTRAINTS; a constraint among a factory's arguments goes before.
        device: to move networks to; None leaves a factory's where they are.
        backend, seed: see :func:`verify`; networks are made under the seed, too.
        path: of a JSON file with all rows, or None.
        options: blend, drift and instance_noise; a factory's own go before.
    """
    reports = {}
    for name, arguments in _jobs(names, networks, constraints, device, seed):
        reports[name] = verify(**{"backend": backend, **options, **arguments})
        _show(name, reports[name])
        if path is not None:
            record = {"passed": all(r.passed for r in reports.values())}
            path.write_text(
                json.dumps(record | {"reports": {n: r.as_dict() for n, r in reports.items()}}, indent=1) + "\n"
            )
    return all(report.passed for report in reports.values())
