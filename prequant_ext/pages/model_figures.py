"""Figures of a quantized model as SVG text: errors, outlier dimensions, histograms, sensitivity, what tasks changed."""

import math
from collections.abc import Sequence
from typing import Any

from prequant_ext.bit_allocation import Choice, Proposal
from prequant_ext.blocks import Block
from prequant_ext.pages.inspection import (
    ClipRange,
    Inspection,
    Matrix,
    Recurrence,
    TaskChange,
    clip_range,
    histogram,
    telling,
)
from prequant_ext.study.figures import COLOURS, INK, grid, svg

COLUMNS = 40  # of a map of dimensions: the rest recurs least
CELL = 0.19  # inches, the height of a matrix's row
BAR = 0.2  # inches, the width of a colour bar
VALUES_UP_TO = 8  # outlier dimensions of a matrix whose values can be read in a cell
PANELS = 3  # tasks side by side


def label(matrix: Matrix, with_stack: bool = False) -> str:
    """Short: the block's number and the name within the block."""
    if matrix.block is None:
        return matrix.part
    return f"{f'{matrix.block.stack}.' if with_stack else ''}{matrix.block.index} {matrix.part}"


def labels(matrices: Sequence[Matrix]) -> list[str]:
    has_stacks = len({matrix.block.stack for matrix in matrices if matrix.block}) > 1
    return [label(matrix, has_stacks) for matrix in matrices]


def _block_names(blocks: Sequence[Block]) -> list[str]:
    has_stacks = len({block.stack for block in blocks}) > 1
    return [f"{block.stack}.{block.index}" if has_stacks else str(block.index) for block in blocks]


def error_figure(inspection: Inspection) -> str | None:
    """Block by matrix, relative errors in percent; None where the blocks are not known."""
    from matplotlib.figure import Figure

    by_place = {
        (matrix.block, matrix.part): 100 * matrix.relative_error for matrix in inspection.matrices if matrix.block
    }
    if not by_place:
        return None
    blocks, parts = (
        list(dict.fromkeys(block for block, _ in by_place)),
        list(dict.fromkeys(part for _, part in by_place)),
    )
    values = [[by_place.get((block, part), math.nan) for part in parts] for block in blocks]
    drawing = Figure(figsize=(2.6 + 0.75 * len(parts), 1.5 + 0.26 * len(blocks)), layout="constrained")
    axes = drawing.subplots()
    image = grid(axes, values, _block_names(blocks), [part for part in parts], max(by_place.values()), ".1f")
    axes.set_ylabel("block", fontsize=9, color=INK)
    _colour_bar(drawing, image, axes, "relative error, %")
    return svg(drawing)


def _colour_bar(drawing: Any, image: Any, axes: Any, text: str) -> None:
    bar = drawing.colorbar(image, ax=axes, pad=0.01, aspect=max(20, drawing.get_figheight() / BAR))
    bar.set_label(text, fontsize=9, color=INK)
    bar.ax.tick_params(labelsize=8)


