"""The guard between a backward pass and the update: no gradient that is infinite or NaN gets into weights or moments.

A step with such a gradient is left out whole. The verdict is made and obeyed on the device; the host hears of it later,
without waiting, and raises once too many steps in a row were left out. The loss scale of float16 training is the
guard's as well, as it goes by the same verdict; and so is clipping by norm, whose factor the update obeys.
"""

import math
from collections.abc import Sequence
from functools import cache, partial
from operator import attrgetter
from typing import Any, NoReturn

import torch
from torch import Tensor, nn

from fastwgan import reference
from fastwgan.backend import Resolved, kernels
from fastwgan.metrics import Lazy
from fastwgan.ops.layout import is_dense
from fastwgan.ops.scores import score_statistics
from fastwgan.reference import TALLY, Tally

FIRST_SCALE = 65536.0  # GradScaler's
READ_EVERY = 32  # steps on a GPU between two readings of the tally, each of which is a copy
PATIENCE = 20  # steps in a row that a loss scale may take to come down
_layout, _grad = attrgetter("layout"), attrgetter("grad")


def statistics(scores: tuple[Tensor, ...], backend: Resolved) -> Tensor:
    """Return what :meth:`Guard.check` does of scores."""
    means = score_statistics(scores[0], scores[-1], backend)
    return means if len(scores) == 2 else -means[:1]


class Guard:
    """Checks a network's gradients before each of its updates; more than ``limit`` steps left out in a row raise."""

    def __init__(
        self, name: str, module: nn.Module, backend: Resolved, *, limit: int, scaled: bool,
        max_norm: float | None = None,
    ) -> None:  # fmt: skip
        self._name, self._module, self._backend, self._limit, self.max_norm = name, module, backend, limit, max_norm
        self._device = next(module.parameters()).device
        self._tally = torch.zeros(TALLY, dtype=torch.int64, device=self._device)
        # 1 to leave the step out, else 0; what gradients are to be multiplied by.
        self.gate = torch.tensor([0.0, 1.0], dtype=torch.float64, device=self._device)
        self._scale = torch.tensor([FIRST_SCALE, 0.0], device=self._device) if scaled else None
        self.dense = True  # whether sparse gradients are refused, which some of PyTorch's optimizers take
        self._kernel: Any = None
        self._unread = 0  # steps since the last reading of the tally was begun
        self._reading: tuple[Tensor, Any] | None = None  # a tally on the way to the host, and the event of its arrival

    @property
    def scale(self) -> Tensor | None:
        """Return the loss scale, 0-d float32, or None."""
        return None if self._scale is None else self._scale[0]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_kernel": None, "_reading": None}  # a copy has its own launcher, and reads anew

    def gradients(self, parameters: Sequence[nn.Parameter]) -> list[Tensor]:
        """Return the last backward pass's gradients, each in memory of its own (compiled passes expand some)."""
        used = [p for p in parameters if p.grad is not None and p.numel()]
        gradients: list[Any] = [*map(_grad, used)]
        if not gradients:
            raise ValueError(f"{self._name}: expected gradients of its parameters, got none")
        if {*map(_layout, gradients)} == {torch.strided} and all(map(Tensor.is_contiguous, gradients)):
            return gradients
        for p in used:
            assert p.grad is not None
            if p.grad.layout != torch.strided:
                if self.dense:
                    name = next(name for name, own in self._module.named_parameters() if own is p)
                    raise TypeError(f"{self._name}: expected dense gradients, got {p.grad.layout} for {name}")
            elif not is_dense(p.grad):
                p.grad = p.grad.contiguous()
        return [g._values().contiguous() if g.is_sparse else g for g in map(_grad, used)]

    def check(self, parameters: Sequence[nn.Parameter], scores: tuple[Tensor, ...] = ()) -> tuple[Lazy | None, Tensor]:
        """Look at all gradients, and set the gate; return (statistics of scores, how many elements were not finite).

        ``scores`` are (real, fake) or (fake,), whose statistics the same launch takes, or none: [mean real, mean fake,
        mean real - mean fake, mean fake - mean real], [-mean fake] or None.
        """
        gradients = self.gradients(parameters)
        if self._backend == "triton":
            self._kernel = self._kernel or kernels.guard.Guard()
            found = self._kernel.launch(gradients, scores, self._tally, self.gate, self._scale, self.max_norm)
            return found[:-1] if scores else None, found[-1]
        quick, cap = self._device.type == "cpu" and self._scale is None, self.max_norm
        sizes = [reference.norm(gradients)] if quick and cap is not None else gradients
        # One sum each, or the norm, shows that all is finite; one that overflowed only sends us the longer way.
        if quick and math.isfinite(sum([g.sum().item() for g in sizes])):
            tally, gate = self._tally.numpy(), self.gate.numpy()  # whose elements are set in a tenth of the time
            tally[Tally.NONFINITE] = tally[Tally.IN_A_ROW] = gate[0] = 0
            tally[Tally.STEPS] += 1
            gate[1] = 1.0 if cap is None else min(1.0, cap / (sizes[0].item() + 1e-6))
        else:
            reference.guard_(gradients, self._tally, self.gate, self._scale, self.max_norm)
        means = cache(partial(statistics, scores, self._backend)) if scores else None
        return means, self._tally[Tally.NONFINITE].clone()

    def watch(self, checkpoint: str | None, *, wait: bool = False) -> None:
        """Raise FloatingPointError if too many steps in a row were left out, as far as the host knows by now.

        ``checkpoint`` is where the last one is, for the message; ``wait`` is for the device, to know of all steps.
        """
        if self._device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return
        if wait or self._device.type == "cpu":
            if self._tally.tolist()[Tally.LONGEST] > self._limit:
                self._raise(self._tally.tolist(), checkpoint)
            return
        self._unread += 1
        if self._unread < READ_EVERY or (self._reading is not None and not self._reading[1].query()):
            return
        if self._reading is not None and self._reading[0][Tally.LONGEST] > self._limit:
            self._raise(self._reading[0].tolist(), checkpoint)
        if self._reading is None:
            self._reading = torch.empty_like(self._tally, device="cpu", pin_memory=True), torch.cuda.Event()  # type: ignore
        tally, event = self._reading
        tally.copy_(self._tally, non_blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._unread = 0

    def _raise(self, numbers: list[int], checkpoint: str | None) -> NoReturn:
        first, last, longest = (numbers[i] for i in (Tally.FIRST, Tally.LAST, Tally.LONGEST))
        self._reading = None
        self._tally[Tally.IN_A_ROW] = self._tally[Tally.LONGEST] = 0  # a caller who goes on hears of the next row
        steps = f"step {last}" if longest == 1 else f"{longest} steps in a row up to {last}"
        names = [name for name, p in self._module.named_parameters() if p.grad is not None and p.numel()]
        name = names[first] if first < len(names) else "a parameter that has left it"
        saved = f"the last checkpoint is {checkpoint}" if checkpoint else "there is no checkpoint"
        raise FloatingPointError(
            f"{self._name}: {steps} had gradients that are not finite, first in {name}; such steps change no "
            f"weight and no optimizer state; {saved}"
        )

    def state_dict(self) -> dict[str, Any]:
        tally = self._tally.clone()
        tally[Tally.LONGEST] = tally[Tally.IN_A_ROW]  # a row that has ended is not saved
        return {"tally": tally, "scale": self._scale}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._reading = None
        self._tally.copy_(state["tally"])
        if self._scale is not None and state["scale"] is not None:
            self._scale.copy_(state["scale"])
