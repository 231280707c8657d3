"""Steps as graphs: on a CPU by a recording that does what a CUDA graph does, on a GPU for real."""

import copy
import functools
import gc
import pickle
import warnings
from contextlib import contextmanager, nullcontext
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from count_launches import Live
from graphed_trainers import Recorded, assert_close_weights, batches, made
from small_trainers import CONSTRAINTS, PAIRS, assert_same_state, quietly, weights
from torch import nn

from fastwgan import GradientPenalty, RMSprop, Trainer, WeightClip, models
from fastwgan.engine import graphs, structure
from fastwgan.metrics import Results

CUDA = torch.device("cuda", 0)


@pytest.mark.parametrize(
    ("constraint", "pair"),
    [
        (WeightClip(0.05), "mlp"),
        (WeightClip(0.05), "batchnorm"),
        (GradientPenalty(), "mlp"),
        (GradientPenalty(), "conv"),
        (GradientPenalty(every=2), "mlp"),
        (GradientPenalty(at="real"), "mlp"),
    ],
)
def test_graphed_steps_are_the_eager_ones(constraint, pair, graphed):
    """New data, latents and eps in each replay, the lazy penalty's two graphs, buffers, counters and metrics."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, pair, constraint=constraint, n_critic=1)
        metrics = [trainer.step(real) for real in batches(graphed, shape, 12)]
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
    assert torch.equal(trainer._steps.latents.stream.get_state(), eager._steps.latents.stream.get_state())


DRIFT = {"critic_term": lambda s: 0.1 * s.real_scores.square().mean()}
RELATIVISTIC = {  # whose generator's term takes a pass of real samples
    "critic_term": lambda s: F.softplus(s.fake_scores - s.real_scores).mean(),
    "generator_term": lambda s: F.softplus(s.real_scores - s.fake_scores).mean(),
}


@pytest.mark.parametrize(
    "options",
    [
        {"constraint": GradientPenalty(), **RELATIVISTIC},
        {"constraint": WeightClip(0.05), **RELATIVISTIC},
        {"constraint": WeightClip(0.05), **DRIFT},
        {"constraint": GradientPenalty(at="perturbed")},
    ],
    ids=["relativistic", "relativistic clip", "drift", "perturbed"],
)
def test_other_objectives_in_graphs(options, graphed):
    """The same losses, of each step's own samples, and new noise in each replay, in steps and in whole iterations."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, **options)
        data = batches(graphed, shape, 24)
        metrics = [trainer.step(real) for real in data[:12]]
        for i in range(12, 24, 2):
            metrics += trainer.iteration(data[i : i + 2])
        runs.append((trainer, [m.as_dict() for m in metrics]))
    (eager, expected), (trainer, actual) = runs
    assert Recorded.made == 3
    assert_close_weights(trainer, eager, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a.keys() == e.keys()
        for name in e:
            assert a[name] == pytest.approx(e[name], rel=1e-4, abs=1e-5), name
    assert trainer.state_dict()["eps_offset"] == eager.state_dict()["eps_offset"]


@pytest.mark.parametrize(
    ("terms", "left", "graphs_made"),
    [
        ({"critic_term": DRIFT["critic_term"]}, ["critic"], 1),
        ({"generator_term": RELATIVISTIC["generator_term"]}, ["generator"], 1),
        (RELATIVISTIC, ["critic", "generator"], 0),
    ],
    ids=["critic", "generator", "both"],
)
def test_a_term_is_captured_only_if_the_user_says_so(terms, left, graphs_made, graphed):
    """It may read what a graph would keep, as these do; told once. Steps of the other network are captured still."""
    runs, factors = [], {"critic": 1.0, "generator": 1.0}

    def of(name):
        return lambda s: factors[name.removesuffix("_term")] * terms[name](s)

    for cuda_graph in (False, "auto"):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.manual_seed(0)
            generator, critic, shape, latent = PAIRS["mlp"](torch.float32)
            trainer = Trainer(
                generator.to(graphed), critic.to(graphed), latent=latent, backend="triton", cuda_graph=cuda_graph,
                n_critic=2, constraint=WeightClip(0.05), **{name: of(name) for name in terms},
            )  # fmt: skip
            data = batches(graphed, shape, 28)
            for i in range(0, 20):
                factors.update(critic=1.0 + i, generator=1.0 - i)
                metrics = trainer.step(data[i])
            assert trainer.batches_at_once() == 1
            for i in range(20, 28, 2):  # as an iteration could be one graph
                factors.update(critic=1.0 + i, generator=1.0 - i)
                metrics = trainer.iteration(data[i : i + 2])[-1]
        told = [(w.filename, str(w.message)) for w in caught if "cuda_graph" in str(w.message)]
        assert told == [
            (
                __file__,
                f"cuda_graph: {name} steps run without CUDA graphs, as {name}_term may read what a graph would keep; "
                "cuda_graph=True says that it does not",
            )
            for name in left if cuda_graph
        ]  # fmt: skip
        runs.append((trainer, metrics.as_dict()))
    (eager, expected), (trainer, actual) = runs
    assert Recorded.made == graphs_made
    assert_close_weights(trainer, eager, 1e-6)
    assert actual == pytest.approx(expected, rel=1e-4, abs=1e-5)


class Labelled(nn.Module):
    """A network of its input and a row of numbers beside it."""

    def __init__(self, *widths):
        super().__init__()
        self.layers = models.mlp(widths, slope=0.2)

    def forward(self, x, label):
        return self.layers(torch.cat((x, label), 1))


@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
def test_conditions_of_fake_samples_in_graphs(constraint, graphed):
    """Others in each replay; and where they are the real ones' again, another graph."""
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        networks = Labelled(6 + 3, 16, 10).to(graphed), Labelled(10 + 3, 16, 1).to(graphed)
        trainer = Trainer(
            *networks, latent=6, constraint=constraint, backend="triton", cuda_graph=cuda_graph, n_critic=1
        )
        data, labels = batches(graphed, (10,), 14), batches(graphed, (3,), 28)
        metrics = []
        for i, real in enumerate(data):
            fake_cond = (labels[14 + i],) if i < 7 else None
            metrics.append(trainer.step(real, labels[i], fake_cond=fake_cond).as_dict())
        runs.append((trainer, metrics))
    (eager, expected), (trainer, actual) = runs
    assert Recorded.made == 3, "the generator's has one set of conditions in any case"
    assert_close_weights(trainer, eager, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a == pytest.approx(e, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_metrics_of_a_replay_have_the_dtypes_of_an_eager_step(dtype, graphed):
    trainer, shape = made(graphed, True, dtype=dtype, n_critic=1)
    dtypes = []
    for real in batches(graphed, shape, 8):
        metrics = trainer.step(real.to(dtype))
        dtypes.append([getattr(metrics, name).dtype for name in metrics.as_dict()])
    assert Recorded.made == 2
    assert dtypes[-1] == dtypes[0]


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


class Mixes(nn.Module):
    def forward(self, x):
        return x - x.mean(0)


GENERATORS = {
    "apart": lambda: models.mlp([6, 16, 10]),
    "batchnorm": lambda: models.mlp([6, 16, 16, 10], norm=True),
    "mixes": lambda: nn.Sequential(nn.Linear(6, 10), Mixes()),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10)),
}


@pytest.mark.parametrize("kind", GENERATORS)
@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
def test_an_iteration_is_one_graph(constraint, kind, graphed, monkeypatch):
    """Compare it with the same work as it is, and step by step, where each critic step has a pass of the generator."""
    runs = []
    for cuda_graph, replays in ((False, False), (True, False), (True, True)):
        torch.manual_seed(0)
        generator, critic = GENERATORS[kind]().to(graphed), models.mlp([10, 16, 1]).to(graphed)
        trainer = Trainer(
            generator, critic, latent=6, n_critic=2, constraint=constraint, backend="triton", cuda_graph=cuda_graph
        )
        samples, passes = trainer._steps.passes.samples, []

        def counted(z, samples=samples, passes=passes):
            passes.append(len(z))
            return samples(z)

        if cuda_graph and not replays:
            trainer._steps.graphs.run = lambda work, *args: Results(work(*args))
        metrics, captured = [], Recorded.made
        data = batches(graphed, (10,), 16)
        for i in range(0, 16, 2):
            if i == 14:  # no hook, for which a graph is made anew
                trainer._steps.passes.samples = counted
            metrics += trainer.iteration(data[i : i + 2])
        assert Recorded.made - captured == replays
        assert passes == ([] if replays else [8, 8, 8])
        assert (trainer.critic_iterations, trainer.generator_iterations) == (16, 8)
        runs.append((trainer, [m.as_dict() for m in metrics]))
    (stepwise, _), (eager, expected), (trainer, actual) = runs
    assert_close_weights(trainer, eager, 1e-6)
    assert_close_weights(trainer, stepwise, 1e-6)
    for a, e in zip(actual, expected, strict=True):
        assert a == pytest.approx(e, rel=1e-4, abs=1e-5)
    with pytest.raises(ValueError, match=r"^batches: expected 2, .* got 3"):
        trainer.iteration(data[:3])


def test_an_iteration_of_a_conditional_gan_is_one_graph(graphed):
    trainer = Trainer(
        Conditional(6, 10).to(graphed), Conditional(10, 1).to(graphed), n_critic=2, latent=6, backend="triton",
        constraint=GradientPenalty(), cuda_graph=True,
    )  # fmt: skip
    labels = torch.arange(8, device=graphed)
    data = [(real, labels, 2.0) for real in batches(graphed, (10,), 12)]
    for i in range(0, 12, 2):
        metrics = trainer.iteration(data[i : i + 2])
    assert Recorded.made == 1
    assert metrics[-1].generator_loss.isfinite()


def test_groups_whose_parameters_have_no_gradient_keep_their_numbers(graphed):
    """A critic in stages, each with its graph: a group's learning rate is its own in both."""

    class Staged(nn.Module):
        def __init__(self):
            super().__init__()
            self.stages = nn.ModuleList([nn.Linear(10, 1), nn.Linear(10, 1)])

        def forward(self, x, stage):
            return self.stages[stage](x)

    class Generator(nn.Linear):
        def forward(self, z, stage):
            return super().forward(z)

    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        generator, critic = Generator(6, 10).to(graphed), Staged().to(graphed)
        groups = [{"params": critic.stages[i].parameters(), "lr": lr} for i, lr in enumerate((1e-2, 1e-4))]
        trainer = Trainer(
            generator, critic, latent=6, critic_optimizer=RMSprop(groups), constraint=WeightClip(1.0), n_critic=100,
            backend="triton", cuda_graph=cuda_graph,
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, (10,), 16)):
            trainer.step(real, i % 2)
        runs.append(trainer)
    assert Recorded.made == 2
    assert_close_weights(*runs, 1e-6)