def dimension_figure(recurrence: Recurrence) -> str | None:
    """Matrices by the dimensions that recur, with the number of matrices above each; None where none recurs."""
    from matplotlib.figure import Figure

    dims = [dim for dim, count in recurrence.counts.items() if count > 1][:COLUMNS]
    if not dims:
        return None
    values = [[own.get(dim, math.nan) for dim in dims] for own in recurrence.strengths]
    rows = len(recurrence.matrices)
    drawing = Figure(figsize=(3.2 + 0.19 * len(dims), 1.5 + CELL * rows), layout="constrained")
    above, below = drawing.subplots(2, 1, sharex=True, height_ratios=(0.9, CELL * rows))
    above.bar(range(len(dims)), [recurrence.counts[dim] for dim in dims], color=COLOURS[0])
    above.axhline(recurrence.by_chance, color=COLOURS[1], linewidth=1)
    note = above.text(
        1.01,
        recurrence.by_chance,
        "by chance",
        transform=above.get_yaxis_transform(),
        va="center",
        fontsize=8,
        color=COLOURS[1],
    )
    note.set_in_layout(False)  # there is room above the colour bar
    above.set_ylabel("matrices", fontsize=8, color=INK)
    above.tick_params(labelsize=8, bottom=False, labelbottom=False)
    above.spines[["top", "right"]].set_visible(False)
    image = grid(
        below,
        values,
        labels(recurrence.matrices),
        [str(dim) for dim in dims],
        max(max(own.values()) for own in recurrence.strengths),
        None,
    )
    below.set_xticks(range(len(dims)), [str(dim) for dim in dims], rotation=90, ha="center", fontsize=7)
    below.tick_params(axis="y", labelsize=7)
    _separate_blocks(below, recurrence.matrices)
    below.set_xlabel("hidden dimension", fontsize=9, color=INK)
    _colour_bar(drawing, image, below, "size of the slice, over the matrix's mean")
    return svg(drawing)


def _separate_blocks(axes: Any, matrices: Sequence[Matrix]) -> None:
    for i in range(1, len(matrices)):
        if matrices[i].block != matrices[i - 1].block:
            axes.axhline(i - 0.5, color="#cccccc", linewidth=0.8)


