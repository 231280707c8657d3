"""The trainer: a lean critic step and generator step round two networks of the user's.

The critic step builds no graph through the generator and no loss tensors (see :mod:`fastwgan.engine.eager`), which
leaves the networks' own kernels and a handful of launches. Nothing in a step waits for the device.
"""

import copy
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from fastwgan import checkpoint, checks
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import Clip, GradientPenalty, NormClip, WeightClip
from fastwgan.engine import graphs, passes, structure
from fastwgan.engine.arguments import check_arguments, kept_apart, momentum, shapes, take_over
from fastwgan.engine.guard import PATIENCE, Guard
from fastwgan.engine.player import Player, default_optimizer, evaluating
from fastwgan.engine.ranks import Ranks, unwrapped
from fastwgan.metrics import Metrics
from fastwgan.ops.samples import interpolate, perturb, perturb_both
from fastwgan.streams import process_streams, random_kept, set_process_streams, stream_seed

__all__ = ["Trainer", "warmup_schedule"]

MOST_CAPTURED = 8  # critic steps in a graph of a whole iteration, which bounds the time that its capture takes

Latent = int | Callable[[int, torch.device], Any]


def warmup_schedule(generator_iteration: int) -> int:
    """Critic steps before a generator step: 100 for the first 25 and every 500th generator step, else 5.

    Source: the WGAN authors' training loop.

    >>> [warmup_schedule(i) for i in (0, 24, 25, 499, 500)]
    [100, 100, 5, 5, 100]
    """
    return 100 if generator_iteration < 25 or generator_iteration % 500 == 0 else 5