def test_a_constant_that_changes_always_does_not_crowd_out_graphs(graphed):
    trainer = Trainer(
        Conditional(6, 10).to(graphed), Conditional(10, 1).to(graphed), n_critic=1000, latent=6, backend="triton",
        cuda_graph=True,
    )  # fmt: skip
    labels, (real,) = torch.arange(8, device=graphed), batches(graphed, (10,), 1)
    for i in range(2 * graphs.GRAPHS + 4):
        trainer.step(real, labels, 1.0 + i)
    assert Recorded.made == 0
    for _ in range(graphs.WARM_UP + 1):
        trainer.step(real, labels, 1.0)
    assert Recorded.made == 1


def test_ever_new_batch_sizes_leave_a_graph_what_it_reads(graphed):
    trainer, shape = made(graphed, True, constraint=GradientPenalty(), n_critic=1000)
    for real in batches(graphed, shape, 6):
        trainer.step(real)
    for size in range(1, 80):
        if size != 8:
            trainer._steps.passes._constant(torch.empty(size, device=graphed), (1 / size,))
    assert trainer.step(real).wasserstein.isfinite()
    assert Recorded.made == 1


def test_inputs_that_a_graph_cannot_have(graphed):
    class Scaled(nn.Linear):
        def forward(self, x, scale):
            return super().forward(x) * (scale[0] if isinstance(scale, tuple) else 1.0)

    def trainer():
        return Trainer(
            Scaled(6, 10).to(graphed), Scaled(10, 1).to(graphed), latent=6, backend="triton", cuda_graph=True
        )

    (real,) = batches(graphed, (10,), 1)
    elsewhere = torch.empty((), device="meta")  # as a CPU tensor is, beside a GPU
    for value, told in ((elsewhere, "a tensor on meta"), ((real.new_ones(()),), "a tuple"), (object(), "a object")):
        one = trainer()
        before = weights(one.critic)
        with pytest.raises(RuntimeError, match=f"^cuda_graph: a step cannot be captured, because there is {told}"):
            one.critic_step(real, value)
        assert torch.equal(weights(one.critic), before)
        assert one.critic_iterations == 0


