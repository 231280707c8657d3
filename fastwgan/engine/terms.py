"""Further terms of a loss: functions of the user's of one record of a step, which are added to what is minimised.

Scores and outputs come with their graphs, so that one backward pass serves the loss and its terms.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_map

from fastwgan.backend import wide
from fastwgan.constraints import Samples

Scored = tuple[Tensor, tuple[Any, ...]]  # scores, and what else the critic returned
Term = Callable[["StepRecord"], Tensor]
CONSTANTS = (bool, int, float, str, type(None))


def split(output: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return a network's samples or scores, and the further outputs behind them, if it returned a tuple."""
    return (output[0], output[1:]) if isinstance(output, tuple) and output else (output, ())


class Outputs:
    """The further outputs of the networks in a step, tuples: the critic's of ``real`` and ``fake``, ``generator``'s."""

    def __init__(self, record: "StepRecord") -> None:
        self._record = record

    real = property(lambda self: self._record._real_pass()[1])
    fake = property(lambda self: self._record._fake_outputs)
    generator = property(lambda self: self._record._generated)


class StepRecord:
    """The tensors of one step, for a ``critic_term`` or ``generator_term`` of a :class:`fastwgan.Trainer`.

    In a generator's step, scores and outputs of real samples take a pass of the critic when they are first asked for.

    Attributes:
        real: the real samples [N, ...]; in a generator's step None where that was given none.
        fake: the generator's samples [N, ...], with their graph in a generator's step.
        real_scores, fake_scores: the critic's scores [N, ...] in float32 or wider, or one for each pack, with graphs.
        cond, fake_cond: the conditions of real and of fake samples, as tuples.
        outputs: :class:`Outputs`, what the networks returned behind scores and samples.
    """

    def __init__(self, samples: Samples, score: Callable[..., Scored], real: Scored | None, fake: Scored) -> None:
        self.real, self.fake, self.cond, self.fake_cond, _, self._generated = samples
        scores, self._fake_outputs = fake
        self.fake_scores, self._score, self._scored_real = scores.to(wide(scores.dtype)), score, real

    def _real_pass(self) -> Scored:
        if self._scored_real is None:
            if self.real is None:
                raise ValueError("generator_term: expected real samples, got none: give generator_step real=")
            self._scored_real = self._score(self.real.clone(), *self.cond)  # as the pass may write to it
        return self._scored_real

    @property
    def real_scores(self) -> Tensor:
        scores, _ = self._real_pass()
        return scores.to(wide(scores.dtype))

    @property
    def outputs(self) -> Outputs:
        return Outputs(self)


def halves(outputs: tuple[Any, ...], rows: int) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """Return the further outputs for real and for fake samples, of a pass on both that gave ``rows`` scores."""

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
