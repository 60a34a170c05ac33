"""The model part of our HTML pages: what quantization did to a model, what it would do at other widths, and what tasks
changed.
"""

import math
from collections.abc import Sequence
from pathlib import Path

from prequant_ext.bit_allocation import Choice, Proposal, Sensitivity, best_choices, block_options
from prequant_ext.config import PreQuantConfig
from prequant_ext.html_page import Section, code, details, paragraph, render, table
from prequant_ext.pages import model_figures as figures
from prequant_ext.pages.inspection import (
    Inspection,
    Matrix,
    Recurrence,
    TaskChange,
    clip_range,
    histogram,
    recurrences,
    task_changes,
    telling,
)
from prequant_ext.report import grouped
from prequant_ext.study.page import sections as run_sections
from prequant_ext.task_file import write_atomically

RANKED = 15  # dimensions in the table of those that recur most
# with their defaults, too
SHOWN_SETTINGS = ("bits", "strategy", "r", "axis", "selector", "activation_bits", "embedding_bits")


def model_page(
    inspection: Inspection,
    proposal: Proposal | None = None,
    task_files: Sequence[Path] = (),
    runs: Path | None = None,
    how_to_quantize: str = "",
) -> str:
    """The page of a model. proposal: of its sensitivity, for a float model, and ``how_to_quantize`` the model by it:
    the command, where the reader has one; task_files: of its base; runs: a folder of experiments.

    Raises FileNotFoundError and ValueError as task_changes, and FileNotFoundError where ``runs`` has no experiment.
    """
    sections = [
        _coverage(inspection),
        _errors(inspection),
        _dimensions(inspection),
        _histograms(inspection),
        _sensitivity(inspection, proposal, how_to_quantize),
    ]
    if task_files:
        sections.append(_tasks(inspection, task_changes(inspection, task_files)))
    if runs is not None:
        sections += run_sections(runs)
    return render(f"PreQuant: {inspection.name}", _intro(inspection), sections)


def write_model_page(
    inspection: Inspection,
    proposal: Proposal | None,
    task_files: Sequence[Path],
    runs: Path | None,
    how_to_quantize: str,
    out: Path,
) -> None:
    """Write :func:`model_page` to ``out``, which is whole or as it was. Raises as model_page."""
    write_atomically(out, model_page(inspection, proposal, task_files, runs, how_to_quantize).encode())


def _intro(inspection: Inspection) -> str:
    source = "A float model, quantized in memory for this page" if inspection.is_float else "A quantized directory"
    return f"{source}. {len(inspection.matrices)} matrices; settings: {_settings(inspection.config)}."


def _settings(config: PreQuantConfig) -> str:
    """What tells one quantization from another: the main settings, and whatever is no default."""
    own, default = config.to_dict(), PreQuantConfig().to_dict()
    return ", ".join(
        f"{name} = {value}" for name, value in own.items() if name in SHOWN_SETTINGS or value != default[name]
    )


# ---- coverage and errors ---------------------------------------------------------------------------------------------


def _coverage(inspection: Inspection) -> Section:
    report = inspection.report
    ratio = 100 * report.bytes_after / report.bytes_before
    text = (
        f"{100 * report.coverage:.1f} % of {report.total_weights:,} weights are quantized; "
        f"{report.bytes_before / 1e6:,.2f} MB became "
        f"{report.bytes_after / 1e6:,.2f} MB ({ratio:.1f} %). {report.trainable:,} outlier weights or scales train "
        "for a task, beside its head."
    )
    rows = []
    for kind, title in (("linear", "matrices"), ("embedding", "embedding tables")):
        own = [row for row in report.rows if row.kind == kind]
        if own:
            weights, before, after = (
                sum(numbers)
                for numbers in zip(*((math.prod(row.shape), row.bytes_before, row.bytes) for row in own), strict=True)
            )
            rows.append(_coverage_row(f"{title}, quantized ({len(own)})", weights, report.total_weights, before, after))
    left_bytes = [
        report.bytes_before - sum(row.bytes_before for row in report.rows),
        report.bytes_after - sum(row.bytes for row in report.rows),
    ]
    rows.append(
        _coverage_row("float", report.total_weights - report.quantized_weights, report.total_weights, *left_bytes)
    )
    missing = grouped(report.uncovered)
    return Section(
        "coverage",
        "Coverage",
        [
            paragraph(text),
            table(("", "weights", "of all", "MB before", "MB after"), rows),
            table(("left float, besides norms and biases", "why"), missing)
            if missing
            else paragraph("Nothing but norms and biases is left float."),
        ],
    )


