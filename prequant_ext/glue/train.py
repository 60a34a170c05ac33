"""Fine-tuning on transformers.Trainer: through the outlier dimensions of a pre-quantized model, or fully, by the same rules."""

import dataclasses
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prequant_ext.glue import measure, metrics
from prequant_ext.glue.batches import Collator, Example, LengthGroupedSampler, by_length, encode
from prequant_ext.glue.models import load_model
from prequant_ext.glue.tasks import Task, get_task, load_rows

METHODS = ("prequant", "ft")
LEARNING_RATES = {"prequant": 5e-3, "ft": 5e-5}  # of a small model; larger ones want less (the paper: 1e-4 to 9e-4, and 1e-5 to 4e-5)
WEIGHT_DECAY = 0.01
EVAL_BATCH = 64
TRAINED_FILE = "trained.safetensors"
BEST_FILE = "best.safetensors"
SETTINGS_FILE = "settings.json"
DONE_MARKER = "trainer_state.json"  # the last file that Trainer writes into a checkpoint: without it the checkpoint is half of one

IMPORTS_BYTES = measure.resident_bytes()  # what the libraries cost before any model: subtracted from every peak


@dataclass(frozen=True)
class Settings:
    """One run. ``model`` is a directory or a hub name; ``quantization`` the PreQuantConfig to apply after loading (None: the model is loaded as it is)."""

    model: str
    task: str
    method: str = "prequant"
    data: str = "glue"
    data_dir: str | None = None
    epochs: int = 3
    lr: float | None = None  # None: LEARNING_RATES of the method
    seed: int = 0
    batch_size: int = 32
    max_length: int = 128
    max_train: int | None = None
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        get_task(self.task)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.lr is not None and not self.lr > 0:
            raise ValueError(f"lr must be positive, got {self.lr}")
        if self.method == "ft" and self.quantization is not None:
            raise ValueError("method ft trains the float model; quantization must be None")

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.method] if self.lr is None else self.lr


@dataclass(frozen=True)
class RunResult:
    """One run as one line: what was asked, what it scored, what it cost. Scores are fractions of 1, of the best epoch."""

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
    environment: dict[str, Any]
    predictions: str  # of the best epoch, one for each validation example in file order; see metrics.pack
    labels: str

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))


# ---- the trainer ------------------------------------------------------------------------------------------------------


class GlueTrainer(Trainer):
    """Trainer with batches of similar length, and checkpoints that hold what is trained instead of the whole model.

    The rest of the model is the base, which is on disk already and never changes; a checkpoint of PreQuant is as small as its task.
    """

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        examples = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler([len(example["input_ids"]) for example in examples], self.args.train_batch_size, self.args.seed)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self.model), folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint) / TRAINED_FILE)


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad}


@torch.no_grad()
def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Put the tensors of ``path`` into the parameters that are trained. Raises ValueError where the names differ."""
    tensors, wanted = load_file(path), trained_tensors(model)
    if set(tensors) != set(wanted):
        raise ValueError(f"{path} holds {len(tensors)} trained tensors but the model trains {len(wanted)}, or their names differ")
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


class Progress(TrainerCallback):
    """A bar on standard error where that is a terminal, and the score of each epoch handed to ``on_score``."""

    def __init__(self, metric: str, on_score: Callable[[int, float], None]) -> None:
        self.metric, self.on_score = metric, on_score
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="fine-tuning", unit="step", disable=None, leave=False)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.update(1)

    def on_evaluate(self, args: Any, state: Any, control: Any, metrics: dict[str, float], **_: Any) -> None:
        value = metrics[f"eval_{self.metric}"]
        if self.bar is not None:
            self.bar.set_postfix({self.metric: f"{value:.4f}"})
        self.on_score(round(state.epoch), value)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar.close()


class Recorder:
    """The score and predictions of every epoch; with a folder, the trained tensors of the best epoch as a file that outlives the process."""

    def __init__(self, model: torch.nn.Module, task: Task, labels: Sequence[float], order: Sequence[int], folder: Path | None) -> None:
        self.model, self.task, self.labels, self.inverse, self.folder = model, task, labels, np.argsort(order), folder
        self.latest: np.ndarray | None = None
        self.best_epoch = 0
        self.best_score = -math.inf
        self.best_predictions: np.ndarray | None = None

    def compute_metrics(self, output: Any) -> dict[str, float]:
        # In file order, with the labels of the file: a sum in another order, or of float32 labels, differs in the last digit from evaluate()'s.
        self.latest = metrics.predictions_of(output.predictions, self.task.num_labels)[self.inverse]
        return metrics.score(self.task.metrics, self.labels, self.latest)

    def resume(self, scores: Sequence[float]) -> None:
        """Take over the scores of the epochs before a checkpoint."""
        for epoch, value in enumerate(scores, 1):
            if value > self.best_score:
                self.best_epoch, self.best_score = epoch, value

    def on_score(self, epoch: int, value: float) -> None:
        if value <= self.best_score:
            return
        self.best_epoch, self.best_score = epoch, value
        self.best_predictions = self.latest
        if self.folder is not None:
            temporary = self.folder / f"{BEST_FILE}.tmp"
            save_file(trained_tensors(self.model), temporary)
            os.replace(temporary, self.folder / BEST_FILE)


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint; half-written ones, left by a kill, are removed."""
    complete = []
    for path in folder.glob(f"{PREFIX_CHECKPOINT_DIR}-*"):
        try:
            complete.append((json.loads((path / DONE_MARKER).read_text())["global_step"], path))
        except (OSError, ValueError, KeyError):
            shutil.rmtree(path)
    return max(complete)[1] if complete else None


