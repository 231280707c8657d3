"""Derivatives: by finite differences, through torch.func, and of deep critics' weights through the penalty."""

import copy

import pytest
import torch
import torch.autograd.forward_ad as fwd
from cases import LAYOUTS, OPS, OWNED, SHAPES
from tolerance import assert_close
from torch import nn

from fastwgan import functional, reference

F64 = torch.float64


@pytest.mark.parametrize(
    ("shape", "layout"),
    [((3,), "contiguous"), ((2, 4), "contiguous"), ((2, 2, 1, 3), "contiguous")]
    + [((2, 2, 1, 2), layout) for layout in OWNED if layout != "contiguous"],
    ids=str,
)
@pytest.mark.parametrize("op", OPS)
def test_finite_differences(op, shape, layout, device):
    """First and second derivatives of every op, in float64."""
    inputs = [torch.randn(shape, dtype=F64, device=device).requires_grad_() for _ in range(OPS[op].tensors)]

    def fn(*xs):
        return OPS[op].fused(*(LAYOUTS[layout](x) for x in xs))

    assert torch.autograd.gradcheck(fn, inputs)
    assert torch.autograd.gradgradcheck(fn, inputs)


# torch.func


def scalar(op, which):
    """The op, or its reference, as a function of as many tensors as it takes to one number."""

    def fn(*xs):
        out = getattr(OPS[op], which)(*xs)
        return sum(out) if isinstance(out, tuple) else out.square().sum() if out.dim() else out

    return fn


def backward_of_vmap(f, xs):
    """By autograd's own backward pass, without a graph."""
    ys = [x.clone().requires_grad_() for x in xs]
    return torch.autograd.grad(torch.func.vmap(f)(*ys).square().sum(), ys)


