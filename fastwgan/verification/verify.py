"""One critic step and one generator step on the user's own networks and device, judged against float64.

Three runs start from the same weights, latents, random numbers and conditions: a :class:`~fastwgan.trainer.Trainer`;
plain PyTorch op by op, as the papers' Algorithm 1 reads, in the networks' dtype; and the same in float64. Hooks on
copies of the networks show what goes through the trainer's step, so each stage of it (interpolates, means, penalty,
update, clamp) is also judged by itself, from what that stage was given: the first stage to fail is the one at fault.

Plain PyTorch runs twice, as one run's error may be small by luck, and the worse counts: once apart, and once on the
trainer's fake samples, points of the penalty and batches, and backward from the gradients that it began with, so that a
ReLU's input within a rounding of zero is on one side in both, and sums over a batch cancel in both.
"""

import copy
import platform
from dataclasses import fields, replace
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastwgan import checks, models
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import GradientPenalty, NormClip, WeightClip
from fastwgan.engine.latents import Latent
from fastwgan.engine.ranks import Ranks, unwrapped
from fastwgan.engine.settings import REMOVED
from fastwgan.engine.terms import Term, split
from fastwgan.streams import process_streams, set_process_streams
from fastwgan.trainer import Trainer
from fastwgan.verification.judge import Judge, difference
from fastwgan.verification.observed import Observed, copied
from fastwgan.verification.oracle import Constraint, Step, passes, to_dtype
from fastwgan.verification.report import Report, Row
from fastwgan.version import __version__

RANDOM = {"dropout": _DropoutNd, "instance noise": models.InstanceNoise}  # layers to be put into evaluation mode
UNTOLD = "latent: expected a width or a callable, as the generator's first layer does not tell it; got None"


def verify(
    generator: nn.Module, critic: nn.Module, real: Tensor, *,
    constraint: Constraint = WeightClip(),  # noqa: B008 - it is frozen
    critic_term: Term | None = None, generator_term: Term | None = None, cond: tuple[Any, ...] = (),
    latent: Latent | None = None, pack: int = 1, seed: int = 0, backend: Backend = "auto", **removed: object,
) -> Report:  # fmt: skip
    """Take a critic step and a generator step on copies of the networks; report on every stage, against float64.

    The networks, their gradients and modes, and the process's random streams are left as they are. Dropout and
    instance noise are put into evaluation mode in the copies; a network whose forward pass is random otherwise has to
    be verified in a form that is not. The networks have to run in float64, in which the scores have to come out.
    Print the :class:`Report`, or ask it whether it ``passed`` and what ``failed``.

    Args:
        generator, critic: as for a :class:`Trainer`, in any floating dtype, on one device.
        real: samples [N, ...] on that device. A small batch will do.
        constraint, pack, backend: as for a Trainer, whose default optimizers take the steps.
        critic_term, generator_term: as for a Trainer; functions of their records alone, which also run in float64.
        cond: conditions, which the networks get after their first argument.
        latent: as for a Trainer: a width, or a callable (batch_size, device) -> z, which is called for each step and
            once before. None takes the width of the generator's first linear or transposed convolution layer.
        seed: of latents, eps and noise.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the networks cannot be verified.
        RuntimeError: ``backend="triton"`` cannot be met; or a call inside ``torch.inference_mode``, under autocast or
            in one of several processes.

    >>> G, D = nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> verify(G, D, torch.randn(32, 2), constraint=GradientPenalty()).passed
    True
    """
    checks.removed(removed, REMOVED)
    checks.refuse_inference_mode()
    networks = nn.ModuleDict({"generator": unwrapped("generator", generator), "critic": unwrapped("critic", critic)})
    if type(constraint) not in (WeightClip, NormClip, GradientPenalty):
        got = type(constraint).__name__
        raise TypeError(f"constraint: expected WeightClip, NormClip or GradientPenalty, got {got}")
    if not isinstance(cond, (tuple, list)):
        raise TypeError(f"cond: expected a tuple of conditions, got {type(cond).__name__}")
    device = next(networks["critic"].parameters()).device
    checks.samples("real", real, device=device)
    if len(real) % checks.count("pack", pack):
        raise ValueError(f"real: expected a multiple of pack={pack} samples, got {len(real)}")
    if Ranks(device).world > 1:
        raise RuntimeError("torch.distributed: expected a single process, got one of several")
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError("torch.autocast: expected a call outside of it, got one inside")
    terms: dict[str, Any] = {"critic_term": critic_term, "generator_term": generator_term}
    ran, streams = resolve(backend, device), process_streams(device)
    try:
        with torch.enable_grad():  # whatever the caller has
            step = Step(copied(real), tuple(map(copied, cond)), constraint, pack, seed, terms)
            rows, notes = _rows(networks, step, latent, backend)
    finally:
        set_process_streams(streams, device)
    dtype = next(p.dtype for p in networks["critic"].parameters() if p.is_floating_point())
    versions = {
        "fastwgan": __version__, "torch": torch.__version__, "python": platform.python_version(),
        "triton": next((d.version for d in metadata.distributions(name="triton")), None),
    }  # fmt: skip
    given = {f.name: x for f in fields(constraint) if (x := getattr(constraint, f.name)) != f.default}
    options = ", ".join(f"{name}={value!r}" for name, value in given.items())
    return Report(
        rows=tuple(rows), constraint=f"{type(constraint).__name__}({options})", backend=ran, batch=len(real), seed=seed,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
        dtype=str(dtype).removeprefix("torch."), versions=versions, notes=tuple(notes),
        terms=tuple(name for name, term in terms.items() if term is not None),
    )  # fmt: skip


