"""A quantized base and its tasks as a server holds them: reads task files, puts them in and out, answers texts of any
mix of tasks in one forward.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from prequant_ext.directory import classifier_class, load_tokenizer, model_config
from prequant_ext.glue.batches import Collator
from prequant_ext.glue.tasks import TASKS
from prequant_ext.serve.settings import MIN_LENGTH, Settings
from prequant_ext.task import add_task, remove_task
from prequant_ext.task_file import check_matches, check_task_name, fingerprint, read_task, task_tensors

DEFAULT_LENGTH = 128  # tokens, where the task file does not say how long its examples were
LEAST_LABELS = max(task.num_labels for task in TASKS.values())  # of the head, so that any task of GLUE may join later

Answer = dict[str, Any]  # JSON-ready


class UnknownTask(ValueError):
    """A task that the server does not have, or no longer."""


class TooManyTasks(ValueError):
    """One task more than the server takes."""


@dataclass(frozen=True)
class ServedTask:
    """What a server tells of a task.

    labels     their names, as the task file's metadata has them. Without that key GLUE's, where the task is one of GLUE
               and was trained on it, else 0 to n - 1. () for a regression
    num_texts  1 or 2, as GLUE has it; None: either
    version    counts what this server has loaded: an answer names the values that it comes from
    """

    name: str
    labels: tuple[str, ...]
    num_texts: int | None
    max_length: int
    data: str | None
    score: str | None
    version: int = 0


@dataclass(frozen=True)
class Query:
    """A text, or a pair of texts, and the task that it is for."""

    task: str
    text: str
    text_pair: str | None = None


class Backbone:
    """The model. :meth:`put`, :meth:`remove` and :meth:`answer` belong to one thread; any other may :meth:`read` and
    look at ``tasks``, which is replaced and never changed.

    The head has room for the largest number of labels; a task with fewer has rows of zeros there, and its answers leave
    them out.
    """

    def __init__(self, directory: str, num_labels: int, settings: Settings) -> None:
        config = model_config(directory)
        # A head that the directory has is replaced by those of the tasks: its size does not matter.
        self.model = (
            classifier_class(directory)
            .from_pretrained(directory, num_labels=num_labels, dtype=torch.float32, ignore_mismatched_sizes=True)
            .eval()
        )
        self.base = fingerprint(self.model)
        self.shapes = {key: parameter.shape for key, parameter in task_tensors(self.model).items()}
        self.tokenizer = load_tokenizer(directory)
        self.collate = Collator(self.tokenizer)
        if self.model.config.pad_token_id is None:
            self.model.config.pad_token_id = self.tokenizer.pad_token_id
        self.num_labels, self.settings = num_labels, settings
        self.longest = min(
            getattr(config, "max_position_embeddings", None) or self.tokenizer.model_max_length,
            self.tokenizer.model_max_length,
        )
        if settings.max_length is not None and settings.max_length > self.longest:
            raise ValueError(
                f"max_length must be at most {self.longest}, which the model has positions for, got "
                f"{settings.max_length}"
            )
        self.tasks: dict[str, ServedTask] = {}
        self.loaded = 0

    @property
    def max_task_bytes(self) -> int:
        """Of a task file: of the widest dtype, and its header."""
        return 8 * sum(shape.numel() for shape in self.shapes.values()) + (1 << 20)

    def read(self, path: Path, name: str | None = None) -> tuple[ServedTask, dict[str, Tensor]]:
        """What :meth:`put` takes, of a task file, as ``name`` or by its own. Works on nothing that the model's thread
        changes.

        Raises FileNotFoundError; ValueError where load_task would, where the file does not say how many labels it has,
        or has more than the head.
        """
        metadata, tensors = read_task(path)
        num_labels = number_of_labels(path, metadata)
        if num_labels > self.num_labels:
            raise ValueError(
                f"{path} has {num_labels} labels but this server's head has {self.num_labels}: start the server with "
                "it among its tasks"
            )
        tensors = {
            key: _with_room(tensor, num_labels, self.shapes.get(key), self.num_labels)
            for key, tensor in tensors.items()
        }
        check_matches(path, metadata, tensors, self.base, self.shapes)
        return self._describe(
            path, metadata, check_task_name(metadata["name"] if name is None else name), num_labels
        ), tensors

    def _describe(self, path: Path, metadata: Mapping[str, str], name: str, num_labels: int) -> ServedTask:
        glue = TASKS.get(metadata["name"])
        if glue is not None and glue.num_labels != num_labels:
            glue = None
        labels: tuple[str, ...] = () if num_labels == 1 else tuple(map(str, range(num_labels)))
        if "labels" in metadata:
            labels = _named_labels(path, metadata["labels"], len(labels))
        elif glue is not None and metadata.get("data") != "synthetic":
            labels = glue.label_names
        length = self.settings.max_length or _number(path, metadata, "max_length", DEFAULT_LENGTH)
        if not MIN_LENGTH <= length <= self.longest:
            raise ValueError(
                f"{path}: max_length must be from {MIN_LENGTH} to {self.longest}, which the model has positions for, "
                f"got {length}"
            )
        return ServedTask(
            name,
            labels,
            None if glue is None else len(glue.fields),
            length,
            metadata.get("data"),
            metadata.get("score"),
        )

    @torch.no_grad()
    def put(self, task: ServedTask, tensors: Mapping[str, Tensor]) -> ServedTask:
        """Add a task, or replace the one of its name. Raises TooManyTasks."""
        if task.name not in self.tasks and len(self.tasks) >= self.settings.max_tasks:
            raise TooManyTasks(
                f"there are {len(self.tasks)} tasks, and max_tasks is {self.settings.max_tasks}: remove one first"
            )
        add_task(self.model, task.name, overwrite=True)
        for key, parameter in task_tensors(self.model).items():
            parameter.copy_(tensors[key])
        self.loaded += 1
        task = replace(task, version=self.loaded)
        self.tasks = {**self.tasks, task.name: task}
        return task

    def remove(self, name: str) -> None:
        """Forget a task. Raises UnknownTask."""
        if name not in self.tasks:
            raise self.unknown(name)
        remove_task(self.model, name)
        self.tasks = {other: task for other, task in self.tasks.items() if other != name}

    def unknown(self, name: str) -> UnknownTask:
        return UnknownTask(f"no task {name!r}: there are {', '.join(self.tasks) or 'none'}")

    @torch.no_grad()
    def answer(self, queries: Sequence[Query]) -> list[Answer | UnknownTask]:
        """An answer for each query, from one forward of them all; UnknownTask in the place of one whose task is not
        there.
        """
        known = [query for query in queries if query.task in self.tasks]
        answers = iter(self._answers(known) if known else ())
        return [next(answers) if query.task in self.tasks else self.unknown(query.task) for query in queries]

    def _answers(self, queries: Sequence[Query]) -> list[Answer]:
        tasks = [self.tasks[query.task] for query in queries]
        encoded = [
            self.tokenizer(query.text, query.text_pair, truncation=True, max_length=task.max_length)
            for query, task in zip(queries, tasks, strict=True)
        ]
        logits = self.model(
            **self.collate([dict(one) for one in encoded]), task_names=[task.name for task in tasks]
        ).logits.float()
        return [_answer(task, row, one) for task, row, one in zip(tasks, logits, encoded, strict=True)]


def _answer(task: ServedTask, logits: Tensor, encoded: Any) -> Answer:
    answer: Answer = {"task": task.name, "version": task.version}
    if task.labels:
        probabilities = logits[: len(task.labels)].softmax(0).tolist()
        answer["label"] = task.labels[max(range(len(probabilities)), key=probabilities.__getitem__)]
        answer["probabilities"] = dict(zip(task.labels, probabilities, strict=True))
    else:
        answer["score"] = logits[0].item()
    return answer | {
        "tokens": len(encoded["input_ids"]),
        "is_cut": any(one.overflowing for one in encoded.encodings or ()),
    }


def _number(path: Path, metadata: Mapping[str, str], key: str, default: int | None = None) -> int:
    value = metadata.get(key)
    if value is None and default is not None:
        return default
    if value is None or not value.isdecimal() or int(value) < 1:
        raise ValueError(
            f"{path}: its metadata must have a number {key}, as in save_task(model, name, path, {{{key!r}: 2}}), got "
            f"{value!r}"
        )
    return int(value)


def number_of_labels(path: Path, metadata: Mapping[str, str]) -> int:
    """From a task file's metadata. Raises ValueError where it does not say."""
    return _number(path, metadata, "num_labels")


