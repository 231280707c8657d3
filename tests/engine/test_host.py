"""How much of the host a step takes: calls of the package's own functions, all calls of a replay, and its copies."""

import cProfile
import os
import pstats
import sys

import pytest
import torch
from graphed_trainers import Recorded, batches, made
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import fastwgan
from fastwgan import GradientPenalty, Trainer, WeightClip, models
from fastwgan.backend import kernels

PLACES = tuple(os.path.realpath(os.path.dirname(package.__file__)) + os.sep for package in (fastwgan, kernels))
COMPREHENSIONS = {"<listcomp>", "<genexpr>", "<setcomp>", "<dictcomp>"}  # which newer Pythons do not call
BOTH = {"clip": WeightClip(), "penalty": GradientPenalty()}


def own_calls(work):
    """Return the names of the package's functions that ``work`` calls, each as often as it is called."""
    names = []

    def seen(frame, event, arg):
        code = frame.f_code
        own = event == "call" and os.path.realpath(code.co_filename).startswith(PLACES)
        if own and code.co_name not in COMPREHENSIONS:
            names.append(f"{os.path.basename(code.co_filename)} {code.co_name}")

    sys.setprofile(seen)
    try:
        work()
    finally:
        sys.setprofile(None)
    return names


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("constraint", BOTH.values(), ids=BOTH)
def test_an_eager_critic_step_calls_few_functions(constraint, backend, device):
    generator = models.mlp([10, 16, 16, 20], slope=0.2, norm=True, tanh=True).to(device)
    critic = models.mlp([20, 16, 16, 1], slope=0.2).to(device)
    trainer = Trainer(generator, critic, latent=10, constraint=constraint, backend=backend, cuda_graph=False)
    (real,) = batches(device, (20,), 1)
    for _ in range(4):
        trainer.critic_step(real)
    # The least of some, as gradients may come to lie where they have not been before, which makes a table.
    names = min((own_calls(lambda: trainer.critic_step(real)) for _ in range(8)), key=len)
    assert len(names) <= (80 if backend == "torch" else 102), "\n".join(names)


class Operations(TorchDispatchMode):
    """Counts what would be launched on a device: all operations but views, and those on the host's memory."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.overloadpacket.__name__ not in ("detach", "empty_like", "lift_fresh"):
            self.names.append(str(func))
        return result


def of_a_replay(trainer, work):
    """Return (all calls of ``work`` as cProfile counts them, its operations, the replay among them).

    The step has been captured. The recording itself is not replayed, whose work is a device's.
    """
    for graph in trainer._steps.graphs._graphs.values():
        if graph.replay is not None:
            graph.replay = lambda: operations.names.append("replay")
    with Operations() as operations:
        work()
    found, profiler = [*operations.names], cProfile.Profile()
    profiler.enable()
    work()
    profiler.disable()
    return pstats.Stats(profiler).total_calls, found


COPIES = ["aten.copy_.default", "replay", "aten.clone.default"]


@pytest.mark.parametrize("constraint", BOTH.values(), ids=BOTH)
def test_python_calls_and_operations_of_a_replayed_critic_step(constraint, graphed):
    trainer, shape = made(graphed, True, constraint=constraint, n_critic=1000)
    *data, real = batches(graphed, shape, 8)
    for each in data:
        trainer.critic_step(each)
    assert Recorded.made == 1
    calls, operations = of_a_replay(trainer, lambda: trainer.critic_step(real))
    assert operations == COPIES
    assert calls <= 120


@pytest.mark.parametrize("constraint", BOTH.values(), ids=BOTH)
def test_python_calls_and_operations_of_a_replayed_generator_step(constraint, graphed):
    trainer, _ = made(graphed, True, constraint=constraint)
    for _ in range(8):
        trainer.generator_step(8)
    calls, operations = of_a_replay(trainer, lambda: trainer.generator_step(8))
    assert operations == COPIES[1:]
    assert calls <= 120


@pytest.mark.parametrize("constraint", BOTH.values(), ids=BOTH)
def test_python_calls_and_operations_of_an_iteration_grow_with_its_batches_alone(constraint, graphed):
    found = []
    for n in (1, 2, 3):
        trainer, shape = made(graphed, True, constraint=constraint, n_critic=n)
        data = batches(graphed, shape, n)
        for _ in range(5):
            trainer.iteration(data)
        found.append(of_a_replay(trainer, lambda trainer=trainer, data=data: trainer.iteration(data)))
        assert found[-1][1] == [*COPIES[:1] * n, *COPIES[1:]]
    (one, _), (two, _), (three, _) = found
    assert one <= 160
    assert three - two == two - one <= 30


def test_a_replay_with_a_schedule_sends_its_numbers_and_no_more(graphed):
    trainer, shape = made(graphed, True, n_critic=1000)
    *data, real = batches(graphed, shape, 8)
    for each in data:
        trainer.critic_step(each)

    def step():
        trainer.critic_optimizer.param_groups[0]["lr"] *= 0.5
        trainer.critic_step(real)

    _, operations = of_a_replay(trainer, step)
    assert operations == [COPIES[0], *COPIES]


class Stashes(nn.Module):
    """Keeps a number of its last forward pass, which lies on the device."""

    last = None

    def forward(self, x):
        self.last = x.mean()
        return x


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_tensors_among_attributes_are_not_read_to_find_changes(cuda_graph, graphed, monkeypatch):
    critic = nn.Sequential(nn.Linear(10, 4), Stashes(), nn.Linear(4, 1)).to(graphed)
    trainer = Trainer(
        nn.Linear(6, 10).to(graphed), critic, latent=6, backend="triton", cuda_graph=cuda_graph, n_critic=1000
    )
    read = []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda x: read.append(x) or True)
    for real in batches(graphed, (10,), 4):
        trainer.critic_step(real)
    assert read == []
