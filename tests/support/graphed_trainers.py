"""Trainers whose steps are graphs: on a GPU for real, on a CPU by a recording that does what a CUDA graph does."""

from contextlib import contextmanager

import pytest
import torch
from fake_cuda_graph import Recording
from small_trainers import PAIRS, quietly, weights

from fastwgan import Trainer
from fastwgan.engine import graphs
from fastwgan.engine.settings import Settings


class Recorded:
    """Stands in for graphs.Capture."""

    made = 0
    stream = 0  # the number of the current one, as a GPU has it

    def __init__(self, device, generators):
        self.generators = generators

    @contextmanager
    def on_stream(self):
        Recorded.stream = id(self)
        try:
            yield
        finally:
            Recorded.stream = 0

    def warm_up(self, work):
        with self.on_stream():
            return work(), None

    def capture(self, work):
        graph = Recording(self.generators)
        with self.on_stream():
            graph.capture(work)
        Recorded.made += 1
        return graph.replay


@pytest.fixture
def graphed(device, monkeypatch):
    """Where graphs are made: a GPU, or a CPU that is made to pass for one."""
    Recorded.made = 0
    if device.type == "cpu":
        monkeypatch.setattr(graphs, "Capture", Recorded)
        monkeypatch.setattr(Settings, "graph_problem", lambda settings, device: None)
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
