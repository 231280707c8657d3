"""Several processes on one batch against one process: each case runs here, and in workers that gloo connects."""

import os
import re
import subprocess
import sys
import time
import warnings
from datetime import timedelta
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastwgan import Adam, GradientPenalty, NormClip, RMSprop, WeightClip, functional, models
from fastwgan import Trainer as _Trainer
from fastwgan.engine.ranks import Ranks

F32, F64 = torch.float32, torch.float64
BATCH, LATENT = 16, 6  # all ranks' batch
EPS = 1e-3  # of optimizers: a gradient that is zero but for rounding, as of the last bias, then moves next to nothing


def Trainer(*args, backend="torch", **options):  # noqa: N802 - or "auto" would be the interpreter, which takes longer
    return _Trainer(*args, backend=backend, **options)


def rank_and_world():
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def part(x):
    """This rank's of a whole batch."""
    rank, world = rank_and_world()
    return x.chunk(world)[rank]


def mlp_pair(dtype=F64):
    return models.mlp([LATENT, 16, 10]).to(dtype), models.mlp([10, 16, 12, 1], slope=0.2).to(dtype), (10,)


def conv_pair(dtype=F64):
    generator = nn.Sequential(
        nn.Linear(LATENT, 32), nn.Tanh(), nn.Unflatten(1, (2, 4, 4)), nn.ConvTranspose2d(2, 1, 4, 2, 1)
    )
    critic = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)
    ).to(memory_format=torch.channels_last)
    return generator.to(dtype), critic.to(dtype), (1, 8, 8)


def norm_pair(dtype=F64):
    """BatchNorm in both."""
    generator = models.mlp([LATENT, 16, 10], norm=True).to(dtype)
    return generator, nn.Sequential(nn.Linear(10, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 1)).to(dtype), (10,)


class Conditional(nn.Module):
    """A network of a sample and a condition of its own."""

    def __init__(self, width, out):
        super().__init__()
        self.net = nn.Linear(width + 3, out)

    def forward(self, x, y):
        return self.net(torch.cat((x, y), 1))


class Packed(nn.Module):
    """One score for each two samples."""

    def __init__(self):
        super().__init__()
        self.net = models.mlp([20, 12, 1], slope=0.2)

    def forward(self, x):
        return self.net(x.reshape(-1, 20))


