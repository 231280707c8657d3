"""The random numbers of a trainer: latents, and its place in the stream of eps."""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastwgan.constraints import Draw
from fastwgan.engine.ranks import Ranks
from fastwgan.streams import Stream, process_streams, set_process_streams, stream_seed

Latent = int | Callable[[int, torch.device], Any]


class Latents:
    """Latents and places in the stream of eps. With several ranks, each has its part of what one process would draw."""

    def __init__(self, latent: Latent, generator: nn.Module, ranks: Ranks, device: torch.device, seed: int) -> None:
        self.latent, self._generator, self._ranks, self._device = latent, generator, ranks, device
        self.seed, self.used = seed, 0  # how many numbers of the stream of eps are used up
        self.stream = torch.Generator(device).manual_seed(stream_seed(seed, Stream.LATENT))
        self._sampling = torch.Generator(device).manual_seed(stream_seed(seed, Stream.SAMPLE))
        self._place: Tensor | None = None  # the same on the device, for steps that a graph replays
        self._placed = False  # whether it is

    def given(self, n: int) -> Any:
        """Return n latents of the caller's, of which there have to be some."""
        assert callable(self.latent)
        z = self.latent(n, self._device)
        if isinstance(z, Tensor) and z.device != self._device:
            raise ValueError(f"latent: its result: expected a tensor on {self._device}, got one on {z.device}")
        return z

    def of_sample(self, n: int, seed: int | None) -> Any:
        """Return n latents to sample with, PyTorch's global streams seeded for what the generator draws."""
        random = self._sampling if seed is None else torch.Generator(self._device).manual_seed(seed)
        if seed is None:
            seed = int(torch.randint(2**62, (), generator=random, device=self._device))
        if self._device.type == "cuda":
            torch.cuda.default_generators[self._device.index].manual_seed(seed)
        torch.default_generator.manual_seed(seed)
        return self.given(n) if callable(self.latent) else self.normal(n, random)

    def normal(self, n: int, random: torch.Generator | None = None) -> Tensor:
        """Return n standard normal latents of a generator's, or without one this rank's of the next step."""
        assert isinstance(self.latent, int)
        world, rank = (self._ranks.world, self._ranks.rank) if random is None else (1, 0)
        dtype = next(self._generator.parameters()).dtype
        options: dict[str, Any] = {"generator": random or self.stream, "device": self._device, "dtype": dtype}
        return torch.randn(n * world, self.latent, **options)[rank * n :][:n]

    # The stream of eps

    def place_on_device(self) -> None:
        """Have steps that a graph replays find their place in the stream of eps, which they count on themselves."""
        if not self._placed:
            if self._place is None:
                self._place = torch.zeros((), dtype=torch.int64, device=self._device)
            self._place.fill_(self.used)
            self._placed = True

    def draw(self, count: int) -> Draw:
        """Return where this rank's next ``count`` numbers of the stream of eps begin."""
        place = self.used if self._place is None else self._place
        return Draw(self.seed, place + self._ranks.rank * count if self._ranks.rank else place)

    def go_on(self, count: int) -> None:
        """Go on by ``count`` numbers on the device, as a graph does at each replay."""
        if self._place is not None:
            self._place += count

    def position(self) -> tuple[Any, Any] | None:
        """Return where the streams of latents stand, or None in a capture, when that cannot be read."""
        if self._device.type == "cpu":
            return self.stream.get_state(), self._sampling.get_state()
        capturing = torch.cuda.is_current_stream_capturing()
        return None if capturing else (self.stream.get_offset(), self._sampling.get_offset())  # a state is an array

    def go_back(self, position: tuple[Any, Any] | None) -> None:
        """Give back the latents that were drawn since, as for a step that has raised."""
        self._placed = False
        for random, where in zip((self.stream, self._sampling), position or (), strict=position is not None):
            (random.set_state if isinstance(where, Tensor) else random.set_offset)(where)

    def state_dict(self) -> dict[str, Any]:
        """Return where all streams stand, the process's own included."""
        latent, sample = self.stream.get_state(), self._sampling.get_state()
        return {
            "seed": self.seed,
            "eps_offset": self.used,
            "random": {"device": self._device.type, "latent": latent, "sample": sample},
            "world": self._ranks.world,
            "ranks": {self._ranks.rank: process_streams(self._device)},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there; warn where that cannot be."""
        self.seed, self.used, self._placed = int(state["seed"]), int(state["eps_offset"]), False
        random, own, told = state["random"], state["ranks"].get(self._ranks.rank), ""
        if random["device"] != self._device.type:
            told = (
                f"saved on {random['device']} and loaded on {self._device.type}, whose random numbers differ: training "
                "goes on with fresh random streams"
            )
        else:
            self.stream.set_state(random["latent"].cpu())
            self._sampling.set_state(random["sample"].cpu())
            if own is None or state["world"] != self._ranks.world:
                told = (
                    f"saved by {state['world']} processes, has the random streams of ranks {sorted(state['ranks'])}; "
                    f"those of rank {self._ranks.rank} of {self._ranks.world} go on as they are"
                )
            else:
                set_process_streams(own, self._device)
                if own.get("fakes") is not None:
                    told = "has fake samples that were made ahead, as an older version did; they are made anew"
        if told:
            warnings.warn(f"state_dict: {told}", stacklevel=6)
