"""The guard: what its launch counts and decides, and that a step with a bad gradient is left out whole."""

import contextlib
import copy
import math
from itertools import product

import pytest
import torch
from count_launches import count_kernels, ours
from graphed_trainers import Recorded, batches, made
from small_trainers import CONSTRAINTS, assert_same_state, quietly, until_it_raises, weights
from torch import nn

from fastwgan import Adam, GradientPenalty, RMSprop, Trainer, WeightClip, models, reference
from fastwgan.backend import kernels
from fastwgan.engine import player
from fastwgan.engine.guard import READ_EVERY, Guard

BAD = [math.nan, math.inf, -math.inf]
F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
CHUNK = 4096  # gradient elements to a program
SCORES_CHUNK, PROGRAMS = 1024, 512  # scores to a block, and how many programs sum them


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def fresh(device, scale=None, served=0.0):
    """(tally, gate, scale) as a trainer starts with them."""
    kept = None if scale is None else torch.tensor([scale, served], device=device)
    return torch.zeros(9, dtype=torch.int64, device=device), torch.tensor([0.0, 1.0], device=device), kept


def assert_guards(launcher, state, gradients, scores=()):
    """One launch against the reference, from one state; returns the state after."""
    expected = [None if x is None else x.clone() for x in state]
    reference.guard_(gradients, *expected)
    found = launcher.launch(gradients, scores, *state)
    assert_same_state(list(state), expected)
    assert found[-1] == state[0][0]
    return found[:-1]


def randn(shape, device, dtype=F32):
    return torch.randn(shape, device=device).to(dtype)


def test_kernel_and_reference_have_the_same_places_and_constants():
    ours = kernels.guard
    assert {place.name: place.value for place in reference.Tally} == {
        name: getattr(ours, name).value for name in reference.Tally.__members__
    }
    assert (len(reference.Tally), reference.TALLY) == (ours.COUNT.value, ours.TALLY)
    assert ours.REACHED.value == ours.TALLY - 1
    for name in ("GROWTH_INTERVAL", "LEAST_SCALE", "MOST_SCALE"):
        assert getattr(ours, name).value == getattr(reference, name)


