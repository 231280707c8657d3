"""Projection onto a ball: its values, what it leaves alone, what it counts, and a trainer that has it."""

import copy
import math

import pytest
import torch
from cases import DTYPES, OWNED, SHAPES, SIZES, VALUES
from cases import LAYOUTS as ARRANGED
from count_launches import count_kernels, ours
from graphed_trainers import Recorded, assert_close_weights, batches, made
from small_trainers import F64, PAIRS, assert_same_state, quietly, weights
from tolerance import assert_close
from torch import nn

from benchmarks.implementations import textbook_critic_step
from fastwgan import Adam, NormClip, RMSprop, Trainer, functional, models, reference
from fastwgan.backend import kernels
from fastwgan.ops.weights import project_and_count_

PER = ("row", "tensor")
HALF = (torch.float16, torch.bfloat16)


@pytest.fixture(params=["triton", "torch"])
def backend(request):
    return request.param


def rows_of(p, per):
    return p.reshape(len(p) if per == "row" and p.dim() else 1, -1)


def projected(p, bound, per):
    """In float64, by Python's own norm, whose squares stay in range; rows that are not finite as they are."""
    exact = []
    for row in rows_of(p.detach().cpu().double(), per):
        values = row.tolist()
        most = max(map(abs, values))
        if math.isfinite(sum(values, 0.0) * 0.0) and most > 0:
            norm = math.hypot(*(x / most for x in values))
            if norm * most > bound:
                values = [x / most * (bound / norm) for x in values]
        exact.append(torch.tensor(values, dtype=F64))
    return torch.stack(exact).view(p.shape)


def check(label, p, bound, per, backend):
    """In place, by the rule of tolerance.py: against the reference in the dtype, and against float64."""
    exact, eager = projected(p, bound, per), p.clone()
    reference.clip_norms_([eager], bound, per)
    assert functional.clip_norms_([p], bound, per=per, backend=backend) is None
    assert_close(f"{label} {tuple(p.shape)} {p.dtype} per {per}", p, eager, exact, p.numel() // len(rows_of(p, per)))


def graded(shape, dtype, device):
    """Rows whose norms are about 1/2, 1, 2, 1/2, ..."""
    p = torch.randn(shape, device=device)
    rows = p.view(len(p), -1)
    rows /= rows.shape[1] ** 0.5
    rows *= torch.tensor([0.5, 1.0, 2.0], device=device).repeat(len(p))[: len(p), None]
    return p.to(dtype)


# The share on the bound, and the gate


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_share_on_the_bound(dtype, per, backend, device):
    """Of rows at the bound or outside, before: 3, 4 has norm 5 in every dtype."""
    three_four = torch.tensor([[3.0, 4.0], [0.0, -5.0], [3.0, 3.0], [30.0, 4.0], [math.nan, 9.0], [math.inf, 9.0]])
    params = [three_four, torch.tensor([5.0, -5.0, 4.5, 50.0, -50.0, math.nan, -math.inf]), torch.zeros(3000)]
    params += [torch.tensor(-6.0), torch.zeros(0), torch.full((3, 8200), 1.0)]
    params = [p.to(device, dtype) for p in params]
    on_bound, of = (3 + 4 + 1 + 3, 6 + 7 + 3000 + 1 + 3) if per == "row" else (2, 5)
    share, total = project_and_count_(params, 5.0, per, backend)
    assert total == of
    assert share.item() == pytest.approx(on_bound / of, rel=1e-6)


def test_the_share_of_several_dtypes_is_of_all_rows(backend, device):
    params = [torch.ones(n, 4, device=device, dtype=dtype) for n, dtype in zip((1, 2, 3, 10), DTYPES, strict=True)]
    params[-1][:] = 0.0
    share, total = project_and_count_(params, 1.0, "row", backend)
    assert total == 16
    assert share.item() == pytest.approx(6 / 16)
    assert project_and_count_([torch.zeros(0, device=device)], 1.0, "row", backend) is None


@pytest.mark.parametrize("per", PER)
def test_a_shut_gate_leaves_all_alone_and_counts_nothing(per, backend, device):
    params = [torch.randn(shape, device=device) for shape in ((40, 30), (7,), (3, 9000), (5, 7))]
    before = [p.clone() for p in params]
    gate = torch.tensor([1.0, 1.0], device=device)
    share, total = project_and_count_(params, 1e-3, per, backend, gate)
    assert share.isnan()
    assert total == (40 + 7 + 3 + 5 if per == "row" else 4)
    assert_same_state(params, before)
    gate[:] = torch.tensor([0.0, 0.25])  # a loss scale's factor is of gradients
    share, _ = project_and_count_(params, 1e-3, per, backend, gate)
    assert share.item() == pytest.approx(1)  # a quotient of counts, which a GPU may round
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p.cpu(), projected(q, 1e-3, per).float())


