"""Losses of critic scores."""

from typing import Any

from torch import Tensor

from fastwgan import checks, reference
from fastwgan.backend import Backend, Resolved, kernels, resolve
from fastwgan.ops.autograd import Op, apply

BLENDED = "write (1 - blend) * {}(...) + blend * {}, F being torch.nn.functional"
REMOVED = {
    "blend": BLENDED.format("critic_loss", "(F.softplus(-real_scores).mean() + F.softplus(fake_scores).mean())"),
    "drift": "write critic_loss(...) + drift * real_scores.square().mean()",
}
REMOVED_OF_GENERATOR = {"blend": BLENDED.format("generator_loss", "F.softplus(-fake_scores).mean()")}


class _LinearLoss(Op):
    """Take mean(b) - mean(a), the critic's loss on real and fake scores; of a alone -mean(a), the generator's."""

    @staticmethod
    def forward(a: Tensor, b: Tensor | None) -> Any:
        return kernels.scores.mean_scores("generator" if b is None else "critic", a, a if b is None else b)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor | None], output: Tensor) -> None:
        ctx.shapes, ctx.dtype = [x.shape for x in inputs if x is not None], inputs[0].dtype

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None]:
        signs = zip((-1, 1), ctx.shapes, strict=False)
        a, *b = ((grad / (sign * shape.numel())).to(ctx.dtype).expand(shape) for sign, shape in signs)
        return a, b[0] if b else None


class _WassersteinLoss(Op):
    @staticmethod
    def forward(y_true: Tensor, y_pred: Tensor) -> Any:
        return kernels.scores.mean_scores("labels", y_true, y_pred)[0]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y_true, y_pred = ctx.saved_tensors
        grad = grad / y_pred.numel()  # float32 or wider, as 1 / N may be too small for float16
        others = zip(ctx.needs_input_grad, (y_pred, y_true), strict=True)  # which are of one dtype
        return tuple((grad * x.to(grad.dtype)).to(x.dtype) if needed else None for needed, x in others)


class _HingeCriticLoss(Op):
    @staticmethod
    def forward(real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
        return kernels.scores.mean_scores("hinge", real, fake)[:2]

    @staticmethod
    def backward(ctx: Any, real_grad: Tensor, fake_grad: Tensor) -> tuple[Tensor, Tensor]:
        real, fake = ctx.saved_tensors
        # Not "real < 1": a NaN score has a slope, so that it shows in the gradients as in the loss.
        real_grad, fake_grad = (real_grad / -real.numel()).to(real.dtype), (fake_grad / fake.numel()).to(fake.dtype)
        return ~(real >= 1) * real_grad, ~(fake <= -1) * fake_grad


def critic_loss(real_scores: Tensor, fake_scores: Tensor, *, backend: Backend = "auto", **removed: object) -> Tensor:
    """Return the critic's loss, mean(fake_scores) - mean(real_scores): minus the Wasserstein estimate.

    It is a 0-d tensor, float32 or wider; its gradients have the scores' dtype.
    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 5 (which ascends; this is to be descended).

    Args:
        real_scores, fake_scores: D(real) and D(fake), of any shapes, e.g. [N] or [N, 1, H, W]; of one dtype and device.
        backend: see :mod:`fastwgan.backend`.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    >>> critic_loss(Tensor([3.0, 1.0]), Tensor([0.5]))
    tensor(-1.5000)
    """
    checks.removed(removed, REMOVED)
    fake_scores, real_scores = checks.pair("fake_scores", fake_scores, "real_scores", real_scores, shape=False)
    if resolve(backend, real_scores.device) == "torch":
        return reference.critic_loss(real_scores, fake_scores)
    return apply(_LinearLoss, real_scores, fake_scores)


def generator_loss(fake_scores: Tensor, *, backend: Backend = "auto", **removed: object) -> Tensor:
    """Return the generator's loss, -mean(fake_scores), 0-d, float32 or wider; its gradients have the scores' dtype.

    ``fake_scores`` is D(G(z)), of any shape; ``backend``: see :mod:`fastwgan.backend`.
    Source: WGAN, arXiv 1701.07875, Algorithm 1, line 10.

    Raises:
        TypeError, ValueError: ``fake_scores`` is not a floating tensor or is empty.

    >>> generator_loss(Tensor([3.0, 1.0]))
    tensor(-2.)
    """
    checks.removed(removed, REMOVED_OF_GENERATOR)
    checks.tensor("fake_scores", fake_scores)
    if resolve(backend, fake_scores.device) == "torch":
        return reference.generator_loss(fake_scores)
    return apply(_LinearLoss, fake_scores, None)


def wasserstein_loss(y_true: Tensor, y_pred: Tensor, *, backend: Backend = "auto") -> Tensor:
    """Return mean(y_true * y_pred), the label form that Keras code uses.

    It is a 0-d tensor, float32 or wider; its gradients have the scores' dtype. ``y_true`` are labels, usually +1 or -1,
    and ``y_pred`` scores, any shape; of one shape, dtype and device: [N] against [N, 1] is an error, not a broadcast.
    With labels -1 for real and +1 for fake, and as many of each, twice this is :func:`critic_loss`.
    Source: WGAN, arXiv 1701.07875, Algorithm 1, lines 5 and 10, with the sign moved into a label.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    >>> wasserstein_loss(Tensor([-1.0, 1.0]), Tensor([3.0, 1.0]))
    tensor(-1.)
    """
    y_true, y_pred = checks.pair("y_true", y_true, "y_pred", y_pred)
    if resolve(backend, y_pred.device) == "torch":
        return reference.wasserstein_loss(y_true, y_pred)
    return apply(_WassersteinLoss, y_true, y_pred)


def hinge_critic_loss(real_scores: Tensor, fake_scores: Tensor, *, backend: Backend = "auto") -> tuple[Tensor, Tensor]:
    """Return the hinge form's two halves, (mean(relu(1 - real_scores)), mean(relu(1 + fake_scores))).

    They are 0-d, float32 or wider; their gradients have the scores' dtype. The critic minimises their sum. Arguments
    are as of :func:`critic_loss`. Source: Lim and Ye, Geometric GAN, arXiv 1705.02894.

    Raises:
        TypeError, ValueError: an argument is not a floating tensor, is empty, or they do not match.

    >>> hinge_critic_loss(Tensor([3.0, 0.0]), Tensor([-0.5]))
    (tensor(0.5000), tensor(0.5000))
    """
    fake_scores, real_scores = checks.pair("fake_scores", fake_scores, "real_scores", real_scores, shape=False)
    if resolve(backend, real_scores.device) == "torch":
        return reference.hinge_critic_loss(real_scores, fake_scores)
    return _HingeCriticLoss.apply(real_scores, fake_scores)  # type: ignore[no-untyped-call, no-any-return]


def score_statistics(real_scores: Tensor, fake_scores: Tensor, backend: Resolved) -> Tensor:
    """Return [mean real, mean fake, Wasserstein estimate, its negative] without a graph. For the trainer."""
    real_scores, fake_scores = real_scores.detach(), fake_scores.detach()
    if backend == "torch":
        return reference.score_statistics(real_scores, fake_scores)
    return kernels.scores.mean_scores("critic", real_scores, fake_scores)[2]
