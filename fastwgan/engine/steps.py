"""The device's part of a trainer's steps, each of which is replayed as a CUDA graph where it can be."""

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan.engine import graphs
from fastwgan.engine.compiled import Compiled
from fastwgan.engine.eager import Eager
from fastwgan.engine.latents import Latents
from fastwgan.engine.player import Player, Settled
from fastwgan.engine.ranks import Ranks
from fastwgan.engine.settings import Settings
from fastwgan.engine.structure import Sharing

MOST_CAPTURED = 8  # critic steps in a graph of a whole iteration, which bounds the time that its capture takes

Part = tuple[Any, ...]  # real samples, and their conditions


class Steps:
    """The steps of two networks."""

    def __init__(
        self, generator: nn.Module, critic: nn.Module, critic_optimizer: torch.optim.Optimizer | None,
        generator_optimizer: torch.optim.Optimizer | None, settings: Settings, ranks: Ranks, device: torch.device,
    ) -> None:  # fmt: skip
        self._settings, self._ranks, self._device = settings, ranks, device
        self._constraint, self._pack = settings.constraint, settings.pack
        self.latents = Latents(settings.latent, generator, ranks, device, ranks.gather(settings.seed)[0])
        self.sharing = Sharing(critic, settings.independent_samples)
        self.passes = (Compiled if settings.compile else Eager)(generator, critic, settings, 1 / ranks.world)
        self.critic = Player("critic", critic, critic_optimizer, settings, ranks, constraint=settings.constraint)
        self.generator = Player("generator", generator, generator_optimizer, settings, ranks, ema=settings.ema)
        self.players = (self.generator, self.critic)
        # The dtype of real samples, as last seen; or as the critic will most likely have them.
        self._sample_dtype = next(p.dtype for p in critic.parameters() if p.is_floating_point())
        self.graphs = graphs.made(settings, device, self.latents.stream, self.players, ranks)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"graphs": self.graphs is not None}  # a copy makes its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        given = (self._settings, self._device, self.latents.stream, self.players, self._ranks)
        self.graphs = graphs.made(*given) if state["graphs"] else None

    # What a trainer calls

    def take_critic_step(self, weight: float, real: Tensor, cond: Part) -> Settled:
        """Return the results of a critic step whose penalty has a weight, or none at 0."""
        with self.latents.undone_if_refused():
            found = self._run(self._critic_step, weight, real, self.latents.given(len(real)), *cond)
        self._count(weight, real)
        return Settled._make(found)

    def take_generator_step(self, batch: int, cond: Part) -> Settled:
        """Return the results of a generator step."""
        with self.latents.undone_if_refused():
            z = self.latents.given(batch)
            return Settled._make(self._run(self._generator_step, batch, self._sample_dtype, z, *cond))

    def takes_whole(self, n: int) -> bool:
        """Return whether an iteration of ``n`` critic steps, on batches alike, can be one graph."""
        served = self.graphs is not None and self.graphs.serving
        return served and not callable(self.latents.latent) and n <= MOST_CAPTURED

    def take_iteration(self, weights: tuple[float, ...], parts: list[Part]) -> list[Settled] | None:
        """Return the results of an iteration's steps, as one graph; None, with nothing done, where that cannot be."""
        uneven = len({(real.shape, real.dtype) for real, *_ in parts}) > 1  # then one may not fit, and the others do
        if uneven or not self.takes_whole(len(parts)):
            return None
        sizes = tuple(len(part) for part in parts)
        with self.latents.undone_if_refused():
            outputs = iter(self._run(self._iteration, weights, sizes, *(x for part in parts for x in part)))
        for weight, (real, *_) in zip(weights, parts, strict=True):
            self._count(weight, real)
        return [Settled._make(islice(outputs, len(Settled._fields))) for _ in range(len(parts) + 1)]

    def _run(self, work: graphs.Work, *args: Any) -> graphs.Outputs:
        """Return what a step gives, replayed from a graph where there is one."""
        self._ranks.check_current()
        for player in self.players:
            player.share()
        # What was made in inference mode no graph could keep.
        args = tuple(x.clone() if isinstance(x, Tensor) and x.is_inference() else x for x in args)
        args = tuple(map(self._settings.formatted, args))
        with self._settings.views_named():
            if self.graphs is None:
                return work(*args)
            self.latents.place_on_device()
            return self.graphs.run(work, *args)

    def _count(self, weight: float, real: Tensor) -> None:
        self._sample_dtype = self._dtype_of(real)
        self.latents.used += self._numbers(weight, len(real))

    def _numbers(self, weight: float, batch: int) -> int:
        """Return how many numbers of the stream of eps all ranks use in a critic step."""
        return self._constraint.random_numbers(batch, self._pack) * self._ranks.world if weight else 0

    def _dtype_of(self, real: Tensor) -> torch.dtype:
        """Return the dtype in which the critic gets real samples."""
        return real.dtype if self._settings.amp is None else torch.float32

    # What a graph replays

    def _critic_step(self, weight: float, real: Tensor, z: Any, *cond: Any) -> Settled:
        """Return the results of a critic step: draw, make fakes, choose points, share, differentiate, settle."""
        self.sharing.check(real, cond)
        parameters = self.critic.prepare()
        z = self.latents.of_step(len(real), z)
        real, fake = self.passes.pair(real, z, cond)
        penalised = None
        if weight:
            draw = self.latents.draw(self._constraint.random_numbers(len(real), self._pack))
            penalised = self._constraint.points(real, fake, weight, draw, self._pack, self._settings.backend)
        batch = self.sharing.batch(real, fake, cond)
        scale, known = self.critic.guard.scale, self.sharing.known
        found = self.passes.critic(parameters, batch, penalised, cond, known=known, scale=scale)
        return self.critic.settle(found)

    def _generator_step(self, batch: int, dtype: torch.dtype, z: Any, *cond: Any) -> Settled:
        """Return the results of a generator step."""
        parameters = self.generator.prepare()
        z = self.latents.of_step(batch, z)
        found = self.passes.generator(parameters, z, cond, batch, dtype, self.generator.guard.scale)
        return self.generator.settle(found)

    def _iteration(self, weights: tuple[float, ...], sizes: tuple[int, ...], *flat: Any) -> graphs.Outputs:
        """Return the results of an iteration's critic steps, and behind them of its generator step."""
        rest = iter(flat)
        parts = [tuple(islice(rest, size)) for size in sizes]
        outputs: list[Tensor | None] = []
        for weight, (real, *cond) in zip(weights, parts, strict=True):
            outputs += self._critic_step(weight, real, None, *cond)
            self.latents.go_on(self._numbers(weight, len(real)))
        real, *cond = parts[-1]
        return *outputs, *self._generator_step(len(real), self._dtype_of(real), None, *cond)

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
