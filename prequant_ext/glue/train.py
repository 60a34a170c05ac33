"""Fine-tuning on transformers.Trainer: through the outlier dimensions of a pre-quantized model, fully, or by another
method of baselines, by the same rules.
"""

import dataclasses
import json
import math
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_callback import PrinterCallback

from prequant_ext import measure
from prequant_ext.baselines import METHODS, Options
from prequant_ext.baselines.prequant_ticket import L1Distance, overlap
from prequant_ext.config import PreQuantConfig
from prequant_ext.glue import metrics
from prequant_ext.glue.batches import Collator, Example, by_length, encode
from prequant_ext.glue.models import load_model, make_ready
from prequant_ext.glue.run import RunResult, RunSettings
from prequant_ext.glue.tasks import Row, Task, get_task, load_rows
from prequant_ext.glue.trainer import (
    BEST_FILE,
    DONE_MARKER,
    GlueTrainer,
    Progress,
    Recorder,
    last_checkpoint,
    load_trained,
    trained_tensors,
)
from prequant_ext.linear import quantized_linears
from prequant_ext.model import quantize_model

CALIBRATION_ROWS, CALIBRATION_BATCH = 64, 16  # the first rows of the training data
WEIGHT_DECAY = 0.01
EVAL_BATCH = 64
SETTINGS_FILE = "settings.json"

IMPORTS_BYTES = measure.resident_bytes()  # what the libraries cost before any model: subtracted from every peak


def _arguments(settings: RunSettings, folder: Path, saves: bool) -> TrainingArguments:
    """Raises ValueError where the processes of torchrun do not divide the batch: it is that of all of them together."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if settings.batch_size % processes:
        raise ValueError(f"batch_size must be a multiple of the {processes} processes, got {settings.batch_size}")
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size // processes,
        per_device_eval_batch_size=EVAL_BATCH,
        learning_rate=settings.learning_rate,
        weight_decay=WEIGHT_DECAY,
        lr_scheduler_type="linear",
        warmup_steps=0,
        seed=settings.seed,
        eval_strategy="epoch",
        save_strategy="epoch" if saves else "no",
        save_total_limit=1,
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
    )


def fine_tune(
    settings: RunSettings, work_dir: str | os.PathLike | None = None, start_anew: bool = False
) -> tuple[PreTrainedModel, Any, RunResult]:
    """Fine-tune by ``settings``; returns the model with the weights of its best epoch, its tokenizer and the result.

    ``work_dir``: the folder for checkpoints. A run that was killed goes on from its last epoch when started again with
    the same settings, and ends with the same weights; ``start_anew`` throws away what other settings left there. None:
    no checkpoints, and the model keeps the weights of its last epoch (the result is still of the best).

    Raises FileNotFoundError for missing data or models; ValueError for wrong settings or data, or where ``work_dir``
    belongs to other settings.
    """
    run = _load(settings, work_dir, start_anew)
    if run.first is not None and not METHODS[settings.method].is_trained:
        return run.model, run.tokenizer, _result_of_first(run, run.first)
    return run.model, run.tokenizer, _result(run, _train(run))


@dataclass(frozen=True)
class _Run:
    """What training starts from.

    rows    by split, as the files have them
    folder  for checkpoints; None: there are none
    first   the result of the run that the method begins with, if it begins with one
    """

    settings: RunSettings
    task: Task
    rows: dict[str, list[Row]]
    folder: Path | None
    model: PreTrainedModel
    tokenizer: Any
    first: RunResult | None

    @property
    def labels(self) -> list[float]:
        return [row["label"] for row in self.rows["validation"]]


@dataclass(frozen=True)
class _Trained:
    """What training leaves besides the model's weights. epochs: the metrics of each one's evaluation."""

    epochs: list[dict[str, float]]
    best_epoch: int
    predictions: np.ndarray
    seconds: float
    peak_bytes: int


def _load(settings: RunSettings, work_dir: str | os.PathLike | None, start_anew: bool) -> _Run:
    """Rows, then the model as the method wants it, after the run that the method begins with."""
    task = get_task(settings.task)
    limits = {"train": settings.max_train, "validation": None}
    rows = {split: load_rows(task, split, settings.data_dir, settings.data, limit) for split, limit in limits.items()}
    folder = None if work_dir is None else _claim(Path(work_dir), settings, start_anew)
    method, wanted = METHODS[settings.method], settings.first_run()
    begun = None
    if wanted is not None:
        begun = fine_tune(wanted, None if folder is None else folder / "first", start_anew)
    if begun is not None and method.begins_with == "ft":
        model, tokenizer, _ = begun
    else:
        model, tokenizer = load_model(settings.model, task, settings.seed)
    tuned = begun[0] if begun is not None and method.begins_with == "ticket" else None
    make_ready(model, settings.method, _options(settings, task, rows["train"], tokenizer, tuned))
    return _Run(settings, task, rows, folder, model, tokenizer, None if begun is None else begun[2])


def _options(
    settings: RunSettings, task: Task, train_rows: Sequence[Row], tokenizer: Any, tuned: PreTrainedModel | None
) -> Options | None:
    """What the method's ``prepare`` is given; None where the model is quantized already."""
    if settings.quantization is None and settings.method in ("prequant", "prequant_alpha"):
        return None
    calibration: list[dict[str, torch.Tensor]] = []
    if METHODS[settings.method].needs_calibration:
        examples = encode(train_rows[:CALIBRATION_ROWS], tokenizer, task, settings.max_length)
        batches = range(0, len(examples), CALIBRATION_BATCH)
        calibration = [Collator(tokenizer)(examples[i : i + CALIBRATION_BATCH]) for i in batches]
    config = PreQuantConfig.from_dict(settings.quantization or {})
    return Options(config=config, calibration=calibration, tuned=tuned, **(settings.options or {}))