def test_numbers_of_the_optimizers_take_effect_in_replays(graphed):
    """A scheduler's learning rate, and every other number of a group, without another capture."""
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        generator, critic, shape, latent = PAIRS["mlp"](torch.float32)
        optimizer = torch.optim.RMSprop(critic.to(graphed).parameters(), lr=1e-2)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        trainer = Trainer(
            generator.to(graphed), critic, latent=latent, critic_optimizer=optimizer, n_critic=1, backend="triton",
            constraint=WeightClip(0.5), cuda_graph=cuda_graph,
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, shape, 12)):
            trainer.step(real)
            scheduler.step()
            if i == 8:
                optimizer.param_groups[0].update(alpha=0.5, eps=1e-3, weight_decay=0.1)
                trainer.generator_optimizer.param_groups[0]["lr"] = 1e-2
        runs.append(trainer)
    assert Recorded.made == 2
    assert_close_weights(*runs, 1e-6)
    runs[1].critic_optimizer.param_groups[0]["lr"] = -1.0
    before = weights(runs[1].critic)
    with pytest.raises(ValueError, match="^lr:"):
        runs[1].step(real)
    assert torch.equal(weights(runs[1].critic), before)


def test_a_batch_of_another_shape_has_a_graph_of_its_own(graphed, monkeypatch):
    monkeypatch.setattr(graphs, "GRAPHS", 4)
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, n_critic=1)
        whole, ragged, other = (batches(graphed, shape, 6, size) for size in (8, 5, 3))
        for real in (*whole[:3], ragged[0], *whole[3:], *ragged[1:], *whole, *other):
            trainer.step(real)
        runs.append(trainer)
    assert Recorded.made == 4  # and no more, of the third shape
    assert_close_weights(*runs, 1e-6)


