"""The guard between a backward pass and the update: no gradient that is infinite or NaN gets into weights or moments.

A step with such a gradient is left out whole. The verdict is made and obeyed on the device; the host hears of it later,
without waiting, and raises once too many steps in a row were left out. The loss scale of float16 training is the
guard's as well, as it goes by the same verdict.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastwgan import reference
from fastwgan.backend import Backend, kernels, resolve
from fastwgan.functional import is_dense

__all__ = ["Guard"]

FIRST_SCALE = 65536.0  # GradScaler's
PATIENCE = 20  # steps in a row that a loss scale may take to come down


class Guard:
    """Looks at one network's gradients before each of its updates.

    Args:
        name: of the network, for messages.
        device: where it is.
        backend: see :mod:`fastwgan.backend`.
        limit: how many steps may be left out in a row; one more raises.
        scaled: whether there is a loss scale.

    Attributes:
        gate: [2] float32: 1 to leave the step out, else 0; what gradients are to be multiplied by.
        scale: the loss scale, 0-d float32, or None.
    """

    def __init__(self, name: str, device: torch.device, backend: Backend, *, limit: int, scaled: bool) -> None:
        self._name, self._device, self._backend, self._limit = name, device, backend, limit
        self._tally = torch.zeros(6, dtype=torch.int64, device=device)
        self.gate = torch.tensor([0.0, 1.0], device=device)
        self._scale = torch.tensor([FIRST_SCALE, 0.0], device=device) if scaled else None
        self.scale = None if self._scale is None else self._scale[0]
        self._kernel: Any = None
        self._names: list[str] = []
        self._reading: tuple[int, Tensor, Any] | None = None  # step, the tally on its way to the host, its event

    def check(self, named: dict[str, Tensor], scores: tuple[Tensor, ...] = ()) -> tuple[Tensor | None, Tensor]:
        """Look at all gradients, and set the gate.

        Args:
            named: the gradients by their parameters' names.
            scores: (real, fake) or (fake,), whose means the same launch takes, or none.

        Returns:
            ([mean real, mean fake, mean real - mean fake, mean fake - mean real], [-mean fake], or None; how many
            elements were not finite, 0-d).
        """
        self._names = [name for name, g in named.items() if g.numel()]
        gradients = [g.detach() for g in named.values() if g.numel()]
        scores = tuple(x.detach() for x in scores)
        if resolve(self._backend, self._device) == "triton":
            self._kernel = self._kernel or kernels.guard.Guard()
            dense = [g if is_dense(g) else g.contiguous() for g in gradients]
            found = self._kernel.launch(dense, scores, self._tally, self.gate, self._scale)
            return found[:-1] if scores else None, found[-1]
        if self._device.type == "cpu" and self._scale is None and _finite(gradients):
            self._tally[0], self._tally[2], self.gate[0] = 0, 0, 0
        else:
            reference.guard_(gradients, self._tally, self.gate, self._scale)
        statistics = None
        if scores:
            two = len(scores) == 2
            statistics = reference.score_statistics(*scores) if two else reference.generator_loss(*scores)[None]
        return statistics, self._tally[0].clone()

    def watch(self, step: int, checkpoint: str | None) -> None:
        """Raise if too many steps in a row were left out, as far as the host knows by now. Does not wait.

        Args:
            step: the number of the step that has just been launched.
            checkpoint: where the last one is, for the message.

        Raises:
            FloatingPointError: they were.
        """
        if self._device.type == "cpu":
            self._judge(step, self._tally, checkpoint)
            return
        if torch.cuda.is_current_stream_capturing():
            return
        if self._reading is not None:
            of, tally, event = self._reading
            if not event.query():
                return
            self._judge(of, tally, checkpoint)
        else:
            tally, event = torch.empty(6, dtype=torch.int64, pin_memory=True), torch.cuda.Event()
        tally.copy_(self._tally, non_blocking=True)
        event.record()  # type: ignore[no-untyped-call]
        self._reading = (step, tally, event)

    def _judge(self, step: int, tally: Tensor, checkpoint: str | None) -> None:
        count, first, in_a_row, *_ = tally.tolist()
        if in_a_row > self._limit:
            self._reading = None
            steps = f"step {step}" if in_a_row == 1 else f"the {in_a_row} steps up to {step}"
            saved = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
            raise FloatingPointError(
                f"{self._name}: {steps} had gradients that are not finite, first in {self._names[first]} ({count} "
                f"elements in all); such steps have changed no weight and no optimizer state; {saved}"
            )

    def state_dict(self) -> dict[str, Any]:
        return {"tally": self._tally, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reading = None
        self._tally.copy_(state["tally"])
        if self._scale is not None and state["scale"] is not None:
            self._scale.copy_(state["scale"])


def _finite(gradients: list[Tensor]) -> bool:
    """Whether all is finite, for which one sum each is enough: False may also be a sum that overflowed."""
    return bool(torch.stack([g.sum() for g in gradients]).isfinite().all())


def gradients_of(named_parameters: Sequence[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """The gradients that there are, by their parameters' names."""
    return {name: p.grad for name, p in named_parameters if p.grad is not None}
