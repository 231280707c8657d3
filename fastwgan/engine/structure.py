"""Say what is known of a network from its layers alone, without trying it out.

Real and fake samples may go through a critic as one batch only where no score depends on another sample. That is known
of a ``Sequential`` of PyTorch's own layers whose numbers, modes and input ranks keep samples apart, and of this
package's models. Nothing is known of a class of somebody else's, of a layer with hooks, or of a patched one.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import _has_any_global_hook

from fastwgan import models

__all__ = ["class_code", "doubt", "foreign", "has_batchnorm", "hooked_everywhere", "hooks", "layers", "may_write"]


def has_batchnorm(module: nn.Module, *, training: bool = False) -> bool:
    """Return whether a module has a BatchNorm, or with ``training`` one in training mode."""
    return any(isinstance(m, _BatchNorm) and (m.training or not training) for m in module.modules())


def hooked_everywhere() -> bool:
    """Return whether there are hooks on all modules."""
    return bool(_has_any_global_hook())  # type: ignore[no-untyped-call]


class _UnknownError(Exception):
    """A layer may mix samples: which, and why."""


_Rule = Callable[[Any, int], int]  # the rank of a layer's output by the layer and its input's rank; 0: may mix samples


def _any_rank(m: nn.Module, rank: int) -> int:
    return rank


def _from(least: int) -> _Rule:
    """Return the rule of layers that keep samples apart on input of a least rank."""
    return lambda m, rank: rank if rank >= least else 0


def _exactly(wanted: int, output: int | None = None) -> _Rule:
    """Return the rule of layers that take input of a smaller rank for one sample without a batch."""
    return lambda m, rank: (output or rank) if rank == wanted else 0


def _pooled(wanted: int) -> _Rule:
    return lambda m, rank: rank if rank == wanted and not getattr(m, "return_indices", False) else 0


def _padded(wanted: int) -> _Rule:
    """Return the rule of padding, which takes two numbers to a dimension, from the last one on."""
    return lambda m, rank: rank if rank == wanted and len(m.padding) < 2 * rank else 0


def _linear(m: nn.Linear, rank: int) -> int:
    return rank if rank >= 2 and m.weight.dim() == 2 and (m.bias is None or m.bias.dim() == 1) else 0


def _along(m: Any, rank: int) -> int:
    """Return the rank where the layer works along a dimension that is not the batch's."""
    return rank if isinstance(m.dim, int) and -rank < m.dim < rank and m.dim != 0 else 0


def _flattened(m: nn.Flatten, rank: int) -> int:
    start, end = (dim + rank if dim < 0 else dim for dim in (m.start_dim, m.end_dim))
    return rank - (end - start) if 1 <= start <= end < rank else 0


def _unflattened(m: nn.Unflatten, rank: int) -> int:
    if not isinstance(m.dim, int) or not isinstance(m.unflattened_size, tuple):
        return 0
    dim = m.dim + rank if m.dim < 0 else m.dim
    return rank - 1 + len(m.unflattened_size) if 1 <= dim < rank else 0


def _within_samples(m: Any, rank: int) -> int:
    return rank if isinstance(m.normalized_shape, tuple) and len(m.normalized_shape) < rank else 0


def _instance_norm(wanted: int) -> _Rule:
    return lambda m, rank: rank if rank == wanted and not m.track_running_stats and m.running_mean is None else 0


def _batchnorm(*ranks: int) -> _Rule:
    """Return the rule of a BatchNorm: in evaluation mode it scales by fixed numbers, if it has them."""

    def rule(m: Any, rank: int) -> int:
        fixed = not m.training and m.running_mean is not None and m.running_var is not None
        return rank if fixed and rank in ranks else 0

    return rule


def _residual(m: models.Residual, rank: int) -> int:
    names = m._modules.keys()
    whole = names == {"norm1", "conv1", "norm2", "conv2", "shortcut"} and names.isdisjoint(vars(m))
    return rank if rank == 4 and whole and all(_output_rank(child, rank, []) == rank for child in m.children()) else 0


