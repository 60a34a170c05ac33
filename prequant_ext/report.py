"""What quantization will do (PlanRow) and has done (Report), as data and as tables."""

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from prequant_ext.sites import BY_INTENT, Uncovered

PLAN_TITLES = ("module", "shape", "axis", "bits", "r", "trained", "kB")
LOW_COVERAGE = 0.5  # of the weights that neither the method nor the user meant to leave float


@dataclass(frozen=True)
class PlanRow:
    """One module of a plan.

    shape (N, K) of a matrix, (V, D) of an embedding · axis "input", "output", or None for an embedding ·
    outlier_slices: r of a matrix · trainable: number of outlier weights (or scales) to train · bytes of the module once
    quantized, as a checkpoint holds it, bias included
    """

    name: str
    kind: str
    shape: tuple[int, int]
    axis: str | None
    bits: int
    outlier_slices: int
    trainable: int
    bytes: int


@dataclass(frozen=True)
class ReportRow(PlanRow):
    """One quantized module. l2_error is ``sqrt(sum (w' - w)^2)``; num_outliers counts weights beyond the threshold (0
    for an embedding).
    """

    bytes_before: int
    l2_error: float
    num_outliers: int


@dataclass(frozen=True)
class Report:
    """What quantize_model did. ``str()`` is a table.

    rows          one a quantized module
    uncovered     the weights that stayed float, with the reason
    total_weights of the model, every parameter counted once
    bytes_before, bytes_after  of the model's parameters, as a checkpoint holds them
    """

    titles: ClassVar = ("module", "shape", "axis", "bits", "r", "outliers", "L2 error", "kB before", "kB after")

    rows: tuple[ReportRow, ...]
    uncovered: tuple[Uncovered, ...]
    total_weights: int
    bytes_before: int
    bytes_after: int

    @property
    def quantized_weights(self) -> int:
        return sum(math.prod(row.shape) for row in self.rows)

    @property
    def coverage(self) -> float:
        """Quantized weights over all weights, 0 to 1."""
        return self.quantized_weights / self.total_weights

    @property
    def is_low(self) -> bool:
        """Whether most of the weights that were meant to be quantized could not be."""
        missed = sum(math.prod(entry.shape) for entry in self.uncovered if entry.reason not in BY_INTENT)
        return self.quantized_weights < LOW_COVERAGE * (self.quantized_weights + missed)

    @property
    def l2_error(self) -> float:
        """``sqrt(sum (w' - w)^2)`` over the matrices; embeddings have theirs in :attr:`embedding_l2_error`."""
        return math.hypot(*(row.l2_error for row in self.rows if row.kind == "linear"))

    @property
    def embedding_l2_error(self) -> float:
        return math.hypot(*(row.l2_error for row in self.rows if row.kind == "embedding"))

    @property
    def num_outliers(self) -> int:
        return sum(row.num_outliers for row in self.rows)

    @property
    def trainable(self) -> int:
        """Outlier weights (or scales) to train; the head is not counted."""
        return sum(row.trainable for row in self.rows)

    def coverage_line(self) -> str:
        """Such as "quantized 61.0 % of the weights; not covered: score (2, 32), task head; ..."."""
        missing = (
            "; ".join(f"{what}, {reason}" for what, reason in grouped(self.uncovered)) or "nothing but norms and biases"
        )
        return f"quantized {100 * self.coverage:.1f} % of the weights; not covered: {missing}"

    def cells(self) -> list[Sequence[str]]:
        """The table as text, a row a module, below ``titles``."""
        return [
            (
                row.name,
                f"{row.shape[0]} x {row.shape[1]}",
                row.axis or "-",
                str(row.bits),
                str(row.outlier_slices),
                f"{row.num_outliers:,}",
                f"{row.l2_error:.4g}",
                f"{row.bytes_before / 1e3:,.1f}",
                f"{row.bytes / 1e3:,.1f}",
            )
            for row in self.rows
        ]

    def caption(self) -> str:
        """What the table's columns come to, and what they leave out."""
        ratio = 100 * self.bytes_after / self.bytes_before
        lines = [
            f"{self.bytes_before / 1e6:,.2f} MB -> {self.bytes_after / 1e6:,.2f} MB ({ratio:.1f} %), "
            f"{self.trainable:,} outlier weights or scales to train",
            f"L2 error of the matrices {self.l2_error:.4g}, of the embeddings {self.embedding_l2_error:.4g}; "
            f"{self.num_outliers:,} outliers",
            f"quantized {100 * self.coverage:.1f} % of {self.total_weights:,} weights; not covered:",
            *(
                [f"  {what}, {reason}" for what, reason in grouped(self.uncovered)]
                or ["  nothing but norms and biases"]
            ),
        ]
        return "\n".join(lines)

    def __str__(self) -> str:
        return f"{table(self.titles, self.cells())}\n\n{self.caption()}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; the inverse of :meth:`from_dict`."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Report":
        rows = tuple(ReportRow(**(row | {"shape": tuple(row["shape"])})) for row in values["rows"])
        uncovered = tuple(Uncovered(**(entry | {"shape": tuple(entry["shape"])})) for entry in values["uncovered"])
        return cls(**(dict(values) | {"rows": rows, "uncovered": uncovered}))


def table(titles: Sequence[str], cells: Sequence[Sequence[str]]) -> str:
    """Plain text, columns aligned: the first to the left, the rest to the right."""
    widths = [max(len(text) for text in column) for column in zip(titles, *cells, strict=True)]
    lines = []
    for row in (titles, ["-" * width for width in widths], *cells):
        first, *rest = (
            text.ljust(width) if i == 0 else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def plan_table(plan_rows: Sequence[PlanRow]) -> tuple[Sequence[str], list[Sequence[str]], str]:
    """Titles, rows and caption of a plan's table."""
    rows: list[Sequence[str]] = []
    for row in plan_rows:
        shape, size = f"{row.shape[0]} x {row.shape[1]}", f"{row.bytes / 1e3:,.1f}"
        rows.append(
            (row.name, shape, row.axis or "-", str(row.bits), str(row.outlier_slices), f"{row.trainable:,}", size)
        )
    trained, total = sum(row.trainable for row in plan_rows), sum(row.bytes for row in plan_rows)
    return (
        PLAN_TITLES,
        rows,
        f"{len(rows)} modules, {total / 1e6:,.2f} MB, {trained:,} outlier weights or scales to train",
    )


def grouped(uncovered: Sequence[Uncovered]) -> list[tuple[str, str]]:
    """A pair of what and why for each name, block numbers folded: ("layers.*.mlp.gate (4, 32) x 2", "...")."""
    groups: dict[tuple[str, tuple[int, ...], str], int] = {}
    for entry in uncovered:
        key = (re.sub(r"(?<=\.)\d+(?=\.)", "*", entry.name), entry.shape, entry.reason)
        groups[key] = groups.get(key, 0) + 1
    return [
        (f"{name} {shape}{f' x {count}' if count > 1 else ''}", reason)
        for (name, shape, reason), count in groups.items()
    ]
