"""Networks that change while they train: trained, clipped, guarded, averaged and saved, or refused in words."""

import copy
import gc
import weakref

import pytest
import torch
from plain_loop import F64, Latents, N, Running, assert_as_plain, own_layers, pair
from small_trainers import assert_same_state, quietly, weights
from torch import nn

from fastwgan import GradientPenalty, NormClip, Trainer, WeightClip, functional

# Growth, thaw and frost


def grown(constraint, kind=torch.optim.Adam, whose="caller's", ema=None):
    """Train a critic, put a layer in front of it, give its parameters to an optimizer, and go on."""
    generator, critic = pair()
    own = None if kind is None else kind(critic.parameters(), lr=5e-3)
    trainer = quietly(
        Trainer, generator, critic, latent=Latents(), constraint=constraint, critic_optimizer=own, ema=ema
    )
    for _ in range(3):
        trainer.step(torch.randn(N, 2, dtype=F64))
    new = nn.Linear(2, 2).double()
    critic.insert(0, new)
    if whose == "caller's":
        own.add_param_group({"params": list(new.parameters()), "lr": 1e-2})
    elif whose == "trainer's":
        trainer.critic_optimizer.add_param_group({"params": list(new.parameters()), "lr": 1e-2})
    before = new.weight.detach().clone()
    metrics = [trainer.step(torch.randn(N, 2, dtype=F64)) for _ in range(3)][-1]
    assert not torch.equal(new.weight, before)
    return trainer, metrics


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClip(0.01), NormClip(0.1, per="tensor")])
@pytest.mark.parametrize(
    ("kind", "whose"),
    [(k, w) for k in (torch.optim.Adam, torch.optim.RMSprop, torch.optim.SGD) for w in ("caller's", "trainer's")]
    + [(None, "default")],
)
def test_layers_are_added_and_join_the_optimizer(constraint, kind, whose):
    trainer, metrics = grown(constraint, kind, whose)
    if isinstance(constraint, WeightClip):
        assert weights(trainer.critic).abs().max() <= 0.01
        assert 0 < metrics.saturation <= 1
    elif isinstance(constraint, NormClip):
        assert all(p.norm() <= 0.1 + 1e-9 for p in trainer.critic.parameters())
    state = trainer.state_dict()
    generator, critic = nn.Linear(3, 2).double(), copy.deepcopy(trainer.critic)
    own = None if kind is None else kind(list(critic[1:].parameters()), lr=1.0)
    if own is not None:
        own.add_param_group({"params": list(critic[0].parameters())})
    again = quietly(Trainer, generator, critic, latent=Latents(), constraint=constraint, critic_optimizer=own)
    again.load_state_dict(state)
    again.latent = copy.deepcopy(trainer.latent)
    for _ in range(7):
        batch = torch.randn(N, 2, dtype=F64)
        trainer.step(batch)
        again.step(batch)
    assert torch.equal(weights(again.critic), weights(trainer.critic))
    assert torch.equal(weights(again.generator), weights(trainer.generator))


def test_a_group_that_joins_has_the_users_numbers():
    """The group names none of its own, and gets those of the optimizer that was taken over."""
    _, critic = pair()
    own = torch.optim.RMSprop(critic.parameters(), lr=1e-4, eps=1e-3)
    trainer = Trainer(nn.Linear(3, 2).double(), critic, latent=Latents(), critic_optimizer=own)
    trainer.critic_optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2, dtype=F64))]})
    assert [(g["lr"], g["eps"]) for g in own.param_groups] == [(1e-4, 1e-3)] * 2