# Values


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("per", PER)
def test_sizes(per, size, dtype, backend, device):
    check("rows", graded((4, size), dtype, device), 1.0, per, backend)
    check("vector", graded((size,), dtype, device), 0.5, per, backend)


@pytest.mark.parametrize("shape", [(7, 5), (12, 16), (5, 3, 3, 3), (3, 1), (4, 2, 6)])
def test_torchs_renorm(shape, backend, device):
    """Which adds 1e-7 to the norm that it divides by, and wants two dimensions."""
    p = graded(shape, F64, device)
    expected = torch.renorm(p, 2, 0, 0.9)
    functional.clip_norms_(p, 0.9, backend=backend)
    torch.testing.assert_close(p, expected, rtol=1e-6, atol=0)
    assert rows_of(p, "row").norm(dim=1).max() <= 0.9 * (1 + 1e-15)


def test_elements_of_vectors_and_scalars_are_rows(backend, device):
    """Exactly on their bound, so clamped; also where a layer has one input."""
    for shape in ((5000,), (3001, 1), (), (1,)):
        p = 2 * torch.randn(shape, device=device)
        expected = p.clamp(-0.3, 0.3)
        functional.clip_norms_([p], 0.3, backend=backend)
        torch.testing.assert_close(p, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", SHAPES)
@pytest.mark.parametrize("layout", OWNED)
@pytest.mark.parametrize("per", PER)
def test_layouts(per, layout, rank, dtype, backend, device):
    p = ARRANGED[layout](graded(SHAPES[rank], dtype, device))
    stride, version = p.stride(), p._version
    check(layout, p, 0.8, per, backend)
    assert p.stride() == stride
    assert p._version > version


@pytest.mark.emulated
def test_a_channels_last_weight_is_projected_as_it_lies(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    p = torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last)
    for per in PER:
        functional.clip_norms_([p], 0.5, per=per, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("per", PER)
def test_extreme_values(per, values, dtype, backend, device):
    """Also where squares leave the range of what they are added up in; never does a row vanish."""
    p = VALUES[values]((5, 37), dtype, device)
    info = torch.finfo(dtype)
    for bound in (1e-3, 1.0, info.tiny, info.max / 2):
        q = p.clone()
        check(values, q, bound, per, backend)
        finite = rows_of(p, per).isfinite().all(1)
        if bound != info.tiny and values != "zeros":
            assert rows_of(q, per)[finite].any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 6, 64, 9000])
