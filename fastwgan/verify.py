"""One critic step and one generator step on the user's own networks and device, judged against float64.

Three runs start from the same weights, latents, random numbers and conditions: a :class:`~fastwgan.trainer.Trainer`;
plain PyTorch op by op, as the papers' Algorithm 1 reads, in the networks' dtype; and the same in float64. Hooks on
copies of the networks show what goes through the trainer's step, so each stage of it (noise, interpolates, means,
penalty, update, clamp) is also judged by itself, from what that stage was given: the first stage to fail is the one at
fault.

The rule: a relative error ||ours - float64|| / ||float64|| is at most twice that of plain PyTorch in the same dtype,
and a floor of roundings to the dtype: 4 for one op, 8 for what has gone through a network. Of a value that is a
difference of larger ones, these are roundings of the larger ones. For networks in float64, which is no oracle for
itself, the floor is eight times as much.

Plain PyTorch runs twice, as one run's error may be small by luck: once apart, and once on the trainer's fake samples,
noise, points of the penalty and batches, and backward from the gradients that the trainer began with, so that a ReLU's
input that lies within a rounding of zero is on one side in both, and sums over a batch cancel in both. The worse of
the two counts.
"""

import copy
import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from fastwgan import functional
from fastwgan.arguments import check_count, check_mode
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import Clip, GradientPenalty, NormClip, WeightClip
from fastwgan.metrics import Metrics
from fastwgan.observed import Observed, copied
from fastwgan.optim import Adam, RMSprop
from fastwgan.plain import ADAM, RMSPROP, Constraint, Pass, Step, critic_pass, generator_pass, means, to_dtype
from fastwgan.ranks import Ranks, unwrapped
from fastwgan.report import Report, Row
from fastwgan.streams import process_streams, set_process_streams
from fastwgan.structure import layers
from fastwgan.trainer import Latent, Trainer

__all__ = ["verify"]

THROUGH_NETWORKS = ("generate", "forward", "input gradient", "loss", "backward", "buffers")
CANCELLED = 1e-10  # of its summands' size: a sum below it is rounding, in float64 too

# The verdict