def test_a_state_of_networks_that_have_just_grown_loads():
    """Before the generator's next step, and with its averages."""

    def networks(grown):
        generator, critic = nn.Sequential(nn.Linear(3, 4)), nn.Linear(4, 1)
        return generator.insert(0, nn.Linear(3, 3)) if grown else generator, critic

    options = {"latent": 3, "n_critic": 5, "ema": 0.9}
    trainer, again = Trainer(*networks(False), **options), Trainer(*networks(True), **options)
    trainer.step(torch.randn(4, 4))
    trainer.generator.insert(0, nn.Linear(3, 3))
    trainer.step(torch.randn(4, 4))
    again.load_state_dict(trainer.state_dict())
    assert_same_state(again.state_dict(), trainer.state_dict())
    assert trainer.averages().keys() == dict(trainer.generator.named_parameters()).keys()


def test_a_layer_that_no_optimizer_has_is_refused_before_anything_changes():
    generator, critic = pair()
    own = torch.optim.Adam(critic.parameters(), lr=1e-3)
    trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty(), critic_optimizer=own)
    trainer.step(torch.randn(N, 2, dtype=F64))
    critic.append(nn.Linear(1, 1).double())
    real = torch.randn(N, 2, dtype=F64)
    before = trainer.state_dict()
    with pytest.raises(ValueError, match=r"^critic_optimizer: expected the parameters .* lacks 3.weight, 3.bias: add "):
        trainer.step(real)
    assert_same_state(trainer.state_dict(), before)
    critic[3].requires_grad_(False)
    trainer.step(torch.randn(N, 2, dtype=F64))


def test_a_generator_that_grows_has_averages_of_its_new_weights():
    generator = nn.Sequential(nn.Linear(3, 2))
    trainer = Trainer(generator, nn.Linear(2, 1), latent=3, n_critic=1, ema=0.5)
    trainer.step(torch.randn(N, 2))
    generator.append(nn.Linear(2, 2))
    start = generator[1].weight.detach().clone()
    trainer.step(torch.randn(N, 2))
    torch.testing.assert_close(trainer.averages()["1.weight"], (start + generator[1].weight.detach()) / 2)
    del generator[1]
    trainer.step(torch.randn(N, 2))
    assert trainer.averages().keys() == {"0.weight", "0.bias"} == trainer.state_dict()["ema"].keys()
    assert set(trainer._steps.generator.averages) == set(generator.parameters())


@pytest.mark.parametrize("given", [False, True])
def test_layers_that_are_unfrozen_later_are_trained(given):
    generator, critic = pair()
    optimizer = torch.optim.Adam(critic.parameters(), lr=1e-3) if given else None
    critic[0].requires_grad_(False)
    trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty(), critic_optimizer=optimizer)
    before = critic[0].weight.detach().clone()
    trainer.step(torch.randn(N, 2, dtype=F64))
    assert torch.equal(critic[0].weight, before)
    critic[0].requires_grad_(True)
    trainer.step(torch.randn(N, 2, dtype=F64))
    assert not torch.equal(critic[0].weight, before)


def test_a_layer_that_left_is_trained_no_more():
    """Its last gradient is not applied again and again."""
    generator, critic = pair()
    own = torch.optim.Adam(critic.parameters(), lr=1e-2)
    trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty(), critic_optimizer=own)
    trainer.step(torch.randn(N, 2, dtype=F64))
    left, critic[0] = critic[0], nn.Identity()
    critic[2] = nn.Linear(2, 1).double()
    own.add_param_group({"params": list(critic[2].parameters())})
    before = left.weight.detach().clone()
    trainer.step(torch.randn(N, 2, dtype=F64))
    assert torch.equal(left.weight, before)


def test_an_older_state_of_a_partly_frozen_network_loads():
    """Default optimizers had the trained parameters alone."""
    generator, critic = pair()
    critic[0].requires_grad_(False)
    trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty())
    trainer.step(torch.randn(N, 2, dtype=F64))
    state = trainer.state_dict()
    older = state["critic_optimizer"]
    older["param_groups"][0]["params"] = [0, 1]
    older["state"] = {i - 2: kept for i, kept in older["state"].items()}
    again = Trainer(*copy.deepcopy((generator, critic)), latent=Latents(), constraint=GradientPenalty())
    again.load_state_dict(state | {"one_forward": True, "one_generation": True, "generator_looks": 2})
    assert_same_state(again.state_dict(), trainer.state_dict())


