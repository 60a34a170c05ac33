"""finetune, eval: one task on a base."""

import dataclasses
import json
import os
import shutil
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import exit_codes, quiet_libraries, say, show, show_json
from prequant_ext.cli.options import AsJson, Data, DataDir, Out, Overwrite, Source, Task, megabytes, refuse_existing
from prequant_ext.glue.tasks import TASKS

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help and a mistyped option need neither
    from prequant_ext.glue.run import RunResult


class Method(str, Enum):
    prequant = "prequant"
    ft = "ft"


@app.command(epilog="Example: prequant finetune base --task sst2 --max-train 4000 --max-length 64 -o tasks")
def finetune(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize; for --method ft a float model")],
    task: Task,
    out: Out,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    method: Annotated[
        Method, typer.Option(help="prequant: outlier weights and head; ft: every weight of a float model")
    ] = Method.prequant,
    epochs: Annotated[int, typer.Option(help="the best one by validation score is kept")] = 3,
    lr: Annotated[
        float | None,
        typer.Option(help="first learning rate, falling linearly to 0 (default: 5e-3 for prequant, 5e-5 for ft)"),
    ] = None,
    batch_size: int = 32,
    max_length: Annotated[int, typer.Option(help="tokens of an example")] = 128,
    max_train: Annotated[
        int | None,
        typer.Option(help="training rows: the first of a shuffle that is the same for every run (default: all)"),
    ] = None,
    seed: Annotated[int, typer.Option(help="of the head, the order of examples and dropout")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune for a task. A run that was killed goes on from its last epoch when the same command is started again.

    prequant writes OUT/TASK.task (outlier weights and head); ft writes OUT as a whole model. Both write
    OUT/results.json.
    """
    with exit_codes():
        quiet_libraries()
        from prequant_ext.directory import resolve_model
        from prequant_ext.glue import train
        from prequant_ext.glue.run import RunSettings

        refuse_existing(out / f"{task.value}.task" if method == Method.prequant else out, overwrite)
        path = resolve_model(model)
        path = os.path.abspath(path) if os.path.isdir(path) else path
        settings = RunSettings(
            path, task.value, method.value, data.value, data_dir, epochs, lr, seed, batch_size, max_length, max_train
        )
        # Beside OUT, not in it: a full model's OUT appears only when it is complete.
        work_dir = out.with_name(f"{out.name}.{task.value}-unfinished")
        tuned, tokenizer, result = train.fine_tune(settings, work_dir, start_anew=overwrite)
        if method == Method.prequant:
            _write_task(tuned, task.value, out, result)
        else:
            from prequant_ext.hf import save_model_dir

            save_model_dir(tuned, tokenizer, out)
        _record(out, result)
        shutil.rmtree(work_dir)
        if as_json:
            print(result.to_json())
        else:
            _show_result(result)
            say(f"wrote {out / (task.value + '.task') if method == Method.prequant else out}")


def _write_task(model: Any, name: str, out: Path, result: "RunResult") -> None:
    from prequant_ext.task import save_task

    out.mkdir(parents=True, exist_ok=True)
    task = TASKS[name]
    facts = {
        "data": result.data,
        "num_labels": str(task.num_labels),
        "max_length": str(result.max_length),
        "score": repr(result.score),
    }
    if result.data == "glue":  # GLUE's names say nothing of generated rows
        facts["labels"] = json.dumps(task.label_names)
    save_task(model, name, out / f"{name}.task", facts)


def _record(out: Path, result: "RunResult") -> None:
    """Add the result to OUT/results.json, an object by task."""
    from prequant_ext.task_file import write_atomically

    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[result.task] = dataclasses.asdict(result)
    write_atomically(path, json.dumps(results, indent=1).encode())


def _show_result(result: "RunResult") -> None:
    scores = [(name, f"{100 * value:.2f}") for name, value in result.scores.items()]
    rows = [
        ("task", result.task if result.data == "glue" else f"{result.task} ({result.data})"),
        ("method", result.method),
        *scores,
        ("best epoch", f"{result.best_epoch} of {result.epochs}"),
        ("trained parameters", f"{result.trainable_parameters:,}"),
        ("model", megabytes(result.model_bytes)),
        ("of that trained", megabytes(result.task_bytes)),
        ("peak memory", f"{result.peak_memory_mb:,.0f} MB above the imports"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    show(("", result.model if len(result.model) < 40 else f"...{result.model[-37:]}"), rows)


@app.command("eval", epilog="Example: prequant eval base --task sst2 --task-file tasks/sst2.task")
def evaluate(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize, or a fully fine-tuned one")],
    task: Task,
    task_file: Annotated[Path | None, typer.Option(help="what prequant finetune wrote")] = None,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    max_length: Annotated[int | None, typer.Option(help="tokens of an example (default: that of training)")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a fine-tuned model on the validation rows."""
    with exit_codes():
        quiet_libraries()
        from prequant_ext.glue.evaluation import evaluate_directory

        scores, length = evaluate_directory(model, task.value, task_file, data_dir, data.value, max_length)
        if as_json:
            show_json(
                {
                    "model": model,
                    "task": task.value,
                    "data": data.value,
                    "max_length": length,
                    "scores": scores,
                    "score": next(iter(scores.values())),
                }
            )
        else:
            show(("metric", task.value), [(name, f"{100 * value:.2f}") for name, value in scores.items()])
