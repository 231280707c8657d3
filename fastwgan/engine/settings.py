"""The options of a Trainer, and what it is given: checked before anything of the caller's is changed."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from fastwgan import checks
from fastwgan.backend import DTYPES, Backend, resolve
from fastwgan.constraints import Constraint
from fastwgan.engine.latents import Latent
from fastwgan.engine.terms import Term

REMOVED = {
    "blend": "write critic_term=lambda s: blend * (F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()"
    " - fastwgan.functional.critic_loss(s.real_scores, s.fake_scores)) and generator_term=lambda s: blend * (F.softplus"
    "(-s.fake_scores).mean() - fastwgan.functional.generator_loss(s.fake_scores)), F being torch.nn.functional",
    "drift": "write critic_term=lambda s: drift * s.real_scores.square().mean()",
    "instance_noise": "wrap the critic: fastwgan.models.InstanceNoise(critic, scale)",
    "max_skipped": "leave it out: a step that is left out 20 times in a row raises",
}
NO_VIEW = "view size is not compatible", "Cannot view a tensor"  # as PyTorch and its compiler say


def warmup_schedule(generator_iteration: int) -> int:
    """Critic steps before a generator step: 100 for the first 25 and every 500th generator step, else 5.

    Source: the WGAN authors' training loop.

    >>> [warmup_schedule(i) for i in (0, 24, 25, 499, 500)]
    [100, 100, 5, 5, 100]
    """
    return 100 if generator_iteration < 25 or generator_iteration % 500 == 0 else 5


@dataclass(frozen=True)
class Settings:
    """The options of a :class:`fastwgan.Trainer`, by its arguments' names."""

    latent: Latent
    constraint: Constraint
    n_critic: int | Callable[[int], int]
    seed: int
    backend: Backend
    amp: torch.dtype | None
    cuda_graph: bool | str
    independent_samples: bool
    compile: bool
    ema: float | None
    critic_term: Term | None
    generator_term: Term | None
    pack: int
    max_norm: float | dict[str, float] | None
    nonfinite: str
    memory_format: torch.memory_format | None

    def __post_init__(self) -> None:
        for name in ("critic_term", "generator_term"):
            if (term := getattr(self, name)) is not None and not callable(term):
                raise TypeError(f"{name}: expected a function of the step's record, got {type(term).__name__}")
        for name in ("compile", "independent_samples"):
            if not isinstance(value := getattr(self, name), bool):
                raise TypeError(f"{name}: expected a bool, got {type(value).__name__}")
        if not (isinstance(self.cuda_graph, bool) or self.cuda_graph == "auto"):
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {self.cuda_graph!r}")
        if not callable(self.latent):
            if isinstance(self.latent, bool) or not isinstance(self.latent, int):
                raise TypeError(f"latent: expected an int or a callable, got {type(self.latent).__name__}")
            checks.count("latent", self.latent)
        if not isinstance(self.constraint, Constraint):
            got = type(self.constraint).__name__
            raise TypeError(f"constraint: expected WeightClip, NormClip or GradientPenalty, got {got}")
        if not callable(self.n_critic):
            checks.count("n_critic", self.n_critic)
        checks.seed("seed", self.seed)
        checks.count("pack", self.pack)
        limits = self.max_norm if isinstance(self.max_norm, dict) else {"critic": self.max_norm}
        if not {"critic", "generator"} >= limits.keys() > set():
            raise ValueError(f"max_norm: expected the keys 'critic', 'generator' or both, got {[*limits]}")
        for limit in () if self.max_norm is None else limits.values():
            checks.number("max_norm", limit, minimum=0, exclusive=True)
        if self.nonfinite not in ("raise", "skip"):
            raise ValueError(f"nonfinite: expected 'raise' or 'skip', got {self.nonfinite!r}")
        if self.ema is not None and checks.number("ema", self.ema, minimum=0) >= 1:
            raise ValueError(f"ema: expected a number in [0, 1), got {self.ema}")
        if self.amp not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"amp: expected None, torch.bfloat16 or torch.float16, got {self.amp!r}")
        if self.memory_format not in (None, torch.channels_last):
            raise ValueError(f"memory_format: expected None or torch.channels_last, got {self.memory_format!r}")

    def check(
        self, networks: dict[str, nn.Module], optimizers: dict[str, Optimizer | None],
        schedulers: dict[str, LRScheduler | None],
    ) -> tuple[torch.device, str | None]:  # fmt: skip
        """Return (the networks' device, advice or None), or raise unless the options and what is given fit together."""
        device = _common_device(networks, self.amp)
        for name, optimizer in optimizers.items():
            if optimizer is not None:
                check_optimizer(f"{name}_optimizer", optimizer, networks[name])
            _check_scheduler(f"{name}_scheduler", schedulers[name], optimizer)
        advice = self.constraint.check(networks["critic"], optimizers["critic"])
        if self.cuda_graph is True and (problem := self.graph_problem(device)):
            raise RuntimeError(f"cuda_graph: True was asked for, but {problem}")
        resolve(self.backend, device)
        return device, advice

    def formatted(self, x: Any) -> Any:
        """Return a tensor [N, C, H, W] in the memory format that is asked for, and anything else as it is."""
        if self.memory_format is None or not isinstance(x, Tensor) or x.dim() != 4 or x.layout != torch.strided:
            return x
        return x.to(memory_format=self.memory_format)  # contiguous() leaves strides of one channel or pixel as they are

    def explain(self, error: BaseException) -> None:
        """Raise ValueError if an error is of a ``view`` that the memory format leaves no room for."""
        viewed = isinstance(error, RuntimeError) and any(words in str(error) for words in NO_VIEW)
        if viewed and self.memory_format is not None:
            raise ValueError(
                f"memory_format: expected forward passes that take {self.memory_format}, got one that calls view on a "
                "tensor that lies so: call reshape or flatten there, or leave memory_format out"
            ) from error

    @staticmethod
    def graph_problem(device: torch.device) -> str | None:
        """Return why there can be no CUDA graph on a device, or None."""
        return None if device.type == "cuda" else f"the networks are on {device}"


