"""The reference against published values, closed forms and torch.optim."""

import numpy as np
import pytest
import torch

from fastwgan import reference
from fastwgan.functional import interpolate


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
@pytest.mark.parametrize("array", [torch.tensor, np.array])
def test_philox_gives_the_published_words(counter, key, expected, array):
    """Known answers of Random123, the cipher's own library."""
    words = reference.philox([array([word]) for word in counter], key)
    assert tuple(word.item() for word in words) == expected


@pytest.mark.parametrize("offset", [0, 1000, 1023, 1024, 2**40 + 1023, 2**62 - 1, 2**62, 2**63 - 2])
@pytest.mark.parametrize("n", [1, 2, 64, 1024, 1025])
def test_numbers_made_many_at_once_are_the_same(offset, n):
    real, fake = torch.ones(n, 1), torch.zeros(n, 1)
    for seed in (0, 2**62):
        eps = interpolate(real, fake, seed=seed, offset=offset, backend="torch")
        assert torch.equal(eps[:, 0], reference.uniform(seed, offset, n))


def test_uniform_lies_in_the_unit_interval_and_is_uniform():
    u = reference.uniform(3, 0, 20_000)
    assert u.min() >= 0
    assert u.max() < 1
    assert abs(u.mean() - 0.5) < 0.01
    assert abs(u.double().var() - 1 / 12) < 0.002


def test_uniform_depends_on_seed_and_index_alone():
    whole = reference.uniform(5, 10, 100)
    assert torch.equal(whole[40:], reference.uniform(5, 50, 60))
    assert torch.equal(whole, reference.uniform(5, torch.tensor([10]), 100))
    with torch.device("meta"):  # as a default device
        assert torch.equal(whole, reference.uniform(5, 10, 100))
    for offset in (2**32 - 50, 2**63 - 100):
        far = reference.uniform(2**63 - 1, offset, 100)
        assert torch.equal(far, reference.uniform(2**63 - 1, torch.tensor([offset]), 100))
    assert not torch.equal(whole, reference.uniform(6, 10, 100))
    assert not torch.equal(whole, reference.uniform(5, 10 + 2**32, 100))
    assert not torch.equal(whole, reference.uniform(5 + 2**32, 10, 100))


@pytest.mark.parametrize(
    "options", [{}, {"momentum": 0.5}, {"centered": True}, {"weight_decay": 0.1, "maximize": True}]
)
def test_rmsprop_step_is_torch_optims(options):
    p = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    mine, square = p.detach().clone(), torch.zeros_like(p.data)
    buffer, mean = torch.zeros_like(mine), torch.zeros_like(mine)
    theirs = torch.optim.RMSprop([p], lr=0.01, **options)
    numbers = {k: v for k, v in options.items() if k != "centered"}
    for _ in range(4):
        p.grad = torch.randn_like(p)
        theirs.step()
        reference.rmsprop_step_(
            mine, p.grad, square, lr=0.01, alpha=0.99, eps=1e-8, momentum_buffer=buffer,
            grad_avg=mean if options.get("centered") else None, **numbers,
        )  # fmt: skip
    torch.testing.assert_close(mine, p.data, rtol=1e-12, atol=0)


def test_adam_step_is_torch_optims():
    p = torch.nn.Parameter(torch.randn(7, 5, dtype=torch.float64))
    mine, m, v, step = p.detach().clone(), torch.zeros_like(p.data), torch.zeros_like(p.data), torch.zeros(())
    theirs = torch.optim.Adam([p], lr=0.01, betas=(0.5, 0.9), weight_decay=0.1)
    for _ in range(4):
        p.grad = torch.randn_like(p)
        theirs.step()
        reference.adam_step_(mine, p.grad, m, v, step, lr=0.01, betas=(0.5, 0.9), eps=1e-8, weight_decay=0.1)
    torch.testing.assert_close(mine, p.data, rtol=1e-12, atol=0)
    assert step == 4


@pytest.mark.parametrize("kind", ["two-sided", "one-sided", "zero-centered", "power"])
def test_penalty_cotangent_is_the_penaltys_derivative(kind):
    g = torch.randn(6, 3, 4, dtype=torch.float64, requires_grad=True)
    loss = 10 * reference.penalty(g, kind=kind, target=1.5)
    (derivative,) = torch.autograd.grad(loss, g)
    statistics, cotangent = reference.penalty_cotangent(g, kind=kind, target=1.5, weight=10.0)
    torch.testing.assert_close(cotangent, derivative)
    torch.testing.assert_close(10 * statistics[0], loss)
    torch.testing.assert_close(statistics[1], g.flatten(1).norm(dim=1).mean())
