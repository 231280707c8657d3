"""The findings of :func:`fastwgan.verify`: rows of errors and a report of them, as text and for JSON."""

import math
from dataclasses import asdict, dataclass
from itertools import groupby
from typing import Any

HEADER, SIDES = ("step", "op", "rows", "worst", "error", "eager", "allowed", ""), "<<><>>><"


@dataclass(frozen=True)
class Row:
    """One tensor of one stage of a step."""

    step: str  # "critic" or "generator"
    # The stage: generate, perturb or interpolate, forward, scores, input gradient, penalty, term, loss, backward,
    # guard, update, clamp or project, or buffers.
    op: str
    name: str  # the tensor's: in backward, update, clamp and project a parameter's, or its state's behind a colon
    error: float  # ||ours - float64|| / ||float64||; absolute where that is 0; NaN where ours is not there or misshapen
    eager: float  # the error of plain PyTorch in the same dtype
    tolerance: float  # the error allowed

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


@dataclass(frozen=True)
class Report:
    """The findings of :func:`fastwgan.verify`. Printed, a table: each stage's worst row, and every row that failed."""

    rows: tuple[Row, ...]  # in the order of the step
    constraint: str
    device: str
    backend: str  # the one that ran
    dtype: str
    batch: int
    seed: int
    versions: dict[str, str | None]  # of fastwgan, torch, triton and python
    notes: tuple[str, ...] = ()  # what was done to the networks' copies
    terms: tuple[str, ...] = ()  # the keywords of those that were given

    @property
    def passed(self) -> bool:
        return not self.failed

    @property
    def failed(self) -> tuple[Row, ...]:
        """Return the rows that failed. The first one's stage is the one at fault."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def title(self) -> str:
        """Return what was verified, in a line."""
        what = " with ".join((self.constraint, *self.terms))
        return f"{what}: {self.backend} on {self.device}, {self.dtype}, batch {self.batch}"

    @property
    def verdict(self) -> str:
        """Return the outcome, in a sentence."""
        if self.passed:
            return f"passed: {len(self.rows)} rows"
        count, first = len(self.failed), self.failed[0]
        return f"FAILED: {count} of {len(self.rows)} rows, first {first.op} ({first.name}) in the {first.step} step"

    def __str__(self) -> str:
        table = [HEADER]
        for (step, op), group in groupby(self.rows, lambda row: (row.step, row.op)):
            members = list(group)
            failed, passed = ([row for row in members if row.passed is verdict] for verdict in (False, True))
            passed.sort(key=lambda row: row.error / row.tolerance if row.tolerance else 0.0, reverse=True)
            for row in failed + passed[:1]:
                numbers = (f"{x:.2g}" for x in (row.error, row.eager, row.tolerance))
                count, verdict = (str(len(passed)), "ok") if row.passed else ("1", "FAIL")
                table.append((step, op, count, row.name, *numbers, verdict))
        formats = [f"{side}{max(map(len, cells))}" for side, *cells in zip(SIDES, *table, strict=True)]
        lines = ["  ".join(map(format, line, formats)).rstrip() for line in table]
        return "\n".join((self.title, *(f"note: {note}" for note in self.notes), *lines, self.verdict))

    def as_dict(self) -> dict[str, Any]:
        """Return all of it, as JSON can hold it: a number that is not finite is None."""
        rows = [
            {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(row).items()}
            | {"passed": row.passed}
            for row in self.rows
        ]
        return asdict(self) | {"passed": self.passed, "rows": rows}
