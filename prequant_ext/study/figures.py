"""Figures of an experiment as SVG text, from its lines alone: score against what the arms differ in."""

import io
import math
import re
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from prequant_ext.baselines import METHODS
from prequant_ext.glue.run import FinishedRun
from prequant_ext.glue.tasks import get_task
from prequant_ext.study.error_map import MatrixError
from prequant_ext.study.experiments import Arm
from prequant_ext.study.runner import Plan
from prequant_ext.study.tables import runs_of

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9")  # Okabe and Ito: told apart by the colour-blind, too
INK = "#333333"


def _r_of(arm: Arm) -> float | None:
    return float((arm.quantization or {}).get("r", 5)) if arm.method == "prequant" else None


def _bits_of(arm: Arm) -> float | None:
    return None if arm.quantization is None else float(arm.quantization.get("bits", 4))


def _rows_of(arm: Arm) -> float | None:
    return None if arm.max_train is None else float(arm.max_train)


# What lies on the x axis of an experiment: its name, the arm's value, whether it is logarithmic. The others have a row
# for each arm.
AXES: dict[str, tuple[str, Callable[[Arm], float | None], bool]] = {
    "table4": ("outlier dimensions r", _r_of, True),
    "table6": ("training rows", _rows_of, True),
    "fig5": ("bits of a weight", _bits_of, False),
}


def heat_map(errors: Sequence[MatrixError]) -> str:
    """SVG of an error map: a panel a strategy, a row a block, a column a matrix; one scale of colours for all."""
    from matplotlib.figure import Figure

    strategies, matrices = (
        list(dict.fromkeys(getattr(error, name) for error in errors)) for name in ("strategy", "matrix")
    )
    blocks = max(error.block for error in errors) + 1
    drawing = Figure(figsize=(3.1 * len(strategies) + 0.6, 1.9 + 0.3 * blocks), layout="constrained")
    panels = drawing.subplots(1, len(strategies), squeeze=False, sharey=True)[0]
    for axes, strategy in zip(panels, strategies, strict=True):
        values = [[math.nan] * len(matrices) for _ in range(blocks)]
        for error in errors:
            if error.strategy == strategy:
                values[error.block][matrices.index(error.matrix)] = 100 * error.error
        image = grid(
            axes, values, [str(block) for block in range(blocks)], matrices, 100 * max(error.error for error in errors)
        )
        axes.set_title(strategy, fontsize=10, color=INK)
    panels[0].set_ylabel("block", fontsize=9, color=INK)
    drawing.colorbar(image, ax=panels, label="||w' - w|| / ||w||, %")
    return svg(drawing)


def grid(
    axes: Any,
    values: Sequence[Sequence[float]],
    rows: Sequence[str],
    columns: Sequence[str],
    largest: float,
    form: str | None = ".0f",
) -> Any:
    """Cells coloured from 0 to ``largest``, each with its value in it unless ``form`` is None; NaN: an empty cell.
    Returns the image, for a colour bar.
    """
    image = axes.imshow(values, cmap="viridis", vmin=0, vmax=largest or 1, aspect="auto")
    for row, own in enumerate(values):
        for column, value in enumerate(own):
            if form is not None and not math.isnan(value):
                axes.text(
                    column,
                    row,
                    f"{value:{form}}",
                    ha="center",
                    va="center",
                    fontsize=7,
                    color="white" if image.norm(value) < 0.7 else "black",
                )
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    return image


def figure(name: str, plan: Plan, finished: Sequence[FinishedRun]) -> str | None:
    """SVG of the experiment called ``name``, a panel a task; None where nothing has run. Means over seeds, with
    whiskers of one standard deviation.
    """
    from matplotlib.figure import Figure

    tasks = [task for task in plan.tasks if any(runs_of(plan, arm, task, finished) for arm in plan.experiment.arms)]
    if not tasks:
        return None
    height = 3.4 if name in AXES else 0.9 + 0.36 * len(plan.experiment.arms)
    drawing = Figure(figsize=(4.6 * len(tasks) + 0.4, height), layout="constrained")
    for axes, task in zip(drawing.subplots(1, len(tasks), squeeze=False)[0], tasks, strict=True):
        (_curves if name in AXES else _rows)(axes, name, plan, task, finished)
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(f"{task} ({get_task(task).metrics[0]})", fontsize=10, color=INK)
    return svg(drawing)


def svg(drawing: Any) -> str:
    """A matplotlib figure as SVG text that can stand in an HTML page; the same text for the same figure."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "prequant"}):  # names of clips and markers are random without one
        drawing.savefig(text, format="svg", metadata={"Date": None})
    return re.sub(r"^.*?<svg", "<svg", text.getvalue(), flags=re.S)


def _points(found: Sequence[FinishedRun]) -> tuple[float, float]:
    scores = [100 * run.result.score for run in found]
    return statistics.mean(scores), statistics.stdev(scores) if len(scores) > 1 else 0.0


def _rows(axes: Any, name: str, plan: Plan, task: str, finished: Sequence[FinishedRun]) -> None:
    """An arm a row. Points and not bars: the axis does not begin at 0."""
    cells = [(arm, runs_of(plan, arm, task, finished)) for arm in plan.experiment.arms]
    shown = [(arm, *_points(found)) for arm, found in cells if found][::-1]  # the first arm on top
    positions = range(len(shown))
    axes.errorbar(
        [mean for _, mean, _ in shown],
        positions,
        xerr=[spread for *_, spread in shown],
        color=COLOURS[0],
        fmt="o",
        markersize=5,
        capsize=2,
    )
    axes.set_yticks(positions, [arm.title for arm, *_ in shown], fontsize=9)
    axes.set_ylim(-0.6, len(shown) - 0.4)
    axes.margins(x=0.15)  # the number over the leftmost point stays off the axis
    axes.grid(axis="y", color="#e5e5e5")
    axes.set_axisbelow(True)
    for position, (_, mean, _) in zip(positions, shown, strict=True):
        axes.annotate(
            f"{mean:.1f}",
            (mean, position),
            xytext=(0, 5),
            textcoords="offset points",
            ha="center",
            fontsize=8,
            color=INK,
        )


def _curves(axes: Any, name: str, plan: Plan, task: str, finished: Sequence[FinishedRun]) -> None:
    label, value_of, is_logarithmic = AXES[name]
    by_method: dict[str, list[tuple[float, float, float]]] = {}
    for arm in plan.experiment.arms:
        found, value = runs_of(plan, arm, task, finished), value_of(arm)
        if found and value is not None:
            by_method.setdefault(arm.method, []).append((value, *_points(found)))
        elif found:
            mean, _ = _points(found)
            axes.axhline(mean, color=INK, linewidth=1, linestyle="--")
            axes.text(
                0.01,
                mean,
                arm.title,
                transform=axes.get_yaxis_transform(),
                ha="left",
                va="bottom",
                fontsize=8,
                color=INK,
            )
    for colour, (method, points) in zip(COLOURS, by_method.items(), strict=False):
        values, means, spreads = zip(*sorted(points), strict=True)
        axes.errorbar(
            values, means, spreads, color=colour, marker="o", markersize=4, capsize=2, label=METHODS[method].title
        )
    ticks = sorted({value for points in by_method.values() for value, *_ in points})
    if is_logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{value:g}" for value in ticks])
    axes.minorticks_off()
    axes.set_xlabel(label, fontsize=9, color=INK)
    if len(by_method) > 1:
        axes.legend(frameon=False, fontsize=8)