_RULES: dict[type[nn.Module], _Rule] = {
    **dict.fromkeys(
        (
            nn.Identity, nn.ReLU, nn.ReLU6, nn.RReLU, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish,
            nn.Sigmoid, nn.Tanh, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink, nn.Softshrink,
            nn.Tanhshrink, nn.LogSigmoid, nn.Softplus, nn.Softsign, nn.Threshold, nn.Dropout, nn.AlphaDropout,
        ),
        _any_rank,
    ),
    **dict.fromkeys((nn.PReLU, nn.GroupNorm), _from(2)),
    nn.Linear: _linear,
    **dict.fromkeys((nn.Softmax, nn.Softmin, nn.LogSoftmax, nn.GLU), _along),
    **dict.fromkeys((nn.LayerNorm, nn.RMSNorm), _within_samples),
    **dict.fromkeys((nn.LocalResponseNorm, nn.Upsample, nn.ChannelShuffle), _from(3)),
    **dict.fromkeys((nn.PixelShuffle, nn.PixelUnshuffle), _from(4)),
    **dict.fromkeys((nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, nn.Softmax2d), _exactly(4)),
    nn.Flatten: _flattened,
    nn.Unflatten: _unflattened,
    nn.Unfold: _exactly(4, 3),
    nn.Fold: _exactly(3, 4),
    nn.BatchNorm1d: _batchnorm(2, 3),
    nn.BatchNorm2d: _batchnorm(4),
    nn.BatchNorm3d: _batchnorm(5),
    models.Residual: _residual,
}  # fmt: skip
for _n in (1, 2, 3):
    for _names, _rule in {
        "Conv ConvTranspose Dropout": _exactly,
        "ReflectionPad ReplicationPad CircularPad ZeroPad ConstantPad": _padded,
        "MaxPool AvgPool AdaptiveMaxPool AdaptiveAvgPool LPPool": _pooled,
        "InstanceNorm": _instance_norm,
    }.items():
        _RULES |= {getattr(nn, f"{name}{_n}d"): _rule(_n + 2) for name in _names.split()}


_CONTAINERS = (nn.Sequential, models.InstanceNoise)  # whose parts work one after the other


def class_code(kind: Any) -> tuple[Any, ...]:
    """Return what a module of a kind runs."""
    return kind.__call__, kind._call_impl, kind.forward, getattr(kind, "_conv_forward", None)


_CODE: dict[Any, tuple[Any, ...]] = {kind: class_code(kind) for kind in (*_CONTAINERS, *_RULES)}


def _home(function: Any) -> str:
    """Return the name of the module that a function was defined in, whatever it says of itself."""
    own = getattr(function, "__globals__", {}).get("__name__")
    return own or getattr(function, "__module__", None) or "torch"


@cache
def _methods(kind: Any) -> frozenset[str]:
    return frozenset(name for name in dir(kind) if callable(getattr(kind, name)))


@cache
def _is_ours(kind: Any) -> bool:
    """Return whether a class of modules is PyTorch's or this package's."""
    return kind.__module__.startswith(("torch.nn.", "fastwgan.models"))  # type: ignore[no-any-return]


def hooks(m: nn.Module) -> tuple[int, ...]:
    """Return the numbers of a module's hooks, of which no two hooks have the same."""
    return *m._forward_hooks, *m._forward_pre_hooks, *m._backward_hooks, *m._backward_pre_hooks


def _untouched(m: nn.Module) -> bool:
    """Return whether a module does what its class says: no hooks, none of its methods patched, not compiled."""
    kind: Any = type(m)
    own = vars(m)
    hooks = own["_forward_hooks"] or own["_forward_pre_hooks"] or own["_backward_hooks"] or own["_backward_pre_hooks"]
    return not hooks and own.get("_compiled_call_impl") is None and _methods(kind).isdisjoint(own)


def _output_rank(m: nn.Module, rank: int, found: list[nn.Module]) -> int:
    """Return the rank of the output for input of a rank; collect the layers in ``found``.

    Raises:
        _UnknownError: a layer may mix samples.
    """
    kind = type(m)
    if kind not in _CODE:
        raise _UnknownError(kind.__name__, "is not among the layers known to keep samples apart")
    if class_code(kind) != _CODE[kind] or not _untouched(m):
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


def _walked(module: nn.Module, ndim: int) -> list[nn.Module] | _UnknownError:
    found: list[nn.Module] = []
    try:
        _output_rank(module, ndim, found)
    except _UnknownError as error:
        return error
    return _UnknownError("there are hooks on all modules") if hooked_everywhere() else found


def layers(module: nn.Module, ndim: int) -> tuple[nn.Module, ...] | None:
    """Return the layers of a network in the order of their use, if its samples are known to stay apart, else None.

    Args:
        module: the network as it is now: a layer replaced or a hook added counts at once.
        ndim: of its input, the batch's dimension included.
    """
    found = _walked(module, ndim)
    return None if isinstance(found, _UnknownError) else tuple(found)


def doubt(module: nn.Module, ndim: int) -> str | None:
    """Return why :func:`layers` does not know a network, or None where it does."""
    found = _walked(module, ndim)
    return " ".join(map(str, found.args)) if isinstance(found, _UnknownError) else None


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
    if any(p._backward_hooks or p._post_accumulate_grad_hooks for p in module.parameters()):
        return "hooks on its parameters"
    return None


def may_write(module: nn.Module) -> bool:
    """Return whether a network's forward pass may write to its input."""
    for m in module.modules():
        kind: Any = type(m)
        if not _is_ours(kind) or not _untouched(m) or getattr(m, "inplace", False):
            return True
    return hooked_everywhere()