class Partial(nn.Module):
    """A parameter that nothing depends on, and a frozen layer."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(10, 12)
        self.first.requires_grad_(False)
        self.unused = nn.Linear(3, 3)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(12, 1))

    def forward(self, x):
        return self.last(self.first(x))


def weights(trainer):
    return torch.cat(
        [p.detach().double().flatten() for m in (trainer.generator, trainer.critic) for p in m.parameters()]
    )


def trained(pair, *, steps=11, seed=0, dtype=F64, condition=False, iterations=False, wrap=False, lr=3e-3,
            backend="torch", fake_condition=False, **options):  # fmt: skip
    """What steps on parts of fixed batches lead to: (weights, [metrics of each step])."""
    torch.manual_seed(seed)
    generator, critic, shape = pair(dtype)
    if wrap and dist.is_initialized():
        generator, critic = DistributedDataParallel(generator), DistributedDataParallel(critic)
    clip = isinstance(options.get("constraint", WeightClip()), WeightClip)
    for name, network in (("generator", generator), ("critic", critic)):
        parameters = [p for p in network.parameters() if p.requires_grad]
        form = RMSprop if clip else partial(Adam, betas=(0.0, 0.9))
        ours = form(parameters, lr, eps=EPS, backend=backend)
        options.setdefault(f"{name}_optimizer", ours)
    if options["critic_optimizer"] == "SGD":
        options["critic_optimizer"] = torch.optim.SGD(critic.parameters(), 0.05, momentum=0.5, weight_decay=0.1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "WeightClip with a critic optimizer that has momentum")
        trainer = Trainer(generator, critic, latent=LATENT, n_critic=3, seed=5 + seed, backend=backend, **options)
    data = torch.Generator().manual_seed(3)
    batches = []
    for _ in range(steps):
        real = torch.randn(BATCH, *shape, generator=data, dtype=torch.float64).to(dtype)
        y = torch.randn(BATCH, 3, generator=data, dtype=torch.float64).to(dtype)
        batches.append((part(real), part(y)) if condition else (part(real),))
    given = [{"fake_cond": (batches[i - 1][1],)} if fake_condition else {} for i in range(steps)]
    if iterations:
        metrics = [m for i in range(0, steps - steps % 3, 3) for m in trainer.iteration(batches[i : i + 3])]
    else:
        metrics = [trainer.step(*batch, **own) for batch, own in zip(batches, given, strict=True)]
    outcome = weights(trainer)
    if "ema" in options:
        outcome = torch.cat((outcome, *(x.double().flatten() for x in trainer.averages().values())))
    return outcome, [m.as_dict() for m in metrics]


def conditional_pair(dtype):
    return Conditional(LATENT, 10).to(dtype), Conditional(10, 1).to(dtype), (10,)


def packed_pair(dtype):
    return models.mlp([LATENT, 16, 10]).to(dtype), Packed().to(dtype), (10,)


def partial_pair(dtype):
    return models.mlp([LATENT, 16, 10]).to(dtype), Partial().to(dtype), (10,)


def expanded_pair(dtype):
    """A gradient of the critic whose elements share memory, as torch.compile may leave one."""
    generator, critic, shape = mlp_pair(dtype)

    def expand(p):
        p.grad = p.grad.mean().expand(p.shape)

    critic[1].bias.register_post_accumulate_grad_hook(expand)
    return generator, critic, shape


CLIP, PENALTY = WeightClip(0.05), GradientPenalty()
BLEND = {
    "critic_term": lambda s: 0.3 * (F.softplus(-s.real_scores).mean() + F.softplus(s.fake_scores).mean()
                                    - functional.critic_loss(s.real_scores, s.fake_scores))
                             + 0.05 * s.real_scores.square().mean(),
    "generator_term": lambda s: 0.3 * (F.softplus(-s.fake_scores).mean() - functional.generator_loss(s.fake_scores)),
}  # fmt: skip
RELATIVISTIC = {
    "critic_term": lambda s: F.softplus(s.fake_scores - s.real_scores).mean(),
    "generator_term": lambda s: F.softplus(s.real_scores - s.fake_scores).mean() + (s.fake - s.real).abs().mean(),
}
TRITON = {"dtype": F32, "lr": 1e-4, "backend": "triton", "steps": 4}
EQUAL = {  # name: (how far the weights may be from those of one process, what to train)
    "clip": (1e-12, mlp_pair, {"constraint": CLIP}),
    "penalty": (1e-12, mlp_pair, {"constraint": PENALTY}),
    "conv clip": (1e-12, conv_pair, {"constraint": CLIP}),
    "conv penalty": (1e-12, conv_pair, {"constraint": PENALTY}),
    "memory format": (1e-12, conv_pair, {"constraint": PENALTY, "memory_format": torch.channels_last}),
    "float32 clip": (1e-6, mlp_pair, {"constraint": CLIP, "dtype": F32, "lr": 1e-4}),
    "float32 penalty": (1e-6, mlp_pair, {"constraint": PENALTY, "dtype": F32, "lr": 1e-4}),
    "triton clip": (1e-6, mlp_pair, {"constraint": CLIP, "dtype": F32, "lr": 1e-4, "backend": "triton", "steps": 4}),
    "triton penalty": (
        1e-6,
        mlp_pair,
        {"constraint": PENALTY, "dtype": F32, "lr": 1e-4, "backend": "triton", "steps": 4},
    ),
    "condition": (1e-12, conditional_pair, {"constraint": PENALTY, "condition": True}),
    "iteration": (1e-12, mlp_pair, {"constraint": PENALTY, "iterations": True}),
    "lazy one-sided": (1e-12, mlp_pair, {"constraint": GradientPenalty(kind="one-sided", at="real", every=2)}),
    "pack clip": (1e-12, packed_pair, {"constraint": CLIP, "pack": 2}),
    "pack penalty": (1e-12, packed_pair, {"constraint": PENALTY, "pack": 2}),
    "ema": (1e-12, mlp_pair, {"constraint": PENALTY, "ema": 0.9}),
    "bfloat16": (1e-3, mlp_pair, {"constraint": PENALTY, "dtype": F32, "amp": torch.bfloat16, "lr": 1e-4}),
    "partial": (1e-12, partial_pair, {"constraint": CLIP}),
    "blend, drift": (1e-12, mlp_pair, {"constraint": PENALTY, **BLEND}),
    "triton blend, drift": (1e-6, mlp_pair, {"constraint": CLIP, **BLEND, **TRITON}),
    "relativistic": (1e-12, mlp_pair, {"constraint": CLIP, **RELATIVISTIC}),
    "relativistic pack": (1e-12, packed_pair, {"constraint": PENALTY, "pack": 2, **RELATIVISTIC}),
    "relativistic iteration": (1e-12, mlp_pair, {"constraint": PENALTY, "iterations": True, **RELATIVISTIC}),
    "fake condition": (
        1e-12,
        conditional_pair,
        {"constraint": PENALTY, "condition": True, "fake_condition": True, **RELATIVISTIC},
    ),
    "norms": (1e-12, mlp_pair, {"constraint": NormClip(0.5)}),
    "perturbed": (1e-12, packed_pair, {"constraint": GradientPenalty(at="perturbed"), "pack": 2}),
    "sgd": (1e-12, partial_pair, {"constraint": PENALTY, "critic_optimizer": "SGD"}),
    "expanded": (1e-12, expanded_pair, {"constraint": CLIP}),
    "wrapped": (1e-12, mlp_pair, {"constraint": PENALTY, "wrap": True}),
    "max_norm": (1e-12, mlp_pair, {"constraint": PENALTY, "max_norm": 0.01}),
    "max_norm sgd": (1e-12, partial_pair, {"constraint": PENALTY, "critic_optimizer": "SGD", "max_norm": 0.01}),
    "triton max_norm": (1e-6, mlp_pair, {"constraint": CLIP, "max_norm": {"critic": 1e-4}, **TRITON}),
}
METRICS_DIGITS = {1e-12: 1e-9, 1e-6: 1e-4, 1e-3: 3e-2}


def case(name):
    _, pair, options = EQUAL[name]
    return trained(pair, **options)


# Checks that only several ranks can make; each runs on all of them, and what it returns is judged in a test.


def check_seeds():
    """Each rank with weights and a seed of its own."""
    return trained(mlp_pair, constraint=PENALTY, seed=dist.get_rank())


def check_batchnorm():
    return trained(norm_pair, constraint=CLIP)


def check_float16():
    """Sums in float16 are of a rank's part, so other steps may overflow than with one process."""
    return trained(mlp_pair, constraint=PENALTY, dtype=F32, amp=torch.float16)


