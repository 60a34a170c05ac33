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
from prequant_ext.glue.tasks import Task, get_task, load_rows
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
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import quantize_model

# Of a small model; larger ones want less (the paper: 1e-4 to 9e-4 for PreQuant, 1e-5 to 4e-5 for full fine-tuning).
LEARNING_RATES = dict.fromkeys(METHODS, 5e-3) | {
    **dict.fromkeys(("ft", "ptq", "qat", "qat_vanilla"), 5e-5),
    **dict.fromkeys(("alphatuning", "prequant_alpha"), 5e-4),  # scales are a few hundredths
    **dict.fromkeys(("lora", "qlora", "bitfit"), 2e-3),
}
FLOAT_METHODS = ("ft", "bitfit", "lora")  # that quantize nothing
L1_STRENGTH = 1e-5  # of the distance in the first run of prequant_ticket
CALIBRATION_ROWS, CALIBRATION_BATCH = 64, 16  # the first rows of the training data
WEIGHT_DECAY = 0.01
EVAL_BATCH = 64
SETTINGS_FILE = "settings.json"

IMPORTS_BYTES = measure.resident_bytes()  # what the libraries cost before any model: subtracted from every peak


@dataclass(frozen=True)
class Settings:
    """One run.

    model          a directory or a hub name
    lr             None: LEARNING_RATES of the method; of ptq, that of its full fine-tuning
    first_lr       of the full fine-tuning that prequant_ticket begins with; None: LEARNING_RATES of ft
    quantization   the PreQuantConfig of methods that quantize; None: its defaults, but for prequant and prequant_alpha,
                   whose model is then quantized already
    options        of the method: settings of baselines.Options by name, config, calibration and tuned apart
    l1_strength    ft: of the L1 distance to the pre-trained weights that is added to the loss
    """

    model: str
    task: str
    method: str = "prequant"
    data: str = "glue"
    data_dir: str | None = None
    epochs: int = 3
    lr: float | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int = 128
    max_train: int | None = None
    quantization: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    first_lr: float | None = None
    l1_strength: float = 0.0

    def __post_init__(self) -> None:
        get_task(self.task)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "first_lr"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")
        if self.method in FLOAT_METHODS and self.quantization is not None:
            raise ValueError(f"method {self.method} trains a float model; quantization must be None")
        if not self.l1_strength >= 0 or (self.l1_strength > 0 and self.method != "ft"):
            raise ValueError(
                f"l1_strength must be at least 0, and 0 unless the method is ft, got {self.l1_strength} with "
                f"{self.method}"
            )
        if self.first_lr is not None and METHODS[self.method].begins_with != "ticket":
            raise ValueError(
                f"first_lr is of a full fine-tuning that comes first, and {self.method} begins with none; got "
                f"{self.first_lr}"
            )

    def first_run(self) -> "Settings | None":
        """The full fine-tuning that the method begins with."""
        begins_with = METHODS[self.method].begins_with
        if begins_with is None:
            return None
        is_ticket = begins_with == "ticket"
        lr, strength = (self.first_lr, L1_STRENGTH) if is_ticket else (self.lr, 0.0)
        return dataclasses.replace(
            self, method="ft", lr=lr, first_lr=None, quantization=None, options=None, l1_strength=strength
        )

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.method] if self.lr is None else self.lr


@dataclass(frozen=True)
class RunResult:
    """One run as one line: what was asked, what it scored, what it cost.
    Scores are fractions of 1, of the best epoch.
    """

    task: str
    method: str
    score: float
    scores: dict[str, float]
    best_epoch: int
    epoch_scores: list[float]
    lr: float
    seed: int
    epochs: int
    batch_size: int
    max_length: int
    n_train: int
    n_validation: int
    trainable_parameters: int
    seconds: float  # training with its evaluations; loading not counted
    peak_memory_mb: float  # above what the imports hold
    model_bytes: int  # all tensors of the model
    task_bytes: int  # those that were trained
    model: str
    data: str
    quantization: dict[str, Any] | None
    quantization_error: float | None  # sqrt(sum (w' - w)^2) over the matrices that were quantized in this run
    # Jaccard, of the dimensions with those that have most outliers, mean over matrices; None where those were chosen
    overlap: float | None
    environment: dict[str, Any]
    predictions: str  # of the best epoch, one for each validation example in file order; see metrics.pack
    labels: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


