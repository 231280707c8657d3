"""Decide from a network's layers alone whether real and fake samples may share a pass of the critic.

Real and fake samples may go through a critic as one batch only where no score depends on another sample. That is known
of a ``Sequential`` of PyTorch's own layers whose numbers, modes and input ranks keep samples apart, and of this
package's models. Nothing is known of a class of somebody else's, of a layer with hooks, or of a patched one.
"""

from collections.abc import Callable
from functools import cache
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fastwgan import checks, models
from fastwgan.constraints import Samples
from fastwgan.engine.piecewise import Block, blocks


def hooked_everywhere() -> bool:
    """Return whether there are hooks on all modules."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


class _UnknownError(Exception):
    """A layer may mix samples: which, and why."""


_Rule = Callable[[Any, int], int]  # the rank of a layer's output by the layer and its input's rank; 0: may mix samples


def _rule(
    *ranks: int, least: int = 0, output: int = 0, keeps: Callable[[Any, int], bool] = lambda m, rank: True
) -> _Rule:
    """Return the rule of layers that keep samples apart on input of these ranks, or of a least one.

    They give output of the same rank, or of ``output``. Input of a smaller rank they take for a sample without a batch.
    """
    return lambda m, rank: (output or rank) if (rank in ranks if ranks else rank >= least) and keeps(m, rank) else 0


def _flattened(m: nn.Flatten, rank: int) -> int:
    start, end = (dim + rank if dim < 0 else dim for dim in (m.start_dim, m.end_dim))
    return rank - (end - start) if 1 <= start <= end < rank else 0


def _unflattened(m: nn.Unflatten, rank: int) -> int:
    if not isinstance(m.dim, int) or not isinstance(m.unflattened_size, tuple):
        return 0
    dim = m.dim + rank if m.dim < 0 else m.dim
    return rank - 1 + len(m.unflattened_size) if 1 <= dim < rank else 0


def _residual(m: models.Residual, rank: int) -> int:
    names = m._modules.keys()
    whole = names == {"norm1", "conv1", "norm2", "conv2", "shortcut"} and names.isdisjoint(vars(m))
    return rank if rank == 4 and whole and all(_output_rank(child, rank, []) == rank for child in m.children()) else 0


def _fixed(m: Any, rank: int) -> bool:
    """Return whether a BatchNorm scales by fixed numbers: in evaluation mode, if it has some."""
    return not m.training and m.running_mean is not None and m.running_var is not None


_RULES: dict[type[nn.Module], _Rule] = {
    **dict.fromkeys(
        (
            nn.Identity, nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
            nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink,
            nn.Tanhshrink, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Threshold, nn.Dropout, nn.AlphaDropout,
        ),
        _rule(),
    ),
    **dict.fromkeys((nn.PReLU, nn.GroupNorm), _rule(least=2)),
    nn.Linear: _rule(least=2, keeps=lambda m, _: m.weight.dim() == 2 and (m.bias is None or m.bias.dim() == 1)),
    **dict.fromkeys(
        (nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU),  # along a dimension that is not the batch's
        _rule(keeps=lambda m, rank: isinstance(m.dim, int) and -rank < m.dim < rank and m.dim != 0),
    ),
    **dict.fromkeys(
        (nn.LayerNorm, nn.RMSNorm),
        _rule(keeps=lambda m, rank: isinstance(m.normalized_shape, tuple) and len(m.normalized_shape) < rank),
    ),
    **dict.fromkeys((nn.LocalResponseNorm, nn.Upsample, nn.ChannelShuffle), _rule(least=3)),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), _rule(least=4)),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Softmax2d), _rule(4)),
    nn.Flatten: _flattened,
    nn.Unflatten: _unflattened,
    nn.Unfold: _rule(4, output=3),
    nn.Fold: _rule(3, output=4),
    nn.BatchNorm1d: _rule(2, 3, keeps=_fixed),
    nn.BatchNorm2d: _rule(4, keeps=_fixed),
    nn.BatchNorm3d: _rule(5, keeps=_fixed),
    models.Residual: _residual,
}  # fmt: skip
for _n in (1, 2, 3):
    for _names, _of_rank in {
        "Conv ConvTranspose Dropout": _rule(_n + 2),
        # Padding takes two numbers to a dimension, from the last one on.
        "ReflectionPad ReplicationPad CircularPad ZeroPad ConstantPad":
            _rule(_n + 2, keeps=lambda m, rank: len(m.padding) < 2 * rank),
        "MaxPool AvgPool AdaptiveMaxPool AdaptiveAvgPool LPPool":
            _rule(_n + 2, keeps=lambda m, _: not getattr(m, "return_indices", False)),
        "InstanceNorm": _rule(_n + 2, keeps=lambda m, _: not m.track_running_stats and m.running_mean is None),
    }.items():  # fmt: skip
        _RULES |= {getattr(nn, f"{name}{_n}d"): _of_rank for name in _names.split()}


_CONTAINERS = (nn.Sequential, models.InstanceNoise)  # whose parts work one after the other


def class_code(kind: Any) -> tuple[Any, ...]:
    """Return what a module of a kind runs."""
    return kind.__call__, kind._call_impl, kind.forward, getattr(kind, "_conv_forward", None)


_CODE: dict[Any, tuple[Any, ...]] = {kind: class_code(kind) for kind in (*_CONTAINERS, models.Concatenated, *_RULES)}


def _home(function: Any) -> str:
    """Return the name of the module that a function was defined in, whatever it says of itself."""
    own = getattr(function, "__globals__", {}).get("__name__")
    return own or getattr(function, "__module__", None) or "torch"


@cache
def _methods(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


@cache
def _is_ours(kind: Any) -> bool:
    return kind.__module__.startswith(("torch.nn.", "fastwgan.models"))  # type: ignore[no-any-return]


def hooks(m: nn.Module) -> tuple[int, ...]:
    """Return the numbers of a module's hooks, of which no two hooks have the same."""
    return *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks, *m._backward_pre_hooks


