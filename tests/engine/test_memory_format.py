"""Networks and batches in channels_last: the same training, and checkpoints, samples and errors that fit it."""

import copy
import pickle

import pytest
import torch
from graphed_trainers import Recorded, assert_close_weights, batches, made
from small_trainers import F64, PAIRS, assert_same_state, quietly, weights
from torch import nn

from fastwgan import Adam, GradientPenalty, NormClip, Trainer, WeightClip

LAST = torch.channels_last
CPU = torch.device("cpu")


TERMS = {
    "critic_term": lambda s: (s.real_scores - 2 * s.fake_scores).square().mean(),
    "generator_term": lambda s: (s.real_scores - s.fake_scores).square().mean() + (s.fake - s.real).abs().mean(),
}


def is_last(x):
    """Whether it lies so, and not contiguous as well."""
    return x.is_contiguous(memory_format=LAST) and not x.is_contiguous()


class Pairs(nn.Module):
    """One score for two samples."""

    def forward(self, scores):
        return scores.reshape(-1, 2).sum(1)


def packed_pair(dtype):
    generator, critic, shape, latent = PAIRS["conv"](dtype)
    return generator, critic.append(Pairs()), shape, latent


def trainer_of(pair="conv", memory_format=LAST, dtype=F64, **options):
    torch.manual_seed(0)
    generator, critic, shape, latent = (PAIRS | {"packed": packed_pair})[pair](dtype)
    options = {"latent": latent, "n_critic": 2, "backend": "torch", "memory_format": memory_format} | options
    return quietly(Trainer, generator, critic, **options), shape


def trained(trainer, shape, steps=4, dtype=F64):
    return [trainer.step(real.to(dtype)).as_dict() for real in batches(CPU, shape, steps)]


@pytest.mark.parametrize(
    ("pair", "options"),
    [
        ("conv", {"constraint": WeightClip(0.05), "ema": 0.9}),
        ("conv", {"constraint": NormClip(0.5)}),
        ("conv", {"constraint": GradientPenalty(), "ema": 0.9}),
        ("conv", {"constraint": GradientPenalty(at="real", kind="zero-centered"), "n_critic": 1}),
        ("conv", {"constraint": GradientPenalty(), "compile": True}),
        ("packed", {"constraint": GradientPenalty(), "pack": 2, **TERMS}),
        ("conv", {"constraint": WeightClip(0.05), "compile": True, **TERMS}),
        ("batchnorm", {"constraint": WeightClip(0.05)}),
        ("batchnorm", {"constraint": GradientPenalty(), "ema": 0.9}),
    ],
)
def test_it_trains_to_what_contiguous_networks_do(pair, options, traced_only):
    runs = []
    for memory_format in (None, LAST):
        trainer, shape = trainer_of(pair, memory_format, **options)
        runs.append((trainer, trained(trainer, shape)))
    (plain, expected), (trainer, metrics) = runs
    for a, e in zip(metrics, expected, strict=True):
        assert a == pytest.approx(e, rel=1e-9, abs=1e-12)
    assert_close_weights(trainer, plain, 1e-9)
    images = [p for m in (trainer.generator, trainer.critic) for p in m.parameters() if p.dim() == 4]
    assert any(map(is_last, images))
    assert all(p.is_contiguous(memory_format=LAST) for p in images)
    for ema in (False, True)[: 1 + ("ema" in options)]:
        samples = trainer.sample(3, ema=ema, seed=1)
        assert samples.is_contiguous()
        torch.testing.assert_close(samples, plain.sample(3, ema=ema, seed=1))


class Seen(nn.Module):
    """Notes how what comes lies in memory."""

    def __init__(self, channels):
        super().__init__()
        self.conv, self.seen = nn.Conv2d(channels, 3, 3, padding=1), []

    def forward(self, x, *cond):
        self.seen.append([is_last(part) for part in (x, *cond) if isinstance(part, torch.Tensor) and part.dim() == 4])
        return self.conv(x)


