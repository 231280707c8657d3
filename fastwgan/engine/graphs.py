"""Steps as CUDA graphs: run a few times as they are, captured once, and then replayed on new data.

A replay launches a whole step at once, with the kernels, addresses and numbers of its capture. So whatever changes from
step to step is in device memory that a graph reads anew: the batch is copied to a static one, latents come from
generators registered with the graph, eps and the optimizers' numbers from tables that are brought up to date before a
replay. What a step returns is copied, as the next replay writes over it.
"""

import gc
import warnings
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor

from fastwgan.backend import kernels, resolve
from fastwgan.engine import structure
from fastwgan.engine.player import Player
from fastwgan.engine.ranks import Ranks
from fastwgan.engine.settings import Settings
from fastwgan.metrics import Lazy, Results
from fastwgan.optim.adopt import has_hooks

Outputs = tuple[Lazy | None, ...]
Work = Callable[..., Outputs]

WARM_UP = 3  # runs of a step before its capture: they compile kernels, make state, and show what waits for the device
RESTLESS = 32  # changes without a replay between them that are told
GRAPHS = 8  # graphs at a time; steps on batches of yet other shapes run without


@contextmanager
def capturing(
    stream: torch.cuda.Stream, pool: Any, generators: Sequence[torch.Generator]
) -> Iterator[torch.cuda.CUDAGraph]:
    """Capture what is asked of ``stream``'s device within, with memory of a pool of graphs, into a new graph.

    Raises:
        Exception: it cannot be captured. PyTorch is as before then, but for random generators, which are made anew:
            without that no later call could draw from them, nor empty the cache or begin another capture.
    """
    index, graph, collects = stream.device.index, torch.cuda.CUDAGraph(), gc.isenabled()
    gc.collect()  # garbage alone may keep alive autograd nodes of another stream, which cannot be captured
    gc.disable()  # during a capture, freeing other graphs or Triton's modules is illegal
    try:
        # The stream twice: PyTorch's context leaves it as it is where a capture fails to begin or to end.
        with torch.cuda.device(index), torch.cuda.stream(stream):
            for generator in generators:
                graph.register_generator_state(generator)
            # Other threads, such as a data loader's, may go on allocating.
            with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
                yield graph
    except Exception:
        for generator in (*generators, torch.cuda.default_generators[index]):  # the latter is always registered
            generator.graphsafe_set_state(generator.clone_state())
        graph.reset()
        with suppress(RuntimeError):  # "not currently recording": PyTorch has ended it, as it does not before 2.12
            torch._C._cuda_endAllocateToPool(index, pool)
            torch._C._cuda_releasePool(index, pool)
        raise
    finally:
        if collects:
            gc.enable()


class Capture:
    """The stream and the memory that a trainer's graphs share: they are replayed one at a time, in stream order."""

    def __init__(self, device: torch.device, generators: Sequence[torch.Generator]) -> None:
        self._device, self._generators = device, generators
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.pool: Any = None

    @contextmanager
    def on_stream(self) -> Iterator[None]:
        """Run the block's device work on the captures' stream: after the current stream's work so far, before its next.

        All steps run there, captured or not: PyTorch has one autograd node for each parameter, of the stream that it
        was made on, which lives for as long as any graph refers to it. One of another stream breaks a capture.
        """
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            current.wait_stream(self._stream)

    def warm_up(self, work: Callable[[], Outputs]) -> tuple[Outputs, str | None]:
        """Run ``work``; return its outputs, and what in it cannot be captured."""
        mode = torch.cuda.get_sync_debug_mode()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                with self.on_stream():
                    outputs = work()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        problem = None
        for w in caught:
            if "called a synchronizing CUDA operation" in str(w.message):
                problem = "it waits for the device, as reading a value, printing it or branching on it does"
            elif "Synchronization debug mode" not in str(w.message):  # that it is a prototype
                warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
        return outputs, problem

    def capture(self, work: Callable[[], None]) -> Callable[[], None]:
        """Capture ``work``, which runs nothing, and return what replays it; raise as :func:`capturing` does."""
        pool = torch.cuda.graph_pool_handle() if self.pool is None else self.pool
        with capturing(self._stream, pool, self._generators) as graph:
            work()
        self.pool = pool
        return graph.replay