class Recorder:
    """Keeps what networks are called with, beyond a trainer's first looks at them."""

    def __init__(self, *modules):
        self.seen = []
        for module in modules:
            module.register_forward_pre_hook(self)

    def __call__(self, module, args):
        self.seen.append(args[0].detach().clone())


def check_draws():
    """Return the latents of some steps, and the points at which the penalty is taken."""
    torch.manual_seed(0)
    generator, critic, _ = mlp_pair()
    trainer = Trainer(generator, critic, latent=LATENT, constraint=PENALTY, n_critic=2, seed=9)
    data = torch.Generator().manual_seed(3)
    batches = [torch.randn(BATCH, 10, generator=data, dtype=F64) for _ in range(8)]
    for real in batches[:4]:
        trainer.step(part(real))
    latents, points = Recorder(generator), Recorder(critic)
    for real in batches[4:]:
        trainer.step(part(real))
    trainer.critic_step(part(batches[0]))
    x = points.seen[2]  # after real and fake samples
    return latents.seen, x


def poisoned(trainer, *, now, only):
    """Have a gradient of the critic be NaN at one step of one rank."""

    def spoil(gradient):
        bad = trainer.critic_iterations == now and trainer.rank == only
        return gradient * float("nan") if bad else gradient

    next(trainer.critic.parameters()).register_hook(spoil)


