"""Tables of an experiment, from its lines alone."""

import statistics
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from prequant_ext.glue import metrics
from prequant_ext.glue.run import FinishedRun
from prequant_ext.glue.tasks import get_task
from prequant_ext.study.experiments import Arm
from prequant_ext.study.runner import SEARCH_TASK, Plan, scores_of

# Columns of tables that have them: title, field of a line, format.
EXTRAS = (("L2 error", "quantization_error", ".1f"), ("overlap", "overlap", ".2f"))

HOW_SEARCHED = {
    "quick": "fixed",
    "once": f"the best of a grid on {SEARCH_TASK} after one epoch, one for each method",
    "each": "the best of a grid for each row and task",
}


def runs_of(plan: Plan, arm: Arm, task: str, finished: Sequence[FinishedRun]) -> list[FinishedRun]:
    """The finished runs of one cell, by seed."""
    lr = plan.rate(arm, task, scores_of(finished))
    if lr is None:
        return []
    by_identity = {run.settings.identity: run for run in finished}
    wanted = [plan.settings(arm, task, lr, seed).identity for seed in plan.seeds]
    return [by_identity[key] for key in wanted if key in by_identity]


def mean_and_spread(scores: Sequence[float]) -> str:
    """In points; with the sample standard deviation where there are several."""
    points = [100 * score for score in scores]
    return f"{statistics.mean(points):.2f}" + (
        f" ± {statistics.stdev(points):.2f} ({len(points)})" if len(points) > 1 else ""
    )


def difference(found: Sequence[FinishedRun], others: Sequence[FinishedRun]) -> str:
    """Accuracy of ``found`` minus that of ``others`` in points, with its 95 % interval by paired bootstrap; of the
    seeds that both have, "" without any.
    """
    seeds = [{run.settings.seed: run.result.predictions for run in runs} for runs in (found, others)]
    shared = sorted(seeds[0].keys() & seeds[1].keys())
    if not shared or get_task(found[0].settings.task).is_regression:
        return ""
    labels = metrics.unpack(found[0].result.labels, is_regression=False)
    right = [np.stack([metrics.unpack(own[seed], is_regression=False) == labels for seed in shared]) for own in seeds]
    mean, low, high = (100 * value for value in metrics.paired_bootstrap(right[0], right[1]))
    return f"{mean:+.2f} [{low:+.2f}, {high:+.2f}]"


def markdown(plan: Plan, finished: Sequence[FinishedRun]) -> Iterator[str]:
    """A row an arm of which something ran; columns of a task: scores, means ± standard deviations (seeds), and
    differences from the arm that it is compared with, if the experiment compares. The average is over the tasks that
    ran for every row, where those are several.
    """
    tasks, against = plan.tasks, plan.experiment.against
    rows = {arm.title: {task: runs_of(plan, arm, task, finished) for task in tasks} for arm in plan.experiment.arms}
    missing = [title for title, cells in rows.items() if not any(cells.values())]
    rows = {title: cells for title, cells in rows.items() if title not in missing}
    shown = [run for cells in rows.values() for found in cells.values() for run in found]
    extras = [extra for extra in EXTRAS if any(getattr(run.result, extra[1]) is not None for run in shown)]
    references = {arm.title: rows.get(arm.against or against or "") for arm in plan.experiment.arms}
    compares = any(references.values())
    complete = [task for task in tasks if all(cells[task] for cells in rows.values())]
    titles = ["method"]
    for task in tasks:
        titles.append(f"{task} ({get_task(task).metrics[0]})")
        titles += [f"minus {against}"] if compares else []
    titles += [*(["average"] if len(complete) > 1 else []), "trained", "model", *(title for title, *_ in extras)]
    yield f"**{plan.experiment.title}**"
    yield ""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for title, cells in rows.items():
        row = [title]
        for task, found in cells.items():
            row.append(mean_and_spread([run.result.score for run in found]) if found else "")
            if compares:
                reference = references[title]
                row.append("" if reference is None or cells is reference else difference(found, reference[task]))
        if len(complete) > 1:
            means = [statistics.mean(run.result.score for run in cells[task]) for task in complete]
            row.append(f"{100 * statistics.mean(means):.2f}")
        own = [run.result for found in cells.values() for run in found]
        row += [f"{own[0].trainable_parameters:,}", f"{own[0].model_bytes / 1e6:.1f} MB"]
        for _, name, form in extras:
            values = [getattr(result, name) for result in own if getattr(result, name) is not None]
            row.append(f"{statistics.mean(values):{form}}" if values else "")
        yield f"| {' | '.join(row)} |"
    yield ""
    yield from (f"- {note}" for note in notes(plan, finished, shown))
    if missing:
        yield f"- not run: {'; '.join(missing)}."


def notes(plan: Plan, finished: Sequence[FinishedRun], shown: Sequence[FinishedRun]) -> Iterator[str]:
    """What a reader must know of ``shown``, the runs in the table; ``finished`` has the searches, too."""
    for task in plan.tasks:
        own = [run for run in shown if run.settings.task == task]
        if not own:
            continue
        sizes, seeds = sorted({run.result.n_train for run in own}), sorted({run.settings.seed for run in own})
        yield (
            f"{task}: {' or '.join(f'{size:,}' for size in sizes)} training rows, {own[0].result.n_validation:,} "
            f"validation rows, {own[0].result.epochs} epochs, batch "
            f"{own[0].result.batch_size}, best epoch of each run, seeds {', '.join(map(str, seeds))}."
        )
    if plan.experiment.against is not None:
        yield (
            "differences are of accuracy, in points, with a 95 % interval: paired bootstrap over the validation "
            "rows, the seeds that both rows have pooled."
        )
    if any(run.result.overlap is not None for run in shown):
        yield "overlap: the Jaccard overlap of the dimensions with those of most outliers, mean over the matrices."
    ran = {run.settings.method for run in shown}
    searched = {
        arm.title if arm.grid else arm.method: (arm, task)
        for arm, task in plan.cells()
        if arm.method in ran and plan.given(arm, task) is None
    }
    if searched:
        how = HOW_SEARCHED[plan.search]
        rates = {name: plan.rate(arm, task, scores_of(finished)) for name, (arm, task) in searched.items()}
        yield f"learning rates, {how}{'' if plan.search == 'each' else _listed(rates)}."
    if plan.rates:
        yield f"learning rates, given{_listed(plan.rates)}."


def _listed(rates: Mapping[str, float | None]) -> str:
    return ": " + ", ".join(f"{name} at {rate:g}" for name, rate in rates.items() if rate)