class Score(Seen):
    def forward(self, x, *cond):
        return super().forward(x, *cond).mean((1, 2, 3))


def test_images_latents_and_conditions_are_brought_into_the_format():
    draw = lambda n, device: torch.randn(n, 2, 4, 4, device=device)  # noqa: E731
    generator, critic = Seen(2), Score(3)
    trainer = Trainer(generator, critic, latent=draw, constraint=GradientPenalty(), n_critic=1, memory_format=LAST)
    trainer.step(torch.randn(4, 3, 4, 4), torch.randn(4, 2, 4, 4), torch.ones(4), "text")
    assert generator.seen == [[True, True]] * 2
    assert all(critic.seen[0]), "of real samples"
    assert len(critic.seen) == 4
    assert all(map(all, critic.seen))


def test_one_channel_and_one_pixel_lie_so_as_well():
    """Strides of one channel are anybody's; a convolution goes by them."""
    trainer, _ = trainer_of()
    real = torch.randn(8, 1, 8, 8, dtype=F64)
    given = trainer._settings.formatted(real)
    assert given.stride() == (64, 1, 8, 1)
    assert trainer._settings.formatted(given) is given
    assert trainer.critic[0].weight.stride()[1] == 1


@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
def test_graphs_keep_the_format(constraint, graphed):
    runs = []
    for cuda_graph, memory_format in ((False, None), (True, LAST)):
        trainer, shape = made(graphed, cuda_graph, "conv", constraint=constraint, memory_format=memory_format, ema=0.9)
        data = batches(graphed, shape, 20)
        for real in data[:12]:
            trainer.step(real)
        for i in range(12, 20, 2):
            trainer.iteration([real.to(memory_format=LAST) for real in data[i : i + 2]])
        runs.append(trainer)
    assert_close_weights(*runs, 1e-5)
    assert Recorded.made == 3, "no other graph for images that lie so from the start"
    static = [x for graph in runs[1]._steps.graphs._graphs.values() for x in graph.args if isinstance(x, torch.Tensor)]
    assert {x.stride() for x in static} == {(64, 1, 8, 1)}


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD, Adam])
def test_optimizers_with_state_are_taken_over(kind):
    options = {"momentum": 0.9} if kind is torch.optim.SGD else {"betas": (0.5, 0.9)}
    runs = []
    for memory_format in (None, LAST):
        torch.manual_seed(0)
        generator, critic, shape, latent = PAIRS["conv"](F64)
        optimizers = [kind(m.parameters(), 1e-2, **options) for m in (critic, generator)]
        for real in batches(CPU, shape, 2):
            critic(real.to(F64)).sum().backward()
            optimizers[0].step()
        trainer = Trainer(
            generator, critic, latent=latent, constraint=GradientPenalty(), critic_optimizer=optimizers[0],
            generator_optimizer=optimizers[1], memory_format=memory_format, backend="torch", n_critic=2,
        )  # fmt: skip
        trained(trainer, shape)
        runs.append(trainer)
    assert_close_weights(*runs, 1e-9)
    for a, b in zip(*(t.critic_optimizer.state.values() for t in runs), strict=True):
        for name, x in a.items():
            torch.testing.assert_close(b[name], x)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("loaded", [None, LAST])
@pytest.mark.parametrize("saved", [None, LAST])
def test_checkpoints_are_contiguous_and_fit_either(saved, loaded, backend, tmp_path):
    options = {"constraint": GradientPenalty(), "ema": 0.9, "backend": backend, "dtype": torch.float32}
    first, shape = trainer_of(memory_format=saved, **options)
    trained(first, shape, 3, torch.float32)
    first.save(tmp_path / "x.pt")

    def tensors(x):
        if isinstance(x, (dict, list, tuple)):
            return [t for part in (x.values() if isinstance(x, dict) else x) for t in tensors(part)]
        return [x] if isinstance(x, torch.Tensor) else []

    state = first.state_dict()
    assert len(tensors(state)) > 30
    assert all(x.is_contiguous() for x in tensors(state))
    assert state["critic"]._metadata == first.critic.state_dict()._metadata
    second, _ = trainer_of(memory_format=loaded, **options)
    second.load(tmp_path / "x.pt")
    assert_same_state(second.state_dict(), state)
    assert is_last(second.critic[2].weight) == (loaded is LAST)
    trained(first, shape, 3, torch.float32)
    trained(second, shape, 3, torch.float32)
    if saved == loaded:
        assert_same_state(second.state_dict(), first.state_dict())
    assert_close_weights(second, first, 1e-5)