def _train(run: _Run) -> _Trained:
    """Train ``run.model``; it has the weights of its best epoch afterwards if there is a folder, else of the last."""
    task, settings, metric = run.task, run.settings, f"eval_{run.task.metrics[0]}"
    train, validation = (
        encode(run.rows[split], run.tokenizer, task, settings.max_length) for split in ("train", "validation")
    )
    order = by_length(validation)
    recorder = Recorder(run.model, task, run.labels, order, run.folder)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GlueTrainer(
            model=run.model,
            args=_arguments(settings, run.folder or Path(scratch), saves=run.folder is not None),
            train_dataset=train,
            eval_dataset=[validation[i] for i in order],
            data_collator=Collator(run.tokenizer),
            compute_metrics=recorder.compute_metrics,
            callbacks=[Progress(task.metrics[0], recorder.on_score)],
        )
        if settings.l1_strength:
            trainer.penalty = L1Distance(run.model, PreQuantConfig(), settings.l1_strength)
        trainer.remove_callback(PrinterCallback)  # it prints to standard output, where --json speaks
        resumed = None if run.folder is None else last_checkpoint(run.folder)
        if resumed is not None:
            history = json.loads((resumed / DONE_MARKER).read_text())["log_history"]
            recorder.resume([entry[metric] for entry in history if metric in entry])
        begin = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.perf_counter() - begin
    peak = measure.peak_bytes() - IMPORTS_BYTES
    if run.folder is not None:
        load_trained(run.model, run.folder / BEST_FILE)
    predictions = recorder.best_predictions
    if predictions is None:  # the best epoch was before the checkpoint that this process started from
        predictions = predict(run.model, run.tokenizer, task, run.rows["validation"], settings.max_length)
    epochs = [entry for entry in trainer.state.log_history if metric in entry]
    run.model.eval()
    return _Trained(epochs, recorder.best_epoch, predictions, seconds, peak)


def _result(run: _Run, done: _Trained) -> RunResult:
    task, settings, metric = run.task, run.settings, f"eval_{run.task.metrics[0]}"
    best, trained = done.epochs[done.best_epoch - 1], list(trained_tensors(run.model).values())
    return RunResult(
        task=task.name,
        method=settings.method,
        score=best[metric],
        scores={name: best[f"eval_{name}"] for name in task.metrics},
        best_epoch=done.best_epoch,
        epoch_scores=[entry[metric] for entry in done.epochs],
        lr=settings.learning_rate,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        n_train=len(run.rows["train"]),
        n_validation=len(run.rows["validation"]),
        trainable_parameters=sum(tensor.numel() for tensor in trained),
        seconds=done.seconds,
        peak_memory_mb=done.peak_bytes / measure.MB,
        model_bytes=_bytes([*run.model.parameters(), *run.model.buffers()]),
        task_bytes=_bytes(trained),
        model=settings.model,
        data=settings.data,
        quantization=settings.quantization,
        quantization_error=_quantization_error(run.model),
        overlap=_overlap(run.model, settings),
        environment=measure.environment(),
        predictions=metrics.pack(done.predictions, task.is_regression),
        labels=metrics.pack(run.labels, task.is_regression),
    )