def _coverage_row(title: str, weights: int, total: int, before: int, after: int) -> tuple[str, ...]:
    return title, f"{weights:,}", f"{100 * weights / total:.1f} %", f"{before / 1e6:,.2f}", f"{after / 1e6:,.2f}"


def _errors(inspection: Inspection) -> Section:
    report = inspection.report
    base = "the float weights' norm" if inspection.is_float else "the stored weights' norm (the float ones are gone)"
    text = (
        f"Relative error of each matrix: ||w' − w|| over {base}. Outlier dimensions count with the values that "
        "they start from."
    )
    worst = sorted(inspection.matrices, key=lambda matrix: -matrix.relative_error)[:3]
    most = "; ".join(f"{matrix.row.name} {100 * matrix.relative_error:.1f} %" for matrix in worst)
    drawn = figures.error_figure(inspection)
    return Section(
        "error",
        "Error of each matrix",
        [
            paragraph(
                f"{text} L2 error of all matrices: {report.l2_error:.4g}; of the embedding tables: "
                f"{report.embedding_l2_error:.4g}."
            ),
            paragraph(f"Most lose: {most}."),
            drawn or paragraph("The blocks of this model are not known: its errors have no place in a map."),
            details("every module", table(report.titles, report.cells())),
        ],
    )


# ---- outlier dimensions ----------------------------------------------------------------------------------------------


def _dimensions(inspection: Inspection) -> Section:
    found = recurrences(inspection)
    parts = [part for recurrence in found for part in _recurrence_parts(recurrence, len(found) > 1)]
    if len(found) > 1:
        parts.append(
            paragraph(
                "Each stack has a residual stream. Cross-attention keys and values, which read another's, are counted "
                "with their own stack."
            )
        )
    if not found:
        has_none = not any(matrix.layer.r for matrix in inspection.matrices)
        why = "it has none" if has_none else "none of its matrices is known to have them in the residual stream"
        parts = [paragraph(f"There is no map of this model's outlier dimensions: {why}.")]
    return Section("dimensions", "Outlier dimensions across layers", parts)


def _recurrence_parts(recurrence: Recurrence, has_stacks: bool) -> list[str]:
    slots, matrices = sum(recurrence.counts.values()), len(recurrence.matrices)
    recurring = sum(count > 1 for count in recurrence.counts.values())
    where = f"{recurrence.stack}: " if has_stacks else ""
    text = (
        f"{where}{matrices} matrices chose {slots:,} outlier dimensions among the {recurrence.width:,} of the "
        f"residual stream, {len(recurrence.counts):,} "
        f"different ones; {recurring:,} recur. Drawn at random, each would be in {recurrence.by_chance:.2f} matrices."
    )
    more = f" The {figures.COLUMNS} that recur most are shown." if recurring > figures.COLUMNS else ""
    how = (
        "A cell is coloured where the dimension is an outlier dimension of the matrix, by the root mean square of "
        f"its slice over that of the matrix.{more}"
    )
    drawn = figures.dimension_figure(recurrence)
    rows = [_dimension_row(recurrence, dim) for dim in list(recurrence.counts)[:RANKED]]
    titles = ("dimension", "matrices", "as input column", "as output row", "blocks", "mean size")
    return [
        paragraph(text),
        *([paragraph(how), drawn] if drawn else [paragraph("No dimension recurs.")]),
        table(titles, rows),
    ]


def _dimension_row(recurrence: Recurrence, dim: int) -> tuple[str, ...]:
    holding = recurrence.holding(dim)
    columns = sum(matrix.layer.axis == "input" for matrix in holding)
    blocks = sorted({matrix.block.index for matrix in holding if matrix.block})
    total = len(recurrence.matrices)
    return (
        str(dim),
        f"{len(holding)} of {total}",
        str(columns),
        str(len(holding) - columns),
        _ranges(blocks),
        f"{recurrence.mean_strength(dim):.2f}",
    )


