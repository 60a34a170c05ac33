"""The whole path on one real model and task:    python -m prequant_ext.cli.demo [--data-dir DIR]

Quantize, inspect, fine-tune SST-2 through the outlier dimensions and, for comparison, fully; compare cost and score;
reload both from disk and check that the scores are the same to the last digit; fine-tune a second task on the same
base, and answer a batch whose rows belong to both. Every step is the command that a user would type, in a process of
its own, since peak memory is per process.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from prequant_ext.cli.console import FAILED, REFUSED, exit_codes, quiet_libraries, say, show
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, get_task, has_files, load_rows, resolve_data_dir

TASK, SECOND = "sst2", "mrpc"
SECOND_ROWS = 1000  # to train on: enough to show, few enough to wait for
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def prequant(*arguments: str, as_json: bool = True) -> dict[str, Any]:
    """Run ``prequant ARGUMENTS`` and return what it says. Ends the demo with its exit code where it fails."""
    say(f"\n$ prequant {' '.join(arguments)}")
    command = [sys.executable, "-m", "prequant_ext.cli", *arguments, *(["--json"] if as_json else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE if as_json else None, text=True, check=False)
    if done.returncode != 0:
        raise typer.Exit(done.returncode if done.returncode == REFUSED else FAILED)
    return json.loads(done.stdout) if as_json else {}


def choose_data(data_dir: str | None) -> list[str]:
    """Options that name the rows: a local folder's, else the hub's, else generated ones, and it says so."""
    folder = resolve_data_dir(data_dir)
    if folder is not None:
        if not has_files(get_task(TASK), folder):
            load_rows(get_task(TASK), "train", folder)  # raises, naming what is missing
            load_rows(get_task(TASK), "validation", folder)
        say(f"data: SST-2 from {folder}")
        return ["--data-dir", str(folder)]
    try:
        quiet_libraries()
        load_rows(get_task(TASK), "validation")
    except FileNotFoundError as error:
        say(f"data: {error}")
        say("data: GENERATED rows instead. The scores below say nothing about SST-2.")
        return ["--data", "synthetic"]
    say("data: SST-2 from the hub")
    return []


@app.command()
def demo(
    data_dir: Annotated[
        str | None,
        typer.Option(
            help=f"folder of sst2/train.jsonl[.gz]; else ${DATA_DIR_VARIABLE}, else the hub, else generated rows"
        ),
    ] = None,
    model: Annotated[str, typer.Option(help="float model")] = "minilm",
    out: Annotated[Path, typer.Option("-o", "--out", help="working folder")] = Path("demo-out"),
    max_train: Annotated[int, typer.Option(help="training rows")] = 4000,
    epochs: Annotated[int, typer.Option(help="of both methods")] = 2,
) -> None:
    """Quantize, inspect, fine-tune both ways, compare, reload; then two tasks in one batch."""
    begin = time.perf_counter()
    with exit_codes():
        data = choose_data(data_dir)
    out.mkdir(parents=True, exist_ok=True)
    base, tasks, full = str(out / "base"), str(out / "tasks"), str(out / "full")
    prequant("quantize", model, "-o", base, "--overwrite")
    prequant("inspect", base, as_json=False)
    common = [
        "--task",
        TASK,
        *data,
        "--max-train",
        str(max_train),
        "--max-length",
        "64",
        "--epochs",
        str(epochs),
        "--overwrite",
    ]
    runs = {
        "PreQuant": prequant("finetune", base, "-o", tasks, *common),
        "full fine-tuning": prequant("finetune", model, "--method", "ft", "-o", full, *common),
    }
    reloaded = {
        "PreQuant": prequant("eval", base, "--task", TASK, "--task-file", f"{tasks}/{TASK}.task", *data),
        "full fine-tuning": prequant("eval", full, "--task", TASK, *data),
    }
    task = get_task(TASK)
    print()
    titles = ("method", "model MB", "trained", "task MB", "peak MB", "seconds", task.metrics[0], "reloaded")
    show(
        titles,
        [_row(name, run, reloaded[name]) for name, run in runs.items()],
        _caption(runs["PreQuant"], time.perf_counter() - begin),
    )
    different = [name for name, run in runs.items() if run["scores"] != reloaded[name]["scores"]]
    for name in different:
        say(f"error: {name} scored {runs[name]['scores']} in training but {reloaded[name]['scores']} after reloading")
    if different:
        raise typer.Exit(FAILED)
    say("Both models score the same, to the last digit, after reloading from disk.")
    answer_two_tasks(base, out, data, min(max_train, SECOND_ROWS), epochs)


def answer_two_tasks(base: str, out: Path, data: list[str], max_train: int, epochs: int) -> None:
    """Fine-tune a second task on the base, then one batch of rows of both."""
    folder, second = as_arguments(data).get("data_dir"), data
    if folder is not None and not has_files(get_task(SECOND), folder):
        say(f"\ndata: {folder} has no {SECOND.upper()}: GENERATED rows for the second task")
        second = ["--data", "synthetic"]
    tasks = str(out / "tasks")
    common = ["--max-train", str(max_train), "--max-length", "64", "--epochs", str(epochs), "--overwrite"]
    prequant("finetune", base, "--task", SECOND, *second, "-o", tasks, *common)
    rows = [row for task, source in ((TASK, data), (SECOND, second)) for row in example_rows(task, source)]
    mixed = out / "mixed.jsonl"
    mixed.write_text("".join(json.dumps(row) + "\n" for row in rows[::2] + rows[1::2]), encoding="utf-8")
    prequant("predict", base, f"{tasks}/{TASK}.task", f"{tasks}/{SECOND}.task", "--rows", str(mixed), as_json=False)


def as_arguments(data: list[str]) -> dict[str, Any]:
    """The options that name rows, as load_rows takes them."""
    names = {"--data-dir": "data_dir", "--data": "source"}
    return {names[option]: value for option, value in zip(data[::2], data[1::2], strict=True)}


def example_rows(name: str, data: list[str], count: int = 4) -> list[dict[str, str]]:
    """The first validation rows of a task, as prequant predict reads them."""
    task = get_task(name)
    rows = load_rows(task, "validation", **as_arguments(data))
    texts = ("text", "text_pair")[: len(task.fields)]
    return [
        {"task": name} | {key: row[field] for key, field in zip(texts, task.fields, strict=True)}
        for row in rows[:count]
    ]


def _row(name: str, run: dict[str, Any], reloaded: dict[str, Any]) -> tuple[str, ...]:
    sizes = (f"{run['model_bytes'] / 1e6:.1f}", f"{run['trainable_parameters']:,}", f"{run['task_bytes'] / 1e6:.2f}")
    costs = (f"{run['peak_memory_mb']:.0f}", f"{run['seconds']:.0f}")
    return (name, *sizes, *costs, f"{100 * run['score']:.2f}", f"{100 * reloaded['score']:.2f}")


def _caption(run: dict[str, Any], seconds: float) -> str:
    rows = f"{run['n_train']:,} training rows, {run['n_validation']:,} validation rows"
    kind = "" if run["data"] == "glue" else ", GENERATED"
    cost = "peak MB: memory of the training process above its imports"
    return (
        f"{run['task']}{kind}: {rows}, {run['epochs']} epochs, seed {run['seed']}; {cost}. The demo took "
        f"{seconds:.0f} s."
    )


if __name__ == "__main__":
    app()