def _result_of_first(run: _Run, first: RunResult) -> RunResult:
    """The result of a method that trains nothing after the run that came first, whose costs it has."""
    run.model.eval()
    predictions = predict(run.model, run.tokenizer, run.task, run.rows["validation"], run.settings.max_length)
    scores = metrics.score(run.task.metrics, run.labels, predictions)
    score = scores[run.task.metrics[0]]
    return dataclasses.replace(
        first,
        method=run.settings.method,
        score=score,
        scores=scores,
        best_epoch=1,
        epoch_scores=[score],
        model_bytes=_bytes([*run.model.parameters(), *run.model.buffers()]),
        peak_memory_mb=(measure.peak_bytes() - IMPORTS_BYTES) / measure.MB,
        quantization=run.settings.quantization,
        quantization_error=_quantization_error(run.model),
        predictions=metrics.pack(predictions, run.task.is_regression),
    )


def _quantization_error(model: torch.nn.Module) -> float | None:
    errors = [layer.squared_error for _, layer in quantized_linears(model)]
    return math.sqrt(sum(error for error in errors if error is not None)) if errors and None not in errors else None


def _overlap(model: PreTrainedModel, settings: RunSettings) -> float | None:
    config = PreQuantConfig.from_dict(settings.quantization or {})
    if config.selector == "outlier" and settings.method not in ("prequant_random", "prequant_ticket"):
        return None
    by_outliers, _ = load_model(settings.model, get_task(settings.task), settings.seed)
    quantize_model(by_outliers, dataclasses.replace(config, selector="outlier"))
    return statistics.fmean(overlap(model, by_outliers).values())


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _claim(folder: Path, settings: RunSettings, start_anew: bool) -> Path:
    """Make ``folder``, or go on in it where an earlier process with the same settings left off."""
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    record = folder / SETTINGS_FILE
    if record.exists():
        found = json.loads(record.read_text())
        different = [
            f"{key} {found.get(key)!r} there, {wanted[key]!r} here" for key in wanted if found.get(key) != wanted[key]
        ]
        if different and start_anew:
            shutil.rmtree(folder)
        elif different:
            raise ValueError(
                f"{folder} holds an unfinished run with other settings ({'; '.join(different)}): finish it, or remove "
                "that folder"
            )
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted))
    return folder


@torch.no_grad()
def predict(
    model: PreTrainedModel, tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]], max_length: int
) -> np.ndarray:
    """Predictions (M,) in the order of ``rows``: the batches are those of training's evaluations, so the same weights
    give the same numbers.
    """
    model.eval()
    examples: list[Example] = encode(rows, tokenizer, task, max_length)
    order, collate = by_length(examples), Collator(tokenizer)
    logits = []
    for begin in tqdm(range(0, len(order), EVAL_BATCH), desc="evaluating", unit="batch", disable=None, leave=False):
        batch = collate([examples[i] for i in order[begin : begin + EVAL_BATCH]])
        batch.pop("labels")
        logits.append(model(**{key: value.to(model.device) for key, value in batch.items()}).logits.float().cpu())
    return metrics.predictions_of(torch.cat(logits).numpy(), task.num_labels)[np.argsort(order)]


def evaluate(model: PreTrainedModel, tokenizer: Any, settings: RunSettings) -> dict[str, float]:
    """The task's metrics on its validation rows."""
    task = get_task(settings.task)
    rows = load_rows(task, "validation", settings.data_dir, settings.data)
    return metrics.score(
        task.metrics, [row["label"] for row in rows], predict(model, tokenizer, task, rows, settings.max_length)
    )
