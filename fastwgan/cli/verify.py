"""fastwgan verify: judge a step on built-in networks or the user's, under each constraint."""

import inspect
import json
import os
import sys
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fastwgan import models
from fastwgan.cli.common import BACKEND, SEED, Options, device, problems
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.verification.oracle import Constraint
from fastwgan.verification.verify import verify

CONSTRAINTS: dict[str, Constraint] = {
    "clip": WeightClip(),
    "norm-clip": NormClip(0.5),  # below the 0.58 that layers start with, so that there is something to project
    "penalty": GradientPenalty(),
    "dragan": GradientPenalty(at="perturbed"),
}
ARGUMENTS = [name for name, p in inspect.signature(verify).parameters.items() if p.kind is not p.VAR_KEYWORD]
Arguments = dict[str, Any]  # verify's


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
NAMES: dict[str, Any] = {"nargs": "+", "metavar": "NAME"}
OPTIONS: Options = {
    "--networks": {
        "metavar": "MODULE:FACTORY",
        "help": "yours: a function without arguments that returns (generator, critic, real), or a dict of the "
        "arguments of fastwgan.verify; default: built-in ones",
    },
    "--workload": NAMES | {"choices": BUILT_IN, "help": f"{', '.join(BUILT_IN)}; default: all"},
    "--constraint": NAMES | {"choices": CONSTRAINTS, "help": f"{', '.join(CONSTRAINTS)}; default: all"},
    "--device": {"help": "such as cpu or cuda:0; default: where --networks are, else the first GPU, else the CPU"},
    "--backend": BACKEND,
    "--seed": {"type": SEED, "default": 0},
    "--json": {"type": Path, "help": "file for all rows"},
}


def _load(name: str) -> Arguments:
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


def _jobs(
    names: Iterable[str], networks: str | None, constraints: Iterable[str], device: torch.device | None, seed: int
) -> Iterator[tuple[str, Arguments]]:
    """Yield (name, verify's arguments) one by one, made under the seed, so that earlier networks can be freed."""
    gpu = device is not None and device.type == "cuda"
    for name in names if networks is None else [networks]:
        for kind in constraints:
            torch.manual_seed(seed)
            made = BUILT_IN[name](CONSTRAINTS[kind], gpu) if networks is None else _load(networks)
            moved = made if device is None else tree_map_only((Tensor, nn.Module), lambda x: x.to(device), made)
            if "constraint" in made:  # the factory's own
                yield name, {"seed": seed} | moved
                break
            yield f"{name}-{kind}", {"constraint": CONSTRAINTS[kind], "seed": seed} | moved


def run(args: Namespace) -> int:
    with problems():
        if args.networks is not None and args.workload:
            raise ValueError("--workload: names built-in networks, and --networks others")
        if args.json is not None and not args.json.absolute().parent.is_dir():
            raise ValueError(f"--json: {args.json.parent} is no directory")
        place = None if args.networks is not None and args.device is None else device(args.device)
        passed, reports = True, {}
        constraints = args.constraint or CONSTRAINTS
        for name, arguments in _jobs(args.workload or BUILT_IN, args.networks, constraints, place, args.seed):
            report = verify(**{"backend": args.backend, **arguments})
            print(f"{name}: {report}\n", flush=True)
            passed, reports[name] = passed and report.passed, report.as_dict()
            if args.json is not None:
                args.json.write_text(json.dumps({"passed": passed, "reports": reports}, indent=1) + "\n")
    return 0 if passed else 1
