"""The device's part of a trainer's steps, each of which is replayed as a CUDA graph where it can be."""

import warnings
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan.backend import resolve
from fastwgan.constraints import Samples
from fastwgan.engine import graphs
from fastwgan.engine.compiled import Compiled
from fastwgan.engine.eager import Eager, Points
from fastwgan.engine.latents import Latents
from fastwgan.engine.piecewise import Block
from fastwgan.engine.player import Player
from fastwgan.engine.ranks import Ranks
from fastwgan.engine.settings import Settings
from fastwgan.engine.structure import Sharing
from fastwgan.metrics import Lazy, Results, Settled
from fastwgan.optim.base import equal

MOST_CAPTURED = 8  # critic steps in a graph of a whole iteration, which bounds the time that its capture takes

Part = tuple[Any, ...]  # conditions, or real samples and their conditions


class Steps:
    """The steps of two networks."""

    def __init__(
        self, generator: nn.Module, critic: nn.Module, critic_optimizer: torch.optim.Optimizer | None,
        generator_optimizer: torch.optim.Optimizer | None, settings: Settings, ranks: Ranks, device: torch.device,
    ) -> None:  # fmt: skip
        self._settings, self._ranks, self._device = settings, ranks, device
        self._constraint, self._pack = settings.constraint, settings.pack
        self._backend, self._scaled = resolve(settings.backend, device), settings.amp == torch.float16
        self.latents = Latents(settings.latent, generator, ranks, device, ranks.gather(settings.seed)[0])
        self.sharing = Sharing(critic, settings.independent_samples)
        self.passes = (Compiled if settings.compile else Eager)(generator, critic, settings, 1 / ranks.world)
        self.critic = Player("critic", critic, critic_optimizer, settings, ranks, constraint=settings.constraint)
        self.generator = Player("generator", generator, generator_optimizer, settings, ranks, ema=settings.ema)
        self.players = (self.generator, self.critic)
        # The dtype in which the critic gets real samples: the last ones', or most likely the first ones'.
        self._sample_dtype = next(p.dtype for p in critic.parameters() if p.is_floating_point())
        self.blocks: tuple[Block, ...] | str = ""  # the critic's in the last step, or why it had none
        self.graphs = graphs.made(settings, device, self.latents.stream, self.players, ranks)
        self._uncaptured = list[str]()  # the steps that no graph may have, as they call a term of the user's
        for name, term in (("critic", settings.critic_term), ("generator", settings.generator_term)):
            if term is not None and self.graphs is not None and settings.cuda_graph is not True:
                self._uncaptured.append(f"_{name}_step")
                warnings.warn(
                    f"cuda_graph: {name} steps run without CUDA graphs, as {name}_term may read what a graph would "
                    "keep; cuda_graph=True says that it does not",
                    stacklevel=3,
                )

    def __str__(self) -> str:
        if not self.blocks:  # as no step was taken
            return str(self.sharing)
        if isinstance(self.blocks, str):
            return f"{self.sharing}; a penalty takes a second backward pass, as {self.blocks}"
        return f"{self.sharing}; there is no second backward pass, as its layers are piecewise linear"

    # What a trainer calls

    def take_critic_step(self, weight: float, real: Tensor, cond: Part, fake_cond: Part | None = None) -> Results:
        """Return the results of a critic step whose penalty has a weight, or none at 0."""
        differs: tuple[int, ...] = ()
        if fake_cond is not None:
            pairs = dict(enumerate(zip(cond, fake_cond, strict=True)))
            # Another tensor is another condition, whatever is in it.
            differs = tuple(
                i for i, (a, b) in pairs.items() if a is not b and (isinstance(a, Tensor) or not equal(a, b))
            )
            self._constraint.check_conditions(real, [pairs[i] for i in differs])
        z = self.latents.given(real.shape[0]) if callable(self.latents.latent) else None
        numbers = self._constraint.random_numbers(real.shape[0], self._pack) if weight else 0
        others = fake_cond if fake_cond is not None and differs else ()
        found = self._run(self._critic_step, (weight, numbers, differs), real, z, *cond, *others)
        self._count(numbers, real)
        return found

    def take_generator_step(self, batch: int, cond: Part, fake_cond: Part | None = None, real: Any = None) -> Results:
        """Return the results of a generator step, whose term may use ``real`` samples and their conditions."""
        z = self.latents.given(batch) if callable(self.latents.latent) else None
        if self._settings.generator_term is None:
            real, cond, fake_cond = None, fake_cond or cond, None
        fixed = batch, self._sample_dtype, len(cond)
        return self._run(self._generator_step, fixed, real, z, *cond, *(fake_cond or ()))

    def takes_whole(self, n: int) -> bool:
        """Return whether an iteration of ``n`` critic steps, on batches alike, can be one graph."""
        served = bool(self.graphs and self.graphs.serving) and not self._uncaptured
        return served and not callable(self.latents.latent) and n <= MOST_CAPTURED

    def take_iteration(self, weights: tuple[float, ...], parts: list[Part]) -> Results | None:
        """Return the results of an iteration's steps, as one graph; None, with nothing done, where that cannot be."""
        uneven = len({(real.shape, real.dtype) for real, *_ in parts}) > 1  # then one may not fit, and the others do
        if uneven or not self.takes_whole(len(parts)):
            return None
        sizes, real = tuple(map(len, parts)), parts[0][0]
        numbers = tuple([self._constraint.random_numbers(real.shape[0], self._pack) if w else 0 for w in weights])
        found = self._run(self._iteration, (weights, numbers, sizes), *chain.from_iterable(parts))
        self._count(sum(numbers), real)
        return found

    def _run(self, work: graphs.Work, *args: Any) -> Results:
        """Return what a step gives, replayed from a graph where there is one."""
        self._ranks.check_current()
        if self._ranks.world > 1:
            for player in self.players:
                player.share()
        # What was made in inference mode no graph could keep.
        args = tuple([x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args])
        if self._settings.memory_format is not None:
            args = tuple(map(self._settings.formatted, args))
        before = self.latents.position()
        try:
            if self.graphs is None:
                return Results(work(*args))
            self.latents.place_on_device()
            if work.__name__ in self._uncaptured:
                return self.graphs.run_uncaptured(work, *args)
            return self.graphs.run(work, *args)
        except BaseException as error:
            self.latents.go_back(before)
            self._settings.explain(error)
            raise

    def _count(self, numbers: int, real: Tensor) -> None:
        self._sample_dtype = real.dtype if self._settings.amp is None else torch.float32
        self.latents.used += numbers * self._ranks.world

    # What a graph replays

    def _critic_step(self, fixed: tuple[float, int, tuple[int, ...]], real: Tensor, z: Any, *conds: Any) -> Settled:
        """Return the results of a critic step: draw, make fakes, choose points, share, differentiate, settle.

        The points take so many ``numbers`` of the stream of eps. If ``differs`` names any conditions, ``conds`` has
        first all those of the real samples and then all those of the fake ones.
        """
        weight, numbers, differs = fixed
        if self._settings.independent_samples:
            self.sharing.check(real, conds)
        parameters = self.critic.prepare()
        z = z if callable(self.latents.latent) else self.latents.normal(real.shape[0])
        n = len(conds) // 2 if differs else len(conds)
        if self._backend == "triton":
            self.generator.look()
            self.passes.follow(self.generator.version)
        samples = self.passes.pair(Samples(real, None, conds[:n], conds[-n:], differs), z)
        points: Points | None = None
        if weight:
            draw = self.latents.draw(numbers)
            points = partial(self._constraint.points, weight=weight, draw=draw, pack=self._pack, backend=self._backend)
        self.sharing.decide(samples, self.critic.version)
        self.blocks = self.passes.doubt() or self.sharing.blocks
        if isinstance(self.blocks, str):
            penalised = None if points is None else points(samples)
            batch, scale = self.sharing.batch(samples), self.critic.guard.scale if self._scaled else None
            found = self.passes.critic(parameters, samples, batch, penalised, layers=self.sharing.layers, scale=scale)
        else:
            found = self.passes.critic_by_blocks(parameters, samples, points, self.blocks)
        if weight and self.graphs is not None:
            self.latents.go_on(numbers * self._ranks.world)
        return self.critic.settle(found)

    def _generator_step(self, fixed: tuple[int, torch.dtype, int], real: Any, z: Any, *conds: Any) -> Settled:
        (batch, dtype, n), parameters = fixed, self.generator.prepare()
        self.passes.follow(self.generator.version)
        z, frozen = z if callable(self.latents.latent) else self.latents.normal(batch), self.critic.look().trained
        given = Samples(None if real is None else real.to(dtype), None, conds[:n], conds[n:] or conds)
        found = self.passes.generator(parameters, frozen, given, z, batch, dtype, self.generator.guard.scale)
        return self.generator.settle(found)

    def _iteration(
        self, fixed: tuple[tuple[float, ...], tuple[int, ...], tuple[int, ...]], *flat: Any
    ) -> graphs.Outputs:
        """Return the results of an iteration's critic steps, and behind them of its generator step."""
        (weights, numbers, sizes), rest = fixed, iter(flat)
        parts = [tuple(islice(rest, size)) for size in sizes]
        outputs: list[Lazy | None] = []
        self.generator.follow()  # before the critic is changed
        for weight, own, (real, *cond) in zip(weights, numbers, parts, strict=True):
            outputs += self._critic_step((weight, own, ()), real, None, *cond)
            self._count(0, real)
        given = None if self._settings.generator_term is None else real
        return *outputs, *self._generator_step((real.shape[0], self._sample_dtype, len(cond)), given, None, *cond)

    # State

    def state_dict(self) -> dict[str, Any]:
        """Return the state of both networks and of the random numbers."""
        generator, critic = (player.state_dict() for player in self.players)
        return {
            "generator": generator["module"],
            "critic": critic["module"],
            "generator_optimizer": generator["optimizer"],
            "critic_optimizer": critic["optimizer"],
            "guards": [generator["guard"], critic["guard"]],
            "ema": generator["averages"],
            **self.latents.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up such a state."""
        if self.graphs is not None:
            self.graphs.forget()
        for player, guard in zip(self.players, state["guards"], strict=True):
            module, optimizer = state[player.name], state[f"{player.name}_optimizer"]
            player.load_state_dict({"module": module, "optimizer": optimizer, "guard": guard, "averages": state["ema"]})
        self.latents.load_state_dict(state)