def check_grown():
    """Return weights and averages after steps of networks that got a layer, which each rank has drawn otherwise."""
    torch.manual_seed(0)
    generator, critic, _ = mlp_pair()
    trainer = Trainer(generator, critic, latent=LATENT, constraint=PENALTY, n_critic=2, seed=9, ema=0.9)
    data = torch.Generator().manual_seed(3)
    for i in range(8):
        if i == 3:
            torch.manual_seed(100 + trainer.rank)
            for network in (critic, generator):
                width = next(iter(network.parameters())).shape[1]
                network.insert(0, nn.utils.parametrizations.spectral_norm(nn.Linear(width, width).double()))
            trainer.averages(), trainer.state_dict()  # which leave no trace
        trainer.step(part(torch.randn(BATCH, 10, generator=data, dtype=F64)))
    return torch.cat((weights(trainer), *(x.flatten() for x in trainer.averages().values())))


def check_nonfinite(optimizer=None):
    """Weights before and after a step with one rank's gradient NaN, and the metrics of it, and of the next."""
    torch.manual_seed(0)
    generator, critic, _ = mlp_pair()
    options = {} if optimizer is None else {"critic_optimizer": optimizer(critic.parameters(), 0.01)}
    trainer = Trainer(generator, critic, latent=LATENT, constraint=PENALTY, nonfinite="skip", **options)
    poisoned(trainer, now=2, only=1)
    real = part(torch.randn(BATCH, 10, dtype=F64))
    trail = []
    for _ in range(4):
        metrics = trainer.step(real)
        trail.append((weights(trainer), metrics.as_dict()["nonfinite"]))
    return trail


def check_nonfinite_sgd():
    return check_nonfinite(torch.optim.SGD)


def message(kind, call, *args, **kwargs):
    """Of the error that the call raises."""
    try:
        call(*args, **kwargs)
    except kind as error:
        return str(error)
    return "no error"


def check_nonfinite_raises():
    torch.manual_seed(0)
    generator, critic, _ = mlp_pair()
    trainer = Trainer(generator, critic, latent=LATENT, constraint=CLIP)
    poisoned(trainer, now=0, only=1)
    before = weights(trainer)
    return message(FloatingPointError, trainer.step, part(torch.randn(BATCH, 10, dtype=F64))), before, weights(trainer)


def check_wrapped_inside():
    generator, critic, _ = mlp_pair()
    inside = nn.Sequential(DistributedDataParallel(critic))
    return message(ValueError, Trainer, generator, inside, latent=LATENT)


def dropout_trainer(seed):
    """Its dropout draws from the process's random stream, which each rank has of its own."""
    torch.manual_seed(seed)
    generator = models.mlp([LATENT, 16, 10]).to(F64)
    critic = nn.Sequential(nn.Linear(10, 16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1)).to(F64)
    return Trainer(generator, critic, latent=LATENT, constraint=PENALTY, n_critic=3, ema=0.9)


def dropout_steps(trainer, steps):
    data = torch.Generator().manual_seed(3)
    batches = [torch.randn(BATCH, 10, generator=data, dtype=F64) for _ in range(20)]
    metrics = [trainer.step(part(batches[trainer.critic_iterations])).as_dict() for _ in range(steps)]
    return torch.cat((weights(trainer), *(x.flatten() for x in trainer.averages().values()))), metrics


def check_resume(folder):
    """Go on from a checkpoint, also from the middle of an iteration, and in another trainer."""
    outcomes = {}
    for steps in (3, 7):
        trainer = dropout_trainer(seed=0)
        torch.manual_seed(100 + trainer.rank)
        dropout_steps(trainer, steps)
        path = folder / f"{steps} of {trainer.world}.pt"
        trainer.save(path)
        expected = dropout_steps(trainer, 6)
        other = dropout_trainer(seed=50 + trainer.rank)
        other.load(path)
        assert other.last_checkpoint == str(path)
        outcomes[steps] = (expected, dropout_steps(other, 6))
    return outcomes


