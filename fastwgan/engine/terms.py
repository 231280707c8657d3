"""Further terms of a loss: functions of the user's of one record of a step, which are added to what is minimised.

Scores and outputs come with their graphs, so that one backward pass serves the loss and its terms.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

Scored = tuple[Tensor, tuple[Any, ...]]  # scores, and what else the critic returned
Term = Callable[["StepRecord"], Tensor]
CONSTANTS = (bool, int, float, str, type(None))


def split(output: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a network's samples or scores, and the further outputs behind them, if it returned a tuple."""
    return (output[0], output[1:]) if isinstance(output, tuple) and output else (output, ())


class RealPass:
    """The critic's pass on the real samples of a step, which is taken when its result is first asked for."""

    def __init__(self, take: Callable[[], Scored]) -> None:
        self._take = take
        self._found: Scored | None = None

    def __call__(self) -> Scored:
        if self._found is None:
            self._found = self._take()
        return self._found


def needed(real: Tensor | None) -> Tensor:
    """Return the real samples of a generator's step, or raise ValueError where it was given none."""
    if real is None:
        raise ValueError("generator_term: expected real samples, for their scores, got none: give generator_step real=")
    return real


class Outputs:
    """The networks' further outputs in a step, as tuples: what they returned behind scores and samples.

    Attributes:
        real, fake: the critic's on real and on fake samples.
        generator: the generator's.
    """

    def __init__(self, real_pass: RealPass, fake: tuple[Any, ...], generator: tuple[Any, ...]) -> None:
        self._real_pass, self.fake, self.generator = real_pass, fake, generator

    @property
    def real(self) -> tuple[Any, ...]:
        return self._real_pass()[1]


class StepRecord:
    """The tensors of one step, for a ``critic_term`` or ``generator_term`` of a :class:`fastwgan.Trainer`.

    In a generator's step the scores and outputs of real samples take a pass of the critic of their own, when they are
    first asked for.

    Attributes:
        real: the real samples [N, ...]; in a generator's step None where that was given none.
        fake: the generator's samples [N, ...], with their graph in a generator's step.
        real_scores, fake_scores: the critic's scores [N, ...], or one for each pack, with their graphs.
        cond, fake_cond: the conditions of real and of fake samples, as tuples.
        outputs: the networks' further outputs, as :class:`Outputs` has them.
    """

    def __init__(
        self, real: Tensor | None, fake: Tensor, cond: tuple[Any, ...], fake_cond: tuple[Any, ...],
        real_pass: Callable[[], Scored], scored: Scored, generated: tuple[Any, ...],
    ) -> None:  # fmt: skip
        self.real, self.fake, self.cond, self.fake_cond, self.fake_scores = real, fake, cond, fake_cond, scored[0]
        self._real_pass = RealPass(real_pass)
        self.outputs = Outputs(self._real_pass, scored[1], generated)

    @property
    def real_scores(self) -> Tensor:
        return self._real_pass()[0]


def halves(outputs: tuple[Any, ...], rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the parts of real and of fake samples in what a critic returned for both, ``rows`` scores in all."""

    def half(x: Any, place: int) -> Any:
        if isinstance(x, Tensor) and x.dim() and len(x) % rows == 0:  # a row for each pack, or for each sample
            return x.tensor_split(2)[place]
        if isinstance(x, CONSTANTS):
            return x
        got = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            "critic: its output: expected further outputs with a row for each sample where real and fake samples share "
            f"a pass, got {got}: leave independent_samples out"
        )

    real, fake = (tree_map(lambda x, place=place: half(x, place), outputs) for place in range(2))
    return real, fake