@pytest.mark.parametrize("per", PER)
def test_what_is_within_or_not_finite_stays_bit_for_bit(per, size, dtype, backend, device):
    p = torch.randn(6, size, device=device) / size**0.5 / 20
    p[1] = 0.0
    p[2, -1] = -0.0
    tensors = [p.to(dtype)]
    for bad in (math.nan, math.inf, -math.inf):
        tensors.append((30 * p[4:]).to(dtype))
        tensors[-1][:, size // 2] = bad
    before = [x.clone() for x in tensors]
    functional.clip_norms_(tensors, 1.0, per=per, backend=backend)
    for x, y in zip(tensors, before, strict=True):
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("per", PER)
def test_twice_is_once_but_for_rounding(per, dtype, backend, device):
    params = [3 * torch.randn(shape, device=device).to(dtype) for shape in ((9, 301), (40,), (3, 8200))]
    functional.clip_norms_(params, 0.7, per=per, backend=backend)
    before = [p.clone() for p in params]
    functional.clip_norms_(params, 0.7, per=per, backend=backend)
    for p, q in zip(params, before, strict=True):
        torch.testing.assert_close(p, q, rtol=4 * torch.finfo(dtype).eps, atol=torch.finfo(dtype).tiny)


@pytest.mark.parametrize("per", PER)
def test_many_tensors_of_all_dtypes(per, backend, device):
    params = [torch.randn(1 + i % 3, 1 + i % 17, device=device).to(DTYPES[i % 4]) for i in range(200)]
    params += [torch.randn(0, 3, device=device), torch.randn(3, 0, device=device), torch.randn((), device=device)]
    expected = [projected(p, 0.6, per) if p.numel() else p.clone() for p in params]
    functional.clip_norms_((p for p in params), 0.6, per=per, backend=backend)
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.cpu(), e.to(p.dtype).cpu(), rtol=2 * torch.finfo(p.dtype).eps, atol=1e-7)


@pytest.mark.emulated
@pytest.mark.parametrize("per", PER)
def test_all_parameters_are_one_launch(per):
    params = [torch.randn(shape) for shape in ((1,), (40, 30), (7,), (3, 9000), (), (4, 3, 2, 2))]
    with count_kernels() as counts:
        functional.clip_norms_(params, 0.1, per=per)
    assert ours(counts) == {"_project_kernel": 1}


# Misuse

X = torch.ones(4, 3)


@pytest.mark.parametrize(
    ("args", "options", "error", "message"),
    [
        ((3, 1.0), {}, TypeError, "parameters: expected tensors, got int"),
        (([X, X.long()], 1.0), {}, TypeError, r"parameters\[1\]: expected float16, .*got torch.int64"),
        (([X, X[:1].expand(4, 3)], 1.0), {}, ValueError, r"parameters\[1\]: expected each element to have its own"),
        (([X], 0), {}, ValueError, "bound: expected a finite number > 0, got 0"),
        (([X], math.inf), {}, ValueError, "bound: expected a finite number > 0, got inf"),
        (([X], "1"), {}, TypeError, "bound: expected a number, got str"),
        (([X, X.half()], 1e5), {}, ValueError, "bound: expected a number that torch.float16 can hold"),
        (([X], 1.0), {"per": "column"}, ValueError, "per: expected 'row' or 'tensor', got 'column'"),
        (([X], 1.0), {"per": None}, ValueError, "per: expected 'row' or 'tensor', got None"),
        (([X], 1.0), {"per": ["row"]}, ValueError, r"per: expected 'row' or 'tensor', got \['row'\]"),
        (([X], 1.0), {"backend": "cuda"}, ValueError, "backend: expected"),
    ],
)
def test_refused_calls_change_nothing(args, options, error, message):
    with pytest.raises(error, match=f"^{message}"):
        functional.clip_norms_(*args, **options)
    assert torch.equal(X, torch.ones(4, 3))


# A trainer that has it


def project_(params, bound, per):
    for p in params:
        if per == "row" and p.dim() > 1:
            norms = p.data.flatten(1).norm(dim=1).view(-1, *[1] * (p.dim() - 1))
        else:
            norms = p.data.abs() if per == "row" else p.data.norm()
        p.data.mul_((bound / norms).clamp(max=1))


OPTIMIZERS = {
    "default": lambda params: torch.optim.RMSprop(params, lr=5e-5),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.02),
    "Adam": lambda params: torch.optim.Adam(params, lr=0.02),
    "SGD": lambda params: torch.optim.SGD(params, lr=0.5),
}