class Conditional(nn.Module):
    def __init__(self, inputs, outputs):
        super().__init__()
        self.embed, self.net = nn.Embedding(10, 4), models.mlp([inputs + 4, 16, outputs])

    def forward(self, x, labels, scale):
        return scale * self.net(torch.cat((x, self.embed(labels)), 1))


def test_conditions_and_callers_latents_are_inputs(graphed):
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        random = torch.Generator(graphed).manual_seed(1)
        trainer = Trainer(
            Conditional(6, 10).to(graphed), Conditional(10, 1).to(graphed), n_critic=1, backend="triton",
            latent=lambda n, device, random=random: torch.randn(n, 6, generator=random, device=device),
            constraint=GradientPenalty(), cuda_graph=cuda_graph,
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, (10,), 10)):
            trainer.step(real, (torch.arange(8, device=graphed) + i) % 10, 2.0 if i != 8 else 3.0)
        runs.append(trainer)
    assert Recorded.made == 2  # and an eager step where the scale was another
    assert_close_weights(*runs, 1e-6)


def test_what_a_graph_depends_on_is_looked_at(graphed):
    """Modes, frozen layers, memory, and a loaded state: each makes the graphs anew, and the steps stay right."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, n_critic=2)
        captures = []
        data = iter(batches(graphed, shape, 100))

        def steps(trainer=trainer, data=data, captures=captures):
            for _ in range(10):
                trainer.step(next(data))
            captures.append(Recorded.made)

        steps(), steps()
        state = trainer.state_dict()
        steps()
        trainer.generator.eval()
        steps()
        trainer.generator.train()
        steps()
        next(trainer.critic.parameters()).requires_grad_(False)
        steps()
        for p in trainer.critic.parameters():
            p.data = p.data.clone()
        steps()
        next(trainer.critic.parameters()).requires_grad_(True)
        trainer.load_state_dict(state)
        steps()
        trainer.critic_optimizer.load_state_dict(trainer.critic_optimizer.state_dict())
        steps()
        runs.append(trainer)
        if cuda_graph:
            assert [b - a for a, b in pairwise(captures[1:])] == [0, 2, 2, 2, 2, 2, 2]
    assert_close_weights(*runs, 1e-6)


def test_a_step_that_cannot_be_captured_says_why_once_and_goes_on(graphed, monkeypatch):
    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if float(x.detach().sum()) > 0 else 2.0)

    def trainer(cuda_graph):
        torch.manual_seed(0)
        networks = models.mlp([6, 16, 10]).to(graphed), nn.Sequential(nn.Linear(10, 4), Reads(4, 1)).to(graphed)
        return Trainer(*networks, latent=6, backend="triton", cuda_graph=cuda_graph, n_critic=1)

    monkeypatch.setattr(structure, "foreign", lambda module: None)  # which says that nobody knows what Reads does
    eager, auto, required = trainer(False), trainer("auto"), trainer(True)
    data = batches(graphed, (10,), 9)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for real in data:
            eager.step(real)
            auto.step(real)
    assert [w.filename for w in caught if "cannot be captured" in str(w.message)] == [__file__]
    assert_close_weights(auto, eager, 1e-6)
    for real in data[:4]:
        required.critic_step(real)
    with pytest.raises(RuntimeError, match=r"cannot be captured.*(waits for the device|read the device)"):
        any(required.critic_step(real) is None for real in data[4:])
    assert required.critic_iterations == 4
    eager = trainer(False)
    for real in data[:4]:
        eager.critic_step(real)
    assert_close_weights(required, eager, 1e-6)


def test_what_waits_in_a_warm_up_is_known_before_a_capture(graphed, monkeypatch):
    """The step that is found to wait is taken and counted; the next one says why it cannot be captured."""
    trainer, shape = made(graphed, True, n_critic=100)
    kind, warm_up = type(trainer._steps.graphs._capture), type(trainer._steps.graphs._capture).warm_up
    monkeypatch.setattr(kind, "warm_up", lambda self, work: (warm_up(self, work)[0], "it waits"))
    *data, last = batches(graphed, shape, graphs.WARM_UP + 2)  # the first makes the optimizer's state
    for real in data:
        trainer.step(real)
    with pytest.raises(RuntimeError, match="because it waits$"):
        trainer.step(last)
    assert trainer.critic_iterations == len(data)


def test_a_replaced_optimizer_is_used(graphed):
    trainer, shape = made(graphed, True, n_critic=100)
    for real in batches(graphed, shape, 8):
        trainer.step(real)
    trainer.critic_optimizer = RMSprop(trainer.critic.parameters(), lr=0.0, clip=10.0)
    before = weights(trainer.critic)
    trainer.step(real)
    assert torch.equal(weights(trainer.critic), before)


def test_who_cannot_have_graphs_hears_of_it():
    networks = nn.Linear(4, 2), nn.Linear(2, 1)
    with pytest.raises(RuntimeError, match="^cuda_graph: True was asked for, but the networks are on cpu"):
        Trainer(*networks, latent=4, cuda_graph=True)
    Trainer(*networks, latent=4)  # without a word


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (lambda D: {"critic_optimizer": torch.optim.SGD(D.parameters(), lr=0.1)}, "critic_optimizer is SGD"),
        (lambda D: {"backend": "torch"}, "the torch backend passes learning rates as numbers"),
        (lambda D: {"critic_optimizer": RMSprop(D.parameters(), backend="torch")}, "the torch backend passes"),
        (lambda D: {"critic_optimizer": hooked(RMSprop(D.parameters()))}, "critic_optimizer has step hooks"),
    ],
)
def test_reasons_known_beforehand(options, reason, graphed):
    generator, critic = nn.Linear(4, 2).to(graphed), nn.Linear(2, 1).to(graphed)
    with pytest.raises(RuntimeError, match=f"^cuda_graph: True was asked for, but {reason}"):
        Trainer(generator, critic, latent=4, cuda_graph=True, **options(critic))


def hooked(optimizer):
    optimizer.register_step_post_hook(lambda *_: None)
    return optimizer


@pytest.mark.emulated
def test_a_replay_allocates_its_copied_outputs_alone(graphed):
    trainer, shape = made(graphed, True, constraint=GradientPenalty(), n_critic=1000)
    *data, last = batches(graphed, shape, 8)
    for real in data:
        trainer.critic_step(real)
    before = trainer._steps.latents.stream.get_state()
    with Live() as live:
        metrics = trainer.critic_step(last)
    assert live.peak == 9 * 4  # four score statistics, four of the penalty, one of the gradients
    assert metrics.penalty.isfinite()
    assert not torch.equal(trainer._steps.latents.stream.get_state(), before)


def test_a_hook_added_later_is_called(graphed):
    trainer, shape = made(graphed, True, n_critic=1)
    for real in batches(graphed, shape, 8):
        trainer.step(real)
    calls = []
    trainer.critic_optimizer.register_step_pre_hook(lambda *_: calls.append(1))
    for real in batches(graphed, shape, 2):
        trainer.step(real)
    assert len(calls) == 2


def test_resuming_with_graphs(graphed, tmp_path):
    whole, shape = made(graphed, True, n_critic=1)
    data = batches(graphed, shape, 12)
    for real in data[:8]:
        whole.step(real)
    whole.save(tmp_path / "state.pt")
    resumed, _ = made(graphed, True, n_critic=1)
    resumed.load(tmp_path / "state.pt")
    for real in data[8:]:
        whole.step(real)
        resumed.step(real)
    assert_same_state(resumed.state_dict(), whole.state_dict())


@pytest.mark.emulated
def test_a_replay_launches_no_kernel_that_has_not_run_before_the_capture(graphed, monkeypatch):
    """Triton compiles another for addresses that are no multiples of 16, and a capture can load none."""
    import poisoned_interpreter

    run, programs = poisoned_interpreter.Executor.__call__, set()

    def seen(launch, *args, **kwargs):
        kinds = [(x.dtype, x.data_ptr() % 16 == 0) if isinstance(x, torch.Tensor) else x for x in args]
        programs.add((launch.fn.__name__, *kinds, str(kwargs)))
        run(launch, *args, **kwargs)

    monkeypatch.setattr(poisoned_interpreter.Executor, "__call__", seen)
    generator = nn.Linear(6, 10, bias=False).to(graphed)  # odd numbers of tensors, whose rows are no multiple of 16
    critic = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1, bias=False)).to(graphed)
    trainer = Trainer(generator, critic, latent=6, n_critic=3, backend="triton", cuda_graph=True)
    while not Recorded.made:
        before = set(programs)
        trainer.iteration(batches(graphed, (10,), 3))
    assert programs == before


class Allocator:
    """PyTorch's, with a graph and a generator, as a capture that fails to end leaves them where it has no care."""

    def __init__(self, monkeypatch, broken):
        self.underway, self.references, self.state, self.broken = set(), 1, "capturing", broken
        for owner, name, value in (
            (torch.cuda, "CUDAGraph", lambda: self),
            (torch.cuda, "default_generators", [self]),
            (torch.cuda, "device", lambda index: nullcontext()),
            (torch.cuda, "stream", lambda stream: nullcontext()),
            (torch.cuda, "graph", self.graph),
            (torch._C, "_cuda_endAllocateToPool", lambda index, pool: self.end(pool)),
            (torch._C, "_cuda_releasePool", lambda index, pool: self.release()),
        ):
            monkeypatch.setattr(owner, name, value, raising=False)

    @contextmanager
    def graph(self, graph, pool, stream, capture_error_mode):
        self.underway.add(pool)
        try:
            yield
        finally:
            if self.broken:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.end(pool)

    def end(self, pool):
        if pool not in self.underway:
            raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
        self.underway.remove(pool)

    def release(self):
        self.references -= 1

    def reset(self):
        self.references -= not self.broken

    def clone_state(self):
        return "new"

    def graphsafe_set_state(self, state):
        self.state = state


