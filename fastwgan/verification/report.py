"""What :func:`fastwgan.verify` found: rows of errors and a report of them, as text and for JSON."""

import math
from dataclasses import asdict, dataclass, field
from itertools import groupby
from typing import Any

__all__ = ["HEADER", "WORDS", "Report", "Row"]

HEADER = ("step", "op", "rows", "worst", "error", "eager", "allowed", "")
WORDS = ("step", "op", "worst", "")  # columns that are none of numbers


@dataclass(frozen=True)
class Row:
    """One tensor of one stage.

    Attributes:
        step: "critic" or "generator".
        op: the stage: generate, perturb, interpolate, forward, scores or objective, input gradient, penalty, loss,
            backward, guard, update, clamp or project, or buffers.
        name: of the tensor; in backward, update, clamp and project the parameter's, with the optimizer's state behind a
            colon.
        error: ||ours - float64|| / ||float64||; absolute where float64 has zero; NaN where ours is not there or has
            another shape.
        eager: the same of plain PyTorch in the same dtype.
        tolerance: of error.
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
        notes: what was done to the networks' copies.
        options: those of blend, drift and instance_noise that were given.
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
        """The rows that failed. The first one's stage is the one at fault."""
        return tuple(row for row in self.rows if not row.passed)

    @property
    def title(self) -> str:
        """What was verified, in a line."""
        what = ", ".join((self.constraint, *(f"{name}={value:g}" for name, value in self.options.items())))
        return f"{what}: {self.backend} on {self.device}, {self.dtype}, batch {self.batch}"

    @property
    def verdict(self) -> str:
        """The outcome, in a sentence."""
        if self.passed:
            return f"passed: {len(self.rows)} rows"
        first = self.failed[0]
        where = f"first {first.op} ({first.name}) in the {first.step} step"
        return f"FAILED: {len(self.failed)} of {len(self.rows)} rows, {where}"

    def lines(self) -> list[tuple[str, ...]]:
        """The table's lines below its HEADER: of each op the worst row of those that passed, and all that failed."""
        table = []
        for (step, op), group in groupby(self.rows, lambda row: (row.step, row.op)):
            members = list(group)
            failed, passed = ([row for row in members if row.passed is verdict] for verdict in (False, True))
            worst = [max(passed, key=lambda row: row.error / row.tolerance if row.tolerance else 0.0)] if passed else []
            for row in failed + worst:
                count = 1 if not row.passed else len(passed)
                numbers = (f"{x:.2g}" for x in (row.error, row.eager, row.tolerance))
                table.append((step, op, str(count), row.name, *numbers, "ok" if row.passed else "FAIL"))
        return table

    def __str__(self) -> str:
        table = [HEADER, *self.lines()]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if name in WORDS else cell.rjust(width)
                for name, cell, width in zip(HEADER, line, widths, strict=True)
            ).rstrip()
            for line in table
        ]
        return "\n".join((self.title, *(f"note: {note}" for note in self.notes), *lines, self.verdict))

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it: a number that is not finite is None."""
        result = asdict(self) | {"passed": self.passed}
        result["rows"] = [
            {key: None if isinstance(x, float) and not math.isfinite(x) else x for key, x in asdict(row).items()}
            | {"passed": row.passed}
            for row in self.rows
        ]
        return result
