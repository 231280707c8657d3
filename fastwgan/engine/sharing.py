"""How real and fake samples go through the critic: as one batch where no score depends on another sample, or apart."""

from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastwgan.engine import structure


class Sharing:
    """The decision, made anew in each step: by the critic's layers, or by the user's word (``independent``)."""

    def __init__(self, critic: nn.Module, independent: bool) -> None:
        self._critic, self._independent = critic, independent
        # Of the last step: whether the layers were known to keep samples apart, and whether these shared a pass.
        self.known = False
        self.together: bool | None = None
        self._ndim, self._conditional = 0, False

    def batch(self, real: Tensor, fake: Tensor, cond: tuple[Any, ...]) -> tuple[Tensor, ...]:
        """Return both as one batch for one pass, or as two; copies where a pass may write to the caller's samples."""
        self._ndim, self._conditional = real.dim(), bool(cond)
        self.known = not cond and structure.layers(self._critic, real.dim()) is not None
        plain = all(isinstance(c, (Tensor, bool, int, float, str, NoneType)) for c in cond)
        self.together = self.known or (self._independent and plain)
        if not self.together and not structure.may_write(self._critic):
            return real, fake
        both = torch.cat((real, fake))
        return (both,) if self.together else both.tensor_split(2)

    def check(self, real: Tensor, cond: tuple[Any, ...]) -> None:
        """Raise ValueError where the user's word cannot be true."""
        if not self._independent:
            return
        if any(isinstance(m, _BatchNorm) and m.training for m in self._critic.modules()):
            raise ValueError(
                "independent_samples: expected no layer that mixes samples, got BatchNorm in training mode"
            )
        for c in cond:
            if isinstance(c, Tensor) and c.dim() and len(c) != len(real):
                got = f"one of shape {tuple(c.shape)} for {len(real)} samples"
                raise ValueError(f"independent_samples: expected conditions with a row for each sample, got {got}")

    def __str__(self) -> str:
        if self.together is None:
            return "a first critic step will tell whether real and fake samples share a pass of the critic"
        if self.together:
            why = "independent_samples=True says so" if self._independent else "its layers keep samples apart"
            return f"real and fake samples share a pass of the critic, as {why}"
        each = "real and fake samples have a pass of the critic each, as "
        if self._independent:
            return f"{each}there are conditions that are neither tensors nor constants"
        reason = "there are conditions" if self._conditional else structure.doubt(self._critic, self._ndim)
        return (
            f"{each}{reason or 'its layers mixed samples in the last step'}; with independent_samples=True, your word "
            "that no score depends on another sample, they share one"
        )