def check_fit(folder):
    """Weights after 9 steps of fit, and after 4 and 5 more in a trainer that goes on from the run's checkpoint."""
    data = torch.Generator().manual_seed(3)
    batches = [part(torch.randn(BATCH, 10, generator=data, dtype=F64)) for _ in range(9)]
    straight = dropout_trainer(seed=0)
    torch.manual_seed(100 + straight.rank)
    straight.fit(batches, 9)

    first = dropout_trainer(seed=0)
    torch.manual_seed(100 + first.rank)
    first.fit(batches[:4], 4, out=folder / "run", log_every=2, save_every=3)
    second = dropout_trainer(seed=1)
    second.load(folder / "run" / "last.pt")
    second.fit(batches[4:], 5, out=folder / "run", log_every=2, save_every=3)
    return weights(straight), weights(second)


def check_save_fails(folder):
    """A rank that cannot write is no reason for the others to wait."""
    trainer = dropout_trainer(seed=0)
    return message(OSError, trainer.save, folder / "missing" / "last.pt"), trainer.last_checkpoint


def check_load_of_one(folder):
    """One process has written what several go on from."""
    trainer = dropout_trainer(seed=rank_and_world()[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.load(folder / "alone.pt")
    return [str(w.message) for w in caught], *dropout_steps(trainer, 4)


class Gapped(nn.Linear):
    """Its weight is every other column of a larger tensor, and its buffer lies transposed."""

    def __init__(self, width, out):
        super().__init__(width, out)
        self.weight = nn.Parameter(torch.randn(out, 2 * width)[:, ::2])
        self.register_buffer("shift", torch.randn(out, 1).t())

    def forward(self, x):
        return super().forward(x) + self.shift


def check_gaps():
    """Networks whose tensors are not dense start and stay the same."""
    torch.manual_seed(dist.get_rank())
    generator, critic = Gapped(LATENT, 10), Gapped(10, 1)
    trainer = Trainer(generator, critic, latent=LATENT)
    start = torch.cat((weights(trainer), generator.shift.flatten(), critic.shift.flatten()))
    trainer.step(part(torch.randn(BATCH, 10)))
    return start, weights(trainer)


def check_batch_sizes():
    """One rank gives fewer samples than the other."""
    torch.manual_seed(0)
    generator, critic, _ = mlp_pair()
    trainer = Trainer(generator, critic, latent=LATENT)
    before = weights(trainer)
    count = 8 - 2 * trainer.rank
    return (
        message(ValueError, trainer.step, torch.randn(count, 10, dtype=F64)),
        message(ValueError, trainer.generator_step, count),
        torch.equal(weights(trainer), before),
    )


def check_branches():
    """Each rank's pass uses another part of the critic: the gradients that there are."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(nn.Linear(10, 1).to(F64) for _ in range(3))

        def forward(self, x):
            return self.parts[dist.get_rank()](x)

    torch.manual_seed(0)
    critic = Critic()
    trainer = Trainer(mlp_pair()[0], critic, latent=LATENT, critic_optimizer=torch.optim.SGD(critic.parameters(), 0.1))
    trainer.critic_step(torch.ones(4, 10, dtype=F64) * (1 + dist.get_rank()))
    return {name: p.grad for name, p in critic.named_parameters() if p.grad is not None}


def check_settings():
    """Trainers that differ between ranks."""
    rank = dist.get_rank()
    generator, critic, _ = mlp_pair()
    make = partial(message, ValueError, Trainer)
    learning = RMSprop(critic.parameters(), 1e-3 * (1 + rank))
    return (
        make(generator, nn.Linear(10 + rank, 1), latent=LATENT),
        make(generator, nn.Linear(10, 1, bias=rank == 0), latent=LATENT),
        make(generator, critic, latent=LATENT, n_critic=3 + rank),
        make(generator, critic, latent=LATENT, critic_optimizer=learning),
        make(generator, mlp_pair()[1].requires_grad_(rank == 0).append(nn.Linear(1, 1)), latent=LATENT),
        make(generator, critic, latent=LATENT, n_critic=[lambda i: 2, lambda i: 3][rank]),
        make(generator, critic, latent=LATENT, critic_term=[None, BLEND["critic_term"]][rank]),
    )


def check_backend():
    """What would carry tensors of a GPU decides whether there can be graphs."""
    ranks = Ranks()
    return ranks.backend(torch.device("cpu")), ranks.backend(torch.device("cuda")), ranks.backend(torch.device("meta"))


# Workers


def work(rank, world, folder, names):
    """In a process of its own: one rank of each of the named cases and checks, whose results go to a file."""
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    results = {}
    for name in names:
        begun = time.perf_counter()
        if name in EQUAL:
            results[name] = case(name)
        else:
            check = globals()[f"check_{name}"]
            results[name] = check(folder) if "folder" in check.__code__.co_varnames[:1] else check()
        print(f"{name}: {time.perf_counter() - begun:.2f} s", flush=True)
        torch.save(results, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def in_ranks(world, folder, names):
    """What each rank returns for the named cases and checks: {name: [of rank 0, of rank 1, ...]}."""
    env = dict(os.environ, TRITON_INTERPRET="1", OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
    commands = [[sys.executable, __file__, str(rank), str(world), str(folder), *names] for rank in range(world)]
    workers = [
        subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for command in commands
    ]
    try:
        outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    assert [w.returncode for w in workers] == [0] * world, "\n\n".join(outputs)
    results = [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
    return {name: [result[name] for result in results] for name in names}


CHECKS = [name.removeprefix("check_") for name in globals() if name.startswith("check_")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two(folder):
    """What two ranks return."""
    torch.manual_seed(100)
    trainer = dropout_trainer(seed=0)
    dropout_steps(trainer, 4)
    trainer.save(folder / "alone.pt")
    return in_ranks(2, folder, [*EQUAL, *CHECKS])


def same_on_all(results):
    """To the bit, however nested; return rank 0's."""
    first = results[0]
    for other in results[1:]:
        torch.testing.assert_close(other, first, rtol=0, atol=0)
    return first


def assert_as_one(name, results):
    """All ranks have the same weights and metrics, which are those of one process."""
    tolerance = EQUAL[name][0]
    changed, metrics = same_on_all(results)
    expected, expected_metrics = case(name)
    assert len(metrics) == len(expected_metrics) >= 4
    torch.testing.assert_close(changed, expected, rtol=0, atol=tolerance)
    for row, expected_row in zip(metrics, expected_metrics, strict=True):
        # A weight whose gradient is zero but for rounding may leave its bound by an ulp.
        digits = {key: 0.01 if key == "saturation" else METRICS_DIGITS[tolerance] for key in expected_row}
        assert row == {key: pytest.approx(value, rel=1e-9, abs=digits[key]) for key, value in expected_row.items()}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.emulated) if name.startswith("triton") else name for name in EQUAL],
)
def test_two_ranks_train_as_one_process(two, name):
    assert_as_one(name, two[name])