@pytest.mark.parametrize("broken", [True, False])
@pytest.mark.parametrize("enabled", [True, False])
def test_a_capture_that_fails_leaves_pytorch_as_it_was(enabled, broken, monkeypatch):
    """Whether it is broken or Python alone raises; and nothing is collected within, which might break it."""
    allocator, stream = Allocator(monkeypatch, broken), SimpleNamespace(device=CUDA)

    def fails():
        with graphs.capturing(stream, (0, 1), ()):
            assert not gc.isenabled()
            assert allocator.underway == {(0, 1)}
            raise KeyError

    if not enabled:
        gc.disable()
    try:
        with pytest.raises(RuntimeError if broken else KeyError):
            fails()
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert (allocator.underway, allocator.references, allocator.state) == (set(), 0, "new")


def current_stream(device):
    return torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else Recorded.stream


def test_all_steps_of_a_trainer_with_graphs_run_on_one_stream(graphed, monkeypatch):
    """They are first steps, warm-ups, captures, steps of too many sizes or with a hook, and those after a refusal."""
    streams = []

    class Watched(nn.Linear):
        def forward(self, x):
            if torch.is_grad_enabled():
                streams.append((current_stream(graphed), len(x)))
            return super().forward(x)

    monkeypatch.setattr(structure, "foreign", lambda module: None)  # which says that nobody knows what Watched does
    networks = nn.Sequential(Watched(6, 10)).to(graphed), nn.Sequential(Watched(10, 1)).to(graphed)
    trainer, outside = Trainer(*networks, latent=6, n_critic=1, backend="triton"), current_stream(graphed)

    def steps(n, size):
        del streams[:-1]
        for real in batches(graphed, (10,), n, size):
            trainer.step(real)
        assert len({stream for stream, _ in streams}) == 1
        return len(streams)

    steps(6, 8)
    assert Recorded.made == 2
    assert steps(2, 8) == 1, "which are replayed: only that of before"
    monkeypatch.setattr(graphs, "GRAPHS", 2)
    steps(6, 9)
    assert Recorded.made == 2, "no third graph"
    hook = trainer.critic_optimizer.register_step_pre_hook(lambda *_: None)
    assert steps(1, 8) > 1
    hook.remove()
    monkeypatch.setattr(graphs, "GRAPHS", 8)
    monkeypatch.setattr(trainer._steps.graphs._capture, "capture", lambda work: 1 / 0)
    quietly(steps, 6, 10)
    assert trainer._steps.graphs._refused
    assert current_stream(graphed) == outside != streams[0][0]


