"""Gradients clipped by norm: the guard's launch against its reference, and steps against ``clip_grad_norm_``."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from count_launches import count_kernels
from graphed_trainers import Recorded, batches, made
from small_trainers import assert_same_state, mlp_pair, quietly, weights
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models, reference
from fastwgan.backend import kernels

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHUNK, WIDTH = 4096, 2048  # gradient elements to a program; how many chunks are added at once
EPS = 1e-14  # the relative error allowed, as the norm is taken in float64 for every dtype
CONSTRAINTS = {"clip": WeightClip(0.3), "penalty": GradientPenalty()}  # a smaller bound would leave small gradients


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


# The launch


def fresh(device, scale=None, dtype=F64):
    """(tally, gate, scale) as a trainer starts with them, all but for the factor, which is to be written."""
    kept = None if scale is None else torch.tensor([scale, 0.0], device=device)
    return torch.zeros(9, dtype=torch.int64, device=device), torch.full((2,), -1.0, dtype=dtype, device=device), kept


def assert_clips(gradients, max_norm, scale=None, launcher=None):
    """One launch against the reference in float64; returns the gate."""
    device = gradients[0].device
    expected, state = fresh(device, scale), fresh(device, scale)
    reference.guard_([g.double() for g in gradients], *expected, max_norm)
    (launcher or kernels.guard.Guard()).launch(gradients, (), *state, max_norm)
    torch.testing.assert_close(state[1], expected[1], rtol=EPS, atol=0)
    assert_same_state([*state[:1], *state[2:]], [*expected[:1], *expected[2:]])
    return state[1].tolist()


def randn(n, device, dtype=F32):
    return torch.randn(n, device=device).to(dtype)


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("numel", [1, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_the_factor(numel, dtype, scale, device):
    """Of a norm above the bound, and of one below it."""
    gradients = [randn(n, device, dtype) for n in (5, numel, 7)]
    norm = torch.cat(gradients).double().norm().item() / (scale or 1)
    skip, factor = assert_clips(gradients, 1 / 3, scale)
    assert skip == 0
    assert factor == pytest.approx(1 / 3 / (norm + 1e-6) / (scale or 1), rel=1e-6) or norm < 1 / 3
    assert assert_clips(gradients, 1e6, scale) == [0, 1 / (scale or 1)]


@pytest.mark.parametrize("scale", [None, 8.0])
def test_several_dtypes_have_one_norm(scale, device):
    """Whichever launch is the last."""
    launcher = kernels.guard.Guard()
    for dtypes in ([F32, F16, BF16, F64, F16, F32], [F64, F32], [F32, F64], [F16, F32, BF16], [BF16, F16]):
        gradients = [randn(CHUNK * (i % 2) + 3 * i + 1, device, dtype) for i, dtype in enumerate(dtypes)]
        assert assert_clips(gradients, 0.1, scale, launcher)[1] < 0.1
        assert assert_clips(gradients, 1e6, scale, launcher) == [0, 1 / (scale or 1)]


def test_more_chunks_than_are_added_at_once(device):
    gradients = [randn(1 + i % 3, device, (F32, F64)[i > WIDTH]) for i in range(WIDTH + 9)]
    assert assert_clips(gradients, 0.5)[1] < 0.1


@pytest.mark.parametrize("dtypes", [[F32], [F64], [F32, F16, F64]])
def test_chunks_are_added_by_and_by(dtypes, device, monkeypatch):
    """Eight at once here, to the last one of them."""
    monkeypatch.setattr(kernels.guard, "MAX_PROGRAMS", 2)
    for count in (7, 8, 9, 16, 30):
        gradients = [randn(1 + i % 3, device, dtypes[i % len(dtypes)]) for i in range(count)]
        for loudest in (0, count // 2, count - 1):
            gradients[loudest].mul_(100)
            assert assert_clips(gradients, 0.5)[1] < 0.5


@pytest.mark.parametrize("dtype", [F32, F64])
def test_large_networks_have_larger_chunks(dtype, device, monkeypatch):
    large = kernels.guard.LARGE_BLOCK
    monkeypatch.setattr(kernels.guard, "LARGE", large)
    assert_clips([randn(n, device, dtype) for n in (2 * large + 1, 5)], 0.5)


def test_a_norm_of_zero_and_of_next_to_nothing(device):
    for dtype in (F16, BF16, F32, F64):
        zeros = [torch.zeros(n, dtype=dtype, device=device) for n in (5, CHUNK + 1)]
        assert assert_clips(zeros, 0.5) == [0, 1]
        assert assert_clips(zeros, 1e-7)[1] == pytest.approx(0.1, rel=1e-6)
    assert assert_clips([torch.full((9,), 1e-30, device=device)], 0.5) == [0, 1]


def test_squares_beyond_float32(device):
    gradient = torch.full((9,), 1e25, device=device)
    assert assert_clips([gradient], 0.5)[1] == pytest.approx(0.5 / 3e25, rel=1e-6)


def test_a_norm_beyond_float64_leaves_no_gradient(device):
    """As with clip_grad_norm_; and such a step is not left out, as all gradients are finite."""
    gradient = torch.full((9,), torch.finfo(F64).max / 4, dtype=F64, device=device)
    p = nn.Parameter(torch.zeros_like(gradient))
    p.grad = gradient.clone()
    nn.utils.clip_grad_norm_([p], 0.5)
    assert not p.grad.any()
    for state in (fresh(device), fresh(device)):
        kernels.guard.Guard().launch([gradient], (), *state, 0.5)
        assert state[1].tolist() == [0, 0]
        reference.guard_([gradient], *state, 0.5)
        assert state[1].tolist() == [0, 0]


@pytest.mark.parametrize("scale", [None, 1024.0])
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_a_step_that_is_left_out_has_the_scale_alone_for_its_factor(bad, scale, device):
    gradients = [randn(CHUNK + 1, device), randn(5, device, F64)]
    for gradient in gradients:
        kept = gradient[2].clone()
        gradient[2] = bad
        assert assert_clips(gradients, 0.5, scale) == [1, 1 / (scale or 1)]
        gradient[2] = kept
    assert assert_clips(gradients, 0.5, scale)[0] == 0


def test_a_bound_keeps_the_digits_of_float64(device):
    (_, factor), gradient = assert_clips([torch.full((4,), 0.5, dtype=F64, device=device)], 0.1), 1.0
    assert factor == pytest.approx(0.1 / (gradient + 1e-6), rel=EPS)


@pytest.mark.parametrize("max_norm", [1, np.float64(0.25), 1e-40, 1e300])
def test_bounds_of_all_kinds(max_norm, backend, device):
    critic = nn.Linear(10, 1).to(device)
    trainer = Trainer(nn.Linear(6, 10).to(device), critic, latent=6, max_norm=max_norm, backend=backend)
    assert trainer.critic_step(10 * torch.randn(8, 10, device=device)).nonfinite == 0
    assert weights(critic).isfinite().all()


def test_a_gate_of_float32_serves_too(device):
    gradients, tally = [randn(9, device)], fresh(device)[0]
    gate, wide = torch.zeros(2, device=device), torch.zeros(2, dtype=F64, device=device)
    for each in (gate, wide):
        kernels.guard.Guard().launch(gradients, (), tally, each, None, 0.5)
    assert gate[1] == wide[1].float()


@pytest.mark.emulated
def test_the_order_of_programs_does_not_matter():
    import poisoned_interpreter

    gradients = [randn(3 * CHUNK + 1, "cpu"), randn(2 * CHUNK, "cpu", F16), *(randn(7, "cpu") for _ in range(40))]
    scores, results = (randn(9000, "cpu"), randn(9000, "cpu")), []
    for order in (lambda i, n: i, lambda i, n: n - 1 - i, lambda i, n: (i + n // 2) % n):
        state = fresh("cpu", 64.0)
        with poisoned_interpreter.program_order(order):
            found = kernels.guard.Guard().launch(gradients, scores, *state, 0.5)
        results.append([found, *state])
    assert_same_state(results[1], results[0])
    assert_same_state(results[2], results[0])
    assert 0 < results[0][2][1] < 0.5 / 64


# In a trainer, against a loop with clip_grad_norm_


OPTIMIZERS = {
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, eps=1e-3),  # which ours take the place of
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-3, betas=(0.5, 0.9), eps=1e-3),
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.5),
}


def plain(generator, critic, optimizers, constraint, limits, data, latents):
    """Train as is common, a generator step to two critic steps; return the norms found, by network."""
    norms = {name: [] for name in limits}

    def update(name, network, loss):
        optimizers[name].zero_grad()
        loss.backward()
        if name in limits:
            norms[name].append(nn.utils.clip_grad_norm_(network.parameters(), limits[name]).item())
        optimizers[name].step()

    latents = iter(latents)
    for i, real in enumerate(data):
        with torch.no_grad():
            fake = generator(next(latents))
        loss = critic(fake).mean() - critic(real).mean()
        if isinstance(constraint, GradientPenalty):
            eps = reference.uniform(0, len(real) * i, len(real), real.device).double()[:, None]
            x = (eps * real + (1 - eps) * fake).requires_grad_()
            (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
            loss = loss + 10 * ((g.norm(2, dim=1) - 1) ** 2).mean()
        update("critic", critic, loss)
        if isinstance(constraint, WeightClip):
            with torch.no_grad():
                for p in critic.parameters():
                    p.clamp_(-constraint.bound, constraint.bound)
        if i % 2:
            update("generator", generator, -critic(generator(next(latents))).mean())
    return norms


def networks(device, dtype=F64):
    torch.manual_seed(0)
    generator, critic, *_ = mlp_pair(dtype)
    return generator.to(device), critic.to(device)


@pytest.mark.parametrize("max_norm", [0.01, {"critic": 0.02}, {"generator": 0.01}, {"critic": 0.02, "generator": 1e6}],
                         ids=str)  # fmt: skip
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_steps_are_a_loops_with_clip_grad_norm(constraint, optimizer, max_norm, backend, device):
    data = [torch.randn(8, 10, dtype=F64, device=device) for _ in range(4)]
    latents = [torch.randn(8, 6, dtype=F64, device=device) for _ in range(6)]
    (generator, critic), drawn = networks(device), iter(latents)
    trainer = quietly(
        Trainer, generator, critic, latent=lambda n, d: next(drawn), constraint=CONSTRAINTS[constraint], n_critic=2,
        critic_optimizer=OPTIMIZERS[optimizer](critic.parameters()), backend=backend, max_norm=max_norm,
        generator_optimizer=OPTIMIZERS[optimizer](generator.parameters()), cuda_graph=False,
    )  # fmt: skip
    for name in ("critic_optimizer", "generator_optimizer"):
        if hasattr(getattr(trainer, name), "backend"):
            getattr(trainer, name).backend = backend
    for real in data:
        assert trainer.step(real).nonfinite == 0

    twins = networks(device)
    made_for = zip(("generator", "critic"), twins, strict=True)
    optimizers = {name: OPTIMIZERS[optimizer](network.parameters()) for name, network in made_for}
    limits = max_norm if isinstance(max_norm, dict) else dict.fromkeys(("critic", "generator"), max_norm)
    norms = plain(*twins, optimizers, CONSTRAINTS[constraint], limits, data, latents)
    for name, limit in limits.items():
        assert len(norms[name]) == (4 if name == "critic" else 2)
        assert (min(norms[name]) > 2 * limit) if limit < 1 else (max(norms[name]) < limit)
    for ours, theirs in zip((generator, critic), twins, strict=True):
        torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)


def test_parameters_without_gradients_and_empty_ones(backend, device):
    """A frozen layer, an unused one and an empty one; the norm is of what there is."""

    def critic():
        torch.manual_seed(1)
        network = models.mlp([10, 8, 1]).to(device, F64)
        next(network.parameters()).requires_grad_(False)
        network.register_parameter("unused", nn.Parameter(torch.ones(3, dtype=F64, device=device)))
        network.register_parameter("empty", nn.Parameter(torch.ones(0, dtype=F64, device=device)))
        return network

    ours, theirs = critic(), critic()
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (ours, theirs)]
    fake, real = torch.randn(2, 8, 10, dtype=F64, device=device)
    trainer = Trainer(
        nn.Linear(6, 10).to(device, F64), ours, latent=6, critic_optimizer=optimizers[0], backend=backend,
        constraint=WeightClip(10.0), max_norm=0.01, cuda_graph=False,
    )  # fmt: skip
    trainer.generator.register_forward_hook(lambda *_: fake)
    trainer.critic_step(real)
    (theirs(fake).mean() - theirs(real).mean()).backward()
    assert nn.utils.clip_grad_norm_(theirs.parameters(), 0.01) > 0.05
    optimizers[1].step()
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-12, atol=0)


@pytest.mark.parametrize("scale", [64.0, 2048.0])
@pytest.mark.parametrize("constraint", CONSTRAINTS)
def test_the_loss_scale_is_taken_out_of_the_norm(constraint, scale, backend, device):
    """Against the unclipped step's unscaled gradients, as SGD leaves them, in the step of SGD and of ours."""
    real, found, start = torch.randn(8, 10, device=device), {}, weights(networks(device, F32)[1])
    for kind, max_norm in (("SGD", None), ("SGD", 0.05), ("SGD", 1e6), ("ours", 0.05)):
        generator, critic = networks(device, F32)
        optimizer = torch.optim.SGD(critic.parameters(), lr=1.0)
        if kind == "ours":
            optimizer = RMSprop(critic.parameters(), lr=1.0, alpha=0.0, eps=1.0, backend=backend)
        trainer = quietly(
            Trainer, generator.eval(), critic, latent=lambda n, d: torch.ones(n, 6, device=d), amp=F16, n_critic=9,
            constraint=WeightClip(1e3) if constraint == "clip" else GradientPenalty(), backend=backend,
            critic_optimizer=optimizer, max_norm=max_norm, cuda_graph=False,
        )  # fmt: skip
        trainer._steps.critic.guard.scale.fill_(scale)
        assert trainer.critic_step(real).nonfinite == 0
        assert trainer._steps.critic.guard.scale == scale
        found[kind, max_norm] = start - weights(critic)
    gradient = found["SGD", None]
    expected = gradient * (0.05 / gradient.norm())
    assert gradient.norm() > 0.1
    assert torch.equal(found["SGD", 1e6], gradient)
    close = {"rtol": 1e-4, "atol": 1e-6}  # weights are float32
    torch.testing.assert_close(found["SGD", 0.05], expected, **close)
    torch.testing.assert_close(found["ours", 0.05], expected / (expected.abs() + 1), **close)


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_in_graphs(constraint, graphed):
    """A replay has the factor of its own gradients, and of a step that is left out."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(
            graphed, cuda_graph, constraint=constraint, n_critic=1, ema=0.5, nonfinite="skip", max_norm=1e-3
        )
        data, factors = batches(graphed, shape, 10), []
        data[7][2, 3] = math.nan
        for i, real in enumerate(data):
            trainer.critic_step(real * (1 + i))
            trainer.generator_step(8)
            factors.append([player.guard.gate[1].item() for player in trainer._steps.players])
        assert factors[7][1] == 1
        assert all(factor < 0.1 for i, row in enumerate(factors) for factor in row if i != 7)
        assert len({row[1] for row in factors}) == 10
        runs.append((trainer, torch.tensor(factors)))
    assert Recorded.made == 2
    (eager, expected), (trainer, actual) = runs
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    assert (weights(trainer.critic) - weights(eager.critic)).norm() <= 1e-6 * weights(eager.critic).norm()


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_whole_iterations(constraint, graphed):
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, constraint=constraint, n_critic=2, max_norm=1e-3)
        data = batches(graphed, shape, 10)
        for i in range(0, 10, 2):
            trainer.iteration(data[i : i + 2])
        runs.append(torch.cat((weights(trainer.critic), weights(trainer.generator))))
    assert (runs[1] - runs[0]).norm() <= 1e-6 * runs[0].norm()


@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
@pytest.mark.usefixtures("traced_only")
def test_compiled_steps_are_the_eager_ones(constraint):
    results = []
    for compiled in (False, True):
        generator, critic = networks("cpu")
        trainer = quietly(
            Trainer, generator, critic, latent=6, constraint=constraint, n_critic=2, backend="torch",
            compile=compiled, max_norm=0.01,
        )  # fmt: skip
        for real in batches("cpu", (10,), 4):
            trainer.step(real.double())
        results.append(torch.cat((weights(critic), weights(generator))))
    assert (results[1] - results[0]).norm() <= 1e-11 * results[0].norm()


class Waits(TorchDispatchMode):
    """Raises where a number is read, for which the host would wait."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func.overloadpacket.__name__ not in ("_local_scalar_dense", "is_nonzero", "nonzero")
        return func(*args, **(kwargs or {}))


