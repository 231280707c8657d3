"""What :func:`fastwgan.verify` found: rows of errors and a report of them, as text and for JSON."""

import math
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

HEADER, SIDES = ("step", "op", "rows", "worst", "error", "eager", "allowed", ""), "<<><>>><"


@dataclass(frozen=True)
class Row:
    """One tensor of one stage.

    Attributes:
        step: "critic" or "generator".
        op: the stage: generate, perturb or interpolate, forward, scores or objective, input gradient, penalty, loss,
            backward, guard, update, clamp or project, or buffers.
        name: of the tensor; in backward, update, clamp and project the parameter's, with the optimizer's state behind a
            colon.
        error: ||ours - float64|| / ||float64||; absolute where float64 has zero; NaN where ours is not there or has
            another shape.
        eager, tolerance: the error of plain PyTorch in the same dtype, and the one allowed.
    """

    step: str
    op: str
    name: str
    error: float
    eager: float
    tolerance: float

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance  # NaN is not


@dataclass(frozen=True)
class Report:
    """What :func:`fastwgan.verify` found. Printed, a table: each stage's worst row, and every row that failed.

    Attributes:
        rows: in the order of the step.
        constraint, device, backend, dtype, batch, seed: what was verified; backend is the one that ran.
        versions: of fastwgan, torch, triton and python.
        notes, options: what was done to the networks' copies; those of blend and drift that were given.
    """

    rows: tuple[Row, ...]
    constraint: str
    device: str
    backend: str
    dtype: str
    batch: int
    seed: int
    versions: dict[str, str | None]
    notes: tuple[str, ...] = ()
    options: dict[str, float] = field(default_factory=dict)

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
        what = ", ".join((self.constraint, *(f"{name}={value:g}" for name, value in self.options.items())))
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
