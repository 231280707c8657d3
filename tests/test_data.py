"""The data sets and the streams of batches."""

import copy

import numpy as np
import torch

from fastwgan import data


def test_digits_are_split_as_documented():
    train, held_out = data.digits()
    assert train.shape == (1297, 1, 8, 8)
    assert held_out.shape == (500, 1, 8, 8)
    assert train.min() == -1
    assert train.max() == 1
    from sklearn.datasets import load_digits

    order = np.random.default_rng(0).permutation(1797)
    assert np.allclose(held_out[-1, 0], load_digits().images[order[-1]] / 8 - 1)


def test_toys_lie_where_they_should():
    random = torch.Generator().manual_seed(0)
    radius = data.gaussians8(4000, random).norm(dim=1)
    assert (radius - 2**0.5).abs().max() < 0.1
    grid = data.gaussians25(4000, random) * 2 * 2**0.5
    assert (grid - 2 * (grid / 2).round()).abs().max() < 0.3
    assert len((grid / 2).round().unique(dim=0)) == 25
    assert data.swissroll(4000, random).abs().max() < 2.2


def test_shuffled_batches_draw_each_sample_once_an_epoch():
    batches = data.ShuffledBatches(torch.arange(10), 4, seed=0)
    drawn = torch.cat([next(batches) for _ in range(5)])
    assert torch.equal(drawn[:10].sort().values, torch.arange(10))
    assert torch.equal(drawn[10:].sort().values, torch.arange(10))
    large = data.ShuffledBatches(torch.arange(3), 7, seed=0)
    assert len(next(large)) == 7


def test_streams_resume_where_they_were():
    for stream in (
        data.ShuffledBatches(torch.arange(10), 4, seed=0),
        data.SampledBatches(data.swissroll, 4, 0, torch.device("cpu")),
    ):
        next(stream)
        state = copy.deepcopy(stream.state_dict())
        expected = [next(stream) for _ in range(4)]
        stream.load_state_dict(state)
        assert all(torch.equal(next(stream), e) for e in expected)