def test_four_ranks_train_as_one_process(tmp_path):
    for name, results in in_ranks(4, tmp_path, ["clip", "pack penalty"]).items():
        assert len(results) == 4
        assert_as_one(name, results)


def test_what_is_compared_moves(two):
    """The comparisons above are of weights that training has changed."""
    start = trained(mlp_pair, steps=0)[0]
    assert (two["penalty"][0][0] - start).abs().max() > 1e-3


def test_weights_and_seed_are_rank_0s(two):
    torch.testing.assert_close(same_on_all(two["seeds"])[0], case("penalty")[0], rtol=0, atol=1e-12)


def test_batchnorm_and_float16_stay_the_same_on_all_ranks(two):
    assert same_on_all(two["batchnorm"])[0].isfinite().all()
    changed, metrics = same_on_all(two["float16"])
    assert changed.isfinite().all()
    assert metrics[-1]["nonfinite"] == 0


def test_latents_and_eps_are_parts_of_what_one_process_draws(two):
    (first, x0), (second, x1) = two["draws"]
    latents, x = check_draws()
    assert [len(z) for z in first] == 7 * [BATCH // 2]  # five critic steps' and two generator steps'
    for z, z0, z1 in zip(latents, first, second, strict=True):
        assert not torch.equal(z0, z1)
        assert torch.equal(torch.cat((z0, z1)), z)
    torch.testing.assert_close(torch.cat((x0, x1)), x, rtol=0, atol=1e-12)


def test_layers_that_come_later_are_the_first_ranks(two):
    torch.testing.assert_close(same_on_all(two["grown"]), check_grown(), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", ["nonfinite", "nonfinite_sgd"])
def test_a_nan_on_one_rank_leaves_the_step_out_on_all(two, name):
    trail = same_on_all(two[name])
    changed = [not torch.equal(after, before) for (before, _), (after, _) in pairwise(trail)]
    assert changed == [True, False, True]
    assert [count > 0 for _, count in trail] == [False, False, True, False]
    assert trail[-1][0].isfinite().all()


def test_a_nan_on_one_rank_raises_on_all(two):
    for error, before, after in two["nonfinite_raises"]:
        assert error.startswith("critic: step 1 had gradients that are not finite, first in 1.weight")
        assert torch.equal(before, after)


def test_wrapped_further_inside(two):
    for error in two["wrapped_inside"]:
        assert error.startswith("critic: expected a plain network, got one with DistributedDataParallel inside")


def test_resumes_bit_identically(two):
    for results in two["resume"]:
        for expected, resumed in results.values():
            torch.testing.assert_close(resumed, expected, rtol=0, atol=0)
    same_on_all(two["resume"])


def test_fit_resumes_bit_identically_and_logs_once(two, folder):
    straight, resumed = same_on_all(two["fit"])
    assert torch.equal(resumed, straight)
    rows = (folder / "run" / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[0] for row in rows] == ["2", "4", "6", "8", "9"]


def test_one_process_goes_on_from_two_ranks(two, folder):
    for steps in (3, 7):
        trainer = dropout_trainer(seed=7)
        with pytest.warns(
            UserWarning, match=r"^state_dict: saved by 2 processes, has the random streams of ranks \[0, 1\]"
        ):
            trainer.load(folder / f"{steps} of 2.pt")
        assert trainer.critic_iterations == steps
        dropout_steps(trainer, 4)


def test_two_ranks_go_on_from_one_process(two):
    for rank, (warned, changed, metrics) in enumerate(two["load_of_one"]):
        assert warned == [
            "state_dict: saved by 1 processes, has the random streams of ranks [0]; "
            f"those of rank {rank} of 2 go on as they are"
        ]
        assert changed.isfinite().all()
        assert len(metrics) == 4
    same_on_all([results[1:] for results in two["load_of_one"]])


def test_a_failure_to_save_is_all_ranks(two):
    for error, last in two["save_fails"]:
        assert "No such file" in error
        assert last is None


def test_tensors_with_gaps(two):
    same_on_all(two["gaps"])


def test_batches_of_different_sizes_are_refused(two):
    for of_real, of_batch_size, unchanged in two["batch_sizes"]:
        assert of_real == "real: expected batches of one size on all ranks, got scores of [8, 6]"
        assert of_batch_size == "batch_size: expected batches of one size on all ranks, got scores of [8, 6]"
        assert unchanged


def test_settings_that_differ_between_ranks_are_refused(two):
    for rank, errors in enumerate(two["settings"]):
        names = ["critic.weight", "critic.bias", "n_critic", "critic_optimizer", "critic.1.weight", "no error"]
        assert [error.split(":")[0] for error in errors] == [*names, "critic_term"]
        assert errors[2] == f"n_critic: expected the same on all ranks, got {3 + rank} on rank {rank} and " + (
            f"{4 - rank} on rank {1 - rank}"
        )


def test_ranks_may_use_different_parameters(two):
    """A gradient goes to its own parameter, whoever has it; what nobody uses has none."""
    gradients = same_on_all(two["branches"])
    assert sorted(gradients) == [f"parts.{i}.{name}" for i in (0, 1) for name in ("bias", "weight")]
    assert all(gradients[f"parts.{i}.weight"].abs().sum() > 0 for i in (0, 1))


def test_backend_of_a_device(two):
    assert two["backend"] == [("gloo", "gloo", "none")] * 2
    assert Ranks().backend(torch.device("cpu")) == "none"


def test_a_process_group_that_comes_too_late(monkeypatch):
    generator, critic, _ = mlp_pair()
    trainer = Trainer(generator, critic, latent=LATENT)
    trainer.step(torch.randn(4, 10, dtype=F64))
    monkeypatch.setattr("fastwgan.engine.ranks._place", lambda: (1, 2))
    with pytest.raises(RuntimeError, match=r"^Trainer: was made as rank 0 of 1, and this is rank 1 of 2 now"):
        trainer.step(torch.randn(4, 10, dtype=F64))


# By torchrun


# PyTorch's threads now and then abort an interpreter that shuts down round them.
LEAVE = "import os, sys\nsys.stdout.flush()\nos._exit(0)\n"


def torchrun(folder, text, *, processes=2):
    """Run a script as so many processes, in a folder: (exit status, output, seconds)."""
    (folder / "script.py").write_text(text)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": ""}
    begun = time.perf_counter()
    done = subprocess.run(
        [sys.executable, *launcher, "script.py"], check=False, cwd=folder, env=env, timeout=180, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    return done.returncode, done.stdout, time.perf_counter() - begun


README = Path(__file__).parents[2].joinpath("README.md").read_text()
(ACCELERATE,) = (block for block in re.findall(r"```py\n(.*?)```", README, re.DOTALL) if "accelerate" in block)


def test_accelerate(tmp_path):
    """Its launching, its loader and its device; networks as they are, and in the wrapper that it prepares for them."""
    double = "import torch\ntorch.set_default_dtype(torch.float64)\n"
    kept = "torch.save([trainer.critic_iterations, trainer.critic.state_dict()], f'{trainer.rank} %s.pt')\n"
    wrapping = "generator, critic = accelerator.prepare(generator, critic)\nprint(type(critic))\ntrainer ="
    ending = "accelerator.end_training()\n"
    assert ACCELERATE.endswith(ending)
    plain, end = ACCELERATE.removesuffix(ending), ending + LEAVE
    wrapped = plain.replace("trainer =", wrapping)
    states = {}
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        text = "".join((double, plain, kept % "plain", wrapped, kept % "wrapped", end))
        status, output, _ = torchrun(folder, text, processes=processes)
        assert status == 0, output
        assert ("DistributedDataParallel" in output) == (processes == 2)
        for rank in range(processes):
            for form in ("plain", "wrapped"):
                steps, state = torch.load(folder / f"{rank} {form}.pt")
                assert steps == 12
                states[processes, rank, form] = state
    for form in ("plain", "wrapped"):
        same_on_all([states[2, 0, form], states[2, 1, form]])
    for state in states.values():
        torch.testing.assert_close(state, states[1, 0, "plain"], rtol=0, atol=1e-9)
    generator, critic = models.mlp([6, 32, 10]).to(F64), models.mlp([10, 32, 1], slope=0.2).to(F64)
    trainer = Trainer(generator, critic, latent=6, constraint=PENALTY)
    with pytest.warns(UserWarning, match="^state_dict: saved by 2 processes"):
        trainer.load(tmp_path / "2" / "last.pt")
    same_on_all([trainer.critic.state_dict(), states[2, 0, "wrapped"]])


DIES = """
import os
import signal

import torch
import torch.distributed as dist

from fastwgan import Trainer, models

dist.init_process_group("gloo")
generator, critic = models.mlp([6, 16, 10]), models.mlp([10, 16, 1])
trainer = Trainer(generator, critic, latent=6)


def die(gradient):
    if trainer.rank == 1 and trainer.critic_iterations == 4:
        os.kill(os.getpid(), signal.SIGKILL)


next(critic.parameters()).register_hook(die)
for _ in range(1000):
    trainer.step(torch.randn(8, 10))
    trainer.save("last.pt")
"""


def test_a_rank_that_dies_ends_the_run(tmp_path):
    status, output, seconds = torchrun(tmp_path, DIES)
    assert status != 0
    assert "SIGKILL" in output or "Signal 9" in output
    assert seconds < 90
    trainer = Trainer(models.mlp([6, 16, 10]), models.mlp([10, 16, 1]), latent=6)
    with pytest.warns(UserWarning, match="^state_dict: saved by 2 processes"):
        trainer.load(tmp_path / "last.pt")
    assert trainer.critic_iterations == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.pt", "script.py"]


if __name__ == "__main__":
    work(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:])
    exec(LEAVE)