# The launch


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("numel", [1, 17, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK + 5])
def test_one_bad_element_anywhere_is_found(numel, dtype, device):
    launcher = kernels.guard.Guard()
    gradients = [randn(n, device, dtype) for n in (5, numel, 7)]
    assert_guards(launcher, fresh(device), gradients)
    for i, (place, bad) in enumerate(product(sorted({0, numel // 2, numel - 1}), BAD)):
        before = gradients[1][place].clone()
        gradients[1][place] = bad
        state = fresh(device)
        assert_guards(launcher, state, gradients)
        assert state[0].tolist() == [1, 1, 1, 1, 1, 1, 1, 0, 0], (i, place, bad)
        assert state[1].tolist() == [1.0, 1.0]
        gradients[1][place] = before


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
def test_large_networks_go_by_larger_blocks(dtype, device, monkeypatch):
    large = kernels.guard.LARGE_BLOCK
    monkeypatch.setattr(kernels.guard, "LARGE", large)
    launcher, blocks = kernels.guard.Guard(), []
    addresses = launcher._tables.addresses
    launcher._tables.addresses = lambda *args, **how: blocks.append(args[1]) or addresses(*args, **how)
    for numel in (large - 6, large - 5, 2 * large, 2 * large + 1):
        gradients = [randn(n, device, dtype) for n in (numel, 5)]
        gradients[0][[0, numel // 2, numel - 1]] = math.nan
        state = fresh(device)
        assert_guards(launcher, state, gradients)
        assert state[0][0] == 3
    assert blocks == [CHUNK, large, large, large]


def test_the_largest_finite_numbers_pass(device):
    for dtype in (F16, BF16, F32, F64):
        info = torch.finfo(dtype)
        gradient = torch.tensor([info.max, -info.max, info.tiny, -info.tiny / 4, 0.0], dtype=dtype, device=device)
        state = fresh(device)
        assert_guards(kernels.guard.Guard(), state, [gradient.repeat(CHUNK)])
        assert state[0].tolist() == [0, 0, 0, 0, 1, 0, 0, 0, 0]


def test_counts_and_the_first_tensor_with_several_dtypes(device):
    """The counts of all launches add up, and the first is the first in the network's order, not a launch's."""
    dtypes = [F32, F16, BF16, F64, F16, F32]
    launcher = kernels.guard.Guard()
    for bad in ([5], [4, 1], [3, 5, 4], [2], [0, 1, 2, 3, 4, 5]):
        gradients = [randn(CHUNK + 3 * i, device, dtype) for i, dtype in enumerate(dtypes)]
        for i in bad:
            gradients[i][torch.arange(0, 9 * (i + 1), 9, device=device)] = BAD[i % 3]
        state = fresh(device)
        with count_kernels() if device.type == "cpu" else contextlib.nullcontext({}) as counts:
            assert_guards(launcher, state, gradients, (randn(6, device), randn(6, device)))
        assert state[0][:2].tolist() == [sum(i + 1 for i in bad), min(bad)]
        assert ours(counts) in ({}, {"_guard_kernel": 4})  # one to a dtype


def test_all_elements_bad_are_all_counted(device):
    state = fresh(device)
    assert_guards(kernels.guard.Guard(), state, [torch.full((2 * CHUNK + 1,), math.nan, device=device)] * 2)
    assert state[0][0] == 4 * CHUNK + 2


def test_layouts(device):
    """Unaligned, channels_last, transposed, and not dense: the last as the guard's owner hands them on."""
    base = randn(CHUNK + 9, device)
    image = randn((3, 8, 5, 5), device).to(memory_format=torch.channels_last)
    layouts = [base[1:], image, randn((33, 65), device).t(), torch.empty((), device=device).fill_(2.0)]
    launcher = kernels.guard.Guard()
    for i, layout in enumerate(layouts):
        state = fresh(device)
        assert_guards(launcher, state, layouts)
        assert state[0][0] == 0
        before = layout.clone()
        layout[(-1,) * layout.dim()] = math.inf
        state = fresh(device)
        assert_guards(launcher, state, layouts)
        assert state[0][:2].tolist() == [1, i]
        layout.copy_(before)


def test_a_launch_leaves_its_gradients_alone(device):
    gradients = [randn(CHUNK + 1, device), randn(3, device)]
    before = [g.clone() for g in gradients]
    kernels.guard.Guard().launch(gradients, (), *fresh(device, 8.0))
    assert_same_state(gradients, before)


@pytest.mark.parametrize("scale", [None, 1024.0])
def test_the_state_machine(scale, device):
    """Good and bad steps in a row, against the reference and by hand."""
    launcher, state = kernels.guard.Guard(), fresh(device, scale)
    good, bad = [torch.ones(9, device=device)], [torch.tensor([1.0, math.nan], device=device)]
    in_a_row = skipped = last = longest = 0
    for i, step in enumerate("gbbgbbbggb", 1):
        factor = 1.0 if scale is None else 1 / state[2][0].item()
        assert_guards(launcher, state, good if step == "g" else bad)
        in_a_row, skipped = (0, skipped) if step == "g" else (in_a_row + 1, skipped + 1)
        last, longest = i if step == "b" else last, max(longest, in_a_row)
        assert state[0].tolist() == [step == "b", 0, in_a_row, skipped, i, last, longest, 0, 0]
        assert state[1].tolist() == [step == "b", factor]
    assert state[2] is None or state[2].tolist() == [1024.0 / 2**6, 0]


def test_the_scale_grows_after_2000_good_steps_in_a_row(device):
    launcher, good, bad = kernels.guard.Guard(), [torch.ones(2, device=device)], [torch.full((2,), math.inf)]
    bad = [bad[0].to(device)]
    state = fresh(device, 512.0, 1998.0)
    assert_guards(launcher, state, good)
    assert state[2].tolist() == [512.0, 1999.0]
    assert_guards(launcher, state, good)
    assert state[2].tolist() == [1024.0, 0.0]
    assert state[1].tolist() == [0.0, 1 / 512]  # these gradients were made with the old one
    state = fresh(device, 512.0, 1999.0)
    assert_guards(launcher, state, bad)
    assert state[2].tolist() == [256.0, 0.0]


@pytest.mark.slow
def test_two_thousand_steps_by_counting(device):
    launcher, state, good = kernels.guard.Guard(), fresh(device, 2.0), [torch.ones(2, device=device)]
    for _ in range(1999):
        launcher.launch(good, (), *state)
    assert state[2].tolist() == [2.0, 1999.0]
    launcher.launch(good, (), *state)
    assert state[2].tolist() == [4.0, 0.0]


@pytest.mark.parametrize("dtype", [F16, BF16, F32, F64])
@pytest.mark.parametrize("numel", [1, SCORES_CHUNK - 1, SCORES_CHUNK + 1, 9 * SCORES_CHUNK + 3])
def test_means_of_scores(numel, dtype, device):
    """In the gradients' launch, of more scores than gradients and of fewer."""
    real, fake = randn((numel, 1), device, dtype) + 3, randn((1, numel), device, dtype)
    exact = reference.score_statistics(real.double(), fake.double()).to(F64 if dtype == F64 else F32)
    for gradients in ([randn(5, device)], [randn(3 * CHUNK, device)]):
        means = assert_guards(kernels.guard.Guard(), fresh(device), gradients, (real, fake))
        assert means.dtype == exact.dtype
        torch.testing.assert_close(means, exact, rtol=1e-6, atol=1e-6)
        (loss,) = assert_guards(kernels.guard.Guard(), fresh(device), gradients, (fake,))
        torch.testing.assert_close(loss, -exact[1], rtol=1e-6, atol=1e-6)


def test_means_of_more_scores_than_programs_take_at_once(device):
    real, fake = randn(PROGRAMS * SCORES_CHUNK + 3, device) + 3, randn(5, device)
    means = assert_guards(kernels.guard.Guard(), fresh(device), [randn(5, device)], (real, fake))
    torch.testing.assert_close(means.double(), reference.score_statistics(real.double(), fake.double()))


def test_scores_are_shared_by_no_more_programs_than_sum_them(device, monkeypatch):
    """Gradients of more chunks have more programs, which leave the scores alone."""
    monkeypatch.setattr(kernels.guard, "MAX_PROGRAMS", 2)
    real, fake = randn(5 * SCORES_CHUNK, device) + 3, randn(5, device)
    means = assert_guards(kernels.guard.Guard(), fresh(device), [randn(6 * CHUNK, device)], (real, fake))
    torch.testing.assert_close(means.double(), reference.score_statistics(real.double(), fake.double()))


def test_scores_that_are_not_finite_show_but_skip_nothing(device):
    real = torch.tensor([1.0, math.inf], device=device)
    state = fresh(device)
    means = assert_guards(kernels.guard.Guard(), state, [torch.ones(3, device=device)], (real, real.neg()))
    assert means.tolist() == [math.inf, -math.inf, math.inf, -math.inf]
    assert state[0][0] == 0


@pytest.mark.emulated
def test_the_order_of_programs_does_not_matter():
    import poisoned_interpreter

    gradients = [randn(3 * CHUNK + 1, "cpu"), randn(2 * CHUNK, "cpu", F16)]
    gradients[0][[7, 5000]], gradients[1][-1] = math.nan, math.inf
    scores = randn(9000, "cpu"), randn(9000, "cpu")
    results = []
    for order in (lambda i, n: i, lambda i, n: n - 1 - i, lambda i, n: (i + n // 2) % n):
        state = fresh("cpu", 64.0)
        with poisoned_interpreter.program_order(order):
            found = kernels.guard.Guard().launch(gradients, scores, *state)
        results.append([found, *state])
    assert_same_state(results[1], results[0])
    assert_same_state(results[2], results[0])
    assert results[0][1][:2].tolist() == [3, 0]


# In a trainer


class Planted:
    """Puts a bad number into a parameter's gradient, in backward passes while ``on``."""

    def __init__(self, p, bad=math.nan, places=1):
        self.on, self._bad, self._places = False, bad, places
        p.register_hook(self._hook)

    def _hook(self, gradient):
        if not self.on:
            return gradient
        gradient = gradient.clone()
        gradient.view(-1)[: self._places] = self._bad
        return gradient


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.01, momentum=0.5)


OPTIMIZERS = {
    "default": lambda p: None,
    "RMSprop centered": lambda p: RMSprop(p, lr=1e-3, centered=True),
    "SGD": sgd,
}


def trainer_with(device, backend, constraint="penalty", optimizer="default", **options):
    torch.manual_seed(0)
    generator, critic = models.mlp([6, 16, 10]).to(device), models.mlp([10, 16, 12, 1], slope=0.2).to(device)
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (critic, generator)]
    for o in optimizers:
        if isinstance(o, RMSprop):
            o.backend = backend
    return quietly(
        Trainer, generator, critic, latent=6, constraint=CONSTRAINTS[constraint], critic_optimizer=optimizers[0],
        generator_optimizer=optimizers[1], backend=backend, n_critic=2, **{"nonfinite": "skip", **options},
    )  # fmt: skip


def changeable(trainer):
    """What a step that is left out must not change."""
    state = trainer.state_dict()
    for name in ("generator_optimizer", "critic_optimizer"):  # a state of zeros is one that is yet to be made
        kept = state[name]["state"]
        state[name]["state"] = {i: s for i, s in kept.items() if any(x is not None and x.any() for x in s.values())}
    return {key: state[key] for key in ("generator", "critic", "generator_optimizer", "critic_optimizer", "ema")}


@pytest.mark.parametrize("constraint", CONSTRAINTS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_bad_gradient_changes_nothing_and_training_goes_on_without(optimizer, constraint, backend, device):
    """Bit for bit; and the rest of the run is that of one in which the update is taken back by hand."""
    runs = []
    for plant in (True, False):
        trainer = trainer_with(device, backend, constraint, optimizer, ema=0.9)
        spots = [Planted(list(m.parameters())[2], places=3) for m in (trainer.critic, trainer.generator)]
        for i, real in enumerate(batches(device, (10,), 7)):
            bad = i in (0, 3, 4)  # a first step; one with a generator step; and the next
            before = changeable(trainer)
            for spot in spots:
                spot.on = plant and bad
            if i % 2:  # the generator's turn is apart, to be looked at by itself
                metrics = trainer.generator_step(8)
                names = "generator", "generator_optimizer"
            else:
                metrics = trainer.critic_step(real)
                names = "critic", "critic_optimizer"
            assert metrics.nonfinite == (3 if plant and bad else 0)
            if bad and plant:
                assert_same_state(changeable(trainer), before)
            elif bad:
                for name in names:
                    getattr(trainer, name).load_state_dict(before[name])
                for name, value in (before["ema"] or {}).items():
                    trainer._steps.generator.averages[dict(trainer.generator.named_parameters())[name]].copy_(value)
            else:
                assert not torch.equal(weights(getattr(trainer, names[0])), flat(before[names[0]]))
        runs.append(changeable(trainer) | {"count": (trainer.critic_iterations, trainer.generator_iterations)})
    assert_same_state(*runs)


def flat(state):
    return torch.cat([x.flatten() for x in state.values()])


@pytest.mark.parametrize("optimizer", ["default", "SGD"])
def test_a_nan_sample_leaves_the_step_out(optimizer, backend, device):
    """Also the clamp of weights that have never been clamped."""
    for constraint in CONSTRAINTS:
        trainer = trainer_with(device, backend, constraint, optimizer)
        real = torch.randn(8, 10, device=device)
        real[3, 4] = math.nan
        before = changeable(trainer)
        metrics = trainer.step(real)
        assert metrics.nonfinite > 100
        assert metrics.real_score.isnan()
        assert_same_state(changeable(trainer), before)
        metrics = trainer.step(real.nan_to_num())
        assert metrics.nonfinite == 0
        assert not torch.equal(weights(trainer.critic), flat(before["critic"]))


def test_parameters_that_are_clamped_apart_wait_for_a_good_step(backend, device):
    """One without a gradient, and one that no optimizer has."""
    critic = models.mlp([10, 8, 1]).to(device)
    critic.register_parameter("unused", nn.Parameter(torch.ones(3, device=device)))
    optimizer = RMSprop(critic[1].parameters(), backend=backend)
    trainer = Trainer(
        models.mlp([6, 10]).to(device), critic, latent=6, critic_optimizer=optimizer, backend=backend, nonfinite="skip"
    )
    before = weights(critic)
    trainer.critic_step(torch.full((8, 10), math.nan, device=device))
    assert torch.equal(weights(critic), before)
    trainer.critic_step(torch.randn(8, 10, device=device))
    assert weights(critic).abs().max() <= 0.01


def test_metrics_of_a_step_left_out_have_the_same_names(backend, device):
    trainer = trainer_with(device, backend, "clip")
    real = torch.randn(8, 10, device=device)
    good, bad = (trainer.critic_step(x).as_dict() for x in (real, real * math.nan))
    assert good.keys() == bad.keys()
    assert math.isnan(bad["saturation"])


@pytest.mark.parametrize("optimizer", ["default", "SGD"])
def test_raising_says_which_network_step_and_tensor_and_where_the_checkpoint_is(optimizer, backend, device, tmp_path):
    trainer = trainer_with(device, backend, "clip", optimizer, nonfinite="raise")
    real = torch.randn(8, 10, device=device)
    trainer.step(real)
    spots = [Planted(m[3].weight, bad, 2) for m, bad in ((trainer.critic, math.inf), (trainer.generator, math.nan))]
    before = weights(trainer.critic)
    spots[0].on = True
    with pytest.raises(FloatingPointError) as error:
        until_it_raises(trainer.critic_step, real)
    for told in ("critic: step 2 had", "not finite, first in 3.weight;", "there is no checkpoint"):
        assert told in str(error.value)
    assert torch.equal(weights(trainer.critic), before)
    spots[0].on, spots[1].on = False, True
    trainer.save(tmp_path / "here.pt")
    with pytest.raises(FloatingPointError) as error:
        until_it_raises(trainer.generator_step, 8)
    assert "generator: step 1 had" in str(error.value)
    assert f"the last checkpoint is {tmp_path / 'here.pt'}" in str(error.value)
    spots[1].on = False
    assert trainer.step(real).nonfinite == 0  # and one may go on


def test_skipping_raises_after_so_many_in_a_row_and_not_before(backend, device, monkeypatch):
    monkeypatch.setattr(player, "PATIENCE", 3)
    trainer = trainer_with(device, backend, "penalty", cuda_graph=False)  # which would keep the spot
    spot, real = Planted(trainer.critic[1].weight), torch.randn(8, 10, device=device)
    for bad in "bbgbbgbb":
        spot.on = bad == "b"
        trainer.critic_step(real)
        synchronize(device)
    spot.on = True
    with pytest.raises(
        FloatingPointError, match="^critic: 3 steps in a row up to 9 had gradients .* first in 1.weight"
    ):
        until_it_raises(trainer.critic_step, real)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize()


def test_each_network_has_its_own_count(backend, device, monkeypatch):
    monkeypatch.setattr(player, "PATIENCE", 2)
    trainer = trainer_with(device, backend, "clip")
    spots = [Planted(m[1].weight) for m in (trainer.critic, trainer.generator)]
    spots[0].on = spots[1].on = True
    real = torch.randn(8, 10, device=device)
    trainer.critic_step(real)
    trainer.generator_step(8)
    with pytest.raises(FloatingPointError, match="^generator: 2 steps in a row up to 2"):
        until_it_raises(trainer.generator_step, 8)
    with pytest.raises(FloatingPointError, match="^critic: 2 steps in a row up to 2"):
        until_it_raises(trainer.critic_step, real)


def test_names_are_of_parameters_that_have_gradients(backend):
    """Frozen, unused and empty ones stand before it."""
    critic = nn.Sequential(nn.Linear(10, 8), nn.ReLU(), nn.Linear(8, 1))
    critic[0].weight.requires_grad_(False)
    critic[0].register_parameter("unused", nn.Parameter(torch.ones(2)))
    critic[0].register_parameter("empty", nn.Parameter(torch.ones(0)))
    trainer = Trainer(models.mlp([6, 10]), critic, latent=6, backend=backend)
    Planted(critic[2].bias).on = True
    with pytest.raises(FloatingPointError, match=r"first in 2\.bias"):
        trainer.critic_step(torch.randn(8, 10))


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.SparseAdam])
def test_sparse_gradients_are_looked_at(optimizer, backend):
    """Of an embedding, by the optimizers that take them."""

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
        Trainer, Generator(6, 10), critic, latent=6, critic_optimizer=optimizer(critic.parameters(), lr=0.1),
        backend=backend, nonfinite="skip",
    )  # fmt: skip
    real, labels = torch.randn(8, 10), torch.arange(8) // 2
    before = weights(critic)
    assert trainer.critic_step(real * math.nan, labels).nonfinite > 0
    assert torch.equal(weights(critic), before)
    assert trainer.critic_step(real, labels).nonfinite == 0
    assert not torch.equal(weights(critic), before)


def test_a_skipped_first_step_of_another_optimizer_is_no_schedulers_fault(backend):
    """torch warns of a scheduler whose optimizer has taken no step, which is an error here."""
    generator, critic = models.mlp([6, 10]), models.mlp([10, 8, 1])
    optimizer = torch.optim.SGD(critic.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)
    trainer = Trainer(
        generator, critic, latent=6, critic_optimizer=optimizer, critic_scheduler=scheduler, nonfinite="skip",
        backend=backend,
    )  # fmt: skip
    trainer.critic_step(torch.full((8, 10), math.nan))
    trainer.critic_step(torch.randn(8, 10))
    assert optimizer.param_groups[0]["lr"] == 0.125


@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
def test_in_graphs(constraint, graphed, monkeypatch):
    """Replays leave bad steps out as steps without graphs do, and the host hears of them."""
    monkeypatch.setattr(player, "PATIENCE", 3)
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, constraint=constraint, n_critic=1, ema=0.5, nonfinite="skip")
        data = batches(graphed, shape, 12)
        for i in (3, 7, 8, 10):
            data[i][2, 3] = math.nan
        counts = []
        for i, real in enumerate(data):
            before = changeable(trainer)
            metrics = trainer.critic_step(real)
            trainer.generator_step(8)
            synchronize(graphed)
            counts.append(metrics.nonfinite.item())
            if i in (3, 7, 8, 10):
                after = changeable(trainer)
                assert_same_state(after["critic"], before["critic"])
                assert_same_state(after["critic_optimizer"], before["critic_optimizer"])
        assert [n > 0 for n in counts] == [i in (3, 7, 8, 10) for i in range(12)]
        runs.append((trainer, counts))
    assert Recorded.made == 2
    (eager, expected), (trainer, actual) = runs
    assert actual == expected
    assert (weights(trainer.critic) - weights(eager.critic)).norm() <= 1e-6 * weights(eager.critic).norm()
    assert_same_state(trainer.state_dict()["guards"], eager.state_dict()["guards"])
    with pytest.raises(FloatingPointError, match="^critic: 3 steps in a row up to 15"):
        until_it_raises(trainer.critic_step, data[3])


def test_the_tally_goes_on_after_a_load(backend, device, tmp_path, monkeypatch):
    monkeypatch.setattr(player, "PATIENCE", 3)
    first, second = (trainer_with(device, backend) for _ in range(2))
    bad = torch.full((8, 10), math.nan, device=device)
    for _ in range(2):
        first.critic_step(bad)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    synchronize(device)
    with pytest.raises(FloatingPointError, match="^critic: 3 steps in a row up to 3 .* checkpoint is .*state.pt"):
        until_it_raises(second.critic_step, bad)


def test_a_state_without_a_scale_loads_where_there_is_one_and_back(backend, device):
    plain, scaled = trainer_with(device, backend), trainer_with(device, backend, amp=F16)
    real = torch.randn(8, 10, device=device)
    plain.critic_step(real)
    scaled._steps.critic.guard.scale.fill_(512.0)
    state = copy.deepcopy(scaled.state_dict())
    scaled.load_state_dict(plain.state_dict())
    assert scaled._steps.critic.guard.scale == 512
    assert torch.equal(weights(scaled.critic), weights(plain.critic))
    plain.load_state_dict(state)
    plain.critic_step(real)
    assert plain._steps.critic.guard.gate.tolist() == [0, 1]
    other = trainer_with(device, backend, amp=F16)
    other.load_state_dict(state)
    assert other._steps.critic.guard.scale == 512


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"nonfinite": "ignore"}, ValueError, "nonfinite"),
        ({"max_skipped": 3}, TypeError, "max_skipped: was removed; leave it out"),
    ],
)
def test_bad_arguments_are_named(options, error, name):
    with pytest.raises(error, match=f"^{name}:"):
        Trainer(models.mlp([6, 10]), models.mlp([10, 1]), latent=6, **options)