def _named_labels(path: Path, text: str, count: int) -> tuple[str, ...]:
    """The names of a task's labels from its metadata. Raises ValueError where they are not ``count`` different ones."""
    try:
        names = json.loads(text)
    except json.JSONDecodeError:
        names = None
    is_list = isinstance(names, list) and all(isinstance(name, str) and name for name in names)
    if not is_list or len(names) != count or len(set(names)) != count:
        raise ValueError(f"{path}: labels in its metadata must be a JSON list of {count} different names, got {text!r}")
    return tuple(names)


def _with_room(tensor: Tensor, num_labels: int, shape: torch.Size | None, room: int) -> Tensor:
    """A head's output, ``num_labels`` rows, with zeros up to ``room``; any other tensor as it is."""
    is_output = (
        shape is not None
        and tensor.dim() == len(shape) > 0
        and tensor.shape[1:] == shape[1:]
        and (len(tensor), shape[0]) == (num_labels, room)
    )
    return (
        torch.cat([tensor, tensor.new_zeros(room - num_labels, *tensor.shape[1:])])
        if is_output and room > num_labels
        else tensor
    )


def load(directory: str, files: Sequence[Path], settings: Settings) -> Backbone:
    """The base in ``directory`` with the tasks of ``files``, after one answer from each of them in a mixed batch.

    Raises FileNotFoundError; ValueError where no file is given, two have one task, a file is damaged or of another
    base, or the model cannot mix tasks.
    """
    if not files:
        raise ValueError("tasks must name at least one task file, got none")
    labels = [number_of_labels(path, read_task(path)[0]) for path in files]
    backbone = Backbone(directory, max(LEAST_LABELS, *labels), settings)
    sources: dict[str, Path] = {}
    for path in files:
        task, tensors = backbone.read(path)
        if task.name in sources:
            raise ValueError(f"{sources[task.name]} and {path} both hold the task {task.name!r}")
        sources[task.name] = path
        backbone.put(task, tensors)
    backbone.answer([Query(task, "a") for task in backbone.tasks] * 2)
    return backbone
