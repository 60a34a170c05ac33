"""The eight GLUE tasks of the paper as data, and their rows from local files or the hub."""

import gzip
import json
import math
import os
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prequant_ext.glue import synthetic

DATA_DIR_VARIABLE = "PREQUANT_DATA_DIR"
HUB_DATASET = "nyu-mll/glue"
SOURCES = ("glue", "synthetic")
SPLITS = ("train", "validation")
SUBSET_SEED = 0  # of the one shuffle that every subset of every task is the beginning of

Row = dict[str, Any]


@dataclass(frozen=True)
class Task:
    """One task of GLUE: the text fields, the labels, and the metrics, of which the first ranks runs.

    num_labels 1 is a regression; its labels are numbers from 0 to ``top_label``.
    label_names: what each label says, as GLUE names it; a regression has none.
    """

    name: str
    fields: tuple[str, ...]
    num_labels: int = 2
    metrics: tuple[str, ...] = ("accuracy",)
    hub_validation: str = "validation"
    top_label: float = 5.0
    label_names: tuple[str, ...] = ()

    @property
    def is_regression(self) -> bool:
        return self.num_labels == 1

    def checked_label(self, label: Any, where: str) -> int | float:
        """``label`` as an int, or as a float for a regression. Raises ValueError naming ``where`` it stands."""
        is_number = isinstance(label, int | float) and not isinstance(label, bool) and math.isfinite(label)
        if self.is_regression:
            if not is_number or not 0 <= label <= self.top_label:
                raise ValueError(
                    f"{where}: label of {self.name} must be a number from 0 to {self.top_label:g}, got {label!r}"
                )
            return float(label)
        if not is_number or label not in range(self.num_labels):
            raise ValueError(
                f"{where}: label of {self.name} must be an integer from 0 to {self.num_labels - 1}, got {label!r}"
            )
        return int(label)


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")
TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("cola", ("sentence",), metrics=("matthews",), label_names=("unacceptable", "acceptable")),
        Task("sst2", ("sentence",), label_names=("negative", "positive")),
        Task("mrpc", _PAIR, metrics=("accuracy", "f1"), label_names=("not_equivalent", "equivalent")),
        Task("stsb", _PAIR, num_labels=1, metrics=("spearman", "pearson")),
        Task("qqp", ("question1", "question2"), metrics=("accuracy", "f1"), label_names=("not_duplicate", "duplicate")),
        Task(
            "mnli",
            ("premise", "hypothesis"),
            num_labels=3,
            hub_validation="validation_matched",
            label_names=("entailment", "neutral", "contradiction"),
        ),
        Task("qnli", ("question", "sentence"), label_names=_ENTAILMENT),
        Task("rte", _PAIR, label_names=_ENTAILMENT),
    )
}


def get_task(name: str) -> Task:
    """The task called ``name``. Raises ValueError listing the tasks there are."""
    if name not in TASKS:
        raise ValueError(f"task must be one of {', '.join(TASKS)}, got {name!r}")
    return TASKS[name]


def resolve_data_dir(data_dir: str | os.PathLike | None) -> Path | None:
    """``data_dir``, else the environment's ``PREQUANT_DATA_DIR``, else None: the hub."""
    chosen = data_dir or os.environ.get(DATA_DIR_VARIABLE)
    return Path(chosen) if chosen else None


def load_rows(
    task: Task, split: str, data_dir: str | os.PathLike | None = None, source: str = "glue", max_rows: int | None = None
) -> list[Row]:
    """Rows of one split: the task's text fields and a checked ``label``.

    source "glue": ``<data_dir>/<task>/<split>.jsonl`` or ``.jsonl.gz`` where a folder is named, the hub's data set
    otherwise; "synthetic": generated rows. ``max_rows``: the first rows of a shuffle that depends on nothing else, so
    that every seed and method trains on the same ones.

    Raises FileNotFoundError naming what was looked for; ValueError naming file and line of a broken row, a missing
    field or a label outside the task's range.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {split!r}")
    if source not in SOURCES:
        raise ValueError(f"data must be one of {', '.join(SOURCES)}, got {source!r}")
    folder = resolve_data_dir(data_dir)
    if source == "synthetic":
        rows = synthetic.generate(task.fields, task.num_labels, split)
    elif folder is not None:
        rows = list(_checked(task, _file_rows(find_file(folder, task, split))))
    else:
        rows = list(_checked(task, _hub_rows(task, split)))
    if max_rows is not None and max_rows < 1:
        raise ValueError(f"max_rows must be at least 1, got {max_rows}")
    return subset(rows, max_rows)


def subset(rows: list[Row], max_rows: int | None) -> list[Row]:
    """All rows, or the first ``max_rows`` of the one fixed shuffle."""
    if max_rows is None or max_rows >= len(rows):
        return rows
    order = list(range(len(rows)))
    random.Random(SUBSET_SEED).shuffle(order)
    return [rows[i] for i in order[:max_rows]]


def find_file(folder: Path, task: Task, split: str) -> Path:
    """The file of one split. Raises FileNotFoundError naming both names it may have."""
    plain = folder / task.name / f"{split}.jsonl"
    candidates = (plain, plain.with_name(plain.name + ".gz"))
    for path in candidates:
        if path.is_file():
            return path
    raise FileNotFoundError(f"no {split} rows of {task.name}: looked for {candidates[0]} and {candidates[1]}")


def has_files(task: Task, data_dir: str | os.PathLike | None) -> bool:
    """Whether a local folder holds both splits of ``task``."""
    folder = resolve_data_dir(data_dir)
    try:
        return folder is not None and all(find_file(folder, task, split) for split in SPLITS)
    except FileNotFoundError:
        return False


def _file_rows(path: Path) -> Iterator[tuple[str, Any]]:
    """(file:line, parsed line) of a JSON-lines file."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                where = f"{path}:{number}"
                try:
                    yield where, json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(f"{where}: not a JSON object: {error}") from error
    except (EOFError, gzip.BadGzipFile, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: damaged: {error}") from error


def _hub_rows(task: Task, split: str) -> Iterator[tuple[str, Any]]:
    import datasets  # a second of imports that local files do not need

    hub_split = task.hub_validation if split == "validation" else split
    name = f"{HUB_DATASET}, {task.name}, {hub_split}"
    try:
        rows = datasets.load_dataset(HUB_DATASET, task.name, split=hub_split)
    except (OSError, ValueError) as error:  # no network, no such data set, nothing cached
        message = (
            f"no {split} rows of {task.name}: looked for {name} on the hub ({error}); name a local folder "
            f"by data_dir or by the environment variable {DATA_DIR_VARIABLE}"
        )
        raise FileNotFoundError(message) from error
    for number, row in enumerate(rows):
        yield f"{name}, row {number}", row


def _checked(task: Task, rows: Iterator[tuple[str, Any]]) -> Iterator[Row]:
    empty = True
    for where, row in rows:
        empty = False
        missing = [field for field in (*task.fields, "label") if not isinstance(row, dict) or field not in row]
        if missing:
            raise ValueError(f"{where}: a row of {task.name} needs the field {missing[0]!r}")
        for field in task.fields:
            if not isinstance(row[field], str):
                raise ValueError(f"{where}: field {field!r} must be text, got {row[field]!r}")
        yield {field: row[field] for field in task.fields} | {"label": task.checked_label(row["label"], where)}
    if empty:
        raise ValueError(f"the data of {task.name} has no rows")
