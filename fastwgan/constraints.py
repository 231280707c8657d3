"""How the critic is kept Lipschitz: WGAN's weight clipping, a bound on norms, or WGAN-GP's gradient penalty."""

from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from fastwgan import checks

__all__ = ["GradientPenalty", "NormClip", "WeightClip"]


class Clip:
    """What :class:`WeightClip` and :class:`NormClip` share: a bound, and parameters that are left alone."""

    bound: float
    exclude: tuple[str | type[nn.Module], ...]

    def __post_init__(self) -> None:
        checks.number("bound", self.bound, minimum=0, exclusive=True)
        if isinstance(self.exclude, (str, type)):
            object.__setattr__(self, "exclude", (self.exclude,))
        elif not isinstance(self.exclude, Iterable):
            raise TypeError(f"exclude: expected parameter-name patterns or module types, got {self.exclude!r}")
        else:
            object.__setattr__(self, "exclude", tuple(self.exclude))
        for entry in self.exclude:
            if not isinstance(entry, str) and not (isinstance(entry, type) and issubclass(entry, nn.Module)):
                raise TypeError(f"exclude: expected parameter-name patterns or module types, got {entry!r}")

    def clipped(self, critic: nn.Module) -> list[nn.Parameter]:
        """Return the critic's parameters that are to be kept within the bound.

        Raises:
            ValueError: an entry of ``exclude`` matches nothing in the critic.
        """
        excluded = self.excluded(critic, strict=True)
        return [p for p in critic.parameters() if p not in excluded]

    def excluded(self, critic: nn.Module, *, strict: bool = False) -> set[nn.Parameter]:
        """Return the critic's parameters that are to be left alone; ``strict`` wants some for each entry."""
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


@dataclass(frozen=True)
class NormClip(Clip):
    """Project the critic's weights onto a ball after each update, in one launch: their L2 norm is at most ``bound``.

    What lies outside is scaled, so that its direction stays, where :class:`WeightClip` drives weights into the corners
    of a box.

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


@dataclass(frozen=True)
class GradientPenalty:
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
        if isinstance(self.every, bool) or not isinstance(self.every, int):
            raise TypeError(f"every: expected an int, got {type(self.every).__name__}")
        if self.every < 1:
            raise ValueError(f"every: expected an int >= 1, got {self.every}")