def _arguments(settings: Settings, folder: Path, saves: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
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


def fine_tune(settings: Settings, work_dir: str | os.PathLike | None = None, start_anew: bool = False) -> tuple[PreTrainedModel, Any, RunResult]:
    """Fine-tune by ``settings``; returns the model with the weights of its best epoch, its tokenizer and the result.

    ``work_dir``: the folder for checkpoints. A run that was killed goes on from its last epoch when started again with the same settings, and ends with
    the same weights; ``start_anew`` throws away what other settings left there. None: no checkpoints, and the model keeps the weights of its last epoch
    (the result is still of the best).

    Raises FileNotFoundError for missing data or models; ValueError for wrong settings or data, or where ``work_dir`` belongs to other settings.
    """
    task = get_task(settings.task)
    limits = {"train": settings.max_train, "validation": None}
    rows = {split: load_rows(task, split, settings.data_dir, settings.data, limit) for split, limit in limits.items()}
    folder = None if work_dir is None else _claim(Path(work_dir), settings, start_anew)
    model, tokenizer = load_model(settings.model, task, settings.method, settings.seed, settings.quantization)
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
        trainer.remove_callback(PrinterCallback)  # it prints to standard output, where --json speaks
        resumed = None if folder is None else last_checkpoint(folder)
        if resumed is not None:
            history = json.loads((resumed / DONE_MARKER).read_text())["log_history"]
            recorder.resume([entry[f"eval_{task.metrics[0]}"] for entry in history if f"eval_{task.metrics[0]}" in entry])
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
        environment=measure.environment(),
        predictions=metrics.pack(recorder.best_predictions, task.is_regression),
        labels=metrics.pack(labels, task.is_regression),
    )
    return model, tokenizer, result


def _bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _claim(folder: Path, settings: Settings, start_anew: bool) -> Path:
    """Make ``folder``, or go on in it where an earlier process with the same settings left off."""
    wanted = json.loads(json.dumps(dataclasses.asdict(settings)))
    record = folder / SETTINGS_FILE
    if record.exists():
        found = json.loads(record.read_text())
        different = [f"{key} {found.get(key)!r} there, {wanted[key]!r} here" for key in wanted if found.get(key) != wanted[key]]
        if different and start_anew:
            shutil.rmtree(folder)
        elif different:
            raise ValueError(f"{folder} holds an unfinished run with other settings ({'; '.join(different)}): finish it, or remove that folder")
    folder.mkdir(parents=True, exist_ok=True)
    record.write_text(json.dumps(wanted))
    return folder


@torch.no_grad()
def predict(model: PreTrainedModel, tokenizer: Any, task: Task, rows: Sequence[dict[str, Any]], max_length: int) -> np.ndarray:
    """Predictions (M,) in the order of ``rows``: the batches are those of training's evaluations, so the same weights give the same numbers."""
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
    return metrics.score(task.metrics, [row["label"] for row in rows], predict(model, tokenizer, task, rows, settings.max_length))