@pytest.mark.emulated
@pytest.mark.parametrize("amp", [None, F16])
@pytest.mark.parametrize("constraint", CONSTRAINTS.values(), ids=CONSTRAINTS)
def test_a_clipped_step_launches_the_same_and_waits_for_nothing(constraint, amp):
    counted = []
    for max_norm in (None, 0.01):
        generator, critic = networks("cpu", F32)
        trainer = quietly(
            Trainer, generator, critic, latent=6, constraint=constraint, n_critic=9, backend="triton", amp=amp,
            max_norm=max_norm,
        )  # fmt: skip
        real = torch.randn(8, 10)
        for _ in range(2):
            trainer.critic_step(real)
            trainer.generator_step(8)
        with count_kernels() as counts:
            trainer._steps.take_critic_step(10.0 * isinstance(constraint, GradientPenalty), real, ())
            trainer._steps.take_generator_step(8, ())
        counted.append(dict(counts))
        with Waits():
            trainer._steps.take_critic_step(10.0 * isinstance(constraint, GradientPenalty), real, ())
            trainer._steps.take_generator_step(8, ())
    assert counted[1] == counted[0]
    assert counted[0]["_guard_kernel"] == counted[0]["_update_kernel"] == 2


def test_without_it_no_norm_is_taken(device, monkeypatch):
    monkeypatch.setattr(reference, "norm", None)
    state = fresh(device)
    kernels.guard.Guard().launch([randn(9, device)], (), *state)
    assert state[1].tolist() == [0, -1]  # which is 1 in a trainer, and stays so
    trainer = Trainer(nn.Linear(6, 10), nn.Linear(10, 1), latent=6, backend="torch")
    trainer.critic_step(torch.randn(8, 10))
    assert trainer._steps.critic.guard.gate.tolist() == [0, 1]


