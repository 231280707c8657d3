"""The trainer: a lean critic step and generator step round two networks of the user's.

The critic step builds no graph through the generator and no loss tensors (see :mod:`fastwgan.passes`), which leaves the
networks' own kernels and a handful of launches. Where the generator mixes no samples, one forward pass of it serves all
critic steps of an iteration. Nothing in a step waits for the device, except that a trainer's first two critic steps
look whether the networks mix samples.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastwgan import checkpoint, functional, mixing, passes
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import GradientPenalty, WeightClip
from fastwgan.graphs import Graphs, device_problem
from fastwgan.metrics import Metrics
from fastwgan.optim import Adam, RMSprop

__all__ = ["Trainer", "warmup_schedule"]

PROBED_STEPS = 2  # critic steps, and generator steps, that look whether the networks mix samples
AHEAD = 8  # the most critic steps that one forward pass of the generator serves, which bounds its memory

Latent = int | Callable[[int, torch.device], Any]


def warmup_schedule(generator_iteration: int) -> int:
    """Critic steps before a generator step: 100 for the first 25 and every 500th generator step, else 5.

    Source: the WGAN authors' training loop.

    >>> [warmup_schedule(i) for i in (0, 24, 25, 499, 500)]
    [100, 100, 5, 5, 100]
    """
    return 100 if generator_iteration < 25 or generator_iteration % 500 == 0 else 5


@contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """In evaluation mode; afterwards each submodule is back in its own."""
    modes = [(m, m.training) for m in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for m, training in modes:  # outer ones first; by train(), which a module may have overridden
            if m.training != training:
                m.train(training)


def _take_over(optimizer: torch.optim.Optimizer, backend: Backend) -> torch.optim.Optimizer:
    """Ours in place of a plain torch RMSprop or Adam, sharing its groups and state; any other as it is.

    Sharing keeps the caller's object alive: a scheduler made for it steers ours, and its hooks are called.
    """
    ours: type[RMSprop] | type[Adam]
    if type(optimizer) is torch.optim.RMSprop:
        ours = RMSprop
    elif type(optimizer) is torch.optim.Adam:
        ours = Adam
    else:
        return optimizer
    for group in optimizer.param_groups:
        numbers = (group["lr"], *group.get("betas", ()))
        if any(isinstance(x, Tensor) for x in numbers) or group.get("amsgrad") or group.get("decoupled_weight_decay"):
            return optimizer
    taken = ours([p for group in optimizer.param_groups for p in group["params"]], backend=backend)
    taken.param_groups, taken.state = optimizer.param_groups, optimizer.state
    for group in taken.param_groups:
        group.setdefault("clip", None)
    for p, state in taken.state.items():
        state["step"] = torch.as_tensor(state["step"], dtype=torch.float32).to(p.device)
    taken._optimizer_step_pre_hooks = optimizer._optimizer_step_pre_hooks
    taken._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks
    taken.register_step_post_hook(_Called(optimizer))
    return taken


def _hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an optimizer has step hooks beside :func:`_take_over`'s."""
    hooks = (*optimizer._optimizer_step_pre_hooks.values(), *optimizer._optimizer_step_post_hooks.values())
    return any(not isinstance(hook, _Called) for hook in hooks)


