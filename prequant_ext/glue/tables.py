"""Tables of an experiment, from its lines alone."""

import statistics
from collections.abc import Iterator, Sequence

from prequant_ext.glue.experiments import Arm
from prequant_ext.glue.runner import Line, Plan, identity, scores_of
from prequant_ext.glue.tasks import get_task


def lines_of(plan: Plan, arm: Arm, task: str, lines: Sequence[Line]) -> list[Line]:
    """The finished runs of one cell, by seed."""
    lr = plan.rate(arm, task, scores_of(lines))
    if lr is None:
        return []
    by_identity = {identity(line["wanted"]): line for line in lines}
    wanted = [identity(plan.settings(arm, task, lr, seed)) for seed in plan.seeds]
    return [by_identity[key] for key in wanted if key in by_identity]


def mean_and_spread(scores: Sequence[float]) -> str:
    """In points; with the sample standard deviation where there are several."""
    points = [100 * score for score in scores]
    return f"{statistics.mean(points):.2f}" + (f" ± {statistics.stdev(points):.2f} ({len(points)})" if len(points) > 1 else "")


def markdown(plan: Plan, lines: Sequence[Line]) -> Iterator[str]:
    """A row an arm, a column a task; scores are means ± standard deviations (seeds). The average is over the tasks that ran for every arm."""
    arms, tasks = plan.experiment.arms, plan.tasks
    cells = {(i, task): lines_of(plan, arm, task, lines) for i, arm in enumerate(arms) for task in tasks}
    complete = [task for task in tasks if all(cells[i, task] for i in range(len(arms)))]
    has_error = any(line.get("quantization_error") is not None for found in cells.values() for line in found)
    titles = ["method", *(f"{task} ({get_task(task).metrics[0]})" for task in tasks), "average", "trained", "model", *(["L2 error"] if has_error else [])]
    yield f"**{plan.experiment.title}**"
    yield ""
    yield f"| {' | '.join(titles)} |"
    yield f"|{'---|' * len(titles)}"
    for i, arm in enumerate(arms):
        found = [line for task in tasks for line in cells[i, task]]
        row = [arm.title, *(mean_and_spread([line["score"] for line in cells[i, task]]) if cells[i, task] else "" for task in tasks)]
        means = [statistics.mean(line["score"] for line in cells[i, task]) for task in complete]
        row.append(f"{100 * statistics.mean(means):.2f}" if means else "")
        row += [f"{found[0]['trainable_parameters']:,}", f"{found[0]['model_bytes'] / 1e6:.1f} MB"] if found else ["", ""]
        if has_error:
            error = found[0].get("quantization_error") if found else None
            row.append("" if error is None else f"{error:.1f}")
        yield f"| {' | '.join(row)} |"
    yield ""
    yield from (f"- {note}" for note in notes(plan, lines, cells))


def notes(plan: Plan, lines: Sequence[Line], cells: dict[tuple[int, str], list[Line]]) -> Iterator[str]:
    for task in plan.tasks:
        own = [line for (_, name), found in cells.items() if name == task for line in found]
        if not own:
            continue
        first = own[0]
        sizes, seeds = sorted({line["n_train"] for line in own}), sorted({line["wanted"]["seed"] for line in own})
        yield (
            f"{task}: {' or '.join(f'{size:,}' for size in sizes)} training rows, {first['n_validation']:,} validation rows, {first['epochs']} epochs, batch "
            f"{first['batch_size']}, best epoch of each run, seeds {', '.join(map(str, seeds))}."
        )
    scores = scores_of(lines)
    rates = {arm.method: plan.rate(arm, plan.tasks[0], scores) for arm in plan.experiment.arms}
    how = {"quick": "fixed", "once": "the best of a grid on sst2 after one epoch, one for each method", "each": "the best of a grid for each row and task"}
    yield f"learning rates, {how[plan.search]}" + (
        "." if plan.search == "each" else ": " + ", ".join(f"{name} {rate:g}" for name, rate in rates.items() if rate) + "."
    )