def test_copies_are_of_the_format():
    trainer, shape = trainer_of(constraint=GradientPenalty())
    trained(trainer, shape, 2)
    copies = [copy.deepcopy(trainer), pickle.loads(pickle.dumps(trainer))]
    for each in (trainer, *copies):
        trained(each, shape, 2)
    for each in copies:
        assert is_last(each.critic[2].weight)
        assert_same_state(each.state_dict(), trainer.state_dict())


# Bad input


class View(nn.Module):
    def forward(self, h):
        return h.view(len(h), -1)


def viewing(which):
    generator = nn.Sequential(nn.Linear(6, 48), nn.Unflatten(1, (3, 4, 4)), nn.Conv2d(3, 3, 3, padding=1))
    critic = [nn.Conv2d(3, 4, 3, padding=1), nn.Flatten(), nn.Linear(64, 1)]
    if which == "critic":
        critic[1] = View()
    elif which == "generator":
        generator.append(View()).append(nn.Unflatten(1, (3, 4, 4)))
    return generator, nn.Sequential(*critic)


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("constraint", [WeightClip(), GradientPenalty()])
@pytest.mark.parametrize("which", ["generator", "critic"])
def test_a_view_is_told_with_its_remedy(which, constraint, compile, traced_only):
    networks = viewing(which)
    before = [weights(m).clone() for m in networks]
    options = {"latent": 6, "constraint": constraint, "compile": compile, "n_critic": 1}
    trainer = Trainer(*networks, memory_format=LAST, **options)
    latents = trainer._steps.latents.stream.get_state()
    words = "^memory_format: .* calls view .*: call reshape or flatten there, or leave memory_format out$"
    for call in (
        lambda: trainer.step(torch.randn(4, 3, 4, 4)),
        lambda: trainer.iteration([torch.randn(4, 3, 4, 4)]),
        lambda: trainer.generator_step(4),
        *([lambda: trainer.sample(2)] if which == "generator" else ()),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert isinstance(caught.value.__cause__, RuntimeError)
    assert all(torch.equal(weights(m), kept) for m, kept in zip(networks, before, strict=True))
    assert torch.equal(trainer._steps.latents.stream.get_state(), latents)
    assert trainer.critic_iterations == 0
    Trainer(*viewing(which), **options).step(torch.randn(4, 3, 4, 4))


def test_other_errors_of_a_forward_pass_are_their_own():
    generator, critic = viewing("none")
    trainer = Trainer(generator, critic[:2].append(nn.Linear(5, 1)), latent=6, memory_format=LAST)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        trainer.step(torch.randn(4, 3, 4, 4))


@pytest.mark.parametrize(
    "value", [torch.contiguous_format, torch.preserve_format, torch.channels_last_3d, "channels_last"]
)
def test_another_format_is_refused_before_anything_changes(value):
    networks = viewing("critic")
    with pytest.raises(ValueError, match="^memory_format: expected None or torch.channels_last, got "):
        Trainer(*networks, latent=6, memory_format=value)
    assert all(p.is_contiguous() for m in networks for p in m.parameters())


def test_none_leaves_a_layout_of_the_callers_own():
    networks = [m.to(memory_format=LAST) for m in viewing("none")]
    trainer = Trainer(*networks, latent=6)
    trainer.step(torch.randn(4, 3, 4, 4))
    assert is_last(networks[1][0].weight)
    assert is_last(trainer.sample(2))