def test_our_adam_in_a_bad_step_of_two_dtypes(backend, device):
    """A network of two dtypes has two launches of the update; one bad gradient keeps both from it."""

    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(10, 8), nn.Linear(8, 1).double()

        def forward(self, x):
            return self.second(self.first(x).relu().double())

    critic = Critic().to(device)
    trainer = Trainer(
        models.mlp([6, 10]).to(device), critic, latent=6, constraint=GradientPenalty(), nonfinite="skip",
        critic_optimizer=Adam(critic.parameters(), backend=backend), backend=backend,
    )  # fmt: skip
    spot, real = Planted(critic.second.weight), torch.randn(8, 10, device=device)
    trainer.critic_step(real)
    for bad in (True, False):
        spot.on, before = bad, trainer.state_dict()
        assert trainer.critic_step(real).nonfinite == bad
        after = trainer.state_dict()
        if bad:
            assert_same_state(after["critic"], before["critic"])
            assert_same_state(after["critic_optimizer"], before["critic_optimizer"])
        else:
            for name in ("first.weight", "second.weight"):
                assert not torch.equal(after["critic"][name], before["critic"][name])


def test_a_row_that_ended_before_the_host_looked_is_told_of(device):
    """On a GPU the host may look some steps late, when a step was good again."""
    critic = nn.Linear(10, 1).to(device)
    guard = Guard("critic", critic, "torch", limit=1, scaled=False)
    for bad in (True, True, False):
        critic.weight.grad = torch.full_like(critic.weight, math.nan if bad else 1.0)
        guard.check([*critic.parameters()])

    def watch():
        for _ in range(2 * READ_EVERY):  # the first look at a GPU is on its way
            guard.watch(None)
            if device.type == "cuda":
                torch.cuda.synchronize()

    with pytest.raises(FloatingPointError, match="^critic: 2 steps in a row up to 2 had"):
        watch()
    watch()  # once is enough