class _Judge:
    """Writes the rows of one step."""

    def __init__(self, step: str, rows: list[Row]) -> None:
        self._step, self._rows = step, rows

    def __call__(
        self, op: str, name: str, ours: Tensor | None, eagers: Sequence[Tensor], exact: Tensor, summands: float = 0.0,
        dtype: torch.dtype | None = None,
    ) -> None:  # fmt: skip
        """``summands`` is the size of what ``exact`` is a sum of, where that may cancel.

        ``dtype`` is what ours was computed in, where it is not its own.
        """
        exact = exact.detach().double()
        norm = exact.norm().item()
        size = norm if norm > CANCELLED * summands else summands or 1.0
        eager = _largest(_error(each, exact, size) for each in eagers)
        floor = 0.0
        if ours is not None and ours.is_floating_point():
            info = torch.finfo(dtype or ours.dtype)
            roundings = (8 if op in THROUGH_NETWORKS else 4) * (8 if info.dtype == "float64" else 1)
            floor = roundings * info.eps * (max(norm, summands) + info.tiny * exact.numel() ** 0.5) / size
        # Where plain PyTorch overflows in the dtype, it is no measure.
        tolerance = floor + (2 * eager if math.isfinite(eager) else 0.0)
        self._rows.append(Row(self._step, op, name, _error(ours, exact, size), eager, tolerance))

    def noisy(self, name: str, ours: Tensor | None, x: Tensor, step: Step, **options: Any) -> None:
        """What the critic was shown of samples x."""
        like = x if ours is None else ours
        wide, eager = (step.noisy(each, like, **options) for each in (x.double(), x))
        self("perturb", name, ours, [eager], wide, x.double().norm().item() + (wide - x).norm().item())

    def scores(
        self, op: str, which: str, scores: Tensor, seed: Tensor | None, step: Step, sign: int, drift: float = 0.0
    ) -> None:
        """The gradient that a backward pass begins with there."""
        wide, size = step.seed_at(scores.double(), sign, drift)
        self(op, f"seed at {which} scores", seed, [step.seed_at(scores, sign, drift)[0]], wide, size)

    def backward(self, module: nn.Module, eagers: Sequence[Pass], exact: Pass) -> None:
        largest = max(g.norm().item() for g in exact.gradients.values())
        for name, p in module.named_parameters():
            if p.requires_grad:
                ours = torch.zeros_like(p) if p.grad is None else p.grad
                parts, size = [each.gradients[name] for each in eagers], exact.sizes[name]
                if exact.gradients[name].norm().item() <= CANCELLED * largest:
                    size = max(size, largest)  # void, as a bias before BatchNorm is: what is left of it is rounding
                self("backward", name, ours, parts, exact.gradients[name], size)

    def guard(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, Tensor], metrics: Metrics
    ) -> None:
        """How many gradients are not finite, and whether the step was taken: only if there are none."""
        found = [p.grad.isfinite().logical_not().sum() for p in module.parameters() if p.grad is not None]
        count = torch.stack(found).sum()
        self("guard", "non-finite", None if metrics.nonfinite is None else metrics.nonfinite.long(), [count], count)
        changed = [x.any() for state in optimizer.state.values() for x in state.values()]
        changed += [(p != before[name]).any() for name, p in module.named_parameters()]
        taken, right = torch.stack([x.to(count.device) for x in changed]).any().int(), (count == 0).int()
        self("guard", "steps taken", taken, [right], right)

    def update(
        self, module: nn.Module, optimizer: torch.optim.Optimizer, before: dict[str, Tensor], backend: Backend,
        step: Step, *, bounded: bool,
    ) -> tuple[dict[str, Tensor], ...]:  # fmt: skip
        """Weights and optimizer state, all from the trainer's own gradients.

        Returns weights by name: ours, plain PyTorch's and float64's. ``bounded`` are those in the module, and ours are
        then what the optimizer does without the bound.
        """
        named = dict(module.named_parameters())
        grads = {name: p.grad for name, p in named.items() if p.grad is not None}
        old = {name: before[name] for name in grads}
        name, options = ("RMSprop", RMSPROP) if isinstance(step.constraint, Clip) else ("Adam", ADAM)
        theirs = partial(getattr(torch.optim, name), foreach=False, **options)
        eager, eager_state = _updated(theirs, old, grads)
        exact, exact_state = _updated(theirs, to_dtype(old, torch.float64), to_dtype(grads, torch.float64))
        new = {name: p.detach() for name, p in named.items()}
        if bounded:
            fused = {"RMSprop": RMSprop, "Adam": Adam}[name]
            new, _ = _updated(partial(fused, backend=backend, **options), old, grads)
        for name in grads:
            self("update", name, new[name], [eager[name]], exact[name])
            state = optimizer.state.get(named[name], {})
            for key, value in exact_state[name].items():
                self("update", f"{name}: {key}", state.get(key), [eager_state[name][key]], value)
        return before | new, before | eager, before | exact

    def bound(
        self, critic: nn.Module, step: Step, metrics: Metrics, new: dict[str, Tensor], eager: dict[str, Tensor],
        exact: dict[str, Tensor],
    ) -> None:  # fmt: skip
        """The critic's weights, ``new`` ones without the bound, and how many of them lie on it."""
        constraint = step.constraint
        assert isinstance(constraint, Clip)
        op = "clamp" if isinstance(constraint, WeightClip) else "project"
        members = set(constraint.clipped(critic))
        on_bound, nearly = [], []  # to a rounding of a norm
        for name, p in critic.named_parameters():
            plain, wide = eager[name], exact[name].double()
            if p in members:
                plain, wide = (step.bounded(w, p.dtype) for w in (plain, wide))
                bound = step.bound(p.dtype)
                sizes = p.detach().abs().flatten()
                margin = 0.0
                if isinstance(constraint, NormClip):
                    sizes, margin = step.row_norms(new[name].double()), 8 * torch.finfo(p.dtype).eps
                on_bound.append(sizes >= bound * (1 + margin))
                nearly.append(sizes >= bound * (1 - margin))
            self(op, name, p.detach(), [plain], wide)
        if members:
            least, most = (torch.cat(each).double().mean() for each in (on_bound, nearly))
            ours = metrics.saturation
            share = least if ours is None else ours.double().clamp(least, most)
            self(op, "saturation", ours, [share.float()], share)

    def buffers(self, ours: nn.Module, eager: nn.Module, exact: nn.Module) -> None:
        """Of both networks, generator first."""
        named = zip(ours.named_buffers(), eager.buffers(), exact.buffers(), strict=True)
        for (name, own), plain, wide in named:
            network, _, path = name.partition(".")
            self("buffers", f"{('generator', 'critic')[int(network)]}: {path}", own, [plain], wide)


