"""Small networks that tests train, and how they compare what has come of it."""

import warnings

import torch
from torch import nn

from fastwgan import GradientPenalty, WeightClip, models

F64 = torch.float64


def mlp_pair(dtype=F64):
    return (
        models.mlp([6, 16, 10], norm=True).to(dtype),
        models.mlp([10, 16, 12, 1], slope=0.2).to(dtype),
        (10,),
        6,
    )


def conv_pair(dtype=F64):
    generator = models.dcgan_generator(5, channels=1, width=4, size=8).to(dtype)
    critic = nn.Sequential(
        nn.Conv2d(1, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 6, 3, 2, 1), nn.Tanh(), nn.Flatten(), nn.Linear(24, 1)
    ).to(dtype)
    return generator, critic, (1, 8, 8), 5


def norm_pair(dtype=F64):
    generator, _, shape, latent = conv_pair(dtype)
    return (
        generator,
        models.dcgan_critic(channels=1, width=4, size=16).to(dtype)[:-2].append(nn.Flatten()),
        shape,
        latent,
    )


PAIRS = {"mlp": mlp_pair, "conv": conv_pair, "batchnorm": norm_pair}
CONSTRAINTS = {"clip": WeightClip(0.05), "penalty": GradientPenalty()}


def quietly(fn, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fn(*args, **kwargs)


def assert_same_state(actual, expected):
    """Bit for bit, all the way down."""
    assert type(actual) is type(expected)
    if isinstance(expected, dict):
        assert actual.keys() == expected.keys()
        for key in expected:
            assert_same_state(actual[key], expected[key])
    elif isinstance(expected, (list, tuple)):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            assert_same_state(a, e)
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(actual, expected)
    else:
        assert actual == expected


def weights(module):
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def until_it_raises(step, *args):
    for _ in range(40):
        step(*args)
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # by now the host could know
