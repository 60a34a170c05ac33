"""From what a user asks of an experiment to its plan, with everything checked before the first run."""

import math

from prequant_ext.baselines import METHODS
from prequant_ext.directory import model_config, resolve_model
from prequant_ext.glue.tasks import get_task, load_rows
from prequant_ext.study.experiments import EXPERIMENTS
from prequant_ext.study.page import Study
from prequant_ext.study.runner import SEARCH_TASK, SEEDS, Plan


def plan_experiment(
    name: str,
    model: str,
    task_names: str | None,
    seeds: str | None,
    search: str,
    data: str,
    data_dir: str | None,
    epochs: int,
    max_train: int | None,
    rates: str | None,
) -> tuple[Study, str]:
    """The study, and the folder of ``model``. Without names of tasks those of the experiment, without seeds SEEDS; of a
    quick one the first of each.

    Raises ValueError for wrong settings, and FileNotFoundError where a task's data is missing: now, and not after an
    hour.
    """
    given, path = _rates(rates), resolve_model(model)
    blocks = getattr(model_config(path), "num_hidden_layers", 0)
    experiment = EXPERIMENTS[name](blocks)
    count = 1 if search == "quick" else None
    chosen = tuple(task_names.split(",")) if task_names else experiment.tasks[:count]
    try:
        numbers = sorted({int(seed) for seed in seeds.split(",")}) if seeds else list(SEEDS[:count])
    except ValueError:
        raise ValueError(f"seeds must be integers separated by commas, got {seeds!r}") from None
    needed = {*chosen, *((SEARCH_TASK,) if search == "once" else ())}
    for task in sorted(needed):
        for split in ("train", "validation"):
            load_rows(get_task(task), split, data_dir, data)
    settled = Plan(experiment, model, chosen, numbers, search, data, epochs, max_train, given)
    return Study(name, blocks, settled), path


def _rates(text: str | None) -> dict[str, float]:
    """[TASK/]METHOD -> learning rate of [TASK/]METHOD=RATE, separated by commas."""
    pairs = [pair.partition("=")[::2] for pair in text.split(",")] if text else []
    try:
        rates: dict[str, float] | None = {name: float(rate) for name, rate in pairs}
    except ValueError:
        rates = None
    if rates is None or not all(
        0 < rate < math.inf and name.rpartition("/")[2] in METHODS for name, rate in rates.items()
    ):
        raise ValueError(
            f"rates must be like ft=1e-4,mrpc/prequant=5e-3, of the methods {', '.join(METHODS)}, got {text!r}"
        )
    for name in rates:
        if "/" in name:
            get_task(name.rpartition("/")[0])
    return rates
