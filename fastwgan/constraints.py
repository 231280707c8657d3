"""The ways to keep the critic Lipschitz: WGAN's weight clipping, a bound on norms, WGAN-GP's gradient penalty.

A constraint knows what it asks of a critic step, and a trainer knows no constraint: it asks :class:`Constraint`.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastwgan import checks
from fastwgan.backend import Backend, Resolved, resolve
from fastwgan.metrics import Lazy
from fastwgan.ops.penalty import packed
from fastwgan.ops.samples import interpolates, perturb
from fastwgan.ops.weights import Share, combine_shares, project_and_count_
from fastwgan.optim import Adam, Gated, RMSprop
from fastwgan.optim.base import Together

__all__ = ["Constraint", "GradientPenalty", "NormClip", "Penalised", "Samples", "WeightClip"]


class Samples(NamedTuple):
    """Real and fake samples of a step, with the conditions of each. None stands for those that are not there yet."""

    real: Any
    fake: Any
    cond: tuple[Any, ...]
    fake_cond: tuple[Any, ...]
    differs: tuple[int, ...] = ()  # which conditions are others for fake samples than for real ones
    outputs: tuple[Any, ...] = ()  # what the generator returned behind the fake samples


class Penalised(NamedTuple):
    """The penalty of the critic's gradient at points x, [N, ...]."""

    x: Tensor
    cond: tuple[Any, ...]
    weight: float
    kind: str
    target: float
    joined: tuple[int, ...] = ()  # x is [N, size] then: samples of ``shape``, and behind them these conditions
    shape: tuple[int, ...] = ()

    def inputs(self, x: Tensor) -> tuple[Any, ...]:
        """Return the critic's inputs at points x: samples, and their conditions."""
        if not self.joined:
            return x, *self.cond
        sizes, cond = [self.cond[i][0].numel() for i in self.joined], [*self.cond]
        samples, *parts = torch.split(x, [x.shape[1] - sum(sizes), *sizes], 1)
        for i, part in zip(self.joined, parts, strict=True):
            cond[i] = part.reshape(cond[i].shape).to(cond[i].dtype)
        return samples.reshape(self.shape), *cond


class Draw(NamedTuple):
    """A place in a random stream: its seed, and the index at which the numbers begin."""

    seed: int
    offset: int | Tensor


