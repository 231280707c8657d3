"""Running averages of the generator's weights, kept in its update's launch."""

import copy
import math

import pytest
import torch
from count_launches import count_kernels
from graphed_trainers import Recorded, batches, made
from small_trainers import assert_same_state, quietly, weights
from torch import nn
from torch.func import functional_call

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models

F32, F64 = torch.float32, torch.float64


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


OPTIMIZERS = {
    "RMSprop": lambda p, backend: RMSprop(p, lr=1e-2, backend=backend),
    "RMSprop momentum": lambda p, backend: RMSprop(p, lr=1e-2, momentum=0.5, clip=0.2, backend=backend),
    "Adam": lambda p, backend: Adam(p, lr=1e-2, backend=backend),
    "torch Adam": lambda p, backend: torch.optim.Adam(p, lr=1e-2),
    "SGD": lambda p, backend: torch.optim.SGD(p, lr=2.0),
}


class Recurrence:
    """e = decay e + (1 - decay) p in float64."""

    def __init__(self, module, decay):
        self.decay = decay
        self.values = {name: p.detach().double().clone() for name, p in module.named_parameters()}

    def follow(self, module):
        for name, p in module.named_parameters():
            self.values[name].mul_(self.decay).add_(p.detach().double(), alpha=1 - self.decay)


def assert_close(trainer, expected, rtol=1e-5):
    actual = trainer.averages()
    assert actual.keys() == expected.values.keys()
    for name, value in expected.values.items():
        assert (actual[name].double() - value).abs().max() <= rtol * value.abs().max().clamp_min(0.1), name


def trainer_with(device, backend, optimizer="Adam", dtype=F32, ema=0.8, **options):
    torch.manual_seed(0)
    # Sizes past a chunk of the update's, odd ones, and one number.
    generator = models.mlp([6, 70, 9, 10], norm=True).to(device, dtype)
    generator.register_parameter("scale", nn.Parameter(torch.ones((), device=device, dtype=dtype)))
    generator.register_forward_hook(lambda m, z, x: x * m.scale)
    critic = models.mlp([10, 16, 1]).to(device, dtype)
    return Trainer(
        generator, critic, latent=6, generator_optimizer=OPTIMIZERS[optimizer](generator.parameters(), backend),
        constraint=WeightClip(1.0), n_critic=1, backend=backend, ema=ema, **options,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("optimizer", "dtype"),
    [*((name, F32) for name in OPTIMIZERS), ("RMSprop momentum", F64), ("Adam", F64), ("SGD", F64)],
)
def test_averages_are_the_recurrence(optimizer, dtype, backend, device):
    trainer = trainer_with(device, backend, optimizer, dtype)
    expected, critic = Recurrence(trainer.generator, 0.8), weights(trainer.critic)
    assert_close(trainer, expected, 0)
    for _ in range(3):
        trainer.step(torch.randn(8, 10, dtype=dtype, device=device))
        expected.follow(trainer.generator)
        assert_close(trainer, expected, 1e-6 if dtype == F32 else 1e-13)
    moved = {
        n: (v - p).abs().max()
        for (n, v), p in zip(expected.values.items(), trainer.generator.parameters(), strict=True)
    }
    assert max(moved.values()) > 1e-2
    assert not torch.equal(weights(trainer.critic), critic)


@pytest.mark.parametrize("decay", [0.0, 0.999])
def test_decays(decay, backend):
    trainer = trainer_with("cpu", backend, ema=decay)
    expected = Recurrence(trainer.generator, decay)
    for _ in range(4):
        trainer.step(torch.randn(8, 10))
        expected.follow(trainer.generator)
    assert_close(trainer, expected, 1e-6)
    if decay == 0:
        assert_same_state(trainer.averages(), {n: p.data for n, p in trainer.generator.named_parameters()})


@pytest.mark.parametrize("optimizer", ["RMSprop", "SGD"])
def test_half_precision_weights_have_float32_averages(optimizer, backend, device):
    """A decay of 0.999 moves a bfloat16 average by less than its rounding: it would never move."""
    trainer = trainer_with(device, backend, optimizer, torch.bfloat16, ema=0.999)
    expected = Recurrence(trainer.generator, 0.999)
    start = copy.deepcopy(expected.values)
    for _ in range(3):
        trainer.step(torch.randn(8, 10, device=device).bfloat16())
        expected.follow(trainer.generator)
    for name, p in trainer.generator.named_parameters():
        average = trainer._steps.generator.averages[p]
        assert average.dtype == F32
        assert (average - expected.values[name]).abs().max() <= 1e-6
        assert trainer.averages()[name].dtype == torch.bfloat16
    assert any((expected.values[name] - start[name]).abs().max() > 1e-4 for name in start)
    assert trainer.sample(3, ema=True).dtype == torch.bfloat16


