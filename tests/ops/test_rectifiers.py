"""The rectifiers of the penalised pass: PyTorch's values and derivatives, without the zeros."""

import pytest
import torch
import torch.nn.functional as F
from count_launches import count_kernels
from torch import nn

from fastwgan import functional, models
from fastwgan.ops.rectifiers import LinearPieces

CALLS = {
    "leaky module": nn.LeakyReLU(0.2),
    "leaky module in place": nn.LeakyReLU(0.2, inplace=True),
    "relu module": nn.ReLU(),
    "relu module in place": nn.ReLU(inplace=True),
    "torch.relu": torch.relu,
    "Tensor.relu": lambda x: x.relu(),
    "F.leaky_relu": F.leaky_relu,
    "output changed in place": lambda x: F.leaky_relu(x).add_(1.0),
    "negative slope": lambda x: F.leaky_relu(x, -0.5),
    "in place on a view": lambda x: F.relu(x[:2], inplace=True),
}


@pytest.mark.parametrize("name", CALLS)
def test_values_and_derivatives_are_pytorchs(name):
    def through(x):
        return CALLS[name](x * 1.0).pow(3)  # a copy, for what works in place

    x = torch.tensor([[-2.0, -0.5, 0.0], [0.5, 2.0, 3.0], [1.0, -1.0, 4.0]], dtype=torch.float64, requires_grad=True)
    results = []
    for mode in (False, True):
        with LinearPieces() if mode else torch.enable_grad():
            y = through(x)
        (first,) = torch.autograd.grad(y.sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x, create_graph=True)
        (third,) = torch.autograd.grad(second.sum(), x)
        results.append((y, first, second, third))
    for ours, theirs in zip(*results, strict=True):
        assert torch.equal(ours, theirs)


def test_infinities_and_nan_are_kept():
    x = torch.tensor([float("-inf"), float("inf"), float("nan")], requires_grad=True)
    for fn in (F.relu, F.leaky_relu):
        with LinearPieces():
            ours = fn(x)
        torch.testing.assert_close(ours, fn(x), equal_nan=True)


def test_outside_nothing_is_replaced():
    x = torch.ones(2, requires_grad=True)
    with LinearPieces():
        pass
    assert "Leaky" in type(F.leaky_relu(x).grad_fn).__name__


def test_the_penalty_backward_does_not_enter_the_forward_graph():
    """Three layers: one product each for the weights, two for the cotangents on their way, and nothing twice."""
    critic, x = models.mlp([10, 8, 7, 1], slope=0.2), torch.randn(4, 10)
    loss = functional.gradient_penalty(critic, x, x + 1, backend="torch")
    with count_kernels() as counts:
        loss.backward()
    assert counts["mm"] == 3 + 2
    assert counts["leaky_relu_backward"] == 2
    assert counts["zeros_like"] == 0


def test_a_slope_that_is_none_is_refused_as_by_pytorch():
    with LinearPieces(), pytest.raises(TypeError):
        F.leaky_relu(torch.randn(3, requires_grad=True), None)
