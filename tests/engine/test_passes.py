"""The passes under torch.compile: a user's own compiled loss, and the trainer's with compile=True."""

import copy

import pytest
import torch
from small_trainers import CONSTRAINTS, PAIRS, quietly, weights
from torch import nn

import fastwgan
from fastwgan import GradientPenalty, Trainer, functional, models

F64 = torch.float64
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit")  # the code generator's own


class Residual(nn.Module):
    """Rectifiers as modules, functions and methods, in place and not."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(8, 8), nn.ReLU(inplace=True), nn.Linear(8, 8))
        self.activation = nn.LeakyReLU(0.2, inplace=True)  # before its layer, and so in the sum as well

    def forward(self, x):
        x = torch.relu(x + self.layers(nn.functional.leaky_relu(x, 0.2)))
        x = x.sub(0.5)
        return (self.layers(self.activation(x)) + x).relu()


@pytest.fixture
def inductor():
    torch._dynamo.reset()


def gradients(loss, critic, *args):
    for p in critic.parameters():
        p.grad = None
    value = loss(*args)
    value.backward()
    return [value.detach().clone(), *(p.grad for p in critic.parameters())]


def assert_gradient_penalty_compiles(critic, kind):
    twin = copy.deepcopy(critic)
    real, fake = torch.randn(2, 6, 8, dtype=F64)

    def loss(critic, real, fake, seed):
        penalty = functional.gradient_penalty(critic, real, fake, kind=kind, seed=seed, weight=3.0, backend="auto")
        return penalty + functional.critic_loss(critic(real), critic(fake))

    compiled = torch.compile(loss, fullgraph=True)
    for seed in (3, 4, 2**62):
        expected = gradients(loss, twin, twin, real, fake, seed)
        actual = gradients(compiled, critic, critic, real, fake, seed)
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-10, atol=1e-12)
        for a, e in zip(critic.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(a, e)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(critic, real, fake, 17)  # a new seed is no new program
    torch.manual_seed(0)
    assert len({compiled(critic, real, fake, None).item() for _ in range(3)}) == 3  # eps drawn anew in each call


@pytest.mark.parametrize("kind", ["two-sided", "power"])
def test_gradient_penalty_in_a_compiled_loss(kind, traced_only):
    torch.manual_seed(1)
    assert_gradient_penalty_compiles(
        nn.Sequential(nn.Linear(8, 8), Residual(), nn.Tanh(), nn.Linear(8, 1)).double(), kind
    )


def test_gradient_penalty_of_a_critic_with_buffers_in_a_compiled_loss(traced_only):
    critic = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.LeakyReLU(0.2), nn.Linear(8, 1)).double()
    assert_gradient_penalty_compiles(critic, "two-sided")


def test_gradient_penalty_compiles_to_code(inductor):
    assert_gradient_penalty_compiles(nn.Sequential(nn.Linear(8, 8), Residual(), nn.Linear(8, 1)).double(), "two-sided")


def test_an_optimizer_steps_uncompiled_in_a_compiled_loop(traced_only):
    critic = nn.Linear(4, 1)
    optimizer = fastwgan.RMSprop(critic.parameters(), lr=0.1, clip=0.01)

    @torch.compile
    def step(x):
        optimizer.zero_grad()
        critic(x).mean().backward()
        optimizer.step()

    step(torch.randn(3, 4))
    assert critic.weight.abs().max() <= 0.01


def train(options, pair, constraint, steps=5):
    torch.manual_seed(0)
    generator, critic, shape, latent = PAIRS[pair]()
    trainer = quietly(
        Trainer, generator, critic, latent=latent, constraint=constraint, n_critic=2, backend="torch", **options
    )
    random = torch.Generator().manual_seed(1)
    metrics = [trainer.step(torch.randn(5 if i == 3 else 8, *shape, dtype=F64, generator=random)) for i in range(steps)]
    return trainer, metrics


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("constraint", [*CONSTRAINTS.values(), GradientPenalty(kind="one-sided", at="real", every=2)])
def test_compiled_steps_are_the_eager_ones(constraint, pair, traced_only):
    """A ragged batch among them, BatchNorm's buffers, and the generator's steps."""
    (expected, eager), (actual, compiled) = (train({"compile": c}, pair, constraint) for c in (False, True))
    for a, e in ((actual.critic, expected.critic), (actual.generator, expected.generator)):
        assert (weights(a) - weights(e)).norm() <= 1e-11 * weights(e).norm()
        for x, y in zip(a.buffers(), e.buffers(), strict=True):
            torch.testing.assert_close(x, y)
    for pair_of_metrics in zip(compiled, eager, strict=True):
        a, e = (m.as_dict() for m in pair_of_metrics)
        assert a.keys() == e.keys()
        for name in a.keys() - {"saturation"}:  # a weight may round to its bound
            assert a[name] == pytest.approx(e[name], rel=1e-9, abs=1e-12)


def test_compiled_steps_as_code(inductor):
    (expected, _), (actual, _) = (train({"compile": c}, "mlp", CONSTRAINTS["penalty"], 2) for c in (False, True))
    assert (weights(actual.critic) - weights(expected.critic)).norm() <= 1e-11 * weights(expected.critic).norm()


def test_each_trainer_compiles_for_itself(traced_only):
    """Dynamo allows a function so many forms in a process; here each trainer has other widths."""
    for width in range(4, 14):
        trainer = Trainer(nn.Linear(2, width), nn.Linear(width, 1), latent=2, n_critic=1, compile=True)
        assert trainer.step(torch.randn(3, width)).wasserstein.isfinite()


def test_compiled_steps_with_conditions_and_frozen_layers(traced_only):
    class Conditional(nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.embed, self.net = nn.Embedding(10, 4), models.mlp([inputs + 4, 8, outputs]).double()
            self.embed.double().weight.requires_grad_(False)

        def forward(self, x, labels, scale):
            return scale * self.net(torch.cat((x, self.embed(labels)), 1))

    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        trainer = Trainer(
            Conditional(6, 10), Conditional(10, 1), latent=6, constraint=GradientPenalty(), n_critic=1,
            backend="torch", compile=compiled,
        )  # fmt: skip
        for i in range(2):
            trainer.step(torch.randn(8, 10, dtype=F64), torch.arange(8) + i, 2.0)
        assert trainer.critic.embed.weight.grad is None
        results.append(torch.cat((weights(trainer.critic), weights(trainer.generator))))
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)


def test_what_cannot_be_one_graph_raises_and_changes_no_weight(traced_only):
    class Reads(nn.Linear):
        def forward(self, x):
            torch._dynamo.graph_break()  # as reading a number or printing does
            return super().forward(x)

    trainer = Trainer(models.mlp([6, 10]), Reads(10, 1), latent=6, compile=True)
    before = weights(trainer.critic)
    with pytest.raises(torch._dynamo.exc.Unsupported):
        trainer.critic_step(torch.randn(8, 10))
    assert torch.equal(weights(trainer.critic), before)