def histogram_figure(inspection: Inspection) -> str:
    """Of the matrices of the largest, median and least error, with the range that the codes reach."""
    from matplotlib.figure import Figure

    shown = telling(inspection.matrices)
    drawing = Figure(figsize=(3.75 * len(shown) + 0.2, 3.7), layout="constrained")
    for axes, (title, matrix) in zip(drawing.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        found, reach = histogram(matrix), clip_range(matrix.layer)
        axes.stairs(
            found.codes,
            found.edges,
            fill=True,
            color=COLOURS[0],
            alpha=0.75,
            label="float weights" if inspection.is_float else "values of the codes",
        )
        if matrix.layer.r:
            axes.stairs(
                found.outliers, found.edges, color=COLOURS[1], linewidth=1.2, label="weights of the outlier dimensions"
            )
        for value in (reach.low, reach.high):
            axes.axvline(
                value,
                color=INK,
                linewidth=1,
                linestyle="--",
                label="lowest and highest code" if value == reach.low else None,
            )
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_ylim(0.5, 8 * max(1, found.codes.max()))
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
        beyond = (
            f"outermost bins: {len(found.beyond)} beyond, as far as {max(found.beyond, key=abs):.3g}"
            if found.beyond
            else ""
        )
        axes.set_xlabel(f"codes reach {reach_text(matrix, reach)}\n{beyond}".replace("-", "−"), fontsize=8, color=INK)
        axes.set_title(
            f"{title}: {label(matrix, True)}\n{100 * matrix.relative_error:.1f} % at {matrix.layer.bits} bits",
            fontsize=9,
            color=INK,
        )
    drawing.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return svg(drawing)


def reach_text(matrix: Matrix, reach: ClipRange) -> str:
    """The clip range in the weights' unit; of float weights with one scale in standard deviations from 0, too."""
    text = f"{reach.low:.3g} to {reach.high:.3g}"
    if reach.scales > 1:
        return f"{text}, medians of {reach.scales:,} scales"
    sigma = 0.0 if matrix.weight is None else matrix.weight.double().std(correction=0).item()
    return f"{text}, {reach.low / sigma:.2f} σ to {reach.high / sigma:.2f} σ" if sigma else text


def sensitivity_figure(proposal: Proposal, front: Sequence[Choice], weights: int) -> str:
    """Errors of each block at each width; and what the best allocations of every size lose, with the proposed one."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(10.6, 3.6), layout="constrained")
    left, right = drawing.subplots(1, 2)
    names = _block_names([own.block for own in proposal.blocks])
    widths = list(proposal.blocks[0].squared_error)
    for colour, bits in zip(COLOURS, widths, strict=False):
        left.plot(
            [math.sqrt(own.squared_error[bits]) for own in proposal.blocks],
            color=colour,
            marker="o",
            markersize=3,
            label=f"{bits} bits",
        )
    chosen = [math.sqrt(own.squared_error[own.bits]) for own in proposal.blocks]
    left.plot(chosen, "o", markersize=9, markerfacecolor="none", color=INK, label="proposed")
    left.set_xticks(range(len(names)), names, fontsize=8, rotation=90 if len(names) > 16 else 0)
    left.set_ylim(bottom=0)
    left.set(xlabel="block", ylabel="L2 error")
    left.legend(
        frameon=False,
        fontsize=8,
        ncols=len(widths) + 1,
        loc="upper center",
        bbox_to_anchor=(0.5, 1.14),
        columnspacing=1,
        handletextpad=0.3,
    )
    right.plot(
        [8 * choice.bytes / weights for choice in front],
        [math.sqrt(choice.squared_error) for choice in front],
        color=COLOURS[0],
        marker="o",
        markersize=3,
    )
    for choice in front:
        if len(set(choice.bits)) == 1:
            _point(
                right, 8 * choice.bytes / weights, math.sqrt(choice.squared_error), f"{choice.bits[0]} bits everywhere"
            )
    right.plot(
        proposal.bits_per_weight,
        math.sqrt(proposal.squared_error),
        "o",
        markersize=9,
        markerfacecolor="none",
        color=INK,
    )
    _point(right, proposal.bits_per_weight, math.sqrt(proposal.squared_error), "proposed", below=True)
    right.set_ylim(bottom=0)
    right.margins(x=0.12)
    right.set(xlabel="stored bits a weight", ylabel="L2 error of the matrices")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=8)
    return svg(drawing)


def _point(axes: Any, x: float, y: float, text: str, below: bool = False) -> None:
    axes.annotate(
        text,
        (x, y),
        xytext=(-6 if below else 6, -6 if below else 6),
        textcoords="offset points",
        fontsize=8,
        color=INK,
        ha="right" if below else "left",
        va="top" if below else "bottom",
    )


def task_figures(inspection: Inspection, changes: Sequence[TaskChange]) -> list[str]:
    """Matrices by their outlier dimensions, in ascending order, PANELS tasks a figure; one scale of colours for all."""
    from matplotlib.figure import Figure

    matrices = [matrix for matrix in inspection.matrices if matrix.layer.r]
    largest = max(norm for change in changes for own in change.norms for norm in own)
    most = max(matrix.layer.r for matrix in matrices)
    drawings = []
    for first in range(0, len(changes), PANELS):
        shown = changes[first : first + PANELS]
        drawing = Figure(
            figsize=(2.6 + max(1.4, 0.4 * min(most, VALUES_UP_TO)) * len(shown), 1.3 + CELL * len(matrices)),
            layout="constrained",
        )
        panels = drawing.subplots(1, len(shown), squeeze=False, sharey=True)[0]
        for axes, change in zip(panels, shown, strict=True):
            values = [own for own in change.norms if own]
            image = grid(
                axes,
                values,
                labels(matrices),
                [str(i + 1) for i in range(most)],
                largest,
                ".2f" if most <= VALUES_UP_TO else None,
            )
            axes.set_xticks(range(most) if most <= VALUES_UP_TO else [0, most - 1])
            axes.tick_params(axis="x", rotation=0, labelsize=8)
            axes.tick_params(axis="y", labelsize=7)
            _separate_blocks(axes, matrices)
            axes.set_title(change.name, fontsize=10, color=INK)
        drawing.supxlabel("outlier dimension of the matrix, ascending", fontsize=9, color=INK)
        _colour_bar(drawing, image, panels, "norm of the slice's change")
        drawings.append(svg(drawing))
    return drawings