class Constraint:
    """The base of all constraints: what a trainer asks of one. This one asks for nothing."""

    commutes = False  # whether W x + b at the points x are the points of W real + b and W fake + b
    bounds_weights = False  # whether weights are held to a bound, but for parameters that ``exclude`` names
    exclude: tuple[str | type[nn.Module], ...] = ()

    def default_optimizer(self, parameters: list[nn.Parameter], backend: Backend) -> Gated:
        """Return the optimizer of the constraint's paper, for the critic or for the generator."""
        return RMSprop(parameters, lr=5e-5, backend=backend)

    def check(self, critic: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
        """Return advice or None; raise TypeError or ValueError if it cannot be had with these."""
        return None

    def penalty_weight(self, iteration: int) -> float:
        """Return the penalty's weight in a critic step; 0 for a step without one."""
        return 0.0

    def random_numbers(self, batch: int, pack: int) -> int:
        """Return how many numbers of a random stream :meth:`points` uses."""
        return 0

    def check_conditions(self, real: Tensor, pairs: Iterable[tuple[Any, Any]]) -> None:
        """Raise ValueError for a pair of different conditions, of real and of fake samples, that cannot be used."""

    def points(
        self, samples: Samples, weight: float, draw: Draw, pack: int, backend: Resolved, out: Tensor | None = None
    ) -> Penalised:
        """Return the points that are penalised in a step, in ``out`` if they commute with linear maps."""
        raise NotImplementedError

    def excluded(self, critic: nn.Module, *, strict: bool = False) -> set[nn.Parameter]:
        """Return the parameters that are left alone; if ``strict``, raise ValueError for an entry without any."""
        excluded: set[nn.Parameter] = set()
        for entry in self.exclude:
            if isinstance(entry, str):
                named = critic.named_parameters(remove_duplicate=False)  # a tied weight has several names
                matched = [p for name, p in named if fnmatchcase(name, entry)]
            else:
                matched = [p for m in critic.modules() if isinstance(m, entry) for p in m.parameters()]
            if strict and not matched:
                raise ValueError(f"exclude: {entry!r} matches no parameter of the critic")
            excluded.update(matched)
        return excluded

    def prepare(self, held: Sequence[Tensor], backend: Backend) -> None:
        """Raise ValueError unless the parameters ``held`` can be bounded."""

    def fuse_into(self, together: Together, held: Iterable[Tensor]) -> Together:
        """Return what the optimizer's launch does, with as much of the bound as it can take."""
        return together

    def apply_(
        self, held: Sequence[Tensor], done: Collection[int], shares: list[Share], gate: Tensor, backend: Backend
    ) -> Lazy | None:
        """Bound parameters in place, but those whose ids are in ``done``, unless the gate says no.

        Return the share on the bound, 0-d, of them all; ``shares`` are of those done. None where there are none.
        """
        return None


class Clip(Constraint):
    """A bound on weights after each update, with parameters that are left alone."""

    bounds_weights = True
    bound: float

    def __post_init__(self) -> None:
        checks.number("bound", self.bound, minimum=0, exclusive=True)
        given: object = self.exclude
        entries = tuple(given) if isinstance(given, Iterable) and not isinstance(given, (str, type)) else (given,)
        for entry in entries:
            if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
                raise TypeError(f"exclude: expected parameter-name patterns or module types, got {entry!r}")
        object.__setattr__(self, "exclude", entries)

    def check(self, critic: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
        excluded = self.excluded(critic, strict=True)
        for p in critic.parameters():
            if p not in excluded:
                checks.bound("bound", self.bound, checks.parameter("critic", p).dtype)
        groups = [] if optimizer is None else optimizer.param_groups
        if any(max(group.get("momentum", 0), group.get("betas", (0,))[0]) > 0 for group in groups):
            return (
                f"{type(self).__name__} with a critic optimizer that has momentum: training becomes unstable "
                "(arXiv 1701.07875, section 4); RMSprop without momentum is the usual choice"
            )
        return None


@dataclass(frozen=True)
class WeightClip(Clip):
    """Clamp every critic weight to [-bound, bound] after each update, in the update's launch.

    Args:
        bound: c > 0.
        exclude: parameters to leave alone: shell patterns of parameter names (``"norm.*"``) or module types
            (``torch.nn.BatchNorm2d``), whose parameters are meant. The default clamps all: leaving BatchNorm's
            scales out lets the critic grow through them.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 7.

    >>> WeightClip(0.02).bound
    0.02
    """

    bound: float = 0.01
    exclude: tuple[str | type[nn.Module], ...] = ()

    def check(self, critic: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
        for group in optimizer.param_groups if isinstance(optimizer, Gated) else ():
            if (clip := group.get("clip")) not in (None, self.bound):
                raise ValueError(f"critic_optimizer: its clip {clip} contradicts the constraint's {self.bound}")
        return super().check(critic, optimizer)

    def fuse_into(self, together: Together, held: Iterable[Tensor]) -> Together:
        return together._replace(bound=self.bound, bounded={id(p) for p in held})

    def apply_(
        self, held: Sequence[Tensor], done: Collection[int], shares: list[Share], gate: Tensor, backend: Backend
    ) -> Lazy | None:
        rest = [p for p in held if id(p) not in done]
        clamped = project_and_count_(rest, self.bound, "weight", backend, gate) if rest else None
        combined = combine_shares(shares if clamped is None else [*shares, clamped])
        return None if combined is None else combined[0]


@dataclass(frozen=True)
class NormClip(Clip):
    """Project the critic's weights onto a ball after each update, in one launch: their L2 norm is at most ``bound``.

    Scaling keeps their direction, where :class:`WeightClip` drives weights into the corners of a box.

    Args:
        bound: c > 0.
        per: what has a norm: "row", the weights of each output of a layer, and each element of a vector; or "tensor",
            each parameter as a whole. See :func:`fastwgan.functional.clip_norms_`.
        exclude: as :class:`WeightClip`'s.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: Hinton et al., arXiv 1207.0580.

    >>> NormClip(exclude=nn.LayerNorm).per
    'row'
    """

    bound: float = 1.0
    per: Literal["row", "tensor"] = "row"
    exclude: tuple[str | type[nn.Module], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        checks.per(self.per)

    def prepare(self, held: Sequence[Tensor], backend: Backend) -> None:
        if held and resolve(backend, held[0].device) == "triton":
            checks.refuse_overlap(held)

    def apply_(
        self, held: Sequence[Tensor], done: Collection[int], shares: list[Share], gate: Tensor, backend: Backend
    ) -> Lazy | None:
        projected = project_and_count_(held, self.bound, self.per, backend, gate)
        return None if projected is None else projected[0]


@dataclass(frozen=True)
class GradientPenalty(Constraint):
    """Add weight * penalty(d critic / dx) to the critic's loss.

    Args:
        weight: lambda > 0.
        kind: "two-sided", "one-sided", "zero-centered" or "power"; see :func:`fastwgan.functional.penalty`.
        target: the norm wanted, >= 0.
        at: where x lies: "interpolates" between real and fake samples, at the "real" or "fake" ones (R1, R2), or
            "perturbed": real samples with Gaussian noise (DRAGAN).
        noise: standard deviation of that noise, > 0, in the samples' units. DRAGAN's code takes half that of the data.
        every: compute the penalty on every k-th critic step only, with k times the weight (lazy regularisation,
            arXiv 1912.04958, appendix B).

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range.

    Source: WGAN-GP, arXiv 1704.00028, equation 3; WGAN-LP, 1709.08894, equation 8; R1 and R2, 1801.04406, equations 9
    and 10 (weight is gamma / 2); WGAN-div, 1712.01026, equation 9 (weight is k = 2); DRAGAN, 1705.07215, equation 3.

    >>> GradientPenalty(weight=1.0, kind="zero-centered", at="real").target
    1.0
    """

    weight: float = 10.0
    kind: str = "two-sided"
    target: float = 1.0
    at: Literal["interpolates", "real", "fake", "perturbed"] = "interpolates"
    every: int = 1
    noise: float = 0.5

    def __post_init__(self) -> None:
        checks.number("weight", self.weight, minimum=0, exclusive=True)
        checks.penalty(self.kind, self.target)
        if self.at not in ("interpolates", "real", "fake", "perturbed"):
            raise ValueError(f"at: expected 'interpolates', 'real', 'fake' or 'perturbed', got {self.at!r}")
        checks.number("noise", self.noise, minimum=0, exclusive=True)
        checks.count("every", self.every)

    @property
    def commutes(self) -> bool:  # type: ignore[override]
        return self.at == "interpolates"

    def default_optimizer(self, parameters: list[nn.Parameter], backend: Backend) -> Gated:
        return Adam(parameters, lr=1e-4, betas=(0.0, 0.9), backend=backend)

    def check(self, critic: nn.Module, optimizer: torch.optim.Optimizer | None) -> str | None:
        if not any(isinstance(m, _BatchNorm) for m in critic.modules()):
            return None
        return (
            "GradientPenalty with a critic that has BatchNorm: the penalty takes each sample's gradient by itself, "
            "which BatchNorm mixes (arXiv 1704.00028, section 4); LayerNorm is the usual choice"
        )

    def penalty_weight(self, iteration: int) -> float:
        return 0.0 if iteration % self.every else self.weight * self.every

    def random_numbers(self, batch: int, pack: int) -> int:
        return {"interpolates": batch // pack, "perturbed": batch}.get(self.at, 0)

    def check_conditions(self, real: Tensor, pairs: Iterable[tuple[Any, Any]]) -> None:
        for both in pairs if self.at == "interpolates" else ():
            rows = all(checks.is_batched(c, len(real)) and c.is_floating_point() for c in both)
            if not rows or both[0].shape != both[1].shape:
                got = [f"{c.dtype} {tuple(c.shape)}" if isinstance(c, Tensor) else type(c).__name__ for c in both]
                raise ValueError(
                    "fake_cond: expected conditions between which the penalty can interpolate, floating tensors of "
                    f"one shape with a row for each sample, got {' and '.join(got)}: give labels as one-hot floats, or "
                    'real and fake samples the same conditions, or take GradientPenalty(at="real")'
                )

    def points(
        self, samples: Samples, weight: float, draw: Draw, pack: int, backend: Resolved, out: Tensor | None = None
    ) -> Penalised:
        real, fake, cond, fake_cond, joined, _ = samples
        if self.at == "interpolates":
            pair = [real.detach(), fake]
            if joined:  # the critic compares samples together with their conditions, so the points have both
                for i, own in enumerate((cond, fake_cond)):
                    parts = [x.reshape(len(real), -1).to(real.dtype) for x in (pair[i], *(own[j] for j in joined))]
                    pair[i] = torch.cat(parts, 1)
            pair = pair if pack == 1 else [packed(x, pack) for x in pair]
            x = interpolates(pair[0], pair[1], draw.seed, draw.offset, backend, out)
            x = x if pack == 1 else x.flatten(0, 1)
            return Penalised(x.detach(), cond, weight, self.kind, self.target, joined, tuple(real.shape))
        if self.at == "perturbed":
            x = perturb(real.detach(), scale=self.noise, seed=draw.seed, offset=draw.offset, backend=backend)
        else:
            x = real if self.at == "real" else fake
        return Penalised(x.detach(), fake_cond if self.at == "fake" else cond, weight, self.kind, self.target)
