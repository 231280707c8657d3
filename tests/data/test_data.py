"""The data sets and the streams of batches."""

import copy

import numpy as np
import pytest
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


class Lazy:
    """Samples that are read when asked for, and remember which; ``missing`` cannot be read."""

    def __init__(self, n, missing=()):
        self.n, self.missing, self.asked = n, set(missing), []

    def __len__(self):
        return self.n

    def __getitem__(self, indices):
        assert indices.device.type == "cpu"
        assert indices.dtype == torch.int64
        self.asked += indices.tolist()
        if self.missing & set(indices.tolist()):
            raise OSError("a file is gone")
        return indices * 10


def test_lazy_samples_come_in_the_order_of_a_tensor_for_any_number_of_workers():
    streams = [data.ShuffledBatches(torch.arange(10) * 10, 4, seed=3)]
    streams += [data.ShuffledBatches(Lazy(10), 4, seed=3, workers=workers) for workers in (0, 1, 2, 7)]
    for _ in range(12):
        first, *others = [next(stream) for stream in streams]
        assert all(torch.equal(first, other) for other in others)


def test_the_position_is_of_batches_handed_out_whatever_workers_have_read():
    expected = list(zip(range(12), data.ShuffledBatches(torch.arange(10) * 10, 4, seed=3), strict=False))
    for before, after in ((0, 3), (3, 0), (3, 3), (1, 5)):
        stream = data.ShuffledBatches(Lazy(10), 4, seed=3, workers=before)
        for _ in range(5):
            next(stream)
        state = copy.deepcopy(stream.state_dict())
        next(stream)
        resumed = data.ShuffledBatches(Lazy(10), 4, seed=9, workers=after)
        next(resumed)
        resumed.load_state_dict(state)
        for i, batch in expected[5:]:
            assert torch.equal(next(resumed), batch), (before, after, i)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_read_is_not_passed_over(workers):
    whole = data.ShuffledBatches(Lazy(10), 2, seed=0)
    batches = [next(whole) for _ in range(5)]
    stream = data.ShuffledBatches(Lazy(10, missing=(batches[2] // 10).tolist()), 2, seed=0, workers=workers)
    for batch in batches[:2]:
        assert torch.equal(next(stream), batch)
    for _ in range(2):
        with pytest.raises(OSError, match="a file is gone"):
            next(stream)
    whole.load_state_dict(stream.state_dict())
    assert torch.equal(next(whole), batches[2])


@pytest.mark.parametrize("workers", [0, 2])
def test_ranks_share_each_batch_and_read_only_their_rows(workers):
    whole = data.ShuffledBatches(torch.arange(10) * 10, 6, seed=1)
    lazies = [Lazy(10) for _ in range(3)]
    ranks = [
        data.ShuffledBatches(lazy, 6, seed=1, rank=r, world=3, workers=workers * r) for r, lazy in enumerate(lazies)
    ]
    for _ in range(7):
        parts = [next(stream) for stream in ranks]
        assert [len(part) for part in parts] == [2, 2, 2]
        assert torch.equal(torch.cat(parts), next(whole))
    assert len(lazies[0].asked) == 7 * 2
    state = data.ShuffledBatches(torch.arange(10), 6, seed=1, rank=2, world=3).state_dict()
    again = data.ShuffledBatches(torch.arange(10), 6, seed=1).state_dict()
    assert all(torch.equal(torch.as_tensor(state[key]), torch.as_tensor(again[key])) for key in again)


def test_ranks_share_drawn_points():
    def streams(**kwargs):
        return data.SampledBatches(data.gaussians8, 6, 1, torch.device("cpu"), **kwargs)

    whole, *ranks = streams(), streams(rank=0, world=2), streams(rank=1, world=2)
    for _ in range(3):
        assert torch.equal(torch.cat([next(stream) for stream in ranks]), next(whole))
    assert torch.equal(ranks[0].state_dict()["random"], ranks[1].state_dict()["random"])


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"world": 4}, "^batch_size: expected a positive multiple of world, 4, got 6"),
        ({"world": 0}, "^batch_size: "),
        ({"world": 2, "rank": 2}, "^rank: expected an int from 0 to 1, got 2"),
        ({"world": 2, "rank": -1}, "^rank: "),
    ],
)
def test_ranks_that_do_not_fit_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        data.ShuffledBatches(torch.arange(10), 6, 0, **numbers)
    with pytest.raises(ValueError, match=message):
        data.SampledBatches(data.swissroll, 6, 0, torch.device("cpu"), **numbers)


def test_no_samples_and_a_position_in_other_samples_are_refused():
    with pytest.raises(ValueError, match="^samples: expected at least one"):
        data.ShuffledBatches(Lazy(0), 2, 0)
    stream = data.ShuffledBatches(torch.arange(10), 2, 0)
    before = copy.deepcopy(stream.state_dict())
    with pytest.raises(ValueError, match="^state: expected one of 10 samples, got 11"):
        stream.load_state_dict(data.ShuffledBatches(torch.arange(11), 2, 0).state_dict())
    assert torch.equal(stream.state_dict()["random"], before["random"])