def _arguments(settings: Settings, folder: Path, saves: bool) -> TrainingArguments:
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
    settings: Settings, work_dir: str | os.PathLike | None = None, start_anew: bool = False
) -> tuple[PreTrainedModel, Any, RunResult]:
    """Fine-tune by ``settings``; returns the model with the weights of its best epoch, its tokenizer and the result.

    ``work_dir``: the folder for checkpoints. A run that was killed goes on from its last epoch when started again with
    the same settings, and ends with the same weights; ``start_anew`` throws away what other settings left there. None:
    no checkpoints, and the model keeps the weights of its last epoch (the result is still of the best).

    Raises FileNotFoundError for missing data or models; ValueError for wrong settings or data, or where ``work_dir``
    belongs to other settings.
    """
    task = get_task(settings.task)
    limits = {"train": settings.max_train, "validation": None}
    rows = {split: load_rows(task, split, settings.data_dir, settings.data, limit) for split, limit in limits.items()}
    folder = None if work_dir is None else _claim(Path(work_dir), settings, start_anew)
    model, tokenizer, first = _ready_model(settings, task, rows["train"], folder, start_anew)
    if first is not None and not METHODS[settings.method].is_trained:
        return model, tokenizer, _untrained(model, tokenizer, settings, first, rows["validation"])
    train, validation = (encode(rows[split], tokenizer, task, settings.max_length) for split in ("train", "validation"))
    order = by_length(validation)
    labels = [row["label"] for row in rows["validation"]]
    recorder = Recorder(model, task, labels, order, folder)
    with tempfile.TemporaryDirectory() as scratch:
        trainer = GlueTrainer(
            model=model,
            args=_arguments(settings, folder or Path(scratch), saves=folder is not None),
            train_dataset=train,
            eval_dataset=[validation[i] for i in order],
            data_collator=Collator(tokenizer),
            compute_metrics=recorder.compute_metrics,
            callbacks=[Progress(task.metrics[0], recorder.on_score)],
        )
        if settings.l1_strength:
            trainer.penalty = L1Distance(model, PreQuantConfig(), settings.l1_strength)
        trainer.remove_callback(PrinterCallback)  # it prints to standard output, where --json speaks
        resumed = None if folder is None else last_checkpoint(folder)
        if resumed is not None:
            history = json.loads((resumed / DONE_MARKER).read_text())["log_history"]
            recorder.resume(
                [entry[f"eval_{task.metrics[0]}"] for entry in history if f"eval_{task.metrics[0]}" in entry]
            )
        begin = time.perf_counter()
        trainer.train(resume_from_checkpoint=None if resumed is None else str(resumed))
        seconds = time.perf_counter() - begin
    peak = measure.peak_bytes() - IMPORTS_BYTES
    if folder is not None:
        load_trained(model, folder / BEST_FILE)
    model.eval()
    epochs = [entry for entry in trainer.state.log_history if f"eval_{task.metrics[0]}" in entry]
    best = epochs[recorder.best_epoch - 1]
    if recorder.best_predictions is None:  # the best epoch was before the checkpoint that this process started from
        recorder.best_predictions = predict(model, tokenizer, task, rows["validation"], settings.max_length)
    trained = list(trained_tensors(model).values())
    result = RunResult(
        task=task.name,
        method=settings.method,
        score=best[f"eval_{task.metrics[0]}"],
        scores={name: best[f"eval_{name}"] for name in task.metrics},
        best_epoch=recorder.best_epoch,
        epoch_scores=[entry[f"eval_{task.metrics[0]}"] for entry in epochs],
        lr=settings.learning_rate,
        seed=settings.seed,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        max_length=settings.max_length,
        n_train=len(train),
        n_validation=len(validation),
        trainable_parameters=sum(tensor.numel() for tensor in trained),
        seconds=seconds,
        peak_memory_mb=peak / measure.MB,
        model_bytes=_bytes([*model.parameters(), *model.buffers()]),
        task_bytes=_bytes(trained),
        model=settings.model,
        data=settings.data,
        quantization=settings.quantization,
        quantization_error=_quantization_error(model),
        overlap=_overlap(model, settings),
        environment=measure.environment(),
        predictions=metrics.pack(recorder.best_predictions, task.is_regression),
        labels=metrics.pack(labels, task.is_regression),
    )
    return model, tokenizer, result


