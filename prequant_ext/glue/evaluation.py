"""Scores of a model directory on the validation rows of a task."""

import json
from pathlib import Path

from prequant_ext.directory import load_tokenizer, load_with_task
from prequant_ext.glue import train
from prequant_ext.glue.run import RunSettings
from prequant_ext.glue.tasks import get_task
from prequant_ext.task_file import read_task


def evaluate_directory(
    name: str, task_name: str, task_file: Path | None, data_dir: str | None, source: str, max_length: int | None
) -> tuple[dict[str, float], int]:
    """(scores, max_length) on the validation rows; ``max_length`` None: that of training, from the task file or the
    directory's results.
    """
    task = get_task(task_name)
    if task_file is not None:
        held = read_task(task_file)[0]["name"]
        if held != task_name:
            raise ValueError(f"{task_file} holds the task {held!r}, wanted {task_name!r}")
    model, metadata = load_with_task(name, task_file, task.num_labels)
    tokenizer = load_tokenizer(name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    recorded = metadata.get("max_length") or _recorded_length(Path(name), task_name)
    length = max_length or int(recorded or RunSettings(name, task_name).max_length)
    settings = RunSettings(name, task_name, data=source, data_dir=data_dir, max_length=length)
    return train.evaluate(model, tokenizer, settings), length


def _recorded_length(folder: Path, task_name: str) -> int | None:
    path = folder / "results.json"
    return json.loads(path.read_text()).get(task_name, {}).get("max_length") if path.is_file() else None