def test_a_step_without_averages_is_the_same(backend):
    runs = []
    for ema in (None, 0.9):
        trainer = trainer_with("cpu", backend, ema=ema)
        for i in range(2):
            trainer.step(torch.randn(8, 10, generator=torch.Generator().manual_seed(i)))
        runs.append(trainer)
    assert torch.equal(weights(runs[0].generator), weights(runs[1].generator))
    assert runs[0].averages() == {}


def test_samples_of_the_averages(backend, device):
    """With BatchNorm's buffers as they are; sampling without asks for none, and nothing is left behind."""
    trainer = trainer_with(device, backend)
    for _ in range(2):
        trainer.step(torch.randn(8, 10, device=device))
    before = copy.deepcopy(trainer.generator.state_dict())
    z = torch.randn(5, 6, device=device)
    trainer.latent = lambda n, d: z[:n]
    generator = copy.deepcopy(trainer.generator).eval()
    averaged = functional_call(generator, trainer.averages() | dict(generator.named_buffers()), z)
    assert torch.equal(trainer.sample(5, ema=True), averaged)
    assert torch.equal(trainer.sample(5), generator(z))
    assert (averaged - generator(z)).abs().max() > 1e-3
    assert_same_state(trainer.generator.state_dict(), before)
    assert all(m.training for m in trainer.generator.modules())


def test_samples_need_averages():
    with pytest.raises(ValueError, match="^ema: expected a trainer"):
        Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6).sample(2, ema=True)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_frozen_parameters(optimizer, backend, device):
    """One frozen from the start, one later, whose average goes on towards it, and one that no optimizer has."""
    trainer = trainer_with(device, backend, optimizer)
    generator = trainer.generator
    generator[1].bias.requires_grad_(False)
    trainer.generator_optimizer.param_groups[0]["params"] = [
        p for p in generator.parameters() if p is not generator[-1].bias
    ]
    expected = Recurrence(generator, 0.8)
    for i in range(4):
        if i == 2:
            generator[1].weight.requires_grad_(False)
        trainer.step(torch.randn(8, 10, device=device))
        expected.follow(generator)
    assert_close(trainer, expected, 1e-6)
    assert torch.equal(trainer.averages()["1.bias"], generator[1].bias)
    assert not torch.equal(trainer.averages()["1.weight"], generator[1].weight)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(10, 10), nn.Linear(10, 10)
        self.second.weight = self.first.weight

    def forward(self, z):
        return self.second(self.first(z).tanh())


def test_tied_weights_have_one_average(backend):
    torch.manual_seed(0)
    trainer = Trainer(
        Tied(), models.mlp([10, 8, 1]), latent=10, n_critic=1, ema=0.5, backend=backend, constraint=GradientPenalty()
    )
    expected = Recurrence(trainer.generator, 0.5)
    for _ in range(3):
        trainer.step(torch.randn(8, 10))
        expected.follow(trainer.generator)
    assert_close(trainer, expected, 1e-6)
    twin = copy.deepcopy(trainer.generator)
    with torch.no_grad():
        for name, p in twin.named_parameters():
            p.copy_(trainer.averages()[name])
    z = torch.randn(4, 10)
    trainer.latent = lambda n, d: z
    torch.testing.assert_close(trainer.sample(4, ema=True), twin(z))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(6, 10)),
        lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(6, 10)),
    ],
)
def test_parametrized_generators(make, backend):
    generator = nn.Sequential(make(), nn.Tanh(), nn.Linear(10, 10))
    trainer = Trainer(
        generator, models.mlp([10, 8, 1]), latent=6, n_critic=1, ema=0.5, backend=backend,
        generator_optimizer=torch.optim.Adam(generator.parameters(), lr=0.05),
    )  # fmt: skip
    for _ in range(3):
        trainer.step(torch.randn(8, 10))
    twin, z = copy.deepcopy(generator).eval(), torch.randn(4, 6)
    twin.load_state_dict(generator.state_dict() | trainer.averages())
    trainer.latent = lambda n, d: z
    torch.testing.assert_close(trainer.sample(4, ema=True), twin(z))
    assert not torch.allclose(trainer.sample(4, ema=True), trainer.sample(4), atol=1e-4)


@pytest.mark.emulated
def test_still_one_launch():
    trainer = Trainer(
        models.mlp([6, 70, 10]), models.mlp([10, 1]), latent=6, ema=0.9, backend="triton", constraint=GradientPenalty()
    )
    other = Trainer(
        models.mlp([6, 70, 10]), models.mlp([10, 1]), latent=6, backend="triton", constraint=GradientPenalty()
    )
    counted = []
    for t in (trainer, other):
        t.generator_step(8)
        with count_kernels() as counts:
            t.generator_step(8)
        counted.append(dict(counts))
    assert counted[0] == counted[1]
    assert counted[0]["_update_kernel"] == counted[0]["_guard_kernel"] == 1