def test_an_older_state_with_fakes_made_ahead_loads_with_a_warning():
    trainer, again = (Trainer(*quietly(pair), latent=Latents(), constraint=GradientPenalty()) for _ in range(2))
    trainer.step(torch.randn(N, 2, dtype=F64))
    state = trainer.state_dict()
    state["ranks"][0]["fakes"] = torch.randn(16, 2)
    with pytest.warns(UserWarning, match="^state_dict: has fake samples that were made ahead") as caught:
        again.load_state_dict(state)
    assert len(caught) == 1
    assert_same_state(again.state_dict(), trainer.state_dict())


# Layers that leave and come back


def test_a_wrong_layer_that_is_taken_back_leaves_no_trace():
    """A step that raises, and what only reads, put the moments of a default optimizer aside."""
    runs = []
    for wrong in (False, True):
        generator, critic = pair()
        trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty(), ema=0.9, n_critic=1)
        for i, real in enumerate(torch.randn(6, N, 2, dtype=F64, generator=torch.Generator().manual_seed(1))):
            if wrong and i == 3:
                kept, latents = critic[2], copy.deepcopy(trainer.latent)
                critic[2] = nn.Linear(5, 1).double()
                with pytest.raises(RuntimeError):
                    trainer.step(real)
                critic[2], trainer.latent = kept, copy.deepcopy(latents)
                weight, generator.weight = generator.weight, nn.Parameter(torch.ones(2, 3, dtype=F64))
                trainer.sample(2)
                trainer.averages()
                trainer.state_dict()
                generator.weight = weight
                trainer.latent = latents
            trainer.step(real)
        runs.append(trainer.state_dict())
    assert_same_state(runs[1]["critic_optimizer"], runs[0]["critic_optimizer"])
    assert_same_state(runs[1]["ema"], runs[0]["ema"])
    assert_same_state(runs[1]["generator"], runs[0]["generator"])


def test_a_state_that_is_read_does_not_keep_a_layer_from_joining():
    generator, critic = pair()
    trainer = Trainer(generator, critic, latent=Latents(), constraint=GradientPenalty())
    trainer.step(torch.randn(N, 2, dtype=F64))
    critic.insert(0, nn.Linear(2, 2).double())
    assert len(trainer.state_dict()["critic_optimizer"]["param_groups"][0]["params"]) == 6
    trainer.critic_optimizer.add_param_group({"params": list(critic[0].parameters()), "lr": 0.5})
    trainer.step(torch.randn(N, 2, dtype=F64))
    assert [len(g["params"]) for g in trainer.critic_optimizer.param_groups] == [4, 2]


def test_parameters_that_have_left_are_freed():
    generator, critic = nn.Sequential(nn.Linear(3, 2)), nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 1))
    trainer = Trainer(generator, critic, latent=3, constraint=GradientPenalty(), ema=0.9, n_critic=1)
    trainer.step(torch.randn(N, 2))
    left = [weakref.ref(x) for x in (generator[0], critic[0], generator[0].weight, critic[0].weight)]
    generator[0], critic[0] = nn.Linear(3, 2), nn.Linear(2, 4)
    for _ in range(2):
        trainer.step(torch.randn(N, 2))
    gc.collect()
    assert [ref() for ref in left] == [None] * 4


def test_a_generator_without_its_parameters_is_refused_before_the_critic_changes():
    generator, critic = nn.Sequential(nn.Linear(3, 2)), nn.Linear(2, 1)
    own = torch.optim.Adam(generator.parameters(), lr=1e-3)
    trainer = Trainer(generator, critic, latent=3, generator_optimizer=own, n_critic=2)
    trainer.step(torch.randn(N, 2))
    generator.append(nn.Linear(2, 2))
    before = weights(critic)
    for call in (lambda: trainer.step(torch.randn(N, 2)), lambda: trainer.iteration([torch.randn(N, 2)])):
        with pytest.raises(ValueError, match="^generator_optimizer: expected the parameters"):
            call()
    assert torch.equal(weights(critic), before)
    assert trainer.critic_iterations == 1