def _error(x: Tensor | None, exact: Tensor, size: float) -> float:
    """||x - exact|| / size; NaN where there is no x to compare."""
    if x is None or x.shape != exact.shape:
        return math.nan
    return float((x.detach().double() - exact).norm() / size)


def _largest(errors: Iterable[float]) -> float:
    """NaN if there is one."""
    return torch.tensor(list(errors), dtype=torch.float64).max().item()


def _updated(
    make: Callable[[list[Tensor]], torch.optim.Optimizer], weights: dict[str, Tensor], grads: dict[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """Weights after an optimizer's first step, and its state, by name."""
    parameters = {name: nn.Parameter(w.clone()) for name, w in weights.items()}
    for name, p in parameters.items():
        p.grad = grads[name].clone()
    if not parameters:
        return {}, {}
    optimizer = make(list(parameters.values()))
    optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}, {n: optimizer.state[p] for n, p in parameters.items()}


def _judge_critic(
    judge: _Judge, trainer: Trainer, seen: Observed, metrics: Metrics, step: Step, before: dict[str, Tensor],
    passes: Sequence[Pass], exact: Pass,
) -> None:  # fmt: skip
    """The rows of a critic step; ``passes`` are plain PyTorch's two."""
    wide, constraint = step.to(torch.float64), step.constraint
    assert seen.fake is not None
    judge("generate", "fake samples", seen.fake, [passes[0].fake], exact.fake)
    real, fake = step.real, seen.fake.to(step.real.dtype)
    if step.noise:
        shown = seen.halves(seen.samples)
        judge.noisy("noisy real samples", shown[0], real, step, stream=2)
        judge.noisy("noisy fake samples", shown[1], fake, step, stream=3)
        if shown[0] is not None and shown[1] is not None:
            real, fake = shown[0], shown[1]
    if isinstance(constraint, GradientPenalty):
        if constraint.at == "perturbed":
            judge.noisy("points", seen.x, real, step, stream=1, scale=constraint.noise)
        else:
            summands = real.double().norm().item() + fake.double().norm().item()
            plain, truth = step.points(real, fake, real), wide.points(real.double(), fake.double(), real)
            judge("interpolate", "points", seen.x, [plain], truth, summands)

    scores, seeds = seen.halves(seen.scores), seen.halves(seen.seeds)
    for i, which in enumerate(("real", "fake")):
        judge("forward", f"{which} scores", scores[i], [each.scores[i] for each in passes], exact.scores[i])
    if scores[0] is not None and scores[1] is not None:
        own = [x.double() for x in scores if x is not None]
        sizes = [x.abs().mean().item() for x in own]
        each = [x.mean() for x in scores if x is not None]
        op = "objective" if step.blend or step.drift else "scores"
        judge(op, "mean of real", metrics.real_score, each[:1], own[0].mean(), sizes[0])
        judge(op, "mean of fake", metrics.fake_score, each[1:], own[1].mean(), sizes[1])
        difference = own[0].mean() - own[1].mean()
        judge(op, "wasserstein", metrics.wasserstein, [each[0] - each[1]], difference, sum(sizes))
        judge.scores(op, "real", scores[0], seeds[0], step, -1, step.drift)
        judge.scores(op, "fake", scores[1], seeds[1], step, 1)
        if op == "objective":
            losses, size = means((*step.terms(own[0], -1, step.drift), *step.terms(own[1], 1)))
            eager, _ = means((*step.terms(scores[0], -1, step.drift), *step.terms(scores[1], 1)))
            penalty = torch.zeros_like(losses[0]) if metrics.penalty is None else step.weight * metrics.penalty.double()
            loss = torch.stack([*losses, penalty]).sum()
            size += penalty.item()
            judge(op, "loss", metrics.critic_loss, [torch.stack([*eager, penalty]).sum()], loss, size)

    if exact.gradient is not None:
        eagers = [each.gradient for each in passes if each.gradient is not None]
        judge("input gradient", "at the points", seen.gradient, eagers, exact.gradient)
        g = torch.full_like(exact.gradient, math.nan) if seen.gradient is None else seen.gradient
        g64 = g.double()
        size = wide.penalty(g64, sign=-1).item()
        judge("penalty", "mean penalty", metrics.penalty, [step.penalty(g)], wide.penalty(g64), size)
        for name, value, of in (
            ("mean norm", metrics.gradient_norm, Tensor.mean),
            ("least norm", metrics.gradient_norm_min, Tensor.amin),
            ("greatest norm", metrics.gradient_norm_max, Tensor.amax),
        ):
            judge("penalty", name, value, [of(step.norms(g))], of(wide.norms(g64)))
        summands = wide.cotangent(g64, sign=-1).norm().item()
        if exact.depends:
            judge("penalty", "its gradient", seen.cotangent, [step.cotangent(g)], wide.cotangent(g64), summands)

    plain_losses = [each.loss for each in passes]
    judge("loss", "critic loss", metrics.critic_loss, plain_losses, exact.loss, exact.summands, plain_losses[0].dtype)
    critic, bounded = trainer.critic, isinstance(constraint, Clip)
    judge.backward(critic, passes, exact)
    judge.guard(critic, trainer.critic_optimizer, before, metrics)
    weights = judge.update(critic, trainer.critic_optimizer, before, trainer.backend, step, bounded=bounded)
    if bounded:
        judge.bound(critic, step, metrics, *weights)


def _judge_generator(
    judge: _Judge, trainer: Trainer, seen: Observed, metrics: Metrics, step: Step, before: dict[str, Tensor],
    passes: Sequence[Pass], exact: Pass,
) -> None:  # fmt: skip
    """The rows of a generator step; ``passes`` are plain PyTorch's two."""
    judge("generate", "fake samples", seen.fake, [passes[0].fake], exact.fake)
    assert seen.fake is not None
    if step.noise:
        fake, shown = seen.fake.to(step.real.dtype), seen.samples[0]
        judge.noisy("noisy fake samples", shown, fake, step, stream=1, offset=len(fake))
    scores = seen.scores[0] if seen.together else None
    judge("forward", "fake scores", scores, [each.scores[0] for each in passes], exact.scores[0])
    if scores is not None:
        op, name = ("objective", "loss") if step.blend else ("scores", "-mean of fake")
        (loss, size), (plain, _) = (means(step.terms(x, -1)) for x in (scores.double(), scores))
        judge(op, name, metrics.generator_loss, [torch.stack(plain).sum()], torch.stack(loss).sum(), size)
        judge.scores(op, "fake", scores, seen.seeds[0], step, -1)
    losses = [each.loss for each in passes]
    judge("loss", "generator loss", metrics.generator_loss, losses, exact.loss, exact.summands, losses[0].dtype)
    generator = trainer.generator
    judge.backward(generator, passes, exact)
    judge.guard(generator, trainer.generator_optimizer, before, metrics)
    judge.update(generator, trainer.generator_optimizer, before, trainer.backend, step, bounded=False)


# Preparing


def verify(
    generator: nn.Module,
    critic: nn.Module,
    real: Tensor,
    *,
    constraint: Constraint = WeightClip(),  # noqa: B008 - it is frozen
    blend: float = 0.0,
    drift: float = 0.0,
    instance_noise: float = 0.0,
    cond: tuple[Any, ...] = (),
    latent: Latent | None = None,
    pack: int = 1,
    seed: int = 0,
    backend: Backend = "auto",
) -> Report:
    """Take one critic step and one generator step on copies of the networks, and judge every stage against float64.

    The networks, their gradients and modes, and the process's random streams are left as they are. Dropout is put into
    evaluation mode in the copies; a network whose forward pass is random otherwise has to be verified in a form that is
    not. The networks have to run in float64, in which the scores have to come out.

    Args:
        generator, critic: as for a :class:`Trainer`, in any floating dtype, on one device.
        real: samples [N, ...] on that device. A small batch will do.
        constraint: as for a Trainer. Its default optimizers take the steps: RMSprop for WeightClip and NormClip, Adam
            for GradientPenalty.
        blend, drift: as for a Trainer.
        instance_noise: as for a Trainer, but a number.
        cond: conditions, which networks get after their first argument.
        latent: as for a Trainer: a width, or a callable (batch_size, device) -> z, which is called for each step and
            once before. None takes the width of the generator's first linear or transposed convolution layer.
        pack: samples to a score.
        seed: of latents, eps and noise.
        backend: see :mod:`fastwgan.backend`.

    Returns:
        A :class:`Report`: ``print`` it, or ask it whether it ``passed`` and what ``failed``.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or the networks cannot be verified.
        RuntimeError: ``backend="triton"`` cannot be met; or a call inside ``torch.inference_mode``, under autocast or
            in one of several processes.

    >>> G, D = nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> verify(G, D, torch.randn(32, 2), constraint=GradientPenalty()).passed
    True
    """
    check_mode()
    networks = [unwrapped("generator", generator), unwrapped("critic", critic)]
    for name, module in zip(("generator", "critic"), networks, strict=True):
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{name}: expected trainable parameters, got none")
    device = next(networks[1].parameters()).device
    _check(real, constraint, cond, pack, seed, device)
    functional.check_blend(blend, drift)
    functional.check_number("instance_noise", instance_noise, minimum=0)
    ran = resolve(backend, device)
    if Ranks(device).world > 1:
        raise RuntimeError("torch.distributed: expected a single process, got one of several")
    if torch.is_autocast_enabled(device.type):
        raise RuntimeError("torch.autocast: expected a call outside of it, got one inside")
    streams = process_streams(device)
    try:
        with torch.enable_grad():  # whatever the caller has
            conditions = tuple(map(copied, cond))
            step = Step(copied(real), conditions, constraint, pack, seed, blend, drift, instance_noise)
            rows, notes = _verified(networks, step, latent, backend)
    finally:
        set_process_streams(streams, device)
    dtype = next(p.dtype for p in networks[1].parameters() if p.is_floating_point())
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    dtype_name = str(dtype).removeprefix("torch.")
    options = {"blend": blend, "drift": drift, "instance_noise": instance_noise}
    return Report(
        tuple(rows), _in_short(constraint), where, ran, dtype_name, len(real), seed, _versions(), tuple(notes),
        {name: float(value) for name, value in options.items() if value},
    )  # fmt: skip


def _check(real: Tensor, constraint: Constraint, cond: object, pack: int, seed: int, device: torch.device) -> None:
    if type(constraint) not in (WeightClip, NormClip, GradientPenalty):
        got = type(constraint).__name__
        raise TypeError(f"constraint: expected WeightClip, NormClip or GradientPenalty, got {got}")
    if not isinstance(cond, (tuple, list)):
        raise TypeError(f"cond: expected a tuple of conditions, got {type(cond).__name__}")
    functional.check_samples("real", real, device)
    check_count("pack", pack)
    functional.check_seed("seed", seed)
    if len(real) % pack:
        raise ValueError(f"real: expected a multiple of pack={pack} samples, got {len(real)}")


def _in_short(constraint: Constraint) -> str:
    """The constraint with what is not its default."""
    default = type(constraint)()
    given = ((f.name, getattr(constraint, f.name)) for f in fields(constraint))
    options = ", ".join(f"{name}={value!r}" for name, value in given if value != getattr(default, name))
    return f"{type(constraint).__name__}({options})"


def _versions() -> dict[str, str | None]:
    import fastwgan  # which imports this file

    try:
        triton = metadata.version("triton")
    except metadata.PackageNotFoundError:
        triton = None
    return {
        "fastwgan": fastwgan.__version__, "torch": torch.__version__, "triton": triton,
        "python": platform.python_version(),
    }  # fmt: skip


def _copy(networks: Iterable[nn.Module]) -> nn.ModuleList:
    """Both at once, so that what they share stays shared; without gradients."""
    try:
        copied = copy.deepcopy(nn.ModuleList(networks))
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"generator: expected networks that can be copied, got {error}") from error
    copied.zero_grad()
    return copied


