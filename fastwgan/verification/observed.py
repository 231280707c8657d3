"""What goes through a trainer's step, as hooks on its networks see it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Observed", "copied"]


class Observed:
    """What went through two networks since the last :meth:`forget`, seen by hooks on them.

    Attributes:
        z: the generator's input.
        fake: its output.
        samples: what each pass of the critic but the penalty's was given: both in one, or real ones and fake ones.
        scores: what came out.
        seeds: the gradients that the backward pass began with there.
        x: where the penalty is taken, or None.
        gradient: the critic's there.
        cotangent: the gradient that the penalty's backward pass began with.
    """

    def __init__(self, generator: nn.Module, critic: nn.Module) -> None:
        generator.register_forward_pre_hook(self._before_generator)
        generator.register_forward_hook(self._after_generator)
        critic.register_forward_pre_hook(self._before_critic)
        critic.register_forward_hook(self._after_critic)
        self.forget()

    def forget(self) -> None:
        self.z: Any = None
        self.fake: Tensor | None = None
        self.x: Tensor | None = None
        self.gradient: Tensor | None = None
        self.cotangent: Tensor | None = None
        self.samples: list[Tensor] = []
        self.scores: list[Tensor] = []
        self.seeds: list[Tensor | None] = []

    @property
    def together(self) -> bool:
        """Whether real and fake samples shared a pass of the critic."""
        return len(self.scores) == 1

    def halves(self, values: Sequence[Tensor | None]) -> tuple[Tensor | None, Tensor | None]:
        """Real and fake samples, or their scores or seeds."""
        if len(values) == 1 and values[0] is not None:
            real, fake = values[0].tensor_split(2)
            return real, fake
        return (values[0], values[1]) if len(values) == 2 else (None, None)

    def _before_generator(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        self.z = copied(args[0])

    def _after_generator(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        self.fake = copied(output)

    def _before_critic(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._is_penalised(args[0]):
            self.x = copied(args[0])
            _hook(args[0], self._on_gradient)
        elif torch.is_grad_enabled():  # as in all passes of a step
            self.samples.append(copied(args[0]))

    def _after_critic(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.is_grad_enabled() or not isinstance(output, Tensor) or self._is_penalised(args[0]):
            return  # or the trainer has something to complain about
        i = len(self.scores)
        self.scores.append(copied(output))
        self.seeds.append(None)

        def began(seed: Tensor) -> None:
            self.seeds[i] = copied(seed)

        if output.requires_grad:
            _hook(output, began)

    @staticmethod
    def _is_penalised(x: Any) -> bool:
        """Whether the critic is passed a leaf that wants a gradient, which only the penalty's points are."""
        return isinstance(x, Tensor) and x.requires_grad and x.is_leaf

    def _on_gradient(self, gradient: Tensor) -> None:
        if self.gradient is None:
            self.gradient = copied(gradient)
            if gradient.requires_grad:
                _hook(gradient, self._on_cotangent)

    def _on_cotangent(self, cotangent: Tensor) -> None:
        self.cotangent = copied(cotangent)


def _hook(x: Tensor, on_gradient: Callable[[Tensor], None]) -> None:
    x.register_hook(on_gradient)  # type: ignore[no-untyped-call]


def copied(x: Any) -> Any:
    return x.detach().clone() if isinstance(x, Tensor) else x