def test_a_scale_stays_within_bounds(device):
    """Bad data now and then is no fault of the scale's: it must not shrink until nothing moves, or grow to infinity."""
    launcher, state = kernels.guard.Guard(), fresh(device, 2.0)
    for _ in range(3):
        assert_guards(launcher, state, [torch.tensor([math.nan], device=device)])
    assert state[2][0] == 1
    state[2].copy_(torch.tensor([2.0**24, 1999.0]))
    assert_guards(launcher, state, [torch.ones(1, device=device)])
    assert state[2].tolist() == [2.0**24, 0]


def test_a_row_that_has_ended_is_not_held_against_a_resumed_run():
    guards = [Guard("critic", nn.Linear(2, 1), "torch", limit=limit, scaled=False) for limit in (5, 0)]
    critic = guards[0]._module
    for bad in (True, False):
        critic.weight.grad = torch.full_like(critic.weight, math.nan if bad else 1.0)
        guards[0].check([*critic.parameters()])
    guards[1].load_state_dict(guards[0].state_dict())
    guards[1].watch(None)


def test_the_callers_optimizer_is_its_own_between_steps():
    critic = nn.Linear(10, 1)
    optimizer = RMSprop(critic.parameters())
    trainer = Trainer(nn.Linear(6, 10), critic, latent=6, critic_optimizer=optimizer, nonfinite="skip")
    trainer.critic_step(torch.full((8, 10), math.nan))
    before = critic.weight.detach().clone()
    critic.weight.grad = torch.ones_like(critic.weight)
    optimizer.step()
    assert not torch.equal(critic.weight, before)


def test_a_torch_optimizer_used_again_has_no_bound_of_the_trainer_before():
    critic = nn.Linear(10, 1)
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3, betas=(0.0, 0.9))
    quietly(Trainer, nn.Linear(6, 10), critic, latent=6, critic_optimizer=optimizer, constraint=WeightClip(0.01))
    trainer = Trainer(nn.Linear(6, 10), critic, latent=6, critic_optimizer=optimizer, constraint=GradientPenalty())
    trainer.critic_step(torch.randn(8, 10))
    assert critic.weight.abs().max() > 0.02


def test_a_state_is_not_written_to_after_it_was_loaded():
    critic = nn.Linear(10, 1)
    optimizer = torch.optim.AdamW(critic.parameters())
    trainer = Trainer(nn.Linear(6, 10), critic, latent=6, critic_optimizer=optimizer, constraint=GradientPenalty())
    trainer.critic_step(torch.randn(8, 10))
    state = trainer.state_dict()
    before = copy.deepcopy(state)
    trainer.load_state_dict(state)
    trainer.critic_step(torch.randn(8, 10))
    assert_same_state(state, before)
