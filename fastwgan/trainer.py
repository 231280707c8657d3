"""The trainer: a lean critic step and generator step round two networks of the user's.

The critic step builds no graph through the generator and no loss tensors (see :mod:`fastwgan.engine.eager`), which
leaves the networks' own kernels and a handful of launches. Nothing in a step waits for the device.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from itertools import islice
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler
from torch.utils._pytree import tree_leaves

from fastwgan import checkpoint, checks
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import Constraint, WeightClip
from fastwgan.engine.latents import Latent
from fastwgan.engine.ranks import Ranks, shapes, unwrapped
from fastwgan.engine.settings import REMOVED, Settings, warmup_schedule
from fastwgan.engine.steps import Steps
from fastwgan.engine.terms import StepRecord, Term, split
from fastwgan.metrics import Found, Metrics
from fastwgan.training.fit import fit

__all__ = ["StepRecord", "Trainer", "warmup_schedule"]


def _optimizer(name: str) -> Any:
    return property(
        lambda trainer: getattr(trainer._steps, name).optimizer,
        lambda trainer, optimizer: getattr(trainer._steps, name).assign(optimizer),
        doc=f"The {name}'s optimizer: ours in place of a plain torch RMSprop or Adam. Another may be assigned.",
    )


def _conditions(cond: tuple[Any, ...], fake_cond: object) -> tuple[Any, ...]:
    """Return the conditions of fake samples, if they can stand beside those of real ones."""
    if not isinstance(fake_cond, (tuple, list)):
        raise TypeError(f"fake_cond: expected a tuple of conditions, got {type(fake_cond).__name__}")
    if len(fake_cond) != len(cond):
        raise ValueError(f"fake_cond: expected {len(cond)} conditions, as real samples have, got {len(fake_cond)}")
    return tuple(fake_cond)


class Trainer:
    """Train a generator and a critic by WGAN or WGAN-GP.

    Args:
        generator: maps latents z (and conditions) to samples [N, ...].
        critic: maps samples [N, ...] (and conditions) to scores [N, ...]. Either network may return a tuple that begins
            with these, and goes on with what a term of a loss is to have.
        latent: width of a standard normal z [N, latent], or a callable (batch, device) -> z, another in each process.
        constraint: :class:`WeightClip` (WGAN), :class:`NormClip` or :class:`GradientPenalty` (WGAN-GP).
        critic_optimizer, generator_optimizer: any ``torch.optim.Optimizer``; a plain torch RMSprop or Adam is
            replaced by ours, sharing its groups and state. None takes the paper's: RMSprop at lr 5e-5 for
            WeightClip and NormClip, Adam at lr 1e-4 and betas (0, 0.9) for GradientPenalty.
        critic_scheduler, generator_scheduler: learning-rate schedulers of the given optimizers, or None. Each takes a
            step after each of its network's, and is part of the state.
        n_critic: critic steps per generator step, or a callable of the generator iteration, as :func:`warmup_schedule`.
        seed: of the latents and of eps; int in [0, 2^63).
        backend: see :mod:`fastwgan.backend`.
        compile: whether torch.compile makes each step's forward and backward passes one graph, which takes a while at
            the first step of each kind and batch size, and raises for layers that it cannot take whole. Random layers,
            such as dropout, draw other numbers than without.
        cuda_graph: whether steps are captured in CUDA graphs after a few runs, and replayed from then on. A replay runs
            no Python. "auto" captures networks of PyTorch's and this package's layers alone, whose numbers, hooks and
            parts are compared at each step, and warns once where it captures nothing on a GPU. True captures any
            networks, or raises: your word that they read nothing that changes but tensors and plain module attributes.
        independent_samples: your word that what the critic returns of a sample depends on no other of its batch, and
            that each tensor among its conditions has a row for each sample. Real and fake samples then share one pass
            of the critic. Sequentials of PyTorch's layers that keep samples apart need no word: see ``repr(trainer)``.
        amp: torch.bfloat16 or torch.float16 to run the networks under autocast, or None. Weights, gradients, penalty
            and statistics stay float32. With float16 each network has a loss scale: it starts at 65536, is halved where
            gradients overflow (that step is left out, as the first few may be) and doubled after 2000 other steps.
        ema: decay in [0, 1) of a running average of the generator's weights, or None.
        critic_term, generator_term: functions of one :class:`StepRecord`. Each returns a 0-d tensor with a graph, which
            is added to what its network minimises: ``lambda s: 0.001 * s.real_scores.square().mean()``. It runs in
            each step, under the same autocast, on a rank's own samples; in CUDA graphs only with ``cuda_graph=True``.
        pack: how many consecutive samples of a batch get one score together. The penalty is then of a pack.
        max_norm: number > 0, or a dict of them for "critic", "generator" or both, or None: a network's gradients are
            multiplied by min(1, max_norm / (norm + 1e-6)), as by ``torch.nn.utils.clip_grad_norm_``. The norm is of all
            of them together, averaged over all processes and without the loss scale.
        nonfinite: what to do about infinite or NaN gradients. Such a step is left out whole: no weight and no
            optimizer's state changes, only what a forward pass itself writes, such as BatchNorm's averages. "raise"
            raises FloatingPointError at the first, "skip" after 20 in a row; so does "raise" with float16, where steps
            are left out to find a loss scale. On a GPU, where the host does not wait, the error comes some steps late.
        memory_format: ``torch.channels_last`` to have both networks' weights and each step's images lie in memory so,
            which may make a GPU's convolutions faster; None leaves them as they are. Forward passes must call
            ``reshape`` or ``flatten`` for ``view``. Results are the same up to rounding, but with ``at="perturbed"``,
            whose noise goes by the place in memory. Checkpoints and samples are contiguous.

    Under ``torch.distributed``, initialised before, every process makes the same trainer, takes the same steps, and
    gives its own part of each batch, all of one size, in the order of ranks. Weights and seed are rank 0's, gradients
    are averaged, metrics are of the whole batch, and latents and eps are parts of what one process would draw: N ranks
    with batches B / N train as one with batch B, but for layers like BatchNorm, whose batch is the rank's own (a
    checkpoint has rank 0's averages). Networks are taken out of DistributedDataParallel, but while you hold the
    wrapper, backward passes cannot be captured in CUDA graphs.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or they do not fit together.
        RuntimeError: ``backend="triton"`` or ``cuda_graph=True`` cannot be met, or ``torch.inference_mode`` is on.

    Attributes:
        critic_iterations, generator_iterations: steps taken so far, those left out included.
        rank, world, pack, ema: this process's rank, and how many there are; what was given.
        last_checkpoint: the path last saved to or loaded from, or None.

    Source: WGAN, arXiv 1701.07875, Algorithm 1; WGAN-GP, arXiv 1704.00028, Algorithm 1.

    >>> G, D = nn.Linear(8, 2), nn.Sequential(nn.Linear(2, 16), nn.ReLU(), nn.Linear(16, 1))
    >>> trainer = Trainer(G, D, latent=8, constraint=WeightClip(0.05))
    >>> metrics = trainer.step(torch.randn(32, 2))
    >>> trainer.critic_iterations, trainer.sample(4).shape
    (1, torch.Size([4, 2]))
    """

    def __init__(
        self, generator: nn.Module, critic: nn.Module, *, latent: Latent,
        constraint: Constraint = WeightClip(),  # noqa: B008 - it is frozen
        critic_optimizer: torch.optim.Optimizer | None = None,
        generator_optimizer: torch.optim.Optimizer | None = None, critic_scheduler: LRScheduler | None = None,
        generator_scheduler: LRScheduler | None = None, n_critic: int | Callable[[int], int] = 5, seed: int = 0,
        backend: Backend = "auto", amp: torch.dtype | None = None, cuda_graph: bool | str = "auto",
        independent_samples: bool = False, compile: bool = False, ema: float | None = None,
        critic_term: Term | None = None, generator_term: Term | None = None, pack: int = 1,
        max_norm: float | dict[str, float] | None = None, nonfinite: str = "raise",
        memory_format: torch.memory_format | None = None, **removed: object,
    ) -> None:  # fmt: skip
        checks.removed(removed, REMOVED)
        checks.refuse_inference_mode()
        generator, critic = unwrapped("generator", generator), unwrapped("critic", critic)
        settings = Settings(
            latent, constraint, n_critic, seed, backend, amp, cuda_graph, independent_samples, compile, ema,
            critic_term, generator_term, pack, max_norm, nonfinite, memory_format,
        )  # fmt: skip
        optimizers = {"critic": critic_optimizer, "generator": generator_optimizer}
        schedulers = {"critic": critic_scheduler, "generator": generator_scheduler}
        self.device, advice = settings.check({"generator": generator, "critic": critic}, optimizers, schedulers)

        self.generator, self.critic, self.n_critic, self._settings = generator, critic, n_critic, settings
        self.critic_scheduler, self.generator_scheduler = critic_scheduler, generator_scheduler
        self.critic_iterations = self.generator_iterations = 0
        self.last_checkpoint: str | None = None
        self.ranks = ranks = Ranks(self.device)
        self.rank, self.world = ranks.rank, ranks.world
        options = vars(settings) | {f"{name}_optimizer": optimizer for name, optimizer in optimizers.items()}
        ranks.agree(shapes("generator", generator) | shapes("critic", critic) | options | {"seed": "the first rank's"})
        tensors = [x for m in (generator, critic) for x in (*m.parameters(), *m.buffers())]
        ranks.broadcast_(tensors)
        self._critic_steps_due = 0  # taken since the last generator step
        for x in tensors if memory_format is not None else ():
            x.data = settings.formatted(x.data)
        self._steps = Steps(generator, critic, critic_optimizer, generator_optimizer, settings, ranks, self.device)
        if advice is not None:
            warnings.warn(advice, stacklevel=2)

    def __repr__(self) -> str:
        return (
            f"Trainer(constraint={self.constraint!r}, optimizers={self._optimizer_names()}, device={self.device}, "
            f"backend={resolve(self.backend, self.device)!r}, cuda_graph={self._steps.graphs is not None}; "
            f"{self.critic_iterations} critic steps, {self.generator_iterations} generator steps; "
            f"{self._steps})"
        )

    critic_optimizer, generator_optimizer = _optimizer("critic"), _optimizer("generator")

    latent = property(attrgetter("_steps.latents.latent"), lambda self, z: setattr(self._steps.latents, "latent", z))
    # Fixed when a trainer is made, but for the seed, which a checkpoint brings along.
    constraint = property(attrgetter("_settings.constraint"))
    backend = property(attrgetter("_settings.backend"))
    pack = property(attrgetter("_settings.pack"))
    ema = property(attrgetter("_settings.ema"))
    seed = property(attrgetter("_steps.latents.seed"))

    def critic_step(self, real: Tensor, *cond: Any, fake_cond: Sequence[Any] | None = None) -> Metrics:
        """Update the critic once on real and as many fresh fake samples; return Metrics without ``generator_loss``.

        Args:
            real: samples [N, ...] on the networks' device.
            cond: conditions, both networks' further arguments. A tensor whose length is N counts as one row per sample.
            fake_cond: as many conditions for the fake samples, where they are others. A penalty at interpolates is then
                taken between samples with their conditions, which have to be floating, and its norms are of both.

        Raises:
            TypeError, ValueError: ``real`` or a network's output cannot be used. No weight is changed then.
        """
        self._check_real(real)
        return self._critic_step(real, cond, fake_cond)

    def _critic_step(self, real: Tensor, cond: tuple[Any, ...], fake_cond: Sequence[Any] | None) -> Metrics:
        weight = self.constraint.penalty_weight(self.critic_iterations)
        if fake_cond is not None:
            fake_cond = _conditions(cond, fake_cond)
        found = self._steps.take_critic_step(weight, real, cond, fake_cond)
        metrics = self._critic_step_done((found, 0), weight)
        self._steps.critic.guard.watch(self.last_checkpoint)
        return metrics

    def _check_real(self, real: Tensor) -> None:
        if torch.is_inference_mode_enabled():
            checks.refuse_inference_mode()
        checks.samples("real", real, device=self.device)
        if real.shape[0] % self.pack:
            raise ValueError(f"real: expected a multiple of pack={self.pack} samples, got {len(real)}")

    def _critic_step_done(self, found: Found, weight: float) -> Metrics:
        self.critic_iterations += 1
        self._critic_steps_due += 1
        if self.critic_scheduler is not None:
            self.critic_scheduler.step()
        return Metrics(found, weight=weight)

    def generator_step(
        self, batch_size: int, *cond: Any, fake_cond: Sequence[Any] | None = None, real: Tensor | None = None
    ) -> Metrics:  # fmt: skip
        """Update the generator once on ``batch_size`` latents; return Metrics with ``generator_loss`` alone.

        ``real`` are as many samples for ``generator_term``, whose conditions are ``cond``. Those of the fake samples
        are ``fake_cond``, if given. Errors: as :meth:`critic_step`.
        """
        if fake_cond is not None:
            fake_cond = _conditions(cond, fake_cond)
        if real is not None:
            self._check_real(real)
            if len(real) != batch_size:
                raise ValueError(f"real: expected batch_size={batch_size} samples, got {len(real)}")
        checks.refuse_inference_mode()
        checks.count("batch_size", batch_size)
        if batch_size % self.pack:
            raise ValueError(f"batch_size: expected a multiple of pack={self.pack}, got {batch_size}")
        metrics = self._generator_step_done((self._steps.take_generator_step(batch_size, cond, fake_cond, real), 0))
        self._steps.generator.guard.watch(self.last_checkpoint)
        return metrics

    def _generator_step_done(self, found: Found) -> Metrics:
        self.generator_iterations += 1
        self._critic_steps_due = 0
        if self.generator_scheduler is not None:
            self.generator_scheduler.step()
        return Metrics(generator=found)

    def step(self, real: Tensor, *cond: Any, fake_cond: Sequence[Any] | None = None) -> Metrics:
        """Take a critic step, and then a generator step if ``n_critic`` critic steps have been taken since the last.

        As :meth:`critic_step`; ``generator_loss`` is set when a generator step was due.
        """
        self._check_real(real)
        left = self._critic_steps_left()
        if left <= 1:
            self._steps.generator.follow()  # before the critic is changed
        metrics = self._critic_step(real, cond, fake_cond)
        if left <= 1:
            given: dict[str, Any] = {} if fake_cond is None else {"fake_cond": fake_cond}
            if self._settings.generator_term is not None:
                given["real"] = real
            metrics.include(self.generator_step(len(real), *cond, **given))
        return metrics

    def iteration(self, batches: Iterable[Any]) -> list[Metrics]:
        """Take the critic steps up to the next generator step, and that one, as ``step`` does on each batch in turn.

        On a GPU all is one CUDA graph, where that can be. ``batches`` has for each critic step left its real samples
        [N, ...], or a tuple of them and their conditions. Return each one's Metrics; the last has ``generator_loss``.
        """
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches: expected an iterable, got {type(batches).__name__}")
        left = self._critic_steps_left()
        # One more is enough to know that there are too many: a whole loader is not read for that.
        parts = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in islice(batches, left + 1)]
        if (n := len(parts)) != left:
            expected = f"{left}, one for each critic step up to the next generator step"
            raise ValueError(f"batches: expected {expected}, got {n}{' or more' if n > left else ''}")
        if not all(parts):
            raise ValueError("batches: expected real samples and their conditions, got an empty tuple")
        for real, *_ in parts:
            self._check_real(real)
        weights = tuple(self.constraint.penalty_weight(self.critic_iterations + i) for i in range(left))
        found = None if self.critic_scheduler is not None else self._steps.take_iteration(weights, parts)
        if found is None:
            self._steps.generator.follow()  # before the critic is changed
            return [self.step(*part) for part in parts]
        metrics = [self._critic_step_done((found, i), weight) for i, weight in enumerate(weights)]
        metrics[-1].include(self._generator_step_done((found, left)))
        self._watch()
        return metrics

    _own = (step, generator_step, iteration)  # as they are in this class

    def batches_at_once(self) -> int:
        """Return how many batches :meth:`iteration` takes next, if all as a CUDA graph that serves again; else 1."""
        # A step of somebody's own is to be called.
        own = all(getattr(getattr(self, method.__name__), "__func__", None) is method for method in self._own)
        if own and not self._critic_steps_due and self.critic_scheduler is None and self._steps.takes_whole(1):
            with suppress(TypeError, ValueError):  # as the step that it concerns will say
                for player in self._steps.players:
                    player.follow()
                left, done = self._critic_steps_left(), self.critic_iterations
                weights = [self.constraint.penalty_weight(i) for i in range(done, done + 2 * left)]
                if self._steps.takes_whole(left) and weights[:left] == weights[left:]:
                    return left
        return 1

    def check_finite(self) -> None:
        """Wait for the steps so far, and raise FloatingPointError if ``nonfinite`` asks for it.

        Steps raise it as well, but on a GPU some steps late, so that the last ones may go unnoticed.
        """
        self._watch(wait=True)

    def _watch(self, *, wait: bool = False) -> None:
        for player in self._steps.players:
            player.guard.watch(self.last_checkpoint, wait=wait)

    def fit(self, batches: Iterable[Any], steps: int, **options: Any) -> int:
        """Call :meth:`step` on ``steps`` batches; see :func:`fastwgan.training.fit` for options and result."""
        return fit(self, batches, steps, **options)

    @torch.no_grad()
    def sample(self, n: int, *cond: Any, ema: bool = False, seed: int | None = None) -> Tensor:
        """Return ``n`` samples [n, ...] of the generator in evaluation mode, on its device; training goes on as before.

        Args:
            n: number of samples.
            cond: conditions, passed on to the generator.
            ema: whether the generator is to have the running averages of its weights.
            seed: of the latents and of what the generator draws, the same samples each time; None draws new ones.

        Raises:
            TypeError, ValueError: ``n`` is not an int >= 1, or there are no averages.
        """
        checks.count("n", n)
        if ema and self.ema is None:
            raise ValueError("ema: expected a trainer that was made with ema=, got one without")
        if seed is not None:
            checks.seed("seed", seed)
        kept = torch.random.fork_rng([self.device] if self.device.type == "cuda" else [])
        before = self._steps.latents.position()
        try:
            with self._steps.generator.evaluating(), kept:
                inputs = (self._steps.latents.of_sample(n, seed), *cond)
                output = functional_call(self.generator, self.averages(), inputs) if ema else self.generator(*inputs)
                found, _ = split(output)
        except BaseException as error:
            self._steps.latents.go_back(before)
            self._settings.explain(error)
            raise
        return found if self._settings.memory_format is None else found.contiguous()  # type: ignore[no-any-return]

    def averages(self) -> dict[str, Tensor]:
        """Return the averages of the generator's weights by name, in the weights' dtypes; none without ``ema``."""
        weights = dict(self.generator.named_parameters())
        return {name: x.to(weights[name].dtype) for name, x in self._steps.generator.named_averages().items()}

    def _critic_steps_left(self) -> int:
        due = self.n_critic
        if callable(due):
            due = checks.count("n_critic: its result", due(self.generator_iterations))
        return max(1, due - self._critic_steps_due)

    def state_dict(self) -> dict[str, Any]:
        """Return everything that a bit-identical continuation needs, as a contiguous copy that later steps leave alone.

        Of what is a rank's own (random streams of the process) it has this one's; :meth:`save` and :meth:`fit`, all.
        """
        schedulers = (self.generator_scheduler, self.critic_scheduler)
        state = self._steps.state_dict() | {
            "critic_iterations": self.critic_iterations,
            "generator_iterations": self.generator_iterations,
            "critic_steps_due": self._critic_steps_due,
            "optimizers": self._optimizer_names(),
            "schedulers": [None if scheduler is None else scheduler.state_dict() for scheduler in schedulers],
        }
        state = copy.deepcopy(state)
        for x in tree_leaves(state):
            if isinstance(x, Tensor) and x.layout == torch.strided:
                x.data = x.data.contiguous()
        return state

    def full_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` with what is each rank's own. All ranks have to call it."""
        state = self.state_dict()
        for part in self.ranks.gather(state["ranks"]):
            state["ranks"].update(part)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`, PyTorch's global random state included.

        Raises:
            TypeError, ValueError, RuntimeError: it does not fit these networks and optimizers. Nothing is changed then.
        """
        checks.refuse_inference_mode()
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        before = self.state_dict()
        if missing := sorted(before.keys() - state_dict.keys()):
            raise ValueError(f"state_dict: expected the state of a Trainer, missing {', '.join(missing)}")
        if (got := state_dict["optimizers"]) != before["optimizers"]:
            raise ValueError(f"state_dict: expected the optimizers {before['optimizers']}, got {got}")
        if state_dict["ema"] is not None and self.ema is None:
            raise ValueError("state_dict: has running averages of weights; expected a trainer made with ema=")
        for name in ("seed", "critic_iterations", "generator_iterations", "critic_steps_due", "eps_offset"):
            checks.seed(f"state_dict: {name}", state_dict[name])
        try:
            self._restore(state_dict)
        except BaseException as error:
            self._restore(before)
            of_parts = isinstance(error, (AttributeError, IndexError, KeyError, TypeError, ValueError))
            if of_parts and not str(error).startswith("state_dict"):
                raise ValueError(f"state_dict: expected a Trainer's state, got a damaged one: {error!r}") from error
            raise

    def _optimizer_names(self) -> list[str]:
        return [type(optimizer).__name__ for optimizer in (self.generator_optimizer, self.critic_optimizer)]

    def _restore(self, state: dict[str, Any]) -> None:
        self._steps.load_state_dict(state)
        self.critic_iterations = int(state["critic_iterations"])
        self.generator_iterations = int(state["generator_iterations"])
        self._critic_steps_due = int(state["critic_steps_due"])
        for scheduler, kept in zip((self.generator_scheduler, self.critic_scheduler), state["schedulers"], strict=True):
            if scheduler is not None and kept is not None:
                scheduler.load_state_dict(copy.deepcopy(kept))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the state to ``path``, whole or not at all. All ranks have to call it; rank 0 writes.

        Raises:
            OSError: the file cannot be written. A file that was there before is untouched.
        """
        state = self.full_state_dict()
        self.ranks.once(lambda: checkpoint.save(path, {"trainer": state}))
        self.last_checkpoint = os.fspath(path)

    def load(self, path: str | os.PathLike[str]) -> None:
        """Take up what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            TypeError, ValueError, RuntimeError: it is no checkpoint, or does not fit. Nothing is changed.
        """
        content = checkpoint.load(path)
        if "trainer" not in content:
            raise ValueError(f"path: {path} holds no trainer")
        self.load_state_dict(content["trainer"])
        self.last_checkpoint = os.fspath(path)