def _ready_model(
    settings: Settings, task: Task, train_rows: Sequence[dict[str, Any]], folder: Path | None, start_anew: bool
) -> tuple[PreTrainedModel, Any, RunResult | None]:
    """The model as the method wants it, its tokenizer, and the result of the run that came first, if one does."""
    method, wanted = METHODS[settings.method], settings.first_run()
    begun = None if wanted is None else fine_tune(wanted, None if folder is None else folder / "first", start_anew)
    model, tokenizer = (
        begun[:2]
        if begun is not None and method.begins_with == "ft"
        else load_model(settings.model, task, settings.seed)
    )
    options = None
    if settings.quantization is not None or settings.method not in ("prequant", "prequant_alpha"):
        calibration: list[dict[str, torch.Tensor]] = []
        if method.needs_calibration:
            examples, collate = (
                encode(train_rows[:CALIBRATION_ROWS], tokenizer, task, settings.max_length),
                Collator(tokenizer),
            )
            calibration = [
                collate(examples[i : i + CALIBRATION_BATCH]) for i in range(0, len(examples), CALIBRATION_BATCH)
            ]
        tuned = begun[0] if begun is not None and method.begins_with == "ticket" else None
        config = PreQuantConfig.from_dict(settings.quantization or {})
        options = Options(config=config, calibration=calibration, tuned=tuned, **(settings.options or {}))
    make_ready(model, settings.method, options)
    return model, tokenizer, None if begun is None else begun[2]


def _untrained(
    model: PreTrainedModel, tokenizer: Any, settings: Settings, first: RunResult, rows: Sequence[dict[str, Any]]
) -> RunResult:
    """The result of a method that trains nothing after the run that came first, whose costs it has."""
    task = get_task(settings.task)
    model.eval()
    predictions = predict(model, tokenizer, task, rows, settings.max_length)
    scores = metrics.score(task.metrics, [row["label"] for row in rows], predictions)
    score = scores[task.metrics[0]]
    return dataclasses.replace(
        first,
        method=settings.method,
        score=score,
        scores=scores,
        best_epoch=1,
        epoch_scores=[score],
        model_bytes=_bytes([*model.parameters(), *model.buffers()]),
        peak_memory_mb=(measure.peak_bytes() - IMPORTS_BYTES) / measure.MB,
        quantization=settings.quantization,
        quantization_error=_quantization_error(model),
        predictions=metrics.pack(predictions, task.is_regression),
    )


def _quantization_error(model: torch.nn.Module) -> float | None:
    errors = [module.squared_error for module in model.modules() if isinstance(module, PreQuantLinear)]
    return math.sqrt(sum(error for error in errors if error is not None)) if errors and None not in errors else None


def _overlap(model: PreTrainedModel, settings: Settings) -> float | None:
    config = PreQuantConfig.from_dict(settings.quantization or {})
    if config.selector == "outlier" and settings.method not in ("prequant_random", "prequant_ticket"):
        return None
    by_outliers, _ = load_model(settings.model, get_task(settings.task), settings.seed)
    quantize_model(by_outliers, dataclasses.replace(config, selector="outlier"))
    return statistics.fmean(overlap(model, by_outliers).values())


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _claim(folder: Path, settings: Settings, start_anew: bool) -> Path:
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


def evaluate(model: PreTrainedModel, tokenizer: Any, settings: Settings) -> dict[str, float]:
    """The task's metrics on its validation rows."""
    task = get_task(settings.task)
    rows = load_rows(task, "validation", settings.data_dir, settings.data)
    return metrics.score(
        task.metrics, [row["label"] for row in rows], predict(model, tokenizer, task, rows, settings.max_length)
    )