class _Called:
    """A step hook that tells torch's schedulers, which warn otherwise, that the optimizer they know takes steps."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer

    def __call__(self, *_: Any) -> None:
        self._optimizer._opt_called = True  # type: ignore[attr-defined]


def stream_seed(seed: int, stream: int) -> int:
    """A seed for one of several random streams that are to be independent though they come from one ``seed``."""
    return int(np.random.SeedSequence((seed, stream)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _momentum(optimizer: torch.optim.Optimizer) -> float:
    return max(float(max(g.get("momentum", 0), g.get("betas", (0,))[0])) for g in optimizer.param_groups)


class Trainer:
    """Train a generator and a critic by WGAN or WGAN-GP.

    Args:
        generator: maps latents z (and conditions) to samples [N, ...].
        critic: maps samples [N, ...] (and conditions) to scores [N, ...].
        latent: width of a standard normal z [N, latent], or a callable (batch_size, device) -> z.
        constraint: :class:`WeightClip` (WGAN) or :class:`GradientPenalty` (WGAN-GP).
        critic_optimizer, generator_optimizer: any ``torch.optim.Optimizer``; a plain torch RMSprop or Adam is
            replaced by ours, sharing its groups and state. None takes the paper's: RMSprop at lr 5e-5 for
            WeightClip, Adam at lr 1e-4 and betas (0, 0.9) for GradientPenalty.
        n_critic: critic steps to a generator step, or a callable of the generator iteration, such as
            :func:`warmup_schedule`.
        seed: of the latents and of eps; int in [0, 2^63).
        backend: see :mod:`fastwgan.backend`.
        compile: have torch.compile make each step's forward and backward passes one graph. The first step of each kind
            takes a while, as does each new batch size; layers that torch.compile cannot take whole make it raise.
            Random layers such as dropout draw other numbers than without.
        cuda_graph: whether steps are captured in CUDA graphs, after a few that are not, and replayed from then on.
            "auto" does so where it can be done, and warns once where it cannot on a GPU; True raises there. A capture
            keeps all Python numbers that a network's forward reads: if they change over time, say False.
        amp, ema: not there yet; anything but the default raises NotImplementedError.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or they do not fit together.
        RuntimeError: ``backend="triton"`` or ``cuda_graph=True`` cannot be met; the message says why.

    Attributes:
        critic_iterations, generator_iterations: steps taken so far.

    Source: WGAN, arXiv 1701.07875, Algorithm 1; WGAN-GP, arXiv 1704.00028, Algorithm 1.

    >>> G, D = nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> trainer = Trainer(G, D, latent=8, constraint=GradientPenalty())
    >>> metrics = trainer.step(torch.randn(32, 2))
    >>> trainer.critic_iterations, trainer.sample(4).shape
    (1, torch.Size([4, 2]))
    """

    def __init__(
        self,
        generator: nn.Module,
        critic: nn.Module,
        *,
        latent: Latent,
        constraint: WeightClip | GradientPenalty = WeightClip(),  # noqa: B008 - it is frozen
        critic_optimizer: torch.optim.Optimizer | None = None,
        generator_optimizer: torch.optim.Optimizer | None = None,
        n_critic: int | Callable[[int], int] = 5,
        seed: int = 0,
        backend: Backend = "auto",
        amp: torch.dtype | None = None,
        cuda_graph: bool | str = "auto",
        compile: bool = False,
        ema: float | None = None,
    ) -> None:
        for name, value, default in (("amp", amp, None), ("ema", ema, None)):
            if value != default:
                raise NotImplementedError(f"{name}: expected {default!r}; other values are not there yet")
        if not isinstance(compile, bool):
            raise TypeError(f"compile: expected a bool, got {type(compile).__name__}")
        if not (isinstance(cuda_graph, bool) or cuda_graph == "auto"):
            raise ValueError(f"cuda_graph: expected 'auto', True or False, got {cuda_graph!r}")
        for name, module in (("generator", generator), ("critic", critic)):
            if not isinstance(module, nn.Module):
                raise TypeError(f"{name}: expected an nn.Module, got {type(module).__name__}")
            if not any(p.requires_grad for p in module.parameters()):
                raise ValueError(f"{name}: expected trainable parameters, got none")
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
        if not isinstance(constraint, (WeightClip, GradientPenalty)):
            raise TypeError(f"constraint: expected WeightClip or GradientPenalty, got {type(constraint).__name__}")
        if not callable(n_critic):
            self._check_count("n_critic", n_critic)
        functional.check_seed("seed", seed)

        self.generator, self.critic = generator, critic
        self.constraint = constraint
        self.device = devices.pop()
        resolve(backend, self.device)
        self.backend: Backend = backend
        self.latent = latent
        self.n_critic = n_critic
        self.seed = seed
        self.critic_iterations = 0
        self.generator_iterations = 0
        self._critic_steps_due = 0  # taken since the last generator step
        self._eps_offset = 0  # numbers of the eps stream used up
        self._latent_random = torch.Generator(self.device).manual_seed(stream_seed(seed, 0))
        self._sample_random = torch.Generator(self.device).manual_seed(stream_seed(seed, 1))
        self._one_forward = True  # until a critic step finds otherwise
        self._one_generation = True  # likewise, of the generator
        self._generator_looks = 0  # iterations in which it has been looked at
        self._fakes: Tensor | None = None  # made ahead for the coming critic steps
        self._fakes_versions: list[int] = []  # of the generator's tensors when they were made
        kind = passes.Compiled if compile else passes.Eager
        self._passes = kind(generator, critic, constraint, backend)

        self.critic_optimizer = self._optimizer("critic_optimizer", critic_optimizer, critic)
        self.generator_optimizer = self._optimizer("generator_optimizer", generator_optimizer, generator)
        self._graphs = self._make_graphs(cuda_graph)
        if isinstance(constraint, WeightClip):
            self._clipped = constraint.clipped(critic)
            self._assign_clip(constraint.bound)
            if _momentum(self.critic_optimizer) > 0:
                warnings.warn(
                    "WeightClip with a critic optimizer that has momentum: training becomes unstable "
                    "(arXiv 1701.07875, section 4); RMSprop without momentum is the usual choice",
                    stacklevel=2,
                )
        elif mixing.has_batchnorm(critic):
            warnings.warn(
                "GradientPenalty with a critic that has BatchNorm: the penalty takes each sample's gradient by "
                "itself, which BatchNorm mixes (arXiv 1704.00028, section 4); LayerNorm is the usual choice",
                stacklevel=2,
            )

    # Setting up

    @staticmethod
    def _check_count(name: str, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name}: expected an int, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"{name}: expected an int >= 1, got {value}")
        return value

    def _optimizer(
        self, name: str, optimizer: torch.optim.Optimizer | None, module: nn.Module
    ) -> torch.optim.Optimizer:
        if optimizer is None:
            trainable = [p for p in module.parameters() if p.requires_grad]
            if isinstance(self.constraint, WeightClip):
                return RMSprop(trainable, lr=5e-5, backend=self.backend)
            return Adam(trainable, lr=1e-4, betas=(0.0, 0.9), backend=self.backend)
        if not isinstance(optimizer, torch.optim.Optimizer):
            raise TypeError(f"{name}: expected a torch.optim.Optimizer, got {type(optimizer).__name__}")
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(f"{name}: expected an optimizer that steps on given gradients, got LBFGS")
        own = {id(p) for p in module.parameters()}
        if any(id(p) not in own for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(f"{name}: expected parameters of its own network only, got others")
        return _take_over(optimizer, self.backend)

    def _assign_clip(self, bound: float) -> None:
        """Have each group of our optimizers that holds no exclusions clamp what it updates."""
        if not isinstance(self.critic_optimizer, (RMSprop, Adam)):
            return
        groups = self.critic_optimizer.param_groups
        for group in groups:
            if group["clip"] not in (None, bound):
                raise ValueError(f"critic_optimizer: its clip {group['clip']} contradicts the constraint's {bound}")
        clipped = {id(p) for p in self._clipped}
        for group in groups:
            group["clip"] = bound if all(id(p) in clipped for p in group["params"]) else None

    def _make_graphs(self, wanted: bool | str) -> Graphs | None:
        if wanted is False:
            return None
        problem = device_problem(self.device)
        ours = []
        for name, optimizer in self._named_optimizers().items():
            if not isinstance(optimizer, (RMSprop, Adam)):
                problem = problem or f"{name} is {type(optimizer).__name__}; only RMSprop and Adam can be captured"
                continue
            ours.append(optimizer)
            if resolve(optimizer.backend, self.device) == "torch" or resolve(self.backend, self.device) == "torch":
                problem = problem or "the torch backend passes learning rates as numbers, which a graph would keep"
            if _hooks(optimizer):
                problem = problem or f"{name} has step hooks, which a graph would not call"
        if problem is None:
            self._device_offset = torch.zeros((), dtype=torch.int64, device=self.device)
            networks = (self.generator, self.critic)
            return Graphs(self.device, [self._latent_random], networks, ours, required=wanted is True)
        if wanted is True:
            raise RuntimeError(f"cuda_graph: True was asked for, but {problem}")
        if self.device.type == "cuda":
            warnings.warn(f"cuda_graph: steps run without CUDA graphs, as {problem}", stacklevel=4)
        return None

    def _named_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        return {"critic_optimizer": self.critic_optimizer, "generator_optimizer": self.generator_optimizer}

    # Steps

    def critic_step(self, real: Tensor, *cond: Any) -> Metrics:
        """Update the critic once on a batch of real samples and as many fresh fake ones.

        Args:
            real: samples [N, ...] on the networks' device.
            cond: conditions, passed on to generator and critic after their first argument. A tensor whose first
                dimension is N counts as one row per sample.

        Returns:
            Metrics without ``generator_loss``.

        Raises:
            TypeError, ValueError: ``real`` or a network's output cannot be used. No weight is changed then.
        """
        functional.check_samples("real", real, self.device)
        return self._critic_step(real, None, cond)

    def _critic_step(self, real: Tensor, fake: Tensor | None, cond: tuple[Any, ...]) -> Metrics:
        weight = self._penalty_weight(self.critic_iterations)
        z = self._given_latents(len(real)) if fake is None else None
        scores, penalty, saturation = self._run(self._critic_work, weight, real, fake, z, *cond)
        self._count_critic_step(len(real), weight)
        return Metrics(scores=scores, penalty=penalty, weight=weight, saturation=saturation)

    def generator_step(self, batch_size: int, *cond: Any) -> Metrics:
        """Update the generator once.

        Args:
            batch_size: number of latents to draw.
            cond: conditions, passed on to generator and critic after their first argument.

        Returns:
            Metrics with ``generator_loss`` alone.

        Raises:
            TypeError, ValueError: an argument or a network's output cannot be used. No weight is changed then.
        """
        self._check_count("batch_size", batch_size)
        (loss,) = self._run(self._generator_work, batch_size, self._given_latents(batch_size), *cond)
        self._count_generator_step()
        return Metrics(generator_loss=loss)

    def step(self, real: Tensor, *cond: Any) -> Metrics:
        """A critic step, and then a generator step if ``n_critic`` critic steps have been taken since the last.

        Args, Returns, Raises: as :meth:`critic_step`; ``generator_loss`` is set when a generator step was due.
        """
        functional.check_samples("real", real, self.device)
        left = self._critic_steps_left()
        fake = None if cond else self._fake_made_ahead(len(real), left)
        metrics = self._critic_step(real, fake, cond)
        if left <= 1:
            metrics.generator_loss = self.generator_step(len(real), *cond).generator_loss
        return metrics

    def iteration(self, batches: Iterable[Any]) -> list[Metrics]:
        """The critic steps up to the next generator step, and that one, as ``step`` takes them on each batch in turn.

        On a GPU the whole iteration is one CUDA graph, where that can be; the latents of its critic steps are then one
        draw where the generator mixes no samples.

        Args:
            batches: for each critic step its real samples [N, ...], or a tuple of them and their conditions.

        Returns:
            The Metrics of each critic step; ``generator_loss`` is set in the last.

        Raises:
            TypeError, ValueError: as :meth:`step`, or there are not as many batches as critic steps left.
        """
        parts = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in batches]
        if len(parts) != self._critic_steps_left():
            raise ValueError(
                f"batches: expected {self._critic_steps_left()}, one for each critic step up to the next generator "
                f"step, got {len(parts)}"
            )
        for real, *_ in parts:
            functional.check_samples("real", real, self.device)
        unconditional = all(len(part) == 1 for part in parts)
        looking = self.critic_iterations < PROBED_STEPS or (unconditional and self._generator_is_unknown())
        if self._graphs is None or looking or callable(self.latent) or len(parts) > AHEAD:
            return [self.step(*part) for part in parts]

        sizes = tuple(len(part) for part in parts)
        weights = tuple(self._penalty_weight(self.critic_iterations + i) for i in range(len(parts)))
        outputs = self._run(self._iteration_work, weights, sizes, *(x for part in parts for x in part))
        metrics = []
        for i, (weight, (real, *_)) in enumerate(zip(weights, parts, strict=True)):
            scores, penalty, saturation = outputs[3 * i : 3 * i + 3]
            metrics.append(Metrics(scores=scores, penalty=penalty, weight=weight, saturation=saturation))
            self._count_critic_step(len(real), weight)
        metrics[-1].generator_loss = outputs[-1]
        self._count_generator_step()
        return metrics

    def fit(self, batches: Iterable[Any], steps: int, **options: Any) -> int:
        """Call :meth:`step` on ``steps`` batches; see :func:`fastwgan.fit.fit` for options and result."""
        from fastwgan.fit import fit  # the loop stands above the trainer

        return fit(self, batches, steps, **options)

    @torch.no_grad()
    def sample(self, n: int, *cond: Any) -> Tensor:
        """n samples of the generator in evaluation mode. Training goes on as if it had not been called.

        Args:
            n: number of samples.
            cond: conditions, passed on to the generator.

        Returns:
            Samples [n, ...] on the networks' device.

        Raises:
            TypeError, ValueError: ``n`` is not an int >= 1.
        """
        self._check_count("n", n)
        with _evaluating(self.generator), mixing.random_kept(self.device):
            seed = int(torch.randint(2**62, (), generator=self._sample_random, device=self.device))
            if self.device.type == "cuda":
                torch.cuda.default_generators[self.device.index].manual_seed(seed)
            torch.default_generator.manual_seed(seed)
            z = self.latent(n, self.device) if callable(self.latent) else self._draw(n, self._sample_random)
            fake: Tensor = self.generator(z, *cond)
            return fake

    # Inside a step

    def _run(self, work: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> tuple[Tensor | None, ...]:
        """The device's part of a step, replayed from a graph where there is one.

        A trainer's first steps look at the networks, which no graph could; after an optimizer has been replaced, or a
        step hook added, which no graph would call, steps run without.
        """
        if self._graphs is None:
            return work(*args)
        self._device_offset.fill_(self._eps_offset)
        early = self.critic_iterations < PROBED_STEPS
        optimizers = self._named_optimizers().values()
        replaced = any(mine is not theirs for mine, theirs in zip(optimizers, self._graphs.optimizers, strict=True))
        if early or replaced or any(map(_hooks, optimizers)):
            return work(*args)
        return self._graphs.run(work, *args)

    def _critic_work(
        self, weight: float, real: Tensor, fake: Tensor | None, z: Any, *cond: Any
    ) -> tuple[Tensor | None, ...]:
        """The device's part of a critic step: (score statistics, penalty statistics, saturation)."""
        if fake is None:
            if not callable(self.latent):
                z = self._draw(len(real), self._latent_random)
            fake = self._passes.generate(z, cond)
        functional.check_samples("generator: its output", fake, self.device)
        functional.check_like("generator: its output", fake, "real", real, shape=True)
        together = self._forward_at_once(real, fake, cond)
        x = self._penalised(real, fake) if weight else None
        scores, penalty = self._passes.critic(real, fake, x, cond, together=together, weight=weight)
        self.critic_optimizer.step()
        return scores, penalty, self._clamp() if isinstance(self.constraint, WeightClip) else None

    def _generator_work(self, batch: int, z: Any, *cond: Any) -> tuple[Tensor | None, ...]:
        """The device's part of a generator step: (loss,)."""
        if not callable(self.latent):
            z = self._draw(batch, self._latent_random)
        loss = self._passes.generator(z, cond, batch)
        self.generator_optimizer.step()
        return (loss,)

    def _iteration_work(
        self, weights: tuple[float, ...], sizes: tuple[int, ...], *flat: Any
    ) -> tuple[Tensor | None, ...]:
        """The device's part of a whole iteration: what its critic steps and then its generator step return."""
        rest = iter(flat)
        parts = [tuple(islice(rest, size)) for size in sizes]
        fakes: Sequence[Tensor | None] = [None] * len(parts)
        counts = [len(real) for real, *_ in parts]
        if set(sizes) == {1} and self._generator_keeps_samples_apart(counts[0]):
            fakes = torch.split(self._passes.generate(self._draw(sum(counts), self._latent_random), ()), counts)
        outputs: list[Tensor | None] = []
        for weight, (real, *cond), fake in zip(weights, parts, fakes, strict=True):
            outputs += self._critic_work(weight, real, fake, None, *cond)
            if weight:
                self._device_offset += len(real)
        _, *cond = parts[-1]
        return *outputs, *self._generator_work(counts[-1], None, *cond)

    def _penalty_weight(self, iteration: int) -> float:
        """What the penalty is multiplied by in a critic step; 0 where there is none."""
        constraint = self.constraint
        if not isinstance(constraint, GradientPenalty) or iteration % constraint.every:
            return 0.0
        return constraint.weight * constraint.every

    def _critic_steps_left(self) -> int:
        """Critic steps until the next generator step, this one included."""
        due = self.n_critic
        if callable(due):
            due = self._check_count("n_critic: its result", due(self.generator_iterations))
        return max(1, due - self._critic_steps_due)

    def _count_critic_step(self, batch: int, weight: float) -> None:
        self.critic_iterations += 1
        self._critic_steps_due += 1
        if weight and isinstance(self.constraint, GradientPenalty) and self.constraint.at == "interpolates":
            self._eps_offset += batch

    def _count_generator_step(self) -> None:
        self.generator_iterations += 1
        self._critic_steps_due = 0
        self._fakes = None

    # Latents and fake samples

    def _given_latents(self, n: int) -> Any:
        """The caller's latents; None where they are drawn in the step."""
        return self.latent(n, self.device) if callable(self.latent) else None

    def _draw(self, n: int, random: torch.Generator) -> Tensor:
        assert isinstance(self.latent, int)
        dtype = next(self.generator.parameters()).dtype
        return torch.randn(n, self.latent, generator=random, device=self.device, dtype=dtype)

    def _fake_made_ahead(self, batch: int, steps: int) -> Tensor | None:
        """A batch out of one forward pass for the critic steps up to the next generator step; None if that is unsound.

        The generator does not change meanwhile; should its weights be found written to, the pass is made again.
        """
        versions = mixing.versions(self.generator)
        if self._fakes is None or len(self._fakes) < batch or self._fakes_versions != versions:
            self._fakes = None
            apart = self._generator_keeps_samples_apart(batch)
            if not apart or steps < 2 or self._graphs is not None:  # a graph has the generator inside
                return None
            z = self._draw(min(steps, AHEAD) * batch, self._latent_random)
            self._fakes_versions = mixing.versions(self.generator)
            self._fakes = self._passes.generate(z, ())
            functional.check_samples("generator: its output", self._fakes, self.device)
            if len(self._fakes) != len(z):
                got = tuple(self._fakes.shape)
                self._fakes = None
                raise ValueError(f"generator: its output: expected shape [{len(z)}, ...], got {got}")
        fake, self._fakes = self._fakes[:batch], self._fakes[batch:]
        return fake

    def _generator_is_unknown(self) -> bool:
        """Whether it is still to be found out if the generator keeps samples apart."""
        told = callable(self.latent) or mixing.has_batchnorm(self.generator, training=True) or not self._one_generation
        return not told and self._generator_looks < PROBED_STEPS

    def _generator_keeps_samples_apart(self, batch: int) -> bool:
        """Whether a sample depends on no other one's latent, so that batches may share a forward pass."""
        if callable(self.latent) or mixing.has_batchnorm(self.generator, training=True):
            return False
        if self._generator_is_unknown():
            self._generator_looks += self._critic_steps_due == 0  # the generator is another in each iteration
            random = torch.Generator(self.device).manual_seed(0)
            z, *others = (self._draw(batch, random) for _ in range(3))
            writes = False

            def forward(other: Tensor) -> Tensor:
                nonlocal writes
                before = mixing.versions(self.generator)
                samples: Tensor = self.generator(torch.cat((z, other)))
                writes |= mixing.versions(self.generator) != before  # as spectral normalisation does in each pass
                return samples[:batch]

            self._one_generation = mixing.same_beside(self.generator, forward, others, self.device) and not writes
        return self._one_generation

    def _forward_at_once(self, real: Tensor, fake: Tensor, cond: tuple[Any, ...]) -> bool:
        """Whether real and fake samples may share a forward pass: no score depends on another sample."""
        if mixing.has_batchnorm(self.critic, training=True):
            return False
        plain = (bool, int, float, str, NoneType)
        if not all(isinstance(c, plain) or passes.is_batched(c, len(real)) for c in cond):
            return False
        # The second step looks again, as a last layer that starts at zero hides everything.
        if self._one_forward and self.critic_iterations < PROBED_STEPS:

            def forward(other: Tensor) -> Tensor:
                return passes.scores_of_both(self.critic, real, other, cond)[: len(real)]

            self._one_forward = mixing.same_beside(self.critic, forward, (fake, 1 - 2 * fake), self.device)
        return self._one_forward

    def _penalised(self, real: Tensor, fake: Tensor) -> Tensor:
        """The points at which the input gradient is taken."""
        assert isinstance(self.constraint, GradientPenalty)
        if self.constraint.at == "interpolates":
            offset = self._eps_offset if self._graphs is None else self._device_offset
            x = functional.interpolate(real.detach(), fake, seed=self.seed, offset=offset, backend=self.backend)
        else:
            x = real if self.constraint.at == "real" else fake
        return x.detach()

    def _clamp(self) -> Tensor | None:
        """Clamp what the optimizer's launch did not; return the share of all clamped weights on their bound."""
        assert isinstance(self.constraint, WeightClip)
        shares, fused = [], set()
        if isinstance(self.critic_optimizer, (RMSprop, Adam)):
            shares = list(self.critic_optimizer.shares)
            groups = [group["params"] for group in self.critic_optimizer.param_groups if group["clip"] is not None]
            fused = {id(p) for params in groups for p in params if p.grad is not None}
        apart = [p for p in self._clipped if id(p) not in fused]
        if apart:
            share = functional.clip_and_count_(apart, self.constraint.bound, self.backend)
            if share is not None:
                shares.append(share)
        combined = functional.combine_shares(shares)
        return None if combined is None else combined[0]

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, as a copy that later steps do not change."""
        state = {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimizer": self.generator_optimizer.state_dict(),
            "critic_optimizer": self.critic_optimizer.state_dict(),
            "critic_iterations": self.critic_iterations,
            "generator_iterations": self.generator_iterations,
            "critic_steps_due": self._critic_steps_due,
            "seed": self.seed,
            "eps_offset": self._eps_offset,
            "one_forward": self._one_forward,
            "one_generation": self._one_generation,
            "generator_looks": self._generator_looks,
            "fakes": self._fakes,
            "optimizers": self._optimizer_names(),
            "random": {
                "device": self.device.type,
                "latent": self._latent_random.get_state(),
                "sample": self._sample_random.get_state(),
                "torch": torch.get_rng_state(),
                "cuda": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            },
        }
        return copy.deepcopy(state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`, PyTorch's global random state included.

        Raises:
            TypeError, ValueError, KeyError, RuntimeError: the state does not fit these networks and optimizers.
                Nothing is changed then.
        """
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        before = self.state_dict()
        missing = sorted(before.keys() - state_dict.keys())
        if missing:
            raise ValueError(f"state_dict: expected the state of a Trainer, missing {', '.join(missing)}")
        if state_dict["optimizers"] != self._optimizer_names():
            expected, got = self._optimizer_names(), state_dict["optimizers"]
            raise ValueError(f"state_dict: expected the optimizers {expected}, got {got}")
        functional.check_seed("state_dict: seed", state_dict["seed"])
        for name in ("critic_iterations", "generator_iterations", "critic_steps_due", "eps_offset", "generator_looks"):
            functional.check_seed(f"state_dict: {name}", state_dict[name])
        try:
            self._restore(state_dict)
        except BaseException:
            self._restore(before)
            raise

    def _optimizer_names(self) -> list[str]:
        """The algorithms, by which torch's RMSprop and Adam are the same as ours."""
        return [type(optimizer).__name__ for optimizer in (self.generator_optimizer, self.critic_optimizer)]

    def _restore(self, state: dict[str, Any]) -> None:
        if self._graphs is not None:
            self._graphs.forget()
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        self.generator_optimizer.load_state_dict(state["generator_optimizer"])
        clips = [group.get("clip") for group in self.critic_optimizer.param_groups]
        self.critic_optimizer.load_state_dict(state["critic_optimizer"])
        for group, clip in zip(self.critic_optimizer.param_groups, clips, strict=True):
            if "clip" in group:
                group["clip"] = clip  # the constraint is the trainer's, not the checkpoint's
        self.critic_iterations = int(state["critic_iterations"])
        self.generator_iterations = int(state["generator_iterations"])
        self._critic_steps_due = int(state["critic_steps_due"])
        self.seed = int(state["seed"])
        self._eps_offset = int(state["eps_offset"])
        self._one_forward = bool(state["one_forward"])
        self._one_generation = bool(state["one_generation"])
        self._generator_looks = int(state["generator_looks"])
        self._fakes = None if state["fakes"] is None else state["fakes"].to(self.device, copy=True)
        self._fakes_versions = mixing.versions(self.generator)
        random = state["random"]
        if random["device"] != self.device.type:
            warnings.warn(
                f"state_dict: saved on {random['device']} and loaded on {self.device.type}, whose random numbers "
                "differ: training goes on with fresh random streams",
                stacklevel=4,
            )
            return
        self._latent_random.set_state(random["latent"].cpu())
        self._sample_random.set_state(random["sample"].cpu())
        torch.set_rng_state(random["torch"].cpu())
        if random["cuda"] is not None:
            torch.cuda.set_rng_state(random["cuda"].cpu(), self.device)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write :meth:`state_dict` to ``path``, whole or not at all.

        Raises:
            OSError: the file cannot be written. A file that was there before is untouched.
        """
        checkpoint.save(path, {"trainer": self.state_dict()})

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError, KeyError, RuntimeError: it is no checkpoint, or does not fit. Nothing is changed.
        """
        content = checkpoint.load(path)
        if "trainer" not in content:
            raise ValueError(f"path: {path} holds no trainer")
        self.load_state_dict(content["trainer"])