@pytest.mark.parametrize("exclude", [nn.LayerNorm, "1.*"])
def test_an_excluded_layer_may_move_or_leave(exclude):
    critic = nn.Sequential(nn.Linear(2, 4), nn.LayerNorm(4), nn.Linear(4, 1))
    trainer = Trainer(nn.Linear(3, 2), critic, latent=3, constraint=WeightClip(0.01, exclude=exclude))
    trainer.step(torch.randn(N, 2))
    critic.insert(0, nn.Identity())
    trainer.step(torch.randn(N, 2))
    assert critic[2].weight.min() > 0.9
    critic[2] = nn.Identity()
    trainer.step(torch.randn(N, 2))
    assert trainer.state_dict()["critic_iterations"] == 3
    assert weights(critic).abs().max() <= 0.01


def test_networks_that_become_double_have_double_averages():
    generator, critic = nn.Linear(3, 2), nn.Linear(2, 1)
    trainer = Trainer(generator, critic, latent=3, n_critic=1, ema=0.5)
    trainer.step(torch.randn(N, 2))
    generator.double(), critic.double()
    before = trainer._steps.generator.averages[generator.weight].double()
    trainer.step(torch.randn(N, 2, dtype=F64))
    torch.testing.assert_close(trainer.averages()["weight"], (before + generator.weight.detach()) / 2)


# Compiled networks that change


def test_hooks_come_and_go_under_compile(traced_only):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        generator, critic = pair(own_layers())
        options = {"critic_optimizer": torch.optim.SGD(critic.parameters(), lr=0.05), "n_critic": 1}
        trainer = Trainer(generator, critic, latent=Latents(), compile=compiled, constraint=WeightClip(0.5), **options)
        batches = torch.randn(9, N, 2, dtype=F64, generator=torch.Generator().manual_seed(1))
        for i, real in enumerate(batches):
            if i == 3:
                hooks = [m.register_forward_hook(lambda m, args, x: 2 * x) for m in (generator, critic[0])]
            if i == 6:
                for hook in hooks:
                    hook.remove()
            trainer.step(real)
        runs.append(torch.cat((weights(critic), weights(generator))))
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


def test_a_compiled_critic_grows_in_every_step(traced_only):
    def change(critic, i):
        critic.insert(0, nn.Identity())

    assert_as_plain(own_layers(), compile=True, change=change, steps=10)


class Lazy(nn.Module):
    """Keeps a buffer that is None at first."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", None)

    def forward(self, x):
        mean = x.mean().detach()
        self.mean = mean if self.mean is None else 0.9 * self.mean + 0.1 * mean
        return x * (1 + self.mean)


@pytest.mark.parametrize("constraint", [GradientPenalty(), WeightClip(0.3)], ids=["penalty", "clip"])
@pytest.mark.parametrize("layer", [Lazy, Running])
def test_buffers_that_are_rebound_under_compile(layer, constraint, traced_only):
    assert_as_plain(own_layers(layer()), compile=True, constraint=constraint)


@pytest.mark.parametrize("layer", [Lazy, Running])
def test_buffers_that_are_rebound_in_a_compiled_loss(layer, traced_only):
    runs = []
    for compiled in (False, True):
        torch.manual_seed(0)
        critic, real = own_layers(layer()).double(), torch.randn(N, 2, dtype=F64)

        def penalty(critic, real, seed):
            return functional.gradient_penalty(critic, real, real + 1, seed=seed)

        call = torch.compile(penalty, fullgraph=True) if compiled else penalty
        runs.append([*(call(critic, real, seed).item() for seed in range(3)), *critic[1].mean.reshape(-1).tolist()])
    assert runs[1] == pytest.approx(runs[0], rel=1e-9)