@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("per", PER)
def test_a_step_is_the_textbooks_and_a_projection(per, optimizer, pair, backend, device):
    """float64, a plain loop: the same weights and the same share, step after step."""
    generator, critic, shape, latent = PAIRS[pair]()
    generator, critic = generator.to(device), critic.to(device)
    generator2, critic2 = copy.deepcopy((generator, critic))
    zs, kept = iter(torch.randn(4, 8, latent, dtype=F64, device=device)), []
    bound = 0.3
    trainer = quietly(
        Trainer, generator, critic, constraint=NormClip(bound, per), backend=backend,
        critic_optimizer=None if optimizer == "default" else OPTIMIZERS[optimizer](critic.parameters()),
        latent=lambda n, d: kept.append(next(zs)) or kept[-1],
    )  # fmt: skip
    theirs, shares = OPTIMIZERS[optimizer](critic2.parameters()), []
    for _ in range(4):
        real = torch.randn(8, *shape, dtype=F64, device=device)
        metrics = trainer.critic_step(real)
        textbook_critic_step(generator2, critic2, theirs, real, kept[-1])
        norms = torch.cat([rows_of(p, per).norm(dim=1) for p in critic2.parameters()])
        project_(critic2.parameters(), bound, per)
        torch.testing.assert_close(weights(critic), weights(critic2), rtol=1e-7, atol=1e-10)
        shares.append(float(metrics.saturation))
        least, most = ((norms > bound + change).double().mean().item() for change in (1e-9, -1e-9))
        assert least - 1e-6 <= shares[-1] <= most + 1e-6
    assert max(shares) > 0


@pytest.mark.emulated
@pytest.mark.parametrize("optimizer", [None, Adam, torch.optim.SGD])
def test_one_launch_after_the_update(optimizer):
    critic = models.mlp([10, 16, 1])
    optimizer = optimizer and optimizer(critic.parameters(), lr=0.01)
    trainer = quietly(
        Trainer, models.mlp([6, 10]), critic, latent=6, constraint=NormClip(), critic_optimizer=optimizer,
        backend="triton",
    )  # fmt: skip
    for _ in range(3):
        with count_kernels() as counts:
            trainer.critic_step(torch.randn(8, 10))
    assert counts["_project_kernel"] == 1
    assert counts["_update_kernel"] == (not isinstance(optimizer, torch.optim.SGD))


def test_excluded_parameters_are_not_projected(backend, device):
    critic = nn.Sequential(nn.Linear(10, 8), nn.LayerNorm(8), nn.Linear(8, 1)).to(device)
    constraint = NormClip(1e-2, exclude=("2.*", nn.LayerNorm))
    before = copy.deepcopy(critic)
    trainer = Trainer(models.mlp([6, 10]).to(device), critic, latent=6, constraint=constraint, backend=backend)
    metrics = trainer.critic_step(torch.randn(8, 10, device=device))
    assert critic[0].weight.norm(dim=1).max() <= 1e-2 * (1 + 1e-6)
    assert metrics.saturation > 0.5
    for name in ("1.weight", "2.weight", "2.bias"):
        torch.testing.assert_close(critic.state_dict()[name], before.state_dict()[name], rtol=0, atol=1e-3)


def test_defaults_and_the_warning():
    pair = models.mlp([6, 10]), models.mlp([10, 8, 1])
    trainer = Trainer(*pair, latent=6, constraint=NormClip())
    assert (NormClip().bound, NormClip().per, NormClip().exclude) == (1.0, "row", ())
    assert isinstance(trainer.critic_optimizer, RMSprop)
    assert trainer.critic_optimizer.param_groups[0]["lr"] == 5e-5
    assert trainer.critic_optimizer.param_groups[0]["clip"] is None
    with pytest.warns(UserWarning, match="^NormClip with a critic optimizer that has momentum"):
        Trainer(*pair, latent=6, constraint=NormClip(), critic_optimizer=Adam(pair[1].parameters()))