def _rows(networks: nn.ModuleDict, step: Step, latent: Latent | None, backend: Backend) -> tuple[list[Row], list[str]]:
    template, rows, notes = _copy(networks), list[Row](), []
    for word, kind in RANDOM.items():
        random = [m for m in template.modules() if isinstance(m, kind) and m.training]
        notes += [f"{len(random)} {word} layers in evaluation mode"] if random else []
        for m in random:
            m.training = False  # by itself, whatever is within
    width = _width(template["generator"]) if latent is None else latent
    ours, apart, beside, exact = (_copy(template) for _ in range(4))
    trainer = Trainer(
        *ours.values(), latent=width, constraint=step.constraint, **step.terms,
        pack=step.pack, seed=step.seed, backend=backend, cuda_graph=False, nonfinite="skip",
    )  # fmt: skip
    _check_networks(template, step, width, guessed=latent is None)
    exact.double()
    seen = Observed(trainer._steps.passes)
    for name, given in (("critic", step.real), ("generator", len(step.real))):
        module, optimizer, take = (getattr(trainer, name + suffix) for suffix in ("", "_optimizer", "_step"))
        seen.forget()
        before = {path: p.detach().clone() for path, p in module.named_parameters()}
        extra = {"real": step.real} if name == "generator" else {}
        metrics = take(given, *step.cond, **extra)
        taken = replace(step, name=name, z=seen.z)
        eagers = [passes(apart, taken, seen), passes(beside, taken, seen, beside=True)]
        truth = passes(exact, taken.to(torch.float64), seen)
        judge = Judge(taken, module, optimizer, backend, before, seen, metrics, eagers, truth, rows)
        judge.judge()
        for (path, own), plain, wide in zip(ours.named_buffers(), apart.buffers(), exact.buffers(), strict=True):
            judge.row("buffers", path.replace(".", ": ", 1), own, [plain], wide)
        latest = [*ours.parameters(), *ours.buffers()]
        with torch.no_grad():  # the next step begins with the trainer's
            for other in (apart, beside, exact):
                for x, own in zip((*other.parameters(), *other.buffers()), latest, strict=True):
                    x.copy_(own)
    return rows, notes


def _copy(networks: nn.ModuleDict) -> nn.ModuleDict:
    """Return copies of both, made at once so that what they share stays shared, without gradients."""
    try:
        copies = copy.deepcopy(networks)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"generator: expected networks that can be copied, got {error}") from error
    copies.zero_grad()
    return copies


def _width(generator: nn.Module) -> int:
    """Return the latents' width, as the generator's first layer has it, which may be for something else."""
    for m in generator.modules():
        if isinstance(m, (nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)):
            return m.in_features if isinstance(m, nn.Linear) else m.in_channels
    raise ValueError(UNTOLD)


@torch.no_grad()
def _check_networks(networks: nn.ModuleDict, step: Step, latent: Latent, *, guessed: bool) -> None:
    """Raise unless each network, from the same state, does the same with the same input, and runs in float64."""
    p, n = next(networks["generator"].parameters()), len(step.real)
    z = latent(n, p.device) if callable(latent) else torch.randn(n, latent, device=p.device, dtype=p.dtype)
    for name, x in (("generator", z), ("critic", step.real)):
        try:
            first, second = (split(_copy(networks)[name](x, *step.cond))[0] for _ in range(2))
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            if guessed and name == "generator":
                raise ValueError(UNTOLD) from error
            raise
        if not isinstance(first, Tensor) or not isinstance(second, Tensor):
            return  # the trainer says what is wrong with that
        if guessed and name == "generator" and first.shape != step.real.shape:
            raise ValueError(UNTOLD)
        size = first.double().norm().item() or 1.0
        if difference(second, first.double(), size) > torch.finfo(first.dtype).eps ** 0.5:
            got = "another in a second pass: verify it in a form without randomness"
            raise ValueError(f"{name}: expected the same output for the same input, got {got}")
        try:
            wide = split(_copy(networks).double()[name](*to_dtype((x, *step.cond), torch.float64)))[0]
        except RuntimeError as error:
            raise ValueError(f"{name}: expected a network that runs in float64, got {error}") from error
        if wide.dtype != torch.float64:
            raise ValueError(f"{name}: expected float64 out of its float64 form, got {wide.dtype}")
