"""What a Trainer is given: checked before anything of the caller's is changed, and optimizers taken over."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastwgan import checks
from fastwgan.backend import DTYPES
from fastwgan.constraints import Clip, GradientPenalty, WeightClip
from fastwgan.engine.structure import has_batchnorm
from fastwgan.optim import Adam, RMSprop
from fastwgan.optim.adopt import MarksStepTaken as Called
from fastwgan.optim.adopt import adopt as take_over
from fastwgan.optim.adopt import follow_loads, has_hooks
from fastwgan.optim.adopt import largest_momentum as momentum

__all__ = [
    "Called", "check_arguments", "check_optimizer", "device_problem", "follow_loads",
    "has_hooks", "kept_apart", "momentum", "shapes", "take_over",
]  # fmt: skip


def device_problem(device: torch.device) -> str | None:
    """Return why there can be no CUDA graph on ``device``, or None."""
    return None if device.type == "cuda" else f"the networks are on {device}"


def check_arguments(
    generator: nn.Module, critic: nn.Module, *, latent: object, constraint: object, critic_optimizer: object,
    generator_optimizer: object, critic_scheduler: object, generator_scheduler: object, n_critic: object, seed: object,
    amp: object, cuda_graph: object, independent_samples: object, compile: object, ema: object, blend: object,
    drift: object, instance_noise: object, pack: object, nonfinite: object, max_skipped: object,
) -> None:  # fmt: skip
    """Raise TypeError, ValueError or RuntimeError, naming the argument, unless a Trainer can be made of these.

    Nothing of the caller's is changed by that.
    """
    if not isinstance(compile, bool):
        raise TypeError(f"compile: expected a bool, got {type(compile).__name__}")
    if not isinstance(independent_samples, bool):
        raise TypeError(f"independent_samples: expected a bool, got {type(independent_samples).__name__}")
    if not (isinstance(cuda_graph, bool) or cuda_graph == "auto"):
        raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
    for name, module in (("generator", generator), ("critic", critic)):
        if not any(p.requires_grad for p in module.parameters()):
            raise ValueError(f"{name}: expected trainable parameters, got none")
        for of, p in module.named_parameters():
            if p.requires_grad and p.dtype not in DTYPES:
                expected = "parameters of float16, bfloat16, float32 or float64"
                raise TypeError(f"{name}: expected {expected}, got {p.dtype} in {of}")
            if p.is_inference():
                raise ValueError(f"{name}: expected parameters made outside of inference mode, got {of} made in it")
    if {id(p) for p in generator.parameters()} & {id(p) for p in critic.parameters()}:
        raise ValueError("critic: expected parameters of its own, got some that are the generator's too")
    devices = {p.device for module in (generator, critic) for p in module.parameters()}
    if len(devices) > 1:
        raise ValueError(f"critic: expected all parameters of both networks on one device, got {devices}")
    if not callable(latent):
        if isinstance(latent, bool) or not isinstance(latent, int):
            raise TypeError(f"latent: expected an int or a callable, got {type(latent).__name__}")
        if latent < 1:
            raise ValueError(f"latent: expected an int >= 1, got {latent}")
    if not isinstance(constraint, (Clip, GradientPenalty)):
        got = type(constraint).__name__
        raise TypeError(f"constraint: expected WeightClip, NormClip or GradientPenalty, got {got}")
    if not callable(n_critic):
        checks.count("n_critic", n_critic)
    checks.seed("seed", seed)
    checks.blend(blend, drift)
    if not callable(instance_noise):
        checks.number("instance_noise", instance_noise, minimum=0)
    checks.count("pack", pack)
    checks.count("max_skipped", max_skipped)
    if nonfinite not in ("raise", "skip"):
        raise ValueError(f"nonfinite: expected 'raise' or 'skip', got {nonfinite!r}")
    if ema is not None and checks.number("ema", ema, minimum=0) >= 1:
        raise ValueError(f"ema: expected a number in [0, 1), got {ema}")
    if amp not in (None, torch.bfloat16, torch.float16):
        raise ValueError(f"amp: expected None, torch.bfloat16 or torch.float16, got {amp!r}")
    dtypes = {p.dtype for module in (generator, critic) for p in module.parameters() if p.is_floating_point()}
    if amp is not None and dtypes != {torch.float32}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"amp: expected networks whose parameters are float32, got {got}")
    check_optimizer("critic_optimizer", critic_optimizer, critic)
    check_optimizer("generator_optimizer", generator_optimizer, generator)
    _check_scheduler("critic_scheduler", critic_scheduler, critic_optimizer)
    _check_scheduler("generator_scheduler", generator_scheduler, generator_optimizer)
    if isinstance(constraint, Clip):
        _check_clip(constraint, critic, critic_optimizer)
    if cuda_graph is True and (problem := device_problem(next(iter(devices)))):
        raise RuntimeError(f"cuda_graph: True was asked for, but {problem}")


def check_optimizer(name: str, optimizer: object, module: nn.Module) -> None:
    if optimizer is None:
        return
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{name}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"{name}: expected an optimizer that steps on given gradients, got LBFGS")
    own = {id(p) for p in module.parameters()}
    if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(f"{name}: expected parameters of its own network only, got others")


def _check_scheduler(name: str, scheduler: object, optimizer: object) -> None:
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        got = type(scheduler).__name__
        raise TypeError(f"{name}: expected a torch.optim.lr_scheduler that takes steps without a metric, got {got}")
    if optimizer is None or scheduler.optimizer is not optimizer:
        raise ValueError(f"{name}: expected a scheduler of {name.replace('scheduler', 'optimizer')}, got another's")


def kept_apart(critic: nn.Module, real: Tensor, cond: tuple[Any, ...]) -> bool:
    """Return whether ``independent_samples=True`` covers these conditions.

    Raises:
        ValueError: it cannot be true.
    """
    if has_batchnorm(critic, training=True):
        raise ValueError("independent_samples: expected no layer that mixes samples, got BatchNorm in training mode")
    for c in cond:
        if isinstance(c, Tensor) and c.dim() and len(c) != len(real):
            got = f"one of shape {tuple(c.shape)} for {len(real)} samples"
            raise ValueError(f"independent_samples: expected conditions with a row for each sample, got {got}")
    return all(isinstance(c, (Tensor, bool, int, float, str, NoneType)) for c in cond)


def _check_clip(constraint: Clip, critic: nn.Module, optimizer: object) -> None:
    for p in constraint.clipped(critic):
        checks.parameter("critic", p)
        checks.bound("bound", constraint.bound, p.dtype)
    if not isinstance(constraint, WeightClip):
        return
    for group in optimizer.param_groups if isinstance(optimizer, (RMSprop, Adam)) else ():
        if group.get("clip") not in (None, constraint.bound):
            got = f"its clip {group['clip']} contradicts the constraint's {constraint.bound}"
            raise ValueError(f"critic_optimizer: {got}")


def shapes(name: str, module: nn.Module) -> dict[str, object]:
    """Of a module's parameters and buffers, with their dtypes and whether they are trained."""
    tensors = (*module.named_parameters(), *module.named_buffers())
    return {f"{name}.{key}": (tuple(x.shape), x.dtype, x.requires_grad) for key, x in tensors}