class Trainer:
    """Train a generator and a critic by WGAN or WGAN-GP.

    Args:
        generator: maps latents z (and conditions) to samples [N, ...].
        critic: maps samples [N, ...] (and conditions) to scores [N, ...].
        latent: width of a standard normal z [N, latent], or a callable (batch_size, device) -> z. With several
            processes a callable has to draw other latents in each.
        constraint: :class:`WeightClip` (WGAN), :class:`NormClip` or :class:`GradientPenalty` (WGAN-GP).
        critic_optimizer, generator_optimizer: any ``torch.optim.Optimizer``; a plain torch RMSprop or Adam is
            replaced by ours, sharing its groups and state. None takes the paper's: RMSprop at lr 5e-5 for
            WeightClip and NormClip, Adam at lr 1e-4 and betas (0, 0.9) for GradientPenalty.
        critic_scheduler, generator_scheduler: learning-rate schedulers of the given optimizers, or None. Each takes a
            step after each of its network's, and is part of the state.
        n_critic: critic steps to a generator step, or a callable of the generator iteration, such as
            :func:`warmup_schedule`.
        seed: of the latents and of eps; int in [0, 2^63).
        backend: see :mod:`fastwgan.backend`.
        compile: have torch.compile make each step's forward and backward passes one graph. The first step of each kind
            takes a while, as does each new batch size; layers that torch.compile cannot take whole make it raise.
            Random layers such as dropout draw other numbers than without.
        cuda_graph: whether steps are captured in CUDA graphs, after a few that are not, and replayed from then on. A
            replay runs no Python. "auto" captures networks made of PyTorch's layers and this package's alone, whose
            numbers, hooks and parts are compared at each step, and warns once where it captures nothing on a GPU. True
            captures networks of any class, and raises where that cannot be done: it is your word that their forward
            passes read nothing that changes but tensors and plain attributes of modules.
        independent_samples: your word that no score of the critic depends on another sample of its batch, and that
            each tensor among its conditions has a row for each sample. Real and fake samples then share one forward
            pass of the critic. They do without it where its layers are known to keep samples apart (a Sequential of
            PyTorch's own, without conditions); see ``repr(trainer)``.
        amp: torch.bfloat16 or torch.float16 to run the networks under autocast in it, or None. Weights, gradients,
            penalty and statistics stay float32. With float16 each network has a loss scale, which starts at 65536, is
            halved where gradients overflow (that step is left out, as the first few may be) and doubled after 2000
            steps without.
        ema: decay in [0, 1) of a running average of the generator's weights, kept in its update's launch, or None.
        blend: alpha in [0, 1]: the losses are alpha times the non-saturating GAN's and 1 - alpha times WGAN's; see
            :func:`fastwgan.functional.critic_loss`.
        drift: what the critic's loss has mean(D(real)^2) added with, which keeps its scores near zero; >= 0.
        instance_noise: standard deviation of Gaussian noise on all that the critic is shown, in the samples' units, or
            a callable of the critic iteration for one that decays. The penalty's points are of noisy samples then.
        pack: how many samples, one after the other in the batch, the critic gives one score for. The penalty is then
            of a pack.
        nonfinite: what to do about gradients that are infinite or NaN. They never enter a weight or an optimizer's
            state: such a step is left out whole. "raise" raises FloatingPointError at the first, "skip" after
            ``max_skipped`` in a row; so does "raise" with float16, where steps are left out to find a loss scale. On a
            GPU the host does not wait for the verdict, so the error comes some steps late. What a forward pass itself
            writes to, as BatchNorm to its running averages, is written to all the same.
        max_skipped: see ``nonfinite``.

    Under ``torch.distributed``, initialised before the trainer is made, every process makes the same trainer, takes the
    same steps, and gives its own part of each batch, all of one size, in the order of ranks.
    Weights and seed are rank 0's, gradients are averaged, metrics are of the whole batch, and latents and eps are each
    rank's part of what one process would draw: N ranks with batches B / N train as one does with batch B, but for
    layers like BatchNorm, whose batch is the rank's own, as are its averages (a checkpoint has rank 0's). Networks are
    passed without DistributedDataParallel, or in it; one that lives on keeps backward passes from being captured, as it
    holds parts of theirs that belong to the stream it was made on.

    Raises:
        TypeError, ValueError: an argument is of the wrong type or out of range, or they do not fit together.
        RuntimeError: ``backend="triton"`` or ``cuda_graph=True`` cannot be met; the message says why. Also where a
            trainer is made, steps or loads inside ``torch.inference_mode``.

    Attributes:
        critic_iterations, generator_iterations: steps taken so far, those left out included.
        rank, world: of this process, and how many there are.
        pack: samples to a score.
        ema: the decay of the running average, or None.
        last_checkpoint: the path last saved to or loaded from, or None.

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
        constraint: WeightClip | NormClip | GradientPenalty = WeightClip(),  # noqa: B008 - it is frozen
        critic_optimizer: torch.optim.Optimizer | None = None,
        generator_optimizer: torch.optim.Optimizer | None = None,
        critic_scheduler: LRScheduler | None = None,
        generator_scheduler: LRScheduler | None = None,
        n_critic: int | Callable[[int], int] = 5,
        seed: int = 0,
        backend: Backend = "auto",
        amp: torch.dtype | None = None,
        cuda_graph: bool | str = "auto",
        independent_samples: bool = False,
        compile: bool = False,
        ema: float | None = None,
        blend: float = 0.0,
        drift: float = 0.0,
        instance_noise: float | Callable[[int], float] = 0.0,
        pack: int = 1,
        nonfinite: str = "raise",
        max_skipped: int = PATIENCE,
    ) -> None:
        checks.refuse_inference_mode()
        generator, critic = unwrapped("generator", generator), unwrapped("critic", critic)
        settings = {
            "latent": latent, "constraint": constraint, "critic_optimizer": critic_optimizer,
            "generator_optimizer": generator_optimizer, "n_critic": n_critic, "amp": amp, "cuda_graph": cuda_graph,
            "independent_samples": independent_samples, "compile": compile, "ema": ema, "blend": blend, "drift": drift,
            "instance_noise": instance_noise, "pack": pack, "nonfinite": nonfinite, "max_skipped": max_skipped,
        }  # fmt: skip
        check_arguments(
            generator, critic, seed=seed, critic_scheduler=critic_scheduler, generator_scheduler=generator_scheduler,
            **settings,
        )  # fmt: skip
        self.generator, self.critic = generator, critic
        self.constraint = constraint
        self.device = next(critic.parameters()).device
        resolve(backend, self.device)
        self.backend: Backend = backend
        self.latent = latent
        self.n_critic = n_critic
        self.last_checkpoint: str | None = None
        self._amp, self.pack, self._instance_noise = amp, pack, instance_noise
        self.ranks = Ranks(self.device)
        self.rank, self.world = self.ranks.rank, self.ranks.world
        self.ranks.agree(shapes("generator", generator) | shapes("critic", critic) | settings)
        self.ranks.broadcast_([x for m in (generator, critic) for x in (*m.parameters(), *m.buffers())])
        self.seed = seed = self.ranks.same(seed, self.device)
        self.critic_iterations = 0
        self.generator_iterations = 0
        self._critic_steps_due = 0  # taken since the last generator step
        self._eps_offset = 0  # numbers of the eps stream used up
        self._latent_random = torch.Generator(self.device).manual_seed(stream_seed(seed, 0))
        self._sample_random = torch.Generator(self.device).manual_seed(stream_seed(seed, 1))
        self._independent_samples = independent_samples
        self._one_forward: bool | None = None  # whether real and fake samples shared a pass in the last step
        self._shown = 0, False  # how many dimensions they had, and whether there were conditions
        kind = passes.Compiled if compile else passes.Eager
        self._passes = kind(
            generator, critic, constraint, backend, amp=amp, pack=pack, blend=float(blend), drift=float(drift),
            share=1 / self.world,
        )  # fmt: skip
        limit = 0 if nonfinite == "raise" and amp != torch.float16 else max_skipped - 1
        # Of real samples, as last seen; or as the critic will most likely have them.
        self._sample_dtype = next(p.dtype for p in critic.parameters() if p.is_floating_point())

        def player(name: str, optimizer: torch.optim.Optimizer | None, **options: Any) -> Player:
            module = getattr(self, name)
            guard = Guard(name, module, backend, limit=limit, scaled=amp == torch.float16)
            default = optimizer is None
            given = take_over(optimizer, backend) if optimizer else default_optimizer(constraint, module, backend)
            return Player(name, module, given, guard, self.ranks, backend, default=default, **options)

        clip = constraint if isinstance(constraint, Clip) else None
        self._critic = player("critic", critic_optimizer, clip=clip)
        self._generator = player("generator", generator_optimizer, ema=ema)
        self.critic_scheduler, self.generator_scheduler = critic_scheduler, generator_scheduler
        self._cuda_graph = cuda_graph
        self._graphs = self._make_graphs()
        if clip is not None:
            if momentum(self.critic_optimizer) > 0:
                warnings.warn(
                    f"{type(constraint).__name__} with a critic optimizer that has momentum: training becomes unstable "
                    "(arXiv 1701.07875, section 4); RMSprop without momentum is the usual choice",
                    stacklevel=2,
                )
        elif structure.has_batchnorm(critic):
            warnings.warn(
                "GradientPenalty with a critic that has BatchNorm: the penalty takes each sample's gradient by "
                "itself, which BatchNorm mixes (arXiv 1704.00028, section 4); LayerNorm is the usual choice",
                stacklevel=2,
            )

    def __repr__(self) -> str:
        return (
            f"Trainer(constraint={self.constraint!r}, optimizers={self._optimizer_names()}, device={self.device}, "
            f"backend={resolve(self.backend, self.device)!r}, cuda_graph={self._graphs is not None}; "
            f"{self.critic_iterations} critic steps, {self.generator_iterations} generator steps; "
            f"{self._passes_taken()})"
        )

    def _passes_taken(self) -> str:
        """Return whether real and fake samples shared a pass of the critic in the last step, and why."""
        if self._one_forward is None:
            return "a first critic step will tell whether real and fake samples share a pass of the critic"
        ndim, conditional = self._shown
        if self._one_forward:
            why = "independent_samples=True says so" if self._independent_samples else "its layers keep samples apart"
            return f"real and fake samples share a pass of the critic, as {why}"
        each = "real and fake samples have a pass of the critic each, as "
        if self._independent_samples:
            return f"{each}there are conditions that are neither tensors nor constants"
        reason = "there are conditions" if conditional else structure.doubt(self.critic, ndim)
        return (
            f"{each}{reason or 'its layers mixed samples in the last step'}; with independent_samples=True, your word "
            "that no score depends on another sample, they share one"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy is made of. Graphs are made anew; hooks would be lost with PyTorch's own copies."""
        hooks = [player.hooks() for player in (self._critic, self._generator)]
        return self.__dict__ | {"_graphs": self._graphs is not None, "hooks": hooks}

    def __setstate__(self, state: dict[str, Any]) -> None:
        hooks = state.pop("hooks")
        self.__dict__.update(state)
        for player, own in zip((self._critic, self._generator), hooks, strict=True):
            player.hook(own)
        self._graphs = self._make_graphs() if state["_graphs"] else None

    def _make_graphs(self) -> graphs.Graphs | None:
        self._device_offset = torch.zeros((), dtype=torch.int64, device=self.device)
        self._device_noise = torch.zeros((), device=self.device)
        players = (self._critic, self._generator)
        return graphs.made(self._cuda_graph, self.device, self._latent_random, players, self.ranks, self.backend)

    @property
    def critic_optimizer(self) -> torch.optim.Optimizer:
        """Return the critic's optimizer: ours in place of a plain torch RMSprop or Adam."""
        return self._critic.optimizer

    @critic_optimizer.setter
    def critic_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._critic.assign(optimizer)

    @property
    def generator_optimizer(self) -> torch.optim.Optimizer:
        """Return the generator's optimizer: ours in place of a plain torch RMSprop or Adam."""
        return self._generator.optimizer

    @generator_optimizer.setter
    def generator_optimizer(self, optimizer: torch.optim.Optimizer) -> None:
        self._generator.assign(optimizer)

    @property
    def ema(self) -> float | None:
        """Return the decay of the running average, or None."""
        return self._generator.ema

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
        self._check_real(real)
        return self._critic_step(real, cond)

    def _check_real(self, real: Tensor) -> None:
        checks.refuse_inference_mode()
        checks.samples("real", real, self.device)
        if len(real) % self.pack:
            raise ValueError(f"real: expected a multiple of pack={self.pack} samples, got {len(real)}")

    def _critic_step(self, real: Tensor, cond: tuple[Any, ...]) -> Metrics:
        weight = self._penalty_weight(self.critic_iterations)
        with self._undone_if_refused():
            outputs = self._run(self._critic_work, weight, real, self._given_latents(len(real)), *cond)
        metrics = self._critic_step_done(outputs, len(real), weight)
        self._critic.guard.watch(self.last_checkpoint)
        return metrics

    def _critic_step_done(self, outputs: tuple[Tensor | None, ...], batch: int, weight: float) -> Metrics:
        scores, penalty, nonfinite, saturation = outputs
        assert nonfinite is not None
        self.critic_iterations += 1
        self._critic_steps_due += 1
        self._eps_offset += self._numbers(batch, weight)
        if self.critic_scheduler is not None:
            self.critic_scheduler.step()
        return Metrics(scores=scores, penalty=penalty, weight=weight, saturation=saturation, nonfinite=(nonfinite,))

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
        checks.refuse_inference_mode()
        checks.count("batch_size", batch_size)
        if batch_size % self.pack:
            raise ValueError(f"batch_size: expected a multiple of pack={self.pack}, got {batch_size}")
        with self._undone_if_refused():
            z = self._given_latents(batch_size)
            outputs = self._run(self._generator_work, batch_size, self._sample_dtype, z, *cond)
        metrics = self._generator_step_done(outputs, batch_size)
        self._generator.guard.watch(self.last_checkpoint)
        return metrics

    def _generator_step_done(self, outputs: tuple[Tensor | None, ...], batch: int) -> Metrics:
        loss, nonfinite = outputs
        assert loss is not None
        assert nonfinite is not None
        self.generator_iterations += 1
        self._eps_offset += self._numbers(batch, 0.0)
        self._critic_steps_due = 0
        if self.generator_scheduler is not None:
            self.generator_scheduler.step()
        return Metrics(generator_loss=loss[0], nonfinite=(nonfinite,))

    def step(self, real: Tensor, *cond: Any) -> Metrics:
        """A critic step, and then a generator step if ``n_critic`` critic steps have been taken since the last.

        Args, Returns, Raises: as :meth:`critic_step`; ``generator_loss`` is set when a generator step was due.
        """
        self._check_real(real)
        left = self._critic_steps_left()
        if left <= 1:
            self._generator.check()  # before the critic is changed
        metrics = self._critic_step(real, cond)
        if left <= 1:
            metrics.include(self.generator_step(len(real), *cond))
        return metrics

    def iteration(self, batches: Iterable[Any]) -> list[Metrics]:
        """The critic steps up to the next generator step, and that one, as ``step`` takes them on each batch in turn.

        On a GPU the whole iteration is one CUDA graph, where that can be.

        Args:
            batches: for each critic step its real samples [N, ...], or a tuple of them and their conditions.

        Returns:
            The Metrics of each critic step; ``generator_loss`` is set in the last.

        Raises:
            TypeError, ValueError: as :meth:`step`, or there are not as many batches as critic steps left.
        """
        if not isinstance(batches, Iterable):
            raise TypeError(f"batches: expected an iterable, got {type(batches).__name__}")
        left = self._critic_steps_left()
        # One more is enough to know that there are too many: a whole loader is not read for that.
        parts = [tuple(b) if isinstance(b, (tuple, list)) else (b,) for b in islice(batches, left + 1)]
        if len(parts) != left:
            got = f"{len(parts)} or more" if len(parts) > left else len(parts)
            raise ValueError(
                f"batches: expected {left}, one for each critic step up to the next generator step, got {got}"
            )
        for part in parts:
            if not part:
                raise ValueError("batches: expected real samples and their conditions, got an empty tuple")
            self._check_real(part[0])
        self._generator.check()  # before the critic is changed
        uneven = len({(real.shape, real.dtype) for real, *_ in parts}) > 1  # then one may not fit, and the others do
        changing = self.critic_scheduler is not None or callable(self._instance_noise)
        if self._graphs is None or callable(self.latent) or changing or uneven or len(parts) > MOST_CAPTURED:
            return [self.step(*part) for part in parts]

        sizes = tuple(len(part) for part in parts)
        weights = tuple(self._penalty_weight(self.critic_iterations + i) for i in range(len(parts)))
        with self._undone_if_refused():
            outputs = iter(self._run(self._iteration_work, weights, sizes, *(x for part in parts for x in part)))
        metrics = []
        for weight, (real, *_) in zip(weights, parts, strict=True):
            metrics.append(self._critic_step_done(tuple(islice(outputs, 4)), len(real), weight))
        metrics[-1].include(self._generator_step_done(tuple(outputs), len(parts[-1][0])))
        for player in (self._critic, self._generator):
            player.guard.watch(self.last_checkpoint)
        return metrics

    def check_finite(self) -> None:
        """Wait for the steps taken so far, and raise what ``nonfinite`` asks for if their gradients were not finite.

        Steps raise it as well, but on a GPU some steps late, so that the last ones may go unnoticed.

        Raises:
            FloatingPointError: they were not.
        """
        for player in (self._critic, self._generator):
            player.guard.watch(self.last_checkpoint, wait=True)

    def fit(self, batches: Iterable[Any], steps: int, **options: Any) -> int:
        """Call :meth:`step` on ``steps`` batches; see :func:`fastwgan.training.fit.fit` for options and result."""
        from fastwgan.training.fit import fit  # the loop stands above the trainer

        return fit(self, batches, steps, **options)

    @torch.no_grad()
    def sample(self, n: int, *cond: Any, ema: bool = False, seed: int | None = None) -> Tensor:
        """n samples of the generator in evaluation mode. Training goes on as if it had not been called.

        Args:
            n: number of samples.
            cond: conditions, passed on to the generator.
            ema: whether the generator is to have the running averages of its weights.
            seed: of the latents and of what the generator draws, the same samples each time; None draws new ones.

        Returns:
            Samples [n, ...] on the networks' device.

        Raises:
            TypeError, ValueError: ``n`` is not an int >= 1, or there are no averages.
        """
        checks.count("n", n)
        if ema and self.ema is None:
            raise ValueError("ema: expected a trainer that was made with ema=, got one without")
        if seed is not None:
            checks.seed("seed", seed)
        with self._undone_if_refused(), evaluating(self.generator), random_kept(self.device):
            random = self._sample_random
            if seed is None:
                seed = int(torch.randint(2**62, (), generator=random, device=self.device))
            else:
                random = torch.Generator(self.device).manual_seed(seed)
            if self.device.type == "cuda":
                torch.cuda.default_generators[self.device.index].manual_seed(seed)
            torch.default_generator.manual_seed(seed)
            z = self._given_latents(n) if callable(self.latent) else self._normal(n, random)
            fake: Tensor
            fake = functional_call(self.generator, self.averages(), (z, *cond)) if ema else self.generator(z, *cond)
            return fake

    def averages(self) -> dict[str, Tensor]:
        """The running averages of the generator's weights by name, in the weights' dtypes; empty without ``ema``."""
        weights = dict(self.generator.named_parameters())
        return {name: x.to(weights[name].dtype) for name, x in self._generator.named_averages().items()}

    # Inside a step

    @contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """Give back the latents that a step which raises has drawn."""
        dtype = self._sample_dtype
        streams = []
        if self.device.type == "cpu" or not torch.cuda.is_current_stream_capturing():  # then they cannot be read
            streams = [(random, random.get_state()) for random in (self._latent_random, self._sample_random)]
        try:
            yield
        except BaseException:
            self._sample_dtype = dtype
            for random, state in streams:
                random.set_state(state)
            raise

    def _run(self, work: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> tuple[Tensor | None, ...]:
        """Return what the device's part of a step gives, replayed from a graph where there is one."""
        self.ranks.check_current()
        for player in (self._critic, self._generator):
            player.share()
        # What was made in inference mode no graph could keep.
        args = tuple(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args)
        if self._graphs is None:
            return work(*args)
        self._device_offset.fill_(self._eps_offset)
        if self._instance_noise:
            self._device_noise.fill_(self._noise_scale())
        return self._graphs.run(work, *args)

    def _critic_work(self, weight: float, real: Tensor, z: Any, *cond: Any) -> tuple[Tensor | None, ...]:
        """Return the device's part of a critic step: (score statistics, penalty statistics, nonfinite, saturation)."""
        parameters = self._critic.prepare()
        if not callable(self.latent):
            z = self._draw(len(real))
        self._shown = real.dim(), bool(cond)
        known = not cond and structure.layers(self.critic, real.dim()) is not None
        self._one_forward = together = known or (self._independent_samples and kept_apart(self.critic, real, cond))
        fake = self._passes.generate(z, cond)
        if self._amp is not None:
            real = real.float()
        self._sample_dtype = real.dtype
        if real.dtype == next(self.critic.parameters()).dtype:  # else it is real samples that do not fit
            fake = fake.to(real.dtype)
        checks.like("generator: its output", fake, "real", real, shape=True)
        noise = self._noise(len(real))
        if noise is not None:
            scale, seed, offset = noise
            both = perturb_both(real, fake, scale=scale, seed=seed, offset=offset, backend=self.backend)
            real, fake = both.tensor_split(2)
        x = self._penalised(real, fake) if weight else None
        if noise is None and (together or structure.may_write(self.critic)):
            both = torch.cat((real, fake))
            real, fake = both.tensor_split(2)  # a copy: the caller's batch stays as it is
        samples = (both,) if together else (real, fake)
        scored, scores, penalty = self._passes.critic(
            parameters, samples, x, cond, weight=weight, known=known, scale=self._critic.guard.scale
        )
        scores, penalty, nonfinite = self._critic.settle(scored, scores, penalty)
        return scores, penalty, nonfinite, self._critic.update()

    def _generator_work(self, batch: int, dtype: torch.dtype | None, z: Any, *cond: Any) -> tuple[Tensor | None, ...]:
        """The device's part of a generator step: ([loss], nonfinite)."""
        if not callable(self.latent):
            z = self._draw(batch)
        parameters = self._generator.prepare()
        scored, loss = self._passes.generator(
            parameters, z, cond, batch, dtype, self._generator.guard.scale, self._noise(batch)
        )
        loss, _, nonfinite = self._generator.settle(scored, loss, None)
        self._generator.update()
        return loss, nonfinite

    def _iteration_work(
        self, weights: tuple[float, ...], sizes: tuple[int, ...], *flat: Any
    ) -> tuple[Tensor | None, ...]:
        """The device's part of a whole iteration: what its critic steps and then its generator step return."""
        rest = iter(flat)
        parts = [tuple(islice(rest, size)) for size in sizes]
        outputs: list[Tensor | None] = []
        for weight, (real, *cond) in zip(weights, parts, strict=True):
            outputs += self._critic_work(weight, real, None, *cond)
            self._device_offset += self._numbers(len(real), weight)
        _, *cond = parts[-1]
        return *outputs, *self._generator_work(len(parts[-1][0]), self._sample_dtype, None, *cond)

    def _penalty_weight(self, iteration: int) -> float:
        """What the penalty is multiplied by in a critic step; 0 where there is none."""
        constraint = self.constraint
        if not isinstance(constraint, GradientPenalty) or iteration % constraint.every:
            return 0.0
        return constraint.weight * constraint.every

    def _numbers(self, batch: int, weight: float) -> int:
        """How many indices of the streams of eps and noise a step uses up; ``weight`` is the penalty's."""
        if self._instance_noise:
            return batch * self.world
        if not weight or not isinstance(self.constraint, GradientPenalty):
            return 0
        return {"interpolates": batch // self.pack, "perturbed": batch}.get(self.constraint.at, 0) * self.world

    def _noise_scale(self) -> float:
        """Standard deviation of the instance noise of this step."""
        if not callable(self._instance_noise):
            return self._instance_noise
        scale = self._instance_noise(self.critic_iterations)
        return checks.number("instance_noise: its result", scale, minimum=0)

    def _noise(self, batch: int) -> passes.Noise | None:
        """The instance noise of a step, or None."""
        if not self._instance_noise:
            return None
        scale = self._noise_scale() if self._graphs is None else self._device_noise
        return scale, self.seed, self._offset(batch)

    def _offset(self, count: int) -> int | Tensor:
        """Where this rank's ``count`` indices of the streams of eps and noise begin."""
        offset = self._eps_offset if self._graphs is None else self._device_offset
        return offset + self.rank * count if self.rank else offset

    def _critic_steps_left(self) -> int:
        """Critic steps until the next generator step, this one included."""
        due = self.n_critic
        if callable(due):
            due = checks.count("n_critic: its result", due(self.generator_iterations))
        return max(1, due - self._critic_steps_due)

    # Latents

    def _given_latents(self, n: int) -> Any:
        """The caller's latents; None where they are drawn in the step."""
        if not callable(self.latent):
            return None
        z = self.latent(n, self.device)
        if isinstance(z, Tensor) and z.device != self.device:
            raise ValueError(f"latent: its result: expected a tensor on {self.device}, got one on {z.device}")
        return z

    def _normal(self, n: int, random: torch.Generator) -> Tensor:
        assert isinstance(self.latent, int)
        dtype = next(self.generator.parameters()).dtype
        return torch.randn(n, self.latent, generator=random, device=self.device, dtype=dtype)

    def _draw(self, n: int) -> Tensor:
        """Return the next n latents; with several ranks this one's of what all draw."""
        return self._normal(n * self.world, self._latent_random)[self.rank * n : (self.rank + 1) * n]

    def _penalised(self, real: Tensor, fake: Tensor) -> Tensor:
        """The points at which the input gradient is taken."""
        assert isinstance(self.constraint, GradientPenalty)
        if self.constraint.at == "interpolates":
            pairs = (x if self.pack == 1 else x.reshape(-1, self.pack, *x.shape[1:]) for x in (real.detach(), fake))
            offset = self._offset(len(real) // self.pack)
            x = interpolate(*pairs, seed=self.seed, offset=offset, backend=self.backend).view(real.shape)
        elif self.constraint.at == "perturbed":
            x = perturb(
                real.detach(), scale=self.constraint.noise, seed=self.seed, offset=self._offset(len(real)),
                backend=self.backend,
            )  # fmt: skip
        else:
            x = real if self.constraint.at == "real" else fake
        return x.detach()

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, as a copy that later steps do not change.

        With several ranks, what is a rank's own (random streams of the process) is this one's only; :meth:`save` and
        :meth:`fit` have all ranks'.
        """
        players = (self._generator, self._critic)
        schedulers = (self.generator_scheduler, self.critic_scheduler)
        state = {
            "generator": self.generator.state_dict(),
            "critic": self.critic.state_dict(),
            "generator_optimizer": self._generator.optimizer_state(),
            "critic_optimizer": self._critic.optimizer_state(),
            "critic_iterations": self.critic_iterations,
            "generator_iterations": self.generator_iterations,
            "critic_steps_due": self._critic_steps_due,
            "seed": self.seed,
            "eps_offset": self._eps_offset,
            "optimizers": self._optimizer_names(),
            "schedulers": [None if scheduler is None else scheduler.state_dict() for scheduler in schedulers],
            "guards": [player.guard.state_dict() for player in players],
            "ema": None if self.ema is None else self._generator.named_averages(),
            "random": {
                "device": self.device.type,
                "latent": self._latent_random.get_state(),
                "sample": self._sample_random.get_state(),
            },
            "world": self.world,
            "ranks": {self.rank: process_streams(self.device)},
        }
        return copy.deepcopy(state)

    def full_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` with what is each rank's own. All ranks have to call it."""
        state = self.state_dict()
        for part in self.ranks.gather(state["ranks"]):
            state["ranks"].update(part)
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`, PyTorch's global random state included.

        Raises:
            TypeError, ValueError, RuntimeError: the state does not fit these networks and optimizers. Nothing is
                changed then.
        """
        checks.refuse_inference_mode()
        if not isinstance(state_dict, dict):
            raise TypeError(f"state_dict: expected a dict, got {type(state_dict).__name__}")
        before = self.state_dict()
        missing = sorted(before.keys() - state_dict.keys())
        if missing:
            raise ValueError(f"state_dict: expected the state of a Trainer, missing {', '.join(missing)}")
        if state_dict["optimizers"] != self._optimizer_names():
            expected, got = self._optimizer_names(), state_dict["optimizers"]
            raise ValueError(f"state_dict: expected the optimizers {expected}, got {got}")
        if state_dict["ema"] is not None and self.ema is None:
            raise ValueError("state_dict: has running averages of weights; expected a trainer made with ema=")
        checks.seed("state_dict: seed", state_dict["seed"])
        for name in ("critic_iterations", "generator_iterations", "critic_steps_due", "eps_offset"):
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
        """The algorithms, by which torch's RMSprop and Adam are the same as ours."""
        return [type(optimizer).__name__ for optimizer in (self.generator_optimizer, self.critic_optimizer)]

    def _restore(self, state: dict[str, Any]) -> None:
        if self._graphs is not None:
            self._graphs.forget()
        self.generator.load_state_dict(state["generator"])
        self.critic.load_state_dict(state["critic"])
        for player in (self._generator, self._critic):
            player.follow()
            groups = player.optimizer.param_groups
            clips = [group.get("clip") for group in groups]
            kept = copy.deepcopy(state[f"{player.name}_optimizer"])
            player.optimizer.load_state_dict(player.widened(kept))
            for group, clip in zip(groups, clips, strict=True):
                if "clip" in group:
                    group["clip"] = clip  # the constraint is the trainer's, not the checkpoint's
        self.critic_iterations = int(state["critic_iterations"])
        self.generator_iterations = int(state["generator_iterations"])
        self._critic_steps_due = int(state["critic_steps_due"])
        self.seed = int(state["seed"])
        self._eps_offset = int(state["eps_offset"])
        for scheduler, kept in zip((self.generator_scheduler, self.critic_scheduler), state["schedulers"], strict=True):
            if scheduler is not None and kept is not None:
                scheduler.load_state_dict(copy.deepcopy(kept))
        for player, kept in zip((self._generator, self._critic), state["guards"], strict=True):
            player.guard.load_state_dict(kept)
        weights = dict(self.generator.named_parameters())
        for name, average in self._generator.named_averages().items():
            average.copy_(weights[name].detach() if state["ema"] is None else state["ema"][name])
        self._restore_streams(state)

    def _restore_streams(self, state: dict[str, Any]) -> None:
        random, own = state["random"], state["ranks"].get(self.rank)
        if random["device"] != self.device.type:
            warnings.warn(
                f"state_dict: saved on {random['device']} and loaded on {self.device.type}, whose random numbers "
                "differ: training goes on with fresh random streams",
                stacklevel=5,
            )
            return
        self._latent_random.set_state(random["latent"].cpu())
        self._sample_random.set_state(random["sample"].cpu())
        if own is None or state["world"] != self.world:
            warnings.warn(
                f"state_dict: saved by {state['world']} processes, has the random streams of ranks "
                f"{sorted(state['ranks'])}; those of rank {self.rank} of {self.world} go on as they are",
                stacklevel=5,
            )
            return
        set_process_streams(own, self.device)
        if own.get("fakes") is not None:
            warnings.warn(
                "state_dict: has fake samples that were made ahead, as an older version did; they are made anew",
                stacklevel=5,
            )

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
