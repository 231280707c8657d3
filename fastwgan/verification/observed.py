"""The tensors that go through a trainer's step, as hooks on its networks see them."""

from typing import Any

import torch
from torch import Tensor, nn

from fastwgan.engine.terms import split


class Observed:
    """The tensors that went through two networks since the last :meth:`forget`, recorded by hooks on them."""

    z: Any  # the generator's input
    fake: Tensor | None  # its output
    x: Tensor | None  # where the penalty is taken
    gradient: Tensor | None  # the critic's there
    cotangent: Tensor | None  # the gradient that the penalty's backward pass began with
    scores: list[Tensor]  # of each pass of the critic but the penalty's: of all samples at once, or of each kind
    seeds: list[Tensor | None]  # the gradients that the backward pass began with there

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        generator.register_forward_pre_hook(lambda _, args: self._keep("z", args[0]))
        generator.register_forward_hook(lambda _, args, output: self._keep("fake", split(output)[0]))
        critic.register_forward_hook(self._after_critic)

    def forget(self) -> None:
        self.z = self.fake = self.x = self.gradient = self.cotangent = None
        self.scores, self.seeds = [], []

    def _keep(self, name: str, x: Any) -> None:
        setattr(self, name, copied(x))

    def _after_critic(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        x, output = args[0], split(output)[0]
        if isinstance(x, Tensor) and x.requires_grad and x.is_leaf:  # which only the penalty's points are
            self.x = copied(x)
            x.register_hook(self._on_gradient)  # type: ignore[no-untyped-call]
        elif torch.is_grad_enabled() and isinstance(output, Tensor):  # or the trainer has something to complain about
            i = len(self.scores)
            self.scores.append(copied(output))
            self.seeds.append(None)
            if output.requires_grad:
                output.register_hook(lambda seed: self.seeds.__setitem__(i, copied(seed)))  # type: ignore[no-untyped-call]

    def _on_gradient(self, gradient: Tensor) -> None:
        if self.gradient is None:
            self.gradient = copied(gradient)
            if gradient.requires_grad:
                gradient.register_hook(lambda x: self._keep("cotangent", x))  # type: ignore[no-untyped-call]


def parts(values: list[Any], n: int) -> list[Any]:
    """Return what is of each of ``n`` kinds of samples: of values that are one for all, or one for each; else None."""
    values = values[:n]  # a term may have had other passes
    if len(values) == 1 and values[0] is not None:
        return [*values[0].tensor_split(n)]
    return values if len(values) == n else [None] * n


def copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
