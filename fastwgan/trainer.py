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

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim.lr_scheduler import LRScheduler

from fastwgan import checkpoint, functional, graphs, mixing, passes
from fastwgan.arguments import Called, check_arguments, check_count, check_mode, has_hooks, momentum, shapes, take_over
from fastwgan.backend import Backend, resolve
from fastwgan.constraints import Clip, GradientPenalty, NormClip, WeightClip
from fastwgan.guard import PATIENCE, Guard
from fastwgan.metrics import Metrics
from fastwgan.optim import Adam, RMSprop
from fastwgan.ranks import Ranks, refuse_uneven, unwrapped
from fastwgan.streams import process_streams, set_process_streams, stream_seed

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


def _ordinary(x: Any) -> Any:
    """A copy of what was made in inference mode, which no graph could keep; all else as it is."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


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
        cuda_graph: whether steps are captured in CUDA graphs, after a few that are not, and replayed from then on.
            "auto" does so where it can be done, and warns once where it cannot on a GPU; True raises there. A capture
            keeps all Python numbers that a network's forward reads: if they change over time, say False.
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
        compile: bool = False,
        ema: float | None = None,
        blend: float = 0.0,
        drift: float = 0.0,
        instance_noise: float | Callable[[int], float] = 0.0,
        pack: int = 1,
        nonfinite: str = "raise",
        max_skipped: int = PATIENCE,
    ) -> None:
        check_mode()
        generator, critic = unwrapped("generator", generator), unwrapped("critic", critic)
        settings = {
            "latent": latent, "constraint": constraint, "critic_optimizer": critic_optimizer,
            "generator_optimizer": generator_optimizer, "n_critic": n_critic, "amp": amp, "cuda_graph": cuda_graph,
            "compile": compile, "ema": ema, "blend": blend, "drift": drift, "instance_noise": instance_noise,
            "pack": pack, "nonfinite": nonfinite, "max_skipped": max_skipped,
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
        self._one_forward = True  # until a critic step finds otherwise
        self._one_generation = True  # likewise, of the generator
        self._generator_looks = 0  # iterations in which it has been looked at
        self._fakes: Tensor | None = None  # made ahead for the coming critic steps
        self._fakes_versions: list[int] = []  # of the generator's tensors when they were made
        kind = passes.Compiled if compile else passes.Eager
        self._passes = kind(
            generator, critic, constraint, backend, amp=amp, pack=pack, blend=float(blend), drift=float(drift),
            share=1 / self.world,
        )  # fmt: skip
        limit = 0 if nonfinite == "raise" and amp != torch.float16 else max_skipped - 1
        self._critic_guard, self._generator_guard = (
            Guard(name, module, backend, limit=limit, scaled=amp == torch.float16)
            for name, module in (("critic", critic), ("generator", generator))
        )
        # Of real samples, as last seen; or as the critic will most likely have them.
        self._sample_dtype = next(p.dtype for p in critic.parameters() if p.is_floating_point())

        self.critic_optimizer = self._optimizer(critic_optimizer, critic)
        self.generator_optimizer = self._optimizer(generator_optimizer, generator)
        self.critic_scheduler, self.generator_scheduler = critic_scheduler, generator_scheduler
        self.ema = ema
        self._averages: dict[Tensor, Tensor] = {}
        if ema is not None:
            self._start_averages()
        self._graphs = self._make_graphs(cuda_graph)
        if isinstance(constraint, Clip):
            self._clipped = constraint.clipped(critic)
            if isinstance(constraint, WeightClip):
                self._assign_clip(constraint.bound)
            if momentum(self.critic_optimizer) > 0:
                warnings.warn(
                    f"{type(constraint).__name__} with a critic optimizer that has momentum: training becomes unstable "
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

    def _optimizer(self, optimizer: torch.optim.Optimizer | None, module: nn.Module) -> torch.optim.Optimizer:
        if optimizer is not None:
            return take_over(optimizer, self.backend)
        trainable = [p for p in module.parameters() if p.requires_grad]
        if isinstance(self.constraint, Clip):
            return RMSprop(trainable, lr=5e-5, backend=self.backend)
        return Adam(trainable, lr=1e-4, betas=(0.0, 0.9), backend=self.backend)

    def _start_averages(self) -> None:
        """Running averages of the generator's weights as they are, in the precision that updates are computed in."""
        for p in filter(torch.is_floating_point, self.generator.parameters()):
            wide = torch.float64 if p.dtype == torch.float64 else torch.float32
            self._averages[p] = p.detach().to(wide, copy=True)

    def _assign_clip(self, bound: float) -> None:
        """Have each group of our optimizers that holds no exclusions clamp what it updates."""
        if not isinstance(self.critic_optimizer, (RMSprop, Adam)):
            return
        clipped = {id(p) for p in self._clipped}
        for group in self.critic_optimizer.param_groups:
            group["clip"] = bound if all(id(p) in clipped for p in group["params"]) else None

    def _make_graphs(self, wanted: bool | str) -> graphs.Graphs | None:
        if wanted is False:
            return None
        problem = graphs.device_problem(self.device)
        ours = []
        for name, optimizer in self._named_optimizers().items():
            if not isinstance(optimizer, (RMSprop, Adam)):
                problem = problem or f"{name} is {type(optimizer).__name__}; only RMSprop and Adam can be captured"
                continue
            ours.append(optimizer)
            if resolve(optimizer.backend, self.device) == "torch" or resolve(self.backend, self.device) == "torch":
                problem = problem or "the torch backend passes learning rates as numbers, which a graph would keep"
            if has_hooks(optimizer):
                problem = problem or f"{name} has step hooks, which a graph would not call"
        if self.world > 1 and (carrier := self.ranks.backend(self.device)) != "nccl":
            problem = problem or f"{carrier} cannot be captured"
        if problem is None:
            self._device_offset = torch.zeros((), dtype=torch.int64, device=self.device)
            self._device_noise = torch.zeros((), device=self.device)
            networks = (self.generator, self.critic)
            return graphs.Graphs(self.device, [self._latent_random], networks, ours, required=wanted is True)
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
        self._check_real(real)
        return self._critic_step(real, 0, cond)

    def _check_real(self, real: Tensor) -> None:
        check_mode()
        functional.check_samples("real", real, self.device)
        if len(real) % self.pack:
            raise ValueError(f"real: expected a multiple of pack={self.pack} samples, got {len(real)}")

    def _critic_step(self, real: Tensor, ahead: int, cond: tuple[Any, ...]) -> Metrics:
        """``ahead``: how many critic steps fake samples may be made for at once; 0 for fresh ones."""
        weight = self._penalty_weight(self.critic_iterations)
        with self._undone_if_refused():
            fake = self._fake_made_ahead(len(real), ahead) if ahead else None
            z = self._given_latents(len(real)) if fake is None else None
            outputs = self._run(self._critic_work, weight, real, fake, z, *cond)
        metrics = self._critic_step_done(outputs, len(real), weight)
        self._critic_guard.watch(self.last_checkpoint)
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
        check_mode()
        check_count("batch_size", batch_size)
        if batch_size % self.pack:
            raise ValueError(f"batch_size: expected a multiple of pack={self.pack}, got {batch_size}")
        with self._undone_if_refused():
            z = self._given_latents(batch_size)
            outputs = self._run(self._generator_work, batch_size, self._sample_dtype, z, *cond)
        metrics = self._generator_step_done(outputs, batch_size)
        self._generator_guard.watch(self.last_checkpoint)
        return metrics

    def _generator_step_done(self, outputs: tuple[Tensor | None, ...], batch: int) -> Metrics:
        loss, nonfinite = outputs
        assert loss is not None
        assert nonfinite is not None
        self.generator_iterations += 1
        self._eps_offset += self._numbers(batch, 0.0)
        self._critic_steps_due = 0
        self._fakes = None
        if self.generator_scheduler is not None:
            self.generator_scheduler.step()
        return Metrics(generator_loss=loss[0], nonfinite=(nonfinite,))

    def step(self, real: Tensor, *cond: Any) -> Metrics:
        """A critic step, and then a generator step if ``n_critic`` critic steps have been taken since the last.

        Args, Returns, Raises: as :meth:`critic_step`; ``generator_loss`` is set when a generator step was due.
        """
        self._check_real(real)
        left = self._critic_steps_left()
        metrics = self._critic_step(real, 0 if cond else left, cond)
        if left <= 1:
            metrics.include(self.generator_step(len(real), *cond))
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
        unconditional = all(len(part) == 1 for part in parts)
        looking = self.critic_iterations < PROBED_STEPS or (unconditional and self._generator_is_unknown())
        uneven = self.world > 1 and len({len(real) for real, *_ in parts}) > 1
        changing = self.critic_scheduler is not None or callable(self._instance_noise)
        stepwise = looking or callable(self.latent) or changing or uneven
        if self._graphs is None or stepwise or len(parts) > AHEAD:
            return [self.step(*part) for part in parts]

        sizes = tuple(len(part) for part in parts)
        weights = tuple(self._penalty_weight(self.critic_iterations + i) for i in range(len(parts)))
        with self._undone_if_refused():
            outputs = iter(self._run(self._iteration_work, weights, sizes, *(x for part in parts for x in part)))
        metrics = []
        for weight, (real, *_) in zip(weights, parts, strict=True):
            metrics.append(self._critic_step_done(tuple(islice(outputs, 4)), len(real), weight))
        metrics[-1].include(self._generator_step_done(tuple(outputs), len(parts[-1][0])))
        for guard in (self._critic_guard, self._generator_guard):
            guard.watch(self.last_checkpoint)
        return metrics

    def check_finite(self) -> None:
        """Wait for the steps taken so far, and raise what ``nonfinite`` asks for if their gradients were not finite.

        Steps raise it as well, but on a GPU some steps late, so that the last ones may go unnoticed.

        Raises:
            FloatingPointError: they were not.
        """
        for guard in (self._critic_guard, self._generator_guard):
            guard.watch(self.last_checkpoint, wait=True)

    def fit(self, batches: Iterable[Any], steps: int, **options: Any) -> int:
        """Call :meth:`step` on ``steps`` batches; see :func:`fastwgan.fit.fit` for options and result."""
        from fastwgan.fit import fit  # the loop stands above the trainer

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
        check_count("n", n)
        if ema and self.ema is None:
            raise ValueError("ema: expected a trainer that was made with ema=, got one without")
        if seed is not None:
            functional.check_seed("seed", seed)
        with self._undone_if_refused(), _evaluating(self.generator), mixing.random_kept(self.device):
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
        return {name: self._averages[p].to(p.dtype) for name, p in self._averaged()}

    # Inside a step

    @contextmanager
    def _undone_if_refused(self) -> Iterator[None]:
        """What raises uses up no latents, and keeps nothing that it found out."""
        names = ("_fakes", "_fakes_versions", "_one_forward", "_one_generation", "_generator_looks", "_sample_dtype")
        found = {name: getattr(self, name) for name in names}
        streams = []
        if self.device.type == "cpu" or not torch.cuda.is_current_stream_capturing():  # then they cannot be read
            streams = [(random, random.get_state()) for random in (self._latent_random, self._sample_random)]
        try:
            yield
        except BaseException:
            self.__dict__.update(found)
            for random, state in streams:
                random.set_state(state)
            raise

    def _run(self, work: Callable[..., tuple[Tensor | None, ...]], *args: Any) -> tuple[Tensor | None, ...]:
        """The device's part of a step, replayed from a graph where there is one.

        A trainer's first steps look at the networks, which no graph could; after an optimizer has been replaced, or a
        step hook added, which no graph would call, steps run without.
        """
        self.ranks.check_current()
        args = tuple(map(_ordinary, args))
        if self._graphs is None:
            return work(*args)
        self._device_offset.fill_(self._eps_offset)
        if self._instance_noise:
            self._device_noise.fill_(self._noise_scale())
        early = self.critic_iterations < PROBED_STEPS
        optimizers = self._named_optimizers().values()
        replaced = any(mine is not theirs for mine, theirs in zip(optimizers, self._graphs.optimizers, strict=True))
        if early or replaced or any(map(has_hooks, optimizers)):
            return self._graphs.run_uncaptured(work, *args)
        return self._graphs.run(work, *args)

    def _critic_work(
        self, weight: float, real: Tensor, fake: Tensor | None, z: Any, *cond: Any
    ) -> tuple[Tensor | None, ...]:
        """The device's part of a critic step: (score statistics, penalty statistics, nonfinite, saturation)."""
        if fake is None:
            if not callable(self.latent):
                z = self._draw(len(real))
            fake = self._passes.generate(z, cond)
        if self._amp is not None:
            real = real.float()
        self._sample_dtype = real.dtype
        if real.dtype == next(self.critic.parameters()).dtype:  # else it is real samples that do not fit
            fake = fake.to(real.dtype)
        functional.check_like("generator: its output", fake, "real", real, shape=True)
        together = self._forward_at_once(real, fake, cond)
        noise = self._noise(len(real))
        if noise is not None:
            scale, seed, offset = noise
            both = functional.perturb_both(real, fake, scale=scale, seed=seed, offset=offset, backend=self.backend)
            real, fake = both.tensor_split(2)
        elif together:
            both = torch.cat((real, fake))
        x = self._penalised(real, fake) if weight else None
        samples = (both,) if together else (real, fake)
        guard = self._critic_guard
        scored, scores, penalty = self._passes.critic(samples, x, cond, weight=weight, scale=guard.scale)
        scores, penalty, nonfinite = self._check(guard, scored, scores, penalty)
        self._update(self.critic_optimizer, guard)
        saturation = self._clamp(guard.gate) if isinstance(self.constraint, Clip) else None
        return scores, penalty, nonfinite, saturation

    def _generator_work(self, batch: int, dtype: torch.dtype | None, z: Any, *cond: Any) -> tuple[Tensor | None, ...]:
        """The device's part of a generator step: ([loss], nonfinite)."""
        if not callable(self.latent):
            z = self._draw(batch)
        guard = self._generator_guard
        scored, loss = self._passes.generator(z, cond, batch, dtype, guard.scale, self._noise(batch))
        loss, _, nonfinite = self._check(guard, scored, loss, None)
        self._update(self.generator_optimizer, guard)
        return loss, nonfinite

    def _check(
        self, guard: Guard, scores: tuple[Tensor, ...], known: Tensor | None, penalty: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Add up what the ranks have, and set the guard's gate: (score statistics, penalty statistics, nonfinite).

        ``known`` are the score statistics, if the passes have taken some.
        """
        optimizer = self.critic_optimizer if guard is self._critic_guard else self.generator_optimizer
        guard.dense = isinstance(optimizer, (RMSprop, Adam)) or self.world > 1
        if self.world == 1:
            statistics, nonfinite = guard.check(scores if known is None else ())
            return statistics if known is None else known, penalty, nonfinite
        own = known
        if own is None:
            own = functional.score_statistics(scores[0], scores[-1], self.backend)
            own = own if len(scores) == 2 else -own[:1]
        trained = guard.trained()
        used = own.new_ones(len(trained))
        without = [i for i, p in enumerate(trained) if p.grad is None]
        for i in without:  # another rank may have used it
            trained[i].grad = torch.zeros_like(trained[i])
            used[i] = 0
        parts = (own.new_full((1,), scores[-1].numel()), used, own, *([] if penalty is None else [penalty]))
        gradients = guard.gradients()
        sizes, counts, own, *rest = torch.split(
            self.ranks.sum_(gradients, torch.cat(parts)), [len(part) for part in parts], dim=1
        )  # fmt: skip
        refuse_uneven("real" if len(scores) == 2 else "batch_size", sizes, gradients)
        for i in without:
            if not counts[:, i].any():  # nobody has: an optimizer is not to take zeros for its gradient
                trained[i].grad = None
        statistics = own.mean(0)
        if rest:
            means, least, greatest = rest[0][:, :2].mean(0), rest[0][:, 2].amin(), rest[0][:, 3].amax()
            penalty = torch.cat((means, least[None], greatest[None]))
        _, nonfinite = guard.check()
        return statistics, penalty, nonfinite

    def _update(self, optimizer: torch.optim.Optimizer, guard: Guard) -> None:
        """A step of the optimizer and of the averages, unless the guard says no."""
        averages = self._averages if guard is self._generator_guard else {}
        averaged: set[Tensor] = set()
        if isinstance(optimizer, (RMSprop, Adam)):
            optimizer.gate, optimizer.averages, optimizer.decay = guard.gate, averages, self.ema or 0.0
            try:
                optimizer.step()
            finally:  # the optimizer is the caller's, too
                optimizer.gate, optimizer.averages = None, {}
            if averages:
                averaged = {p for group in optimizer.param_groups for p in group["params"] if p.grad is not None}
        else:
            skip, factor = guard.gate.tolist()  # any optimizer may come, so the host has to know
            if skip:
                Called(optimizer)()
            else:
                if factor != 1:
                    torch._foreach_mul_(guard.gradients(), factor)
                optimizer.step()
        for p, average in averages.items():
            if p not in averaged:
                taken = (1 - guard.gate[0]).to(average.dtype)  # or 0, where the step is left out
                average.lerp_(p.detach().to(average.dtype), taken * (1 - (self.ema or 0.0)))

    def _iteration_work(
        self, weights: tuple[float, ...], sizes: tuple[int, ...], *flat: Any
    ) -> tuple[Tensor | None, ...]:
        """The device's part of a whole iteration: what its critic steps and then its generator step return."""
        rest = iter(flat)
        parts = [tuple(islice(rest, size)) for size in sizes]
        fakes: Sequence[Tensor | None] = [None] * len(parts)
        counts = [len(real) for real, *_ in parts]
        if set(sizes) == {1} and self._generator_keeps_samples_apart(counts[0]):
            z = self._draw(sum(counts), batches=len(counts))
            fakes = torch.split(self._passes.generate(z, ()), counts)
        outputs: list[Tensor | None] = []
        for weight, (real, *cond), fake in zip(weights, parts, fakes, strict=True):
            outputs += self._critic_work(weight, real, fake, None, *cond)
            self._device_offset += self._numbers(len(real), weight)
        _, *cond = parts[-1]
        return *outputs, *self._generator_work(counts[-1], self._sample_dtype, None, *cond)

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
        return functional.check_number("instance_noise: its result", scale, minimum=0)

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
            due = check_count("n_critic: its result", due(self.generator_iterations))
        return max(1, due - self._critic_steps_due)

    # Latents and fake samples

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

    def _draw(self, n: int, batches: int = 1) -> Tensor:
        """The next n latents, for so many batches; with several ranks this one's of what all draw."""
        z = self._normal(n * self.world, self._latent_random)
        if self.world == 1:
            return z
        return z.view(batches, self.world, n // batches, -1)[:, self.rank].reshape(n, -1)

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
            ahead = min(steps, AHEAD)
            z = self._draw(ahead * batch, batches=ahead)
            self._fakes_versions = mixing.versions(self.generator)
            self._fakes = self._passes.generate(z, ())
            if len(self._fakes) != len(z):
                raise ValueError(
                    f"generator: its output: expected shape [{len(z)}, ...], got {tuple(self._fakes.shape)}"
                )
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
            z, *others = (self._normal(batch, random) for _ in range(3))

            def forward(other: Tensor) -> Tensor:
                return self._passes.samples(torch.cat((z, other)))[:batch]

            apart = mixing.same_beside(self.generator, forward, others, self.device)
            self._one_generation = self.ranks.all(apart, self.device)
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
                both = torch.cat((real, other))
                return passes.scores_of_both(self._passes.score, both, cond, self.pack)[: len(real) // self.pack]

            apart = mixing.same_beside(self.critic, forward, (fake, 1 - 2 * fake), self.device)
            self._one_forward = self.ranks.all(apart, self.device)
        return self._one_forward

    def _penalised(self, real: Tensor, fake: Tensor) -> Tensor:
        """The points at which the input gradient is taken."""
        assert isinstance(self.constraint, GradientPenalty)
        if self.constraint.at == "interpolates":
            pairs = (x if self.pack == 1 else x.reshape(-1, self.pack, *x.shape[1:]) for x in (real.detach(), fake))
            offset = self._offset(len(real) // self.pack)
            x = functional.interpolate(*pairs, seed=self.seed, offset=offset, backend=self.backend).view(real.shape)
        elif self.constraint.at == "perturbed":
            x = functional.perturb(
                real.detach(), scale=self.constraint.noise, seed=self.seed, offset=self._offset(len(real)),
                backend=self.backend,
            )  # fmt: skip
        else:
            x = real if self.constraint.at == "real" else fake
        return x.detach()

    def _clamp(self, gate: Tensor) -> Tensor | None:
        """Clamp what the optimizer's launch did not, or project, unless the gate says no; return the share on bound."""
        if isinstance(self.constraint, NormClip):
            bound, per = self.constraint.bound, self.constraint.per
            projected = functional.project_and_count_(self._clipped, bound, per, self.backend, gate)
            return None if projected is None else projected[0]
        assert isinstance(self.constraint, WeightClip)
        shares, fused = [], set()
        if isinstance(self.critic_optimizer, (RMSprop, Adam)):
            shares = list(self.critic_optimizer.shares)
            groups = [group["params"] for group in self.critic_optimizer.param_groups if group["clip"] is not None]
            fused = {id(p) for params in groups for p in params if p.grad is not None}
        apart = [p for p in self._clipped if id(p) not in fused]
        if apart:
            share = functional.clip_and_count_(apart, self.constraint.bound, self.backend, gate)
            if share is not None:
                shares.append(share)
        combined = functional.combine_shares(shares)
        return None if combined is None else combined[0]

    # State

    def state_dict(self) -> dict[str, Any]:
        """Everything that a bit-identical continuation needs, as a copy that later steps do not change.

        With several ranks, what is a rank's own (random streams of the process) is this one's only; :meth:`save` and
        :meth:`fit` have all ranks'.
        """
        schedulers = (self.generator_scheduler, self.critic_scheduler)
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
            "optimizers": self._optimizer_names(),
            "schedulers": [None if scheduler is None else scheduler.state_dict() for scheduler in schedulers],
            "guards": [guard.state_dict() for guard in (self._generator_guard, self._critic_guard)],
            "ema": None if self.ema is None else {n: self._averages[p] for n, p in self._averaged()},
            "random": {
                "device": self.device.type,
                "latent": self._latent_random.get_state(),
                "sample": self._sample_random.get_state(),
            },
            "world": self.world,
            "ranks": {
                self.rank: {
                    "fakes": None if self._fakes is None else self._fakes.clone(),
                    **process_streams(self.device),
                }
            },
        }
        return copy.deepcopy(state)

    def full_state_dict(self) -> dict[str, Any]:
        """:meth:`state_dict` with what is each rank's own. All ranks have to call it."""
        state = self.state_dict()
        own = state["ranks"][self.rank]
        if own["fakes"] is not None:
            own["fakes"] = own["fakes"].cpu()  # another rank may not have this one's device
        for part in self.ranks.gather(state["ranks"]):
            state["ranks"].update(part)
        return state

    def _averaged(self) -> list[tuple[str, Tensor]]:
        return [(name, p) for name, p in self.generator.named_parameters() if p in self._averages]

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up a state from :meth:`state_dict`, PyTorch's global random state included.

        Raises:
            TypeError, ValueError, RuntimeError: the state does not fit these networks and optimizers. Nothing is
                changed then.
        """
        check_mode()
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
        functional.check_seed("state_dict: seed", state_dict["seed"])
        for name in ("critic_iterations", "generator_iterations", "critic_steps_due", "eps_offset", "generator_looks"):
            functional.check_seed(f"state_dict: {name}", state_dict[name])
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
        self.generator_optimizer.load_state_dict(copy.deepcopy(state["generator_optimizer"]))
        clips = [group.get("clip") for group in self.critic_optimizer.param_groups]
        self.critic_optimizer.load_state_dict(copy.deepcopy(state["critic_optimizer"]))
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
        for scheduler, kept in zip((self.generator_scheduler, self.critic_scheduler), state["schedulers"], strict=True):
            if scheduler is not None and kept is not None:
                scheduler.load_state_dict(copy.deepcopy(kept))
        for guard, kept in zip((self._generator_guard, self._critic_guard), state["guards"], strict=True):
            guard.load_state_dict(kept)
        for name, p in self._averaged():
            self._averages[p].copy_(p.detach() if state["ema"] is None else state["ema"][name])
        self._restore_streams(state)

    def _restore_streams(self, state: dict[str, Any]) -> None:
        self._fakes = None
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
        self._fakes = None if own["fakes"] is None else own["fakes"].to(self.device, copy=True)
        self._fakes_versions = mixing.versions(self.generator)

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