# Copies, states and what is refused


def test_a_copy_clips_as_the_original_does(backend, device):
    def steps(trainer):
        for real in batches(device, (10,), 3):
            trainer.critic_step(real.double())
            trainer.generator_step(8)
        return trainer.state_dict()

    generator, critic = networks(device)
    trainer = Trainer(
        generator, critic, latent=6, constraint=GradientPenalty(), max_norm={"critic": 0.01}, backend=backend,
        cuda_graph=False,
    )  # fmt: skip
    steps(trainer)
    twins = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    expected = steps(trainer)
    for twin in twins:
        found = steps(twin)
        for part in ("generator", "critic", "generator_optimizer", "critic_optimizer", "guards"):
            assert_same_state(found[part], expected[part])
        gates = [[player.guard.gate for player in t._steps.players] for t in (twin, trainer)]
        assert gates[0][1][1] == gates[1][1][1] < 0.1
        assert gates[0][0][1] == 1
        assert gates[0][1] is not gates[1][1]


def test_states_are_those_of_a_trainer_that_does_not_clip(backend, device):
    """So an older checkpoint serves, and one of a clipped run where nothing is clipped."""
    trainers = []
    for max_norm in (None, 0.01):
        options = {"constraint": GradientPenalty(), "backend": backend, "max_norm": max_norm, "cuda_graph": False}
        trainers.append(Trainer(*networks(device), latent=6, **options))
        trainers[-1].critic_step(torch.randn(8, 10, dtype=F64, device=device))
    plain, clipped = trainers
    states = [copy.deepcopy(t.state_dict()) for t in trainers]
    assert [*states[0]["guards"][1]] == [*states[1]["guards"][1]] == ["tally", "scale"]
    clipped.load_state_dict(states[0])
    plain.load_state_dict(states[1])
    for trainer, changed in ((plain, False), (clipped, True)):
        trainer.critic_step(torch.randn(8, 10, dtype=F64, device=device))
        assert (trainer._steps.critic.guard.gate[1] < 1) == changed


