# Types of what the package calls in fastwgan.kernels, as type checkers cannot find that in a checkout: it lies in
# ../kernels. Each class stands for a module there. A test compares the signatures with the sources.

from collections.abc import Sequence

import torch

INTERPRETED: bool

class activation:
    @staticmethod
    def activate_(
        z: torch.Tensor,
        bias: torch.Tensor | None,
        factors: torch.Tensor | None,
        slope: float,
        seeds: torch.Tensor | None = None,
        top: torch.Tensor | None = None,
    ) -> torch.Tensor | None: ...

class arrival:
    @staticmethod
    def stream_of(device: torch.device) -> int: ...
    @staticmethod
    def capturing(device: torch.device) -> bool: ...

class batchnorm:
    @staticmethod
    def batch_norm(
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        running: tuple[torch.Tensor, ...],
        of_batch: bool,
        momentum: float | None,
        eps: float,
        slope: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...
    @staticmethod
    def batch_norm_backward(
        dy: torch.Tensor,
        x: torch.Tensor,
        y: torch.Tensor,
        weight: torch.Tensor | None,
        stats: torch.Tensor,
        of_batch: bool,
        slope: float,
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

class guard:
    class Guard:
        def __init__(self) -> None: ...
        def launch(
            self,
            gradients: Sequence[torch.Tensor],
            scores: tuple[torch.Tensor, ...],
            tally: torch.Tensor,
            gate: torch.Tensor,
            scale: torch.Tensor | None,
            max_norm: float | None = None,
        ) -> torch.Tensor: ...

class interpolate:
    @staticmethod
    def interpolate(
        real: torch.Tensor, fake: torch.Tensor, seed: int, offset: int | torch.Tensor, out: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]: ...

class penalty:
    @staticmethod
    def gradient_penalty(
        g: torch.Tensor, kind: str, target: float, weight: float, cotangent: torch.dtype | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

class perturb:
    @staticmethod
    def perturb(
        x: torch.Tensor, scale: float | torch.Tensor, seed: int, offset: int | torch.Tensor
    ) -> torch.Tensor: ...

class project:
    class Project:
        def __init__(self, device: torch.device, dtype: torch.dtype) -> None: ...
        def launch(
            self, params: Sequence[torch.Tensor], sizes: Sequence[int], bound: float, gate: torch.Tensor | None = None
        ) -> torch.Tensor: ...

class scores:
    @staticmethod
    def mean_scores(form: str, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]: ...

class table:
    NOT_WARM: str
    class Mirror:
        def set(self, rows: tuple[tuple[float, ...], ...]) -> torch.Tensor: ...

    @staticmethod
    def fill_pending() -> None: ...

class update:
    class Update:
        hyper: table.Mirror
        def __init__(self, device: torch.device, dtype: torch.dtype) -> None: ...
        def launch(
            self,
            algorithm: str,
            params: Sequence[torch.Tensor],
            grads: Sequence[torch.Tensor],
            states: Sequence[Sequence[torch.Tensor]],
            steps: Sequence[torch.Tensor],
            hyper: tuple[tuple[float, ...], ...],
            hyper_rows: Sequence[int],
            *,
            averages: Sequence[torch.Tensor] | None = None,
            gate: torch.Tensor | None = None,
            momentum: bool = False,
            centered: bool = False,
        ) -> torch.Tensor | None: ...
        def clamp(
            self, params: Sequence[torch.Tensor], bound: float, gate: torch.Tensor | None = None
        ) -> torch.Tensor: ...
