"""Steps as graphs: on a CPU by a recording that does what a CUDA graph does, on a GPU for real."""

import copy
import warnings

import pytest
import torch
from test_trainer import CONSTRAINTS, PAIRS, assert_same_state, quietly, weights
from torch import nn

from fastwgan import GradientPenalty, RMSprop, Trainer, WeightClip, graphs, models
from fastwgan import trainer as trainer_module

CUDA = torch.device("cuda", 0)


class Recorded:
    """Stands in for graphs.Capture."""

    made = 0

    def __init__(self, device, generators):
        self.generators = generators

    def warm_up(self, work):
        return work(), None

    def capture(self, work):
        from recording import Recording

        graph = Recording(self.generators)
        outputs = graph.capture(work)
        Recorded.made += 1
        return outputs, graph.replay


@pytest.fixture
def graphed(device, monkeypatch):
    """Where graphs are made: a GPU, or a CPU that is made to pass for one."""
    Recorded.made = 0
    if device.type == "cpu":
        monkeypatch.setattr(graphs, "Capture", Recorded)
        monkeypatch.setattr(trainer_module, "device_problem", lambda device: None)
    else:
        capture = graphs.Capture.capture

        def counted(self, work):
            result = capture(self, work)
            Recorded.made += 1
            return result

        monkeypatch.setattr(graphs.Capture, "capture", counted)
    return device


def made(device, cuda_graph, pair="mlp", dtype=torch.float32, **options):
    torch.manual_seed(0)
    generator, critic, shape, latent = PAIRS[pair](dtype)
    trainer = quietly(
        Trainer, generator.to(device), critic.to(device), backend="triton", cuda_graph=cuda_graph,
        **{"latent": latent, "n_critic": 2, **options},
    )  # fmt: skip
    return trainer, shape


def batches(device, shape, n, size=8):
    random = torch.Generator().manual_seed(3)
    return [torch.randn(size, *shape, generator=random).to(device) for _ in range(n)]


def assert_close_weights(actual, expected, tolerance):
    for a, e in ((actual.critic, expected.critic), (actual.generator, expected.generator)):
        assert (weights(a) - weights(e)).norm() <= tolerance * weights(e).norm()
        for x, y in zip(a.buffers(), e.buffers(), strict=True):
            torch.testing.assert_close(x, y)


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("constraint", [*CONSTRAINTS.values(), GradientPenalty(every=2), GradientPenalty(at="real")])
def test_graphed_steps_are_the_eager_ones(constraint, pair, graphed):
    """New data, latents and eps in each replay, the lazy penalty's two graphs, buffers, counters and metrics."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, pair, constraint=constraint)
        trainer._one_generation = False  # a graph has the generator inside, and draws for each step
        metrics = [trainer.step(real) for real in batches(graphed, shape, 20)]
        runs.append((trainer, [m.as_dict() for m in metrics], metrics))
    (eager, expected, _), (trainer, actual, metrics) = runs
    assert Recorded.made == (3 if constraint == GradientPenalty(every=2) else 2)
    assert_close_weights(trainer, eager, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a.keys() == e.keys()
        for name in a:
            assert a[name] == pytest.approx(e[name], rel=1e-4, abs=1e-5), name
    assert [m.as_dict() for m in metrics] == actual, "metrics are those of their own step"
    assert trainer.state_dict()["eps_offset"] == eager.state_dict()["eps_offset"]
    assert torch.equal(trainer._latent_random.get_state(), eager._latent_random.get_state())


@pytest.mark.slow
@pytest.mark.parametrize("constraint", CONSTRAINTS.values())
def test_fifty_graphed_iterations(constraint, graphed):
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, constraint=constraint, n_critic=5)
        for real in batches(graphed, shape, 250):
            trainer.step(real)
        runs.append(trainer)
    assert_close_weights(*runs, 1e-5)