def _common_device(networks: dict[str, nn.Module], amp: torch.dtype | None) -> torch.device:
    """Return the device of both networks, or raise unless they can be trained together."""
    for name, module in networks.items():
        for of, p in module.named_parameters():
            if p.requires_grad and p.dtype not in DTYPES:
                expected = "parameters of float16, bfloat16, float32 or float64"
                raise TypeError(f"{name}: expected {expected}, got {p.dtype} in {of}")
            if p.is_inference():
                raise ValueError(f"{name}: expected parameters made outside of inference mode, got {of} made in it")
    parameters = [p for module in networks.values() for p in module.parameters()]
    if len({*parameters}) < len(parameters):
        raise ValueError("critic: expected parameters of its own, got some that are the generator's too")
    if len(devices := {p.device for p in parameters}) > 1:
        raise ValueError(f"critic: expected all parameters of both networks on one device, got {devices}")
    dtypes = {p.dtype for p in parameters if p.is_floating_point()}
    if amp is not None and dtypes != {torch.float32}:
        got = ", ".join(sorted(map(str, dtypes)))
        raise ValueError(f"amp: expected networks whose parameters are float32, got {got}")
    return devices.pop()


def check_optimizer(name: str, optimizer: object, module: nn.Module) -> None:
    """Raise unless an optimizer can train a network."""
    if not isinstance(optimizer, Optimizer):
        raise TypeError(f"{name}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
    if isinstance(optimizer, torch.optim.LBFGS):
        raise TypeError(f"{name}: expected an optimizer that steps on given gradients, got LBFGS")
    if not {p for group in optimizer.param_groups for p in group["params"]} <= {*module.parameters()}:
        raise ValueError(f"{name}: expected parameters of its own network only, got others")


def _check_scheduler(name: str, scheduler: object, optimizer: Optimizer | None) -> None:
    if scheduler is None:
        return
    if not isinstance(scheduler, LRScheduler) or isinstance(scheduler, ReduceLROnPlateau):
        got = type(scheduler).__name__
        raise TypeError(f"{name}: expected a torch.optim.lr_scheduler that takes steps without a metric, got {got}")
    if optimizer is None or scheduler.optimizer is not optimizer:
        raise ValueError(f"{name}: expected a scheduler of {name.replace('scheduler', 'optimizer')}, got another's")
