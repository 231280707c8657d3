"""What ``fastwgan verify`` runs: the built-in networks or a user's, under each constraint, and what it prints."""

import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan import models
from fastwgan.backend import Backend
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.verification.oracle import Constraint
from fastwgan.verification.verify import verify

__all__ = ["BUILT_IN", "CONSTRAINTS", "run"]

CONSTRAINTS: dict[str, Constraint] = {
    "clip": WeightClip(),
    "norm-clip": NormClip(0.5),  # below the 0.58 that layers start with, so that there is something to project
    "penalty": GradientPenalty(),
    "dragan": GradientPenalty(at="perturbed"),
}
Arguments = dict[str, Any]  # verify's
ARGUMENTS = [name for name, p in inspect.signature(verify).parameters.items() if p.kind is not p.VAR_KEYWORD]


def _mlp(constraint: Constraint, gpu: bool) -> Arguments:
    generator = models.mlp([100, 128, 256, 512, 1024, 784], slope=0.2, norm=True, tanh=True)
    return {"generator": generator, "critic": models.mlp([784, 512, 256, 1], slope=0.2), "real": torch.randn(64, 784)}


def _dcgan(constraint: Constraint, gpu: bool) -> Arguments:
    width, batch = (64, 64) if gpu else (8, 8)
    generator = models.dcgan_generator(width=width)
    # A penalty takes each sample's gradient by itself, and BatchNorm mixes them.
    critic = models.dcgan_critic(width=width, norm=not isinstance(constraint, GradientPenalty))
    return {"generator": generator, "critic": critic, "real": torch.randn(batch, 3, 64, 64)}


def _resnet(constraint: Constraint, gpu: bool) -> Arguments:
    """Return WGAN-GP's, with the layer normalisation that its paper recommends where a critic wants one."""
    width, batch = (128, 64) if gpu else (16, 8)
    generator, critic = models.resnet_generator(width=width), models.resnet_critic(width=width)
    for name, m in critic.named_children():
        if isinstance(m, models.Residual):
            for norm in ("norm1", "norm2")[name == "0" :]:  # an image is not normalised
                m.add_module(norm, nn.GroupNorm(1, width))  # in one group: LayerNorm
    return {"generator": generator, "critic": critic, "real": torch.randn(batch, 3, 32, 32)}


def _tabular(constraint: Constraint, gpu: bool) -> Arguments:
    """Return CTGAN's, whose critic here puts ten rows together itself."""
    critic = nn.Sequential(nn.Unflatten(0, (-1, 10)), nn.Flatten(), models.ctgan_critic(128, pack=10))
    generator = models.ctgan_generator(128, 128, pack=1)
    return {"generator": generator, "critic": critic, "real": torch.randn(500 if gpu else 100, 128), "pack": 10}


class _Labelled(nn.ModuleDict):
    """A network that gets an embedding of its labels beside its input."""

    def forward(self, x: Tensor, labels: Tensor) -> Tensor:
        result: Tensor = self["network"](torch.cat((x, self["embedding"](labels)), dim=1))
        return result


def _conditional(constraint: Constraint, gpu: bool) -> Arguments:
    networks = (models.mlp([32 + 8, 128, 64], norm=True), models.mlp([64 + 8, 128, 128, 1], slope=0.2))
    generator, critic = (_Labelled({"embedding": nn.Embedding(10, 8), "network": m}) for m in networks)
    labels = torch.randint(10, (64,))
    return {"generator": generator, "critic": critic, "real": torch.randn(64, 64), "cond": (labels,), "latent": 32}


BUILT_IN: dict[str, Callable[[Constraint, bool], Arguments]] = {
    "mlp": _mlp, "dcgan": _dcgan, "resnet": _resnet, "tabular": _tabular, "conditional": _conditional,
}  # fmt: skip


def load(name: str) -> Arguments:
    """Return what a user's factory, MODULE:FACTORY, makes; modules are looked for in the working directory, too."""
    path, _, attribute = name.partition(":")
    if not path or not attribute:
        raise ValueError(f"--networks: expected MODULE:FACTORY, got {name!r}")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        made = getattr(import_module(path), attribute)()
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
    """Yield (name, verify's arguments) one by one, so that networks which are done with need not be kept."""
    gpu = device is not None and device.type == "cuda"
    for name in names if networks is None else [networks]:
        for kind, constraint in ((kind, CONSTRAINTS[kind]) for kind in constraints):
            torch.manual_seed(seed)
            made = BUILT_IN[name](constraint, gpu) if networks is None else load(networks)
            moved = made if device is None else {key: _moved(value, device) for key, value in made.items()}
            own = "constraint" in made  # the factory's
            yield name if own else f"{name}-{kind}", {"constraint": constraint, "seed": seed} | moved
            if own:
                break


def run(
    names: Sequence[str], networks: str | None, constraints: Sequence[str], device: torch.device | None,
    *, backend: Backend, seed: int, path: Path | None, **options: float,
) -> bool:  # fmt: skip
    """Verify networks, print a report of each, and write all rows to ``path``; return whether all passed.

    The networks are built-in ones of ``names``, or what a factory, MODULE:FACTORY, makes, whose arguments go before
    the others: (generator, critic, real), or a dict of :func:`verify`'s. They are made under the seed, and moved to
    ``device`` unless it is None.
    """
    passed, reports = True, {}
    for name, arguments in _jobs(names, networks, constraints, device, seed):
        report = verify(**{"backend": backend, **options, **arguments})
        print(f"{name}: {report}\n", flush=True)
        passed, reports[name] = passed and report.passed, report.as_dict()
        if path is not None:
            path.write_text(json.dumps({"passed": passed, "reports": reports}, indent=1) + "\n")
    return passed
