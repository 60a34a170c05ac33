"""transformers.Trainer as this project uses it: batches of similar length, checkpoints of what is trained, the best
epoch kept.
"""

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from prequant_ext.glue import metrics
from prequant_ext.glue.batches import LengthGroupedSampler
from prequant_ext.glue.tasks import Task

TRAINED_FILE = "trained.safetensors"
BEST_FILE = "best.safetensors"
# the last file that Trainer writes into a checkpoint: without it the checkpoint is half of one
DONE_MARKER = "trainer_state.json"


class GlueTrainer(Trainer):
    """Trainer with batches of similar length, and checkpoints that hold what is trained instead of the whole model.

    The rest of the model is the base, which is on disk already and never changes; a checkpoint of PreQuant is as small
    as its task.
    """

    penalty: Callable[[], torch.Tensor] | None = None  # added to the loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if self.penalty is None or not self.model.training:
            return loss
        return (loss[0] + self.penalty(), *loss[1:]) if isinstance(loss, tuple) else loss + self.penalty()

    def _get_train_sampler(self, train_dataset: Any = None) -> LengthGroupedSampler:
        examples = self.train_dataset if train_dataset is None else train_dataset
        return LengthGroupedSampler(
            [len(example["input_ids"]) for example in examples], self.args.train_batch_size, self.args.seed
        )

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        save_file(trained_tensors(self.model), folder / TRAINED_FILE)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        load_trained(model or self.model, Path(resume_from_checkpoint) / TRAINED_FILE)


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: parameter.detach().contiguous() for name, parameter in model.named_parameters() if parameter.requires_grad
    }


@torch.no_grad()
def load_trained(model: torch.nn.Module, path: Path) -> None:
    """Put the tensors of ``path`` into the parameters that are trained. Raises ValueError where the names differ."""
    tensors, wanted = load_file(path), trained_tensors(model)
    if set(tensors) != set(wanted):
        raise ValueError(
            f"{path} holds {len(tensors)} trained tensors but the model trains {len(wanted)}, or their names differ"
        )
    for name, parameter in wanted.items():
        parameter.copy_(tensors[name])


class Progress(TrainerCallback):
    """A bar on standard error where that is a terminal, and the score of each epoch handed to ``on_score``."""

    def __init__(self, metric: str, on_score: Callable[[int, float], None]) -> None:
        self.metric, self.on_score = metric, on_score
        self.bar: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc="fine-tuning", unit="step", disable=None, leave=False
        )

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
    """The score and predictions of every epoch; with a folder, the trained tensors of the best epoch as a file that
    outlives the process.
    """

    def __init__(
        self, model: torch.nn.Module, task: Task, labels: Sequence[float], order: Sequence[int], folder: Path | None
    ) -> None:
        self.model, self.task, self.labels, self.inverse, self.folder = model, task, labels, np.argsort(order), folder
        self.latest: np.ndarray | None = None
        self.best_epoch = 0
        self.best_score = -math.inf
        self.best_predictions: np.ndarray | None = None

    def compute_metrics(self, output: Any) -> dict[str, float]:
        # In file order, with the labels of the file: a sum in another order, or of float32 labels, differs in the last
        # digit from evaluate()'s.
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