CONSTANTS = (bool, int, float, str, type(None), torch.dtype)


def _signature(x: Any, device: torch.device) -> Hashable:
    """Return what has to be the same for a graph to serve, or raise TypeError for what no graph takes."""
    if isinstance(x, Tensor) and x.device == device:
        return x.shape, x.stride(), x.dtype
    if isinstance(x, CONSTANTS) or (isinstance(x, tuple) and all(isinstance(part, CONSTANTS) for part in x)):
        return type(x), x
    what = f"tensor on {x.device}" if isinstance(x, Tensor) else type(x).__name__
    raise TypeError(f"a {what} among its inputs, where graphs take tensors on their device and plain constants")


class _Graph:
    """A step on inputs of one signature: the static inputs, and the graph once it is captured."""

    def __init__(self, args: tuple[Any, ...]) -> None:
        self.args = tuple(torch.empty_like(x) if isinstance(x, Tensor) else x for x in args)
        self.runs = 0
        self.replay: Callable[[], None] | None = None

    def pack(self, outputs: Outputs) -> None:
        """Have all outputs in one tensor, so that one launch copies them."""
        tensors = [x() if callable(x) else x for x in outputs]
        self.like = [None if x is None else (x.shape, x.dtype) for x in tensors]
        self.packed = torch.cat([x.detach().reshape(-1) for x in tensors if x is not None])


def _problem_of(player: Player, settings: Settings, device: torch.device) -> str | None:
    """Return why no graph can have the step of a player's optimizer, or None."""
    name, optimizer = f"{player.name}_optimizer", player.gated
    if optimizer is None:
        return f"{name} is {type(player.optimizer).__name__}; only RMSprop and Adam can be captured"
    if "torch" in (resolve(optimizer.backend, device), resolve(settings.backend, device)):
        return "the torch backend passes learning rates as numbers, which a graph would keep"
    return f"{name} has step hooks, which a graph would not call" if has_hooks(optimizer) else None


def made(
    settings: Settings, device: torch.device, latents: torch.Generator, players: Sequence[Player], ranks: Ranks
) -> "Graphs | None":
    """Return the graphs of a trainer's steps; None where they are not wanted, or cannot be and need not."""
    if settings.cuda_graph is False:
        return None
    problems = [settings.graph_problem(device), *(_problem_of(player, settings, device) for player in players)]
    problem = next(filter(None, problems), None)
    if ranks.world > 1 and (carrier := ranks.backend(device)) != "nccl":
        problem = problem or f"{carrier} cannot be captured"
    if problem is None:
        return Graphs(device, [latents], players, settings)
    if settings.cuda_graph is True:
        raise RuntimeError(f"cuda_graph: True was asked for, but {problem}")
    if device.type == "cuda":
        warnings.warn(f"cuda_graph: steps run without CUDA graphs, as {problem}", stacklevel=4)
    return None


