"""Noise on what a critic is shown, as a module round it."""

import copy

import pytest
import torch
from graphed_trainers import Recorded, batches, made
from torch import nn

from fastwgan import GradientPenalty, Trainer, WeightClip, models, reference
from fastwgan.engine import structure

F64 = torch.float64


def noisy(scale=0.3):
    return models.InstanceNoise(models.mlp([6, 16, 12, 1], slope=0.2), scale)


def test_noise_is_gaussian_and_ends_with_training():
    critic = models.InstanceNoise(nn.Identity(), 0.5)
    x = torch.ones(20_000, 5)
    noise = critic(x) - x
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 0.5) < 0.01
    assert not torch.equal(critic(x), critic(x))
    critic.scale.fill_(0.1)
    assert abs((critic(x) - x).std() - 0.1) < 0.01
    assert torch.equal(critic.eval()(x), x)


def test_conditions_and_dtypes_go_through():
    class Critic(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(6, 1)

        def forward(self, x, labels):
            return self.layer(x) + labels

    critic = models.InstanceNoise(Critic(), 0.1)
    assert critic(torch.ones(4, 6), torch.ones(4, 1)).shape == (4, 1)
    for dtype in (torch.float64, torch.bfloat16):
        assert critic.to(dtype)(torch.ones(4, 6, dtype=dtype), torch.ones(4, 1, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize("scale", [-0.1, float("inf"), "1"])
def test_a_scale_that_is_none_is_named(scale):
    with pytest.raises((TypeError, ValueError), match="^scale: expected a"):
        models.InstanceNoise(nn.Linear(6, 1), scale)


def test_samples_are_known_to_stay_apart():
    critic = noisy()
    found = structure.layers(critic, 2)
    assert [type(m) for m in found] == [models.InstanceNoise, *(type(m) for m in critic.critic)]
    assert structure.foreign(critic) is None
    assert not structure.may_write(critic)
    critic.add_module("more", nn.Linear(1, 1))
    assert structure.layers(critic, 2) is None
    assert "other parts than its critic" in structure.doubt(critic, 2)
    mixing = models.InstanceNoise(nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)), 0.1)
    assert structure.layers(mixing, 2) is None


@pytest.mark.parametrize("constraint", [WeightClip(0.05), GradientPenalty()])
def test_steps_are_those_of_a_plain_loop(constraint):
    """The scores' noise is drawn for both halves of a batch at once, and then the penalised points' noise."""
    torch.manual_seed(0)
    generator, critic = models.mlp([4, 8, 6]).double(), noisy().double()
    plain, zs = copy.deepcopy(critic), torch.randn(3, 8, 4, dtype=F64)
    ours = iter(zs)
    trainer = Trainer(generator, critic, latent=lambda n, device: next(ours), constraint=constraint, seed=3)
    if isinstance(constraint, WeightClip):
        optimizer = torch.optim.RMSprop(plain.parameters(), lr=5e-5)
    else:
        optimizer = torch.optim.Adam(plain.parameters(), lr=1e-4, betas=(0.0, 0.9))
    for i, z in enumerate(zs):
        real = torch.randn(8, 6, dtype=F64)
        critic.scale.fill_(0.3 / (1 + i))
        torch.manual_seed(i)
        metrics = trainer.critic_step(real)
        plain.scale.fill_(0.3 / (1 + i))
        torch.manual_seed(i)
        fake = generator(z).detach()
        on_real, on_fake = plain(torch.cat((real, fake))).tensor_split(2)
        loss = on_fake.mean() - on_real.mean()
        if isinstance(constraint, GradientPenalty):
            x = reference.interpolate(real, fake, seed=3, offset=8 * i).requires_grad_()
            (g,) = torch.autograd.grad(plain(x).sum(), x, create_graph=True)
            loss = loss + 10 * ((g.norm(dim=1) - 1) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if isinstance(constraint, WeightClip):
            for p in plain.parameters():
                p.data.clamp_(-0.05, 0.05)
        assert metrics.critic_loss.item() == pytest.approx(loss.item(), rel=1e-9)
        for a, b in zip(critic.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-12)


def test_scale_is_part_of_the_state(tmp_path):
    trainers = [Trainer(models.mlp([4, 8, 6]), noisy(), latent=4) for _ in range(2)]
    trainers[0].critic.scale.fill_(0.125)
    trainers[0].save(tmp_path / "state.pt")
    trainers[1].load(tmp_path / "state.pt")
    assert trainers[1].critic.scale == 0.125


def test_replays_draw_new_noise_of_the_scale_that_is_there(graphed):
    trainer, shape = made(graphed, True, constraint=WeightClip(0.05))
    critic = models.InstanceNoise(trainer.critic, 0.0)
    trainer = Trainer(trainer.generator, critic, latent=6, constraint=WeightClip(0.05), cuda_graph="auto")
    real, scores = batches(graphed, shape, 1)[0], []
    for i in range(8):
        critic.scale.fill_(0.0 if i < 5 else 500.0)
        scores.append(trainer.critic_step(real).real_score.item())
    assert Recorded.made == 1
    assert max(scores[1:5]) - min(scores[1:5]) < 0.01
    assert len({round(x, 3) for x in scores[4:]}) == 4


def test_a_removed_keyword_says_what_to_write():
    networks = models.mlp([4, 8, 6]), models.mlp([6, 8, 1])
    with pytest.raises(TypeError, match=r"^instance_noise: was removed; wrap the critic: fastwgan.models.Insta"):
        Trainer(*networks, latent=4, instance_noise=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'instance_noises'"):
        Trainer(*networks, latent=4, instance_noises=0.1)