def _untouched(m: nn.Module) -> bool:
    """Return whether a module does what its class says: no hooks, none of its methods patched, not compiled."""
    kind: Any = type(m)
    own = vars(m)
    return not hooks(m) and own.get("_compiled_call_impl") is None and _methods(kind).isdisjoint(own)


def is_itself(m: nn.Module) -> bool:
    """Return whether a layer of a known class is unpatched and without hooks, and its class as it was imported."""
    return class_code(type(m)) == _CODE[type(m)] and _untouched(m)


def _output_rank(m: nn.Module, rank: int, found: list[nn.Module]) -> int:
    """Return the rank of the output for input of a rank, and collect the layers; raise if one may mix samples."""
    kind = type(m)
    if kind not in _RULES and kind not in _CONTAINERS:
        raise _UnknownError(kind.__name__, "is not among the layers known to keep samples apart")
    if not is_itself(m):
        raise _UnknownError(kind.__name__, "has hooks, or is patched or compiled")
    if kind is models.InstanceNoise:
        found.append(m)
        if m._modules.keys() != {"critic"}:
            raise _UnknownError(kind.__name__, "has other parts than its critic")
    if kind in _CONTAINERS:
        for child in m._modules.values():
            rank = _output_rank(child, rank, found)  # type: ignore[arg-type]  # None is no known layer
        return rank
    result = _RULES[kind](m, rank)
    if not result:
        raise _UnknownError(m, f"may mix samples on input of {rank} dimensions")
    found.append(m)
    return result


def layers(module: nn.Module, ndim: int) -> tuple[nn.Module, ...] | None:
    """Return the layers of a network as it is now, if they are known to keep apart samples of ``ndim`` dimensions.

    The batch's dimension is one of these. The layers are in the order of their use; of an unknown network None.
    """
    found: list[nn.Module] = []
    return tuple(found) if doubt(module, ndim, found) is None else None


def doubt(module: nn.Module, ndim: int, found: list[nn.Module] | None = None) -> str | None:
    """Return why :func:`layers` does not know a network, or None where it does; collect the layers in ``found``."""
    try:
        _output_rank(module, ndim, [] if found is None else found)
    except _UnknownError as error:
        return " ".join(map(str, error.args))
    return "there are hooks on all modules" if hooked_everywhere() else None