def _verified(
    networks: list[nn.Module], step: Step, latent: Latent | None, backend: Backend
) -> tuple[list[Row], list[str]]:
    """(rows, notes)."""
    template = _copy(networks)
    dropped = [m for m in template.modules() if isinstance(m, _DropoutNd) and m.training]
    notes = [f"{len(dropped)} dropout layers in evaluation mode"] if dropped else []
    for m in dropped:
        m.eval()
    if latent is None:
        latent = _width(template, step)
    known = not step.cond and layers(template[1], step.real.dim()) is not None  # as hooks hide it
    ours, apart, beside, exact = (_copy(template) for _ in range(4))
    trainer = Trainer(
        *ours, latent=latent, independent_samples=known, constraint=step.constraint, seed=step.seed, backend=backend,
        cuda_graph=False, pack=step.pack, nonfinite="skip", blend=step.blend, drift=step.drift,
        instance_noise=step.noise,
    )  # fmt: skip
    _check_networks(template, step, latent)
    exact.double()
    wide = step.to(torch.float64)
    seen = Observed(*ours)
    rows: list[Row] = []

    before = {name: p.detach().clone() for name, p in trainer.critic.named_parameters()}
    metrics = trainer.critic_step(step.real, *step.cond)
    passes = [critic_pass(apart, step, seen.z, seen), critic_pass(beside, step, seen.z, seen, beside=True)]
    truth = critic_pass(exact, wide, to_dtype(seen.z, torch.float64), seen)
    judge = _Judge("critic", rows)
    _judge_critic(judge, trainer, seen, metrics, step, before, passes, truth)
    judge.buffers(ours, apart, exact)

    seen.forget()
    for other in (apart, beside, exact):
        _match(other, ours)
    before = {name: p.detach().clone() for name, p in trainer.generator.named_parameters()}
    metrics = trainer.generator_step(len(step.real), *step.cond)
    passes = [generator_pass(apart, step, seen.z, seen), generator_pass(beside, step, seen.z, seen, beside=True)]
    truth = generator_pass(exact, wide, to_dtype(seen.z, torch.float64), seen)
    judge = _Judge("generator", rows)
    _judge_generator(judge, trainer, seen, metrics, step, before, passes, truth)
    judge.buffers(ours, apart, exact)
    return rows, notes