TRANSFORMS = {
    "grad": lambda f, xs: torch.func.grad(f)(*(x[0] for x in xs)),
    "vjp": lambda f, xs: torch.func.vjp(f, *(x[0] for x in xs))[1](torch.ones((), dtype=F64, device=xs[0].device)),
    "vmap": lambda f, xs: torch.func.vmap(f)(*xs),
    "vmap of one": lambda f, xs: torch.func.vmap(f, in_dims=(1, *[None] * (len(xs) - 1)))(
        xs[0].transpose(0, 1), *(x[0] for x in xs[1:])
    ),
    "grad of vmap": lambda f, xs: torch.func.grad(lambda *ys: torch.func.vmap(f)(*ys).square().sum())(*xs),
    "backward of vmap": backward_of_vmap,
    "vmap of grad": lambda f, xs: torch.func.vmap(torch.func.grad(f))(*xs),
    "vmap of grad of grad": lambda f, xs: torch.func.vmap(
        torch.func.grad(lambda *ys: torch.func.grad(f)(*ys).square().sum())
    )(*xs),
    "jacrev of jacrev": lambda f, xs: torch.func.jacrev(torch.func.jacrev(f))(*(x[0] for x in xs)),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", OPS)
def test_func_transforms(op, transform, device):
    xs = [torch.randn(3, *SHAPES[2], dtype=F64, device=device) for _ in range(OPS[op].tensors)]
    actual, expected = (TRANSFORMS[transform](scalar(op, which), xs) for which in ("fused", "eager"))
    torch.testing.assert_close(actual, expected)


@pytest.mark.filterwarnings("ignore:`torch.jit")  # torch's own, where it looks for a formula
@pytest.mark.parametrize("op", OPS)
def test_forward_mode_raises(op, device):
    """Rather than forget the tangent."""
    xs = [torch.randn(3, 4, device=device) for _ in range(OPS[op].tensors)]
    with pytest.raises(NotImplementedError, match="forward mode AD"):
        torch.func.jvp(scalar(op, "fused"), tuple(xs), tuple(xs))
    with fwd.dual_level(), pytest.raises(NotImplementedError, match="forward mode AD"):
        OPS[op].fused(*(fwd.make_dual(x, torch.ones_like(x)) for x in xs))


# Critics of two and three layers. One layer would hide wrong second derivatives.


class Attention(nn.Module):
    """Self-attention over positions, with a residual, as SAGAN's critics have it."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.project, self.out = nn.LayerNorm(width), nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.project(self.norm(x)).chunk(3, -1)
        return x + self.out((q @ k.transpose(-2, -1) / q.shape[-1] ** 0.5).softmax(-1) @ v)


CRITICS = {
    "two layers": (lambda: [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 1)], (12,)),
    "mlp": (lambda: [nn.Linear(12, 9), nn.Tanh(), nn.Linear(9, 7), nn.LeakyReLU(0.2), nn.Linear(7, 1)], (12,)),
    "relu mlp": (lambda: [nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 7), nn.ReLU(), nn.Linear(7, 1)], (12,)),
    "conv": (
        lambda: [nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Conv2d(4, 3, 3), nn.Softplus(), nn.Flatten(), nn.Linear(12, 1)],
        (2, 6, 6),
    ),
    "patch": (lambda: [nn.Conv2d(2, 4, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3)], (2, 6, 6)),
    "LayerNorm": (
        lambda: [nn.Linear(12, 9), nn.LayerNorm(9), nn.LeakyReLU(0.2), nn.Linear(9, 7), nn.GELU(), nn.Linear(7, 1)],
        (12,),
    ),
    "InstanceNorm": (
        lambda: [
            nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True), nn.LeakyReLU(0.2), nn.Conv2d(4, 3, 3), nn.Tanh(),
            nn.Flatten(), nn.Linear(12, 1),
        ],
        (2, 6, 6),
    ),
    "attention": (
        lambda: [nn.Linear(5, 6), Attention(6), nn.LeakyReLU(0.2), Attention(6), nn.Flatten(), nn.Linear(24, 1)],
        (4, 5),
    ),
}  # fmt: skip


def naive(critic, x):
    """The penalty as anyone would write it."""
    x = x.requires_grad_()
    (g,) = torch.autograd.grad(critic(x).sum(), x, create_graph=True)
    return 10 * ((g.flatten(1).norm(dim=1) - 1) ** 2).mean()


@pytest.mark.parametrize("dtype", [F64, torch.float32])
@pytest.mark.parametrize("name", CRITICS)
def test_gradient_penalty_reaches_the_weights_of_deep_critics(name, dtype, device):
    """By the tolerance rule: eager in the same dtype and in float64 on the CPU, from the same interpolates."""
    layers, shape = CRITICS[name]
    exact_critic = nn.Sequential(*layers()).double()
    exact_real, exact_fake = (torch.randn(5, *shape, dtype=F64).to(dtype).double() for _ in range(2))
    results = []
    for run in ("fused", "eager", "exact"):
        critic = copy.deepcopy(exact_critic).to(*(("cpu", F64) if run == "exact" else (device, dtype)))
        p = next(critic.parameters())
        real, fake = exact_real.to(p.device, p.dtype), exact_fake.to(p.device, p.dtype)
        if run == "fused":
            loss = functional.gradient_penalty(critic, real, fake, seed=8, backend="triton")
        else:
            loss = naive(critic, reference.interpolate(real, fake, seed=8))
        gradients = torch.autograd.grad(loss, list(critic.parameters()), allow_unused=True)
        # None is no path to the weight, where eager may have one that carries zeros.
        zeros = (torch.zeros_like(q) if g is None else g for g, q in zip(gradients, critic.parameters(), strict=True))
        results.append((loss, *zeros))
    largest = max(g.abs().max().item() for g in results[2][1:-1])
    assert largest > 0.01
    for i, (fused, eager, exact) in enumerate(zip(*results, strict=True)):
        label = f"gradient_penalty of {name} {dtype}, gradient {i - 1}"
        assert_close(label, fused, eager, exact, length=100, summand=largest)  # a bias before a norm has none but noise