@pytest.mark.emulated  # on a GPU its warm-up tells, and each step raises
def test_all_graphs_are_made_anew_after_a_capture_that_fails(graphed):
    """One that was to have graphs and raises may be used on; random generators are others by then."""

    class Reads(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1.0 if len(x) != 5 or float(x.detach().sum()) > 0 else 2.0)

    networks = models.mlp([6, 16, 10]).to(graphed), Reads(10, 1).to(graphed)
    trainer = Trainer(*networks, latent=6, n_critic=100, backend="triton", cuda_graph=True)
    for real in batches(graphed, (10,), 6):
        trainer.critic_step(real)
    assert Recorded.made == 1
    *others, last = batches(graphed, (10,), graphs.WARM_UP + 1, size=5)
    for real in others:
        trainer.critic_step(real)
    with pytest.raises(RuntimeError, match="cannot be captured"):
        trainer.critic_step(last)
    for real in batches(graphed, (10,), graphs.WARM_UP):
        trainer.critic_step(real)
    assert Recorded.made == 1
    trainer.critic_step(real)
    assert Recorded.made == 2


class Faded(nn.Linear):
    """A layer of somebody's own, whose forward pass reads a number."""

    alpha = 1.0

    def forward(self, x):
        return super().forward(x) * self.alpha