@torch.no_grad()
def _match(networks: nn.ModuleList, others: nn.ModuleList) -> None:
    """Give networks the weights and buffers of others, in their own dtype."""
    pairs = zip((*networks.parameters(), *networks.buffers()), (*others.parameters(), *others.buffers()), strict=True)
    for own, other in pairs:
        own.copy_(other)


def _drawn(networks: nn.ModuleList, latent: Latent, batch: int) -> Any:
    """Latents to try a generator on."""
    p = next(networks[0].parameters())
    return latent(batch, p.device) if callable(latent) else torch.randn(batch, latent, device=p.device, dtype=p.dtype)


def _width(networks: nn.ModuleList, step: Step) -> int:
    """Of the latents, by the generator's first layer; it is tried out, as that layer may be for something else."""
    layers = (nn.Linear, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    first = next((m for m in networks[0].modules() if isinstance(m, layers)), None)
    problem: Exception | None = None
    if first is not None:
        width = first.in_features if isinstance(first, nn.Linear) else first.in_channels
        try:
            with torch.no_grad():
                fake = _copy(networks)[0](_drawn(networks, width, len(step.real)), *step.cond)
            if fake.shape == step.real.shape:
                return width
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            problem = error
    raise ValueError(
        "latent: expected a width or a callable, as the generator's first layer does not tell it; got None"
    ) from problem


def _check_networks(networks: nn.ModuleList, step: Step, latent: Latent) -> None:
    """Raise unless each network, from the same state, does the same with the same input, and runs in float64."""
    inputs = (_drawn(networks, latent, len(step.real)), step.real)
    for i, name in enumerate(("generator", "critic")):
        with torch.no_grad():
            first, second = (_copy(networks)[i](inputs[i], *step.cond) for _ in range(2))
            if not isinstance(first, Tensor) or not isinstance(second, Tensor):
                return  # the trainer says what is wrong with that
            size = first.double().norm().item() or 1.0
            if _error(second, first.double(), size) > torch.finfo(first.dtype).eps ** 0.5:
                raise ValueError(
                    f"{name}: expected the same output for the same input, got another in a second pass: verify it in "
                    "a form without randomness"
                )
            try:
                wide = _copy(networks).double()[i](*to_dtype((inputs[i], *step.cond), torch.float64))
            except RuntimeError as error:
                raise ValueError(f"{name}: expected a network that runs in float64, got {error}") from error
            if wide.dtype != torch.float64:
                raise ValueError(f"{name}: expected float64 out of its float64 form, got {wide.dtype}")