def _ranges(numbers: Sequence[int]) -> str:
    """Ascending numbers with runs folded: "0-3, 5"."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# ---- histograms ------------------------------------------------------------------------------------------------------


def _histograms(inspection: Inspection) -> Section:
    text = (
        "Counts on a logarithmic axis; dashed: the values of the lowest and the highest code. The range is not "
        "symmetric: with zero point z and b bits it goes "
        "from −z to 2^b − 1 − z steps, which at 4 bits and a step of 6σ / 16 is −3σ to +2.625σ. Outlier dimensions "
        "are kept in float32 and not clipped."
    )
    source = (
        ""
        if inspection.is_float
        else " The float weights are gone: the bars are the values of the codes, and what was clipped sits in the "
        "outer ones."
    )
    titles = ("matrix", "which", "bits", "lowest code", "highest code", "clipped, of those held as codes")
    return Section(
        "histograms",
        "Weights and the range of their codes",
        [
            paragraph(text + source),
            figures.histogram_figure(inspection),
            table(titles, [_histogram_row(*chosen) for chosen in telling(inspection.matrices)]),
        ],
    )


def _histogram_row(title: str, matrix: Matrix) -> tuple[str, ...]:
    reach, clipped = clip_range(matrix.layer), histogram(matrix).clipped
    share = "not known" if clipped is None else f"{100 * clipped:.2f} %"
    return matrix.row.name, title, str(matrix.layer.bits), f"{reach.low:.4g}", f"{reach.high:.4g}", share


# ---- sensitivity -----------------------------------------------------------------------------------------------------


def _sensitivity(inspection: Inspection, proposal: Proposal | None, how_to_quantize: str) -> Section:
    if inspection.measured is None:
        parts = [
            paragraph(
                "Errors at other widths need the float weights, which a quantized directory does not have: inspect "
                "the float model."
            )
        ]
    elif proposal is None:
        parts = [
            paragraph("The blocks of this model are not known, and layer_bits could not name them."),
            _matrix_table(inspection.measured),
        ]
    else:
        parts = _proposal_parts(inspection.measured, proposal, how_to_quantize)
    return Section("sensitivity", "Sensitivity, and bits for each block", parts)


def _proposal_parts(measured: Sensitivity, proposal: Proposal, how_to_quantize: str) -> list[str]:
    front = best_choices(
        [
            [Choice(size, error, (bits,)) for bits, (size, error) in own.items()]
            for own in block_options(measured).values()
        ]
    )
    text = (
        "Squared errors of the weights, added over the matrices of a block; no data was read. The proposal has the "
        "least sum of all allocations of its size. "
        "Sizes are those of the stored containers of 2, 4 and 8 bits: 3 bits take the place of 4 and are never worth "
        "proposing."
    )
    caution = (
        "What this cannot see is how far an error travels. In the paper's Table 5 (T5 encoder, QNLI) 2 bits in the "
        "bottom third of the blocks cost 10 points, "
        "in the top third 3: every later block works on what an early one spoilt. Try a proposal on a task before you "
        "use it."
    )
    return [
        paragraph(text),
        figures.sensitivity_figure(proposal, front, measured.weights),
        table(proposal.titles, proposal.cells()),
        paragraph(
            f"Proposed: {proposal.bits_per_weight:.2f} stored bits a weight, a model of "
            f"{proposal.model_bytes / 1e6:,.2f} MB, L2 error of the matrices "
            f"{math.sqrt(proposal.squared_error):.4g}. To quantize so, the other options as they were here:"
        ),
        code(how_to_quantize or f"layer_bits = {proposal.layer_bits}"),
        paragraph(caution),
        details("relative error of every matrix", _matrix_table(measured)),
    ]


def _matrix_table(measured: Sensitivity) -> str:
    rows = [
        (matrix.name, *(f"{100 * matrix.relative_error(bits):.1f} %" for bits in measured.widths))
        for matrix in measured.matrices
    ]
    return table(("matrix", *(f"{bits} bits" for bits in measured.widths)), rows)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def _tasks(inspection: Inspection, changes: Sequence[TaskChange]) -> Section:
    text = (
        "What each task file changed: the norm of the difference between its outlier weights and the base's, for "
        "each column (of a writer: row)."
    )
    if not any(matrix.layer.r for matrix in inspection.matrices):
        return Section(
            "tasks", "What tasks changed", [paragraph("This base has no outlier dimensions: its tasks changed none.")]
        )
    rows = [_task_row(inspection, change) for change in changes]
    titles = ("task", "file", "score", "change", "of the base's", "changed most")
    return Section(
        "tasks",
        "What tasks changed",
        [paragraph(text), table(titles, rows), *figures.task_figures(inspection, changes)],
    )


def _task_row(inspection: Inspection, change: TaskChange) -> tuple[str, ...]:
    totals = [math.hypot(*own) for own in change.norms]
    most = inspection.matrices[totals.index(max(totals))].row.name
    ratio = f"{100 * change.norm / change.base_norm:.1f} %" if change.base_norm else ""
    return change.name, change.file, change.metadata.get("score", "")[:6], f"{change.norm:.4g}", ratio, most
