"""From what a user asks of an experiment to its plan, with everything checked before the first run."""

from collections.abc import Mapping, Sequence

from prequant_ext.directory import model_config, resolve_model
from prequant_ext.glue.tasks import get_task, load_rows
from prequant_ext.study.experiments import EXPERIMENTS
from prequant_ext.study.page import Study
from prequant_ext.study.runner import SEARCH_TASK, SEEDS, Plan


def plan_experiment(
    name: str,
    model: str,
    task_names: Sequence[str] | None,
    seeds: Sequence[int] | None,
    search: str,
    data: str,
    data_dir: str | None,
    epochs: int,
    max_train: int | None,
    rates: Mapping[str, float],
) -> tuple[Study, str]:
    """The study, and the folder of ``model``. Without names of tasks it has those of the experiment, without seeds
    SEEDS; a quick one has the first of each.

    Raises ValueError for wrong settings, and FileNotFoundError where a task's data is missing: now, and not after an
    hour.
    """
    path = resolve_model(model)
    blocks = getattr(model_config(path), "num_hidden_layers", 0)
    experiment = EXPERIMENTS[name](blocks)
    count = 1 if search == "quick" else None
    chosen = tuple(task_names or experiment.tasks[:count])
    numbers = sorted(set(seeds or SEEDS[:count]))
    for key in rates:
        if "/" in key:  # TASK/METHOD
            get_task(key.rpartition("/")[0])
    needed = {*chosen, *((SEARCH_TASK,) if search == "once" else ())}
    for task in sorted(needed):
        for split in ("train", "validation"):
            load_rows(get_task(task), split, data_dir, data)
    settled = Plan(experiment, model, chosen, numbers, search, data, epochs, max_train, rates)
    return Study(name, blocks, settled), path