class Graphs:
    """The graphs of a trainer's steps on ``players``, which may draw from ``generators`` beside PyTorch's default one.

    Where the settings require graphs, a step that cannot be captured raises. Else it warns, once, and goes on without;
    and networks that may run Python of somebody else's are not captured.
    """

    def __init__(
        self, device: torch.device, generators: Sequence[torch.Generator], players: Sequence[Player], settings: Settings
    ) -> None:
        self._device, self._generators, self._players, self._settings = device, generators, players, settings
        self._required = settings.cuda_graph is True
        self._capture = Capture(device, generators)
        self._versions: list[int] = []  # of the players, which the graphs are of
        self._graphs: dict[Hashable, _Graph] = {}
        self._problem: str | None = None  # with steps as they are
        self._refused = self._foreign = self._unfit = False
        self._changes = 0

    def __reduce__(self) -> tuple[Any, ...]:
        return Graphs, (self._device, self._generators, self._players, self._settings)  # a copy makes its own graphs

    def _follow_changes(self) -> None:
        """Make all graphs anew when something that they depend on has changed."""
        for player in self._players:
            player.look()
        if self._versions == (versions := [player.version for player in self._players]):
            return
        self.forget()
        self._versions = versions
        self._unfit = any(_problem_of(player, self._settings, self._device) for player in self._players)
        parts = ((player.name, structure.foreign(player.module)) for player in self._players)
        found = "" if self._required else ", ".join(f"{name} has {part}" for name, part in parts if part)
        if found and not self._foreign:
            warnings.warn(
                f"cuda_graph: steps run without CUDA graphs, as the {found}, whose forward pass may read what a "
                "graph would keep; cuda_graph=True says that it does not",
                stacklevel=7,
            )
        self._foreign = bool(found)
        self._changes += 1
        if self._changes == RESTLESS:
            warnings.warn(
                f"cuda_graph: no graph could serve, as networks or optimizers changed before each of {RESTLESS} "
                "steps, as where a forward pass rebinds a buffer or counts on a number: write to buffers in place",
                stacklevel=7,
            )

    def forget(self) -> None:
        """Make all graphs anew."""
        self._graphs.clear()
        self._capture.pool = None  # the memory of graphs which are gone cannot be captured into

    def run(self, work: Work, *args: Any) -> Results:
        """Return ``work(*args)``, replayed where its like has been captured.

        ``work`` is a function of one hashable constant, of tensors and what else users give, of the networks and of the
        optimizers. With an optimizer that no graph can have, such as one with a step hook, it runs as it is. Raises
        RuntimeError where it cannot be captured and graphs are required. It has not been run then.
        """
        key = None
        if not self._refused:
            self._follow_changes()
            if self._unfit:
                return self.run_uncaptured(work, *args)
            try:
                kind = self._device.type
                autocast = torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)
                fixed, *given = args
                key = (work.__name__, autocast, fixed, *[_signature(x, self._device) for x in given])
            except TypeError as error:
                self._problem = f"there is {error}"
            if self._problem is not None:
                self._refuse(self._problem)
        graph = None if self._refused or self._foreign else self._graph(key, args)
        if graph is None:
            return self.run_uncaptured(work, *args)
        for static, x in zip(graph.args, args, strict=True):
            if isinstance(x, Tensor):
                static.copy_(x.detach(), non_blocking=True)
        if graph.replay is None and graph.runs < WARM_UP:
            graph.runs += 1
            outputs, problem = self._capture.warm_up(lambda: work(*graph.args))
            if graph.runs == WARM_UP:  # the first runs may look and wait, later ones not
                self._problem = problem
            return Results(outputs)
        if graph.replay is None:
            try:
                graph.replay = self._capture.capture(lambda: graph.pack(work(*graph.args)))
            except Exception as error:
                told = [str(e) for e in (error, error.__context__) if e is not None]  # the latter came first
                self._refuse(f"its capture failed: {', after '.join(told)}", error)
                return self.run_uncaptured(work, *args)
            finally:
                kernels.table.fill_pending()
        for player in self._players:
            player.refresh()
        graph.replay()
        self._changes = 0  # since the last replay
        return Results(packed=graph.packed.clone(), like=graph.like)

    @property
    def serving(self) -> bool:
        """Return whether steps are captured, as far as the last one showed."""
        return not (self._refused or self._foreign or self._unfit)

    def run_uncaptured(self, work: Work, *args: Any) -> Results:
        """Return ``work(*args)``, run as it is on the stream of the captures."""
        with self._capture.on_stream():
            return Results(work(*args))

    def _graph(self, key: Hashable, args: tuple[Any, ...]) -> _Graph | None:
        """Return the graph for inputs like these, a new one if need be; None where there are too many."""
        if key not in self._graphs:
            candidates = [k for k, graph in self._graphs.items() if graph.replay is None]
            if len(self._graphs) - len(candidates) >= GRAPHS:
                return None
            if len(candidates) >= GRAPHS:
                del self._graphs[candidates[0]]  # the oldest: a constant that is another in each step leaves many
            self._graphs[key] = _Graph(args)
        return self._graphs[key]

    def _refuse(self, reason: str, cause: Exception | None = None) -> None:
        message = f"cuda_graph: a step cannot be captured, because {reason}"
        self.forget()  # other graphs have random states which a capture that failed has made anew
        if self._required:
            raise RuntimeError(message) from cause
        self._refused = True
        warnings.warn(f"{message}; training goes on without CUDA graphs", stacklevel=7)