def foreign(module: nn.Module) -> str | None:
    """Return which part of a network may run Python of somebody else's in its forward pass, or None.

    That is all but the modules of PyTorch and of this package, and any with hooks or patched methods.
    """
    if hooked_everywhere():
        return "hooks on all modules"
    for m in module.modules():
        kind: Any = type(m)
        if not _is_ours(kind):
            return f"{kind.__name__}, a class of its own"
        functions = (*class_code(kind), *filter(callable, vars(m).values()))
        ours = all(_home(f).startswith(("torch", "fastwgan.")) for f in functions)
        if not ours or not _untouched(m) or _CODE.get(kind) not in (None, class_code(kind)):
            return f"{kind.__name__} with hooks or patched, or with functions of its own"
    hooked = any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters())
    return "hooks on its parameters" if hooked else None


def may_write(module: nn.Module) -> bool:
    """Return whether a network's forward pass may write to its input."""
    return hooked_everywhere() or any(
        not _is_ours(type(m)) or not _untouched(m) or getattr(m, "inplace", False)  # type: ignore[arg-type]
        for m in module.modules()
    )


UNKNOWN: tuple[Block, ...] | str = "its layers are not known to keep samples apart"


class Sharing:
    """The decision, made anew in each step: by the critic's layers, or by the user's word (``independent``)."""

    def __init__(self, critic: nn.Module, independent: bool) -> None:
        self._critic, self._independent = critic, independent
        # Of the last step: the layers, if they were known to keep samples apart, and whether these shared a pass.
        self.layers: tuple[nn.Module, ...] | None = None
        self.together: bool | None = None
        self.blocks = self._blocks = UNKNOWN  # the critic's blocks, or why it has none
        self._seen: tuple[Any, ...] = (0, 0)  # the critic's version, the samples' rank and dtype
        self._layers: tuple[nn.Module, ...] | None = None
        self._writes = self._conditional = False

    def decide(self, samples: Samples, version: int) -> None:
        """Decide for a step. The critic's layers are looked at again when its ``version`` is another."""
        real, _, cond, fake_cond, differs, _ = samples
        if self._seen != (seen := (version, real.dim(), real.dtype)):
            self._layers, self._writes = layers(self._critic, real.dim()), may_write(self._critic)
            self._blocks = UNKNOWN if self._layers is None else blocks(self._layers, real.dim(), real.dtype)
            self._seen = seen
        self._conditional = bool(cond)
        self.layers, self.blocks = (None, UNKNOWN) if cond else (self._layers, self._blocks)
        plain = self._independent and all(isinstance(c, (Tensor, bool, int, float, str, NoneType)) for c in cond)
        rows = all(checks.is_batched(c[i], len(real)) for c in (cond, fake_cond) for i in differs)
        self.together = self.layers is not None or (plain and rows)

    def batch(self, samples: Samples) -> tuple[Tensor, ...]:
        """Return both as one batch for one pass, or as two; copies where a pass may write to the caller's samples."""
        real, fake = samples[:2]
        if not self.together and not self._writes:
            return real, fake
        both = torch.cat((real, fake))
        return (both,) if self.together else both.tensor_split(2)

    def check(self, real: Tensor, cond: tuple[Any, ...]) -> None:
        """Raise ValueError where the user's word cannot be true."""
        if any(isinstance(m, _BatchNorm) and m.training for m in self._critic.modules()):
            raise ValueError(
                "independent_samples: expected no layer that mixes samples, got BatchNorm in training mode"
            )
        for c in cond:
            if isinstance(c, Tensor) and c.dim() and len(c) != len(real):
                got = f"one of shape {tuple(c.shape)} for {len(real)} samples"
                raise ValueError(f"independent_samples: expected conditions with a row for each sample, got {got}")

    def __str__(self) -> str:
        if self.together is None:
            return "a first critic step will tell whether real and fake samples share a pass of the critic"
        if self.together:
            why = "independent_samples=True says so" if self._independent else "its layers keep samples apart"
            return f"real and fake samples share a pass of the critic, as {why}"
        each = "real and fake samples have a pass of the critic each, as "
        if self._independent:
            return f"{each}there are conditions that are neither tensors nor constants"
        reason = "there are conditions" if self._conditional else doubt(self._critic, self._seen[1])
        return (
            f"{each}{reason or 'its layers mixed samples in the last step'}; with independent_samples=True, your word "
            "that no score depends on another sample, they share one"
        )