def test_layouts(backend, device):
    """Weights in channels_last, and one that is a part of a larger array."""

    class Generator(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(2, 8, 3, padding=1).to(memory_format=torch.channels_last)
            self.part = nn.Parameter(torch.randn(9, 8)[:, ::2])

        def forward(self, z):
            x = self.conv(z.view(-1, 2, 3, 3))
            return x.mean((2, 3))[:, :4] * self.part.sum(0)

    torch.manual_seed(0)
    generator = Generator()
    part = torch.randn(9, 8, device=device)
    generator.to(device)
    generator.part.data = part[:, ::2]
    trainer = Trainer(
        generator, models.mlp([4, 8, 1]).to(device), latent=18, n_critic=1, ema=0.5, backend=backend,
        generator_optimizer=OPTIMIZERS["Adam"](generator.parameters(), backend),
    )  # fmt: skip
    expected = Recurrence(generator, 0.5)
    for _ in range(3):
        trainer.step(torch.randn(8, 4, device=device))
        expected.follow(generator)
    assert_close(trainer, expected, 1e-6)


@pytest.mark.parametrize("optimizer", ["Adam", "SGD"])
def test_resuming_goes_on_with_the_averages(optimizer, backend, tmp_path):
    def start():
        return trainer_with("cpu", backend, optimizer)

    data, (whole, first, second) = torch.randn(4, 8, 10), (start(), start(), start())
    for real in data:
        whole.step(real)
    for real in data[:2]:
        first.step(real)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    assert_same_state(second.averages(), first.averages())
    for real in data[2:]:
        second.step(real)
    assert_same_state(second.state_dict(), whole.state_dict())


def test_states_with_and_without_averages():
    trainer, without = trainer_with("cpu", "torch"), trainer_with("cpu", "torch", ema=None)
    for _ in range(2):
        trainer.step(torch.randn(8, 10))
        without.step(torch.randn(8, 10))
    before = copy.deepcopy(without.state_dict())
    with pytest.raises(
        ValueError, match="^state_dict: has running averages of weights; expected a trainer made with ema="
    ):
        without.load_state_dict(trainer.state_dict())
    assert_same_state(without.state_dict(), before)
    trainer.load_state_dict(before)  # and the other way they begin with the weights
    assert_same_state(trainer.averages(), {n: p.data for n, p in without.generator.named_parameters()})
    state = trainer.state_dict()
    del state["ema"]["scale"]
    before = trainer.state_dict()
    with pytest.raises((KeyError, ValueError)):
        trainer.load_state_dict(state)
    assert_same_state(trainer.state_dict(), before)


@pytest.mark.parametrize("value", [-0.1, 1.0, math.nan, True, "0.9"])
def test_bad_decays(value):
    with pytest.raises((TypeError, ValueError), match="^ema:"):
        Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, ema=value)


def test_in_graphs(graphed):
    """Steps and whole iterations, of which a replay runs no Python."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, constraint=WeightClip(0.05), n_critic=1, ema=0.75)
        trainer.generator_optimizer.param_groups[0]["lr"] = 1e-2
        expected = Recurrence(trainer.generator, 0.75)
        for real in batches(graphed, shape, 9):
            trainer.step(real)
            expected.follow(trainer.generator)
        for name, p in trainer.generator.named_parameters():  # read after the fact, as .grad is a graph's own
            assert (trainer._steps.generator.averages[p] - expected.values[name]).abs().max() <= 1e-5
        runs.append(trainer)
    assert Recorded.made == 2
    for (name, a), e in zip(runs[1].averages().items(), runs[0].averages().values(), strict=True):
        assert (a - e).norm() <= 1e-6 * e.norm() + 1e-7, name


def test_iterations_in_graphs(graphed):
    trainer, shape = made(graphed, True, constraint=GradientPenalty(), n_critic=2, ema=0.75)
    expected, data = Recurrence(trainer.generator, 0.75), batches(graphed, shape, 14)
    for i in range(0, 14, 2):
        trainer.iteration(data[i : i + 2])
        expected.follow(trainer.generator)
    assert Recorded.made == 1
    assert_close(trainer, expected, 1e-6)


def test_a_replaced_optimizer_keeps_them(backend):
    trainer = trainer_with("cpu", backend)
    trainer.step(torch.randn(8, 10))
    trainer.generator_optimizer = quietly(RMSprop, trainer.generator.parameters(), lr=1e-2, backend=backend)
    expected = Recurrence(trainer.generator, 0.8)
    expected.values = {n: v.double() for n, v in trainer.averages().items()}
    trainer.step(torch.randn(8, 10))
    expected.follow(trainer.generator)
    assert_close(trainer, expected, 1e-6)