def test_networks_of_own_classes_are_captured_only_if_the_user_says_so(graphed):
    """Their forward passes may read what a graph would keep; told once, and a network of known parts is captured."""
    runs = []
    for cuda_graph in (False, "auto"):
        torch.manual_seed(0)
        networks = nn.Linear(6, 10).to(graphed), nn.Sequential(Faded(10, 1)).to(graphed)
        trainer = Trainer(*networks, latent=6, backend="triton", cuda_graph=cuda_graph, n_critic=1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for i, real in enumerate(batches(graphed, (10,), 12)):
                trainer.critic[0].alpha = 1.0 + i
                trainer.step(real)
        told = [
            w for w in caught if "steps run without CUDA graphs, as the critic has Faded, a class" in str(w.message)
        ]
        assert [w.filename for w in told] == [__file__] * bool(cuda_graph)
        runs.append(trainer)
    assert Recorded.made == 0
    assert_close_weights(*runs, 1e-6)
    trainer.critic[0] = nn.Linear(10, 1).to(graphed)
    trainer.critic_optimizer.add_param_group({"params": list(trainer.critic.parameters())})
    for real in batches(graphed, (10,), 12):
        trainer.step(real)
    assert Recorded.made > 0


def test_plain_attributes_of_modules_take_effect_in_replays(graphed):
    """Change a layer of PyTorch's, and one of the user's own that may be captured."""
    runs, graphs_made = [], []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Linear(10, 4), nn.LeakyReLU(0.2), Faded(4, 1))
        trainer = Trainer(
            nn.Linear(6, 10).to(graphed), critic.to(graphed), latent=6, backend="triton", cuda_graph=cuda_graph,
            n_critic=100, constraint=GradientPenalty(),
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, (10,), 30)):
            if i == 10:
                critic[1].negative_slope = 0.5
            if i == 20:
                critic[2].alpha = 3.0
            trainer.step(real)
            if cuda_graph and i in (9, 19, 29):
                graphs_made.append(Recorded.made)
        runs.append(trainer)
    assert graphs_made == [1, 2, 3]
    assert_close_weights(*runs, 1e-6)


def test_hooks_that_come_and_go_are_called(graphed):
    """Under "auto" steps run without a graph as long as there is one."""
    trainer, shape = made(graphed, "auto", n_critic=100)
    *data, real = batches(graphed, shape, 8)
    for real in data:
        trainer.step(real)
    assert Recorded.made == 1
    calls = []
    hook = trainer.critic[0].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="steps run without CUDA graphs, as the critic has .* with hooks"):
        trainer.step(real)
    trainer.step(real)
    assert len(calls) == 2 * 2, "real and fake samples have a pass each in a step"
    hook.remove()
    for real in data * 6:
        trainer.step(real)
    assert len(calls) == 4
    assert Recorded.made == 2


class Counting(nn.Module):
    """Counts its passes in a buffer that it rebinds, whose memory may come back after two passes."""

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls = self.calls + 1
        return x * torch.exp(-self.calls / 100)