@pytest.mark.parametrize("per", PER)
def test_a_step_that_is_left_out_projects_nothing(per, backend, device):
    critic = models.mlp([10, 8, 1]).to(device)
    trainer = Trainer(
        models.mlp([6, 10]).to(device), critic, latent=6, constraint=NormClip(1e-3, per), nonfinite="skip",
        backend=backend,
    )  # fmt: skip
    before = copy.deepcopy(critic.state_dict())
    metrics = trainer.critic_step(torch.full((8, 10), math.nan, device=device))
    assert metrics.saturation.isnan()
    assert_same_state(dict(critic.state_dict()), dict(before))
    metrics = trainer.critic_step(torch.randn(8, 10, device=device))
    assert metrics.saturation > 0.5
    assert max(rows_of(p, per).norm(dim=1).max() for p in critic.parameters()) <= 1e-3 * (1 + 1e-6)


def test_resumed_training_is_uninterrupted_training(tmp_path, backend, device):
    def trainer():
        torch.manual_seed(0)
        networks = models.mlp([6, 10]).to(device), models.mlp([10, 8, 1]).to(device)
        return Trainer(*networks, latent=6, constraint=NormClip(0.3), n_critic=2, backend=backend, cuda_graph=False)

    data = torch.randn(8, 8, 10, device=device)
    whole, first, second = trainer(), trainer(), trainer()
    for real in data:
        whole.step(real)
    for real in data[:3]:
        first.step(real)
    first.save(tmp_path / "state.pt")
    second.load(tmp_path / "state.pt")
    for real in data[3:]:
        second.step(real)
    assert_same_state(dict(second.critic.state_dict()), dict(whole.critic.state_dict()))
    assert_same_state(dict(second.generator.state_dict()), dict(whole.generator.state_dict()))


@pytest.mark.parametrize("per", PER)
@pytest.mark.parametrize("pair", ["mlp", "conv"])
def test_graphed_steps_are_the_eager_ones(pair, per, graphed):
    """A bad step among them, which each replay leaves out by itself."""
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(
            graphed, cuda_graph, pair, constraint=NormClip(0.3, per), n_critic=1, nonfinite="skip",
            critic_optimizer=None,
        )  # fmt: skip
        data = batches(graphed, shape, 12)
        data[9][2] = math.nan
        shares = [float(trainer.step(real).saturation) for real in data]
        runs.append((trainer, shares))
    (eager, expected), (trainer, actual) = runs
    assert Recorded.made == 2
    assert_close_weights(trainer, eager, 1e-6)
    assert actual == pytest.approx(expected, nan_ok=True)
    assert [math.isnan(share) for share in actual] == [i == 9 for i in range(12)]


@pytest.mark.parametrize("per", PER)
def test_an_iteration_is_one_graph(per, graphed):
    runs = []
    for cuda_graph in (False, True):
        trainer, shape = made(graphed, cuda_graph, "conv", constraint=NormClip(0.3, per))
        data = batches(graphed, shape, 16)
        metrics = [m for i in range(0, 16, 2) for m in trainer.iteration(data[i : i + 2])]
        runs.append((trainer, [float(m.saturation) for m in metrics]))
    assert Recorded.made == 1
    assert_close_weights(runs[1][0], runs[0][0], 1e-6)
    assert runs[1][1] == pytest.approx(runs[0][1], abs=1e-3)


@pytest.mark.emulated
def test_new_bounds_do_not_reach_into_graphs_nor_share_tables():
    """One launcher serves any bound and both kinds of rows, in any order."""
    p = torch.randn(6, 40)
    for bound, per in ((2.0, "row"), (1.0, "tensor"), (2.0, "row"), (0.5, "tensor"), (0.25, "row")):
        q = p.clone()
        functional.clip_norms_(q, bound, per=per, backend="triton")
        torch.testing.assert_close(q, projected(p, bound, per).float())
    assert kernels.project.MAX_BLOCK >= kernels.project.MIN_BLOCK


def test_a_norm_just_outside_the_bound_is_brought_down_in_float64(backend, device):
    """The norm is outside by less than the bound's rounding to float32."""
    w = torch.full((1, 4), 0.15 * (1 + 5e-9), dtype=torch.float64, device=device)
    share, _ = project_and_count_([w], 0.3, "row", backend)
    assert w.norm().item() == pytest.approx(0.3, abs=1e-15)
    assert share == 1
