"""What the experiments that train generators share."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from benchmarks.experiments import toys
from benchmarks.experiments.training import LATENT, checkpoints, digit_networks, follow, packed, spearman, unpacked
from fastwgan import GradientPenalty, Trainer, data
from fastwgan.distances import wasserstein


@pytest.mark.parametrize("values", [torch.randn(3, 4, 5), torch.full((2, 3), 1.5), torch.tensor([-1e6, 0.0, 1e6])])
def test_packed_values_come_back_from_json(values):
    back = unpacked(json.loads(json.dumps(packed(values))))
    assert back.shape == values.shape
    step = float(values.max() - values.min()) / 65535
    np.testing.assert_allclose(back, values.numpy(), rtol=1e-6, atol=0.51 * step)


def test_checkpoints_grow_by_a_factor_and_end_with_the_last_step():
    steps = checkpoints(5, 1200)
    assert (steps[0], steps[-1], len(steps)) == (5, 1200, 24)
    ratios = [b / a for a, b in pairwise(steps[8:])]
    assert max(ratios) < 1.1 * min(ratios)
    assert checkpoints(5, 7) == [5, 6, 7]
    assert checkpoints(5, 2) == [2]


def test_spearman_is_of_ranks():
    seen = [{"estimate": x, "exact": x**3} for x in (1.0, 2.0, 5.0)]
    assert spearman(seen) == pytest.approx(1)
    assert spearman([*seen, {"estimate": 9.0, "exact": -1.0}]) == pytest.approx(-0.2)


def test_following_digits_trains_to_each_step_and_measures_there():
    generator, critic = digit_networks(0)
    trainer = Trainer(generator, critic, latent=LATENT, constraint=GradientPenalty(), n_critic=2)
    held_out = data.digits()[1]
    reached = []
    for row in follow(trainer, 0, [1, 3]):
        reached.append((row["step"], trainer.generator_iterations, trainer.critic_iterations))
        again = trainer.sample(len(held_out))  # others than those measured
        assert row["exact"] == pytest.approx(float(wasserstein(again, held_out)), rel=0.02)
    assert reached == [(1, 1, 2), (3, 3, 6)]


@pytest.mark.parametrize("toy", [toys.GAUSSIANS8, toys.GAUSSIANS25, toys.SWISSROLL], ids=["8", "25", "roll"])
def test_real_points_lie_round_the_skeleton_evenly(toy):
    points = toy.sample(20_000, torch.Generator().manual_seed(0))
    distance, nearest = torch.cdist(points, toy.skeleton).min(1)
    assert 0.985 < float((distance <= 3 * toy.noise).double().mean()) < 0.999
    assert float((distance <= toy.noise).double().mean()) < 0.7
    shares = (nearest // (len(toy.skeleton) // toy.parts)).bincount(minlength=toy.parts) * toy.parts / len(points)
    assert len(shares) == toy.parts
    assert 0.85 < float(shares.min()) <= float(shares.max()) < 1.15