def test_buffers_that_are_rebound_are_not_captured(graphed):
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        critic = nn.Sequential(nn.Linear(10, 4), Counting(), nn.Linear(4, 1)).to(graphed)
        trainer = Trainer(
            nn.Linear(6, 10).to(graphed), critic, latent=6, backend="triton", cuda_graph=cuda_graph, n_critic=3
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for real in batches(graphed, (10,), 36):
                trainer.step(real)
        told = [w.filename for w in caught if "no graph could serve" in str(w.message)]
        assert told == [__file__] * cuda_graph
        assert critic[1].calls == 2 * 36 + 12
        runs.append(trainer)
    assert Recorded.made == 0
    assert_close_weights(*runs, 1e-6)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_makes_its_own_graphs(how, graphed):
    trainer, shape = made(graphed, True, n_critic=2)
    data = batches(graphed, shape, 12)
    for real in data:
        trainer.step(real)
    captured = Recorded.made
    copied = how(trainer)
    for real in data:
        copied.step(real)
    assert Recorded.made == captured + 2
    for real in data:
        trainer.step(real)
    assert Recorded.made == captured + 2
    assert_close_weights(copied, trainer, 1e-6)
    assert torch.equal(copied._steps.latents.stream.get_state(), trainer._steps.latents.stream.get_state())


def test_graphs_follow_a_network_that_grows(graphed):
    """A layer with a group of its own in the caller's optimizer, clipped as the others are."""
    runs = []
    for cuda_graph in (False, True):
        torch.manual_seed(0)
        generator, critic = models.mlp([6, 16, 10]).to(graphed), models.mlp([10, 16, 1], slope=0.2).to(graphed)
        optimizer = torch.optim.RMSprop(critic.parameters(), lr=1e-2)
        trainer = Trainer(
            generator, critic, latent=6, constraint=WeightClip(0.05), critic_optimizer=optimizer, n_critic=2,
            backend="triton", cuda_graph=cuda_graph, ema=0.9,
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, (10,), 30)):
            if i == 12:
                critic.insert(2, nn.Linear(16, 16).to(graphed))
                optimizer.add_param_group({"params": list(critic[2].parameters()), "lr": 2e-2})
                generator.append(nn.Linear(10, 10).to(graphed))
            metrics = trainer.step(real)
        assert weights(critic).abs().max() <= 0.05
        assert 0 < metrics.saturation < 1
        runs.append(trainer)
    assert_close_weights(*runs, 1e-5)
    for a, b in zip(*(r.averages().values() for r in runs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def _mine(x, *_, slope=[0.2]):  # noqa: B006 - what only Python knows
    return nn.functional.leaky_relu(x, slope[0])


def _patched(critic):
    critic[1].forward = functools.wraps(nn.LeakyReLU.forward)(_mine)


def _patched_class(critic):
    nn.LeakyReLU.forward = functools.wraps(nn.LeakyReLU.forward)(lambda self, x: _mine(x, slope=[0.7]))


CHANGES = {  # of a critic of Linear, LeakyReLU, Upsample, Flatten and Linear
    "a list": lambda critic: critic[3].size.__setitem__(0, 10),
    "a number of NumPy's": lambda critic: setattr(critic[1], "negative_slope", np.float32(0.7)),
    "a hook on a parameter": lambda critic: critic[0].weight.register_hook(lambda g: g * 0.5),
    "two hooks on a parameter": lambda critic: list(
        map(critic[0].bias.register_hook, (lambda g: g * 2, lambda g: g * 0.1))
    ),
    "a hook after accumulation": lambda critic: critic[0].weight.register_post_accumulate_grad_hook(
        lambda p: setattr(p, "grad", p.grad * 0.5)
    ),
    "a patched layer": _patched,
    "a patched class": _patched_class,
}


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_noticed_in_the_same_step(name, graphed, monkeypatch):
    monkeypatch.setattr(nn.LeakyReLU, "forward", nn.LeakyReLU.forward)  # and put back
    runs, before = [], nn.LeakyReLU.forward
    for cuda_graph in (False, "auto"):
        nn.LeakyReLU.forward = before
        torch.manual_seed(0)
        critic = nn.Sequential(
            nn.Linear(10, 4), nn.LeakyReLU(np.float32(0.2)), nn.Unflatten(1, (1, 4)), nn.Upsample([4]), nn.Flatten(),
            nn.AdaptiveAvgPool1d(4), nn.Linear(4, 1),
        )  # fmt: skip
        trainer = Trainer(
            nn.Linear(6, 10).to(graphed), critic.to(graphed), latent=6, backend="triton", cuda_graph=cuda_graph,
            n_critic=100, constraint=WeightClip(0.5), critic_optimizer=RMSprop(critic.parameters(), lr=0.01),
        )  # fmt: skip
        for i, real in enumerate(batches(graphed, (10,), 14)):
            if i == 8:
                captured = Recorded.made
                quietly(CHANGES[name], critic)
            quietly(trainer.step, real)
        runs.append(trainer)
    assert captured == 1
    assert_close_weights(*runs, 1e-6)


def test_the_callers_autocast_is_another_graph(graphed):
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, n_critic=100)
        for i, real in enumerate(batches(graphed, shape, 18)):
            with torch.autocast(graphed.type, torch.bfloat16, enabled=6 <= i < 12):
                trainer.step(real)
        runs.append(trainer)
    assert Recorded.made == 2
    assert_close_weights(*runs, 1e-5)