@pytest.mark.parametrize("max_norm", [1.0, {"generator": 1.0}])
def test_sparse_gradients_are_refused_where_they_would_be_clipped(max_norm, backend):
    """Whose elements may be parts of one another's."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(10, 10, sparse=True)

        def forward(self, x, labels):
            return (self.embed(labels) * x).sum(1)

    class Generator(nn.Linear):
        def forward(self, z, labels):
            return super().forward(z)

    critic = Critic()
    trainer = quietly(
        Trainer, Generator(6, 10), critic, latent=6, critic_optimizer=torch.optim.SGD(critic.parameters(), lr=0.1),
        backend=backend, max_norm=max_norm,
    )  # fmt: skip
    real, labels, before = torch.randn(8, 10), torch.arange(8) // 2, weights(critic)
    if isinstance(max_norm, dict):
        trainer.critic_step(real, labels)
        assert not torch.equal(weights(critic), before)
        return
    with pytest.raises(TypeError, match="^critic: expected dense gradients, got torch.sparse_coo for embed.weight"):
        trainer.critic_step(real, labels)
    assert torch.equal(weights(critic), before)


def test_a_network_of_two_dtypes_has_one_norm(backend, device):
    """And two launches each of the guard and the update."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(1)
            self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 1).double()

        def forward(self, x):
            return self.second(self.first(x).relu().double())

    found = []
    for max_norm in (None, 0.01):
        critic = Critic().to(device)
        start, (fake, real) = weights(critic), torch.randn(2, 8, 10, device=device, generator=seeded(device))
        optimizer = Adam(critic.parameters(), lr=1.0, betas=(0.0, 0.0), eps=1.0, backend=backend)
        trainer = Trainer(
            nn.Linear(6, 10).to(device), critic, latent=6, constraint=GradientPenalty(), critic_optimizer=optimizer,
            backend=backend, max_norm=max_norm, cuda_graph=False,
        )  # fmt: skip
        trainer.generator.register_forward_hook(lambda *_, fake=fake: fake)
        trainer.critic_step(real)
        step = start - weights(critic)
        found.append(step / (1 - step.abs()))  # the gradient, of which Adam has made g / (|g| + 1)
    gradient, clipped = found
    assert gradient.norm() > 0.1
    torch.testing.assert_close(clipped, gradient * (0.01 / gradient.norm()), rtol=1e-3, atol=1e-6)


def seeded(device):
    return torch.Generator(device).manual_seed(5)
