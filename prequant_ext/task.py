"""Tasks of one model: the base and its codes once, and for every task the values of its outlier weights and its head.

One task is live: its values stand in the model's own parameters. The others are kept beside, and switching copies into
storage that stays where it is: nothing is compiled again, and no optimizer, CUDA graph or view loses its tensor. None
is the base, with the values that the model had when its first task was added.

Under FSDP2 a rank keeps its share of every task, and all ranks call these functions together.
"""

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed, nn

from prequant_ext import model as models
from prequant_ext.frozen import is_sharded, sharded_like
from prequant_ext.row_tasks import RowTasks
from prequant_ext.task_file import check_fits, check_task_name, fingerprint, read_task, task_tensors, write_task

_ATTRIBUTE = "_prequant_tasks"


class _Tasks:
    """What a model knows of its tasks. ``slots``: name -> parameter name -> its values while the task is not live; the
    live one's are stale. None: the base.
    """

    def __init__(self, model: nn.Module):
        live = task_tensors(model)
        names = {key: key.rpartition(".") for key in live}
        self.owners = {key: (model.get_submodule(module), own) for key, (module, _, own) in names.items()}
        self.slots: dict[str | None, dict[str, nn.Parameter]] = {None: _copies(live, live)}
        self.active: str | None = None
        self.row_tasks = RowTasks(model, list(live), self.parameters_of)

    def live(self) -> dict[str, nn.Parameter]:
        """task_tensors of the model, without a walk over it: most of a switch would be that walk."""
        return {key: getattr(module, own) for key, (module, own) in self.owners.items()}

    def parameters_of(self, model: nn.Module, name: str | None) -> Mapping[str, nn.Parameter]:
        """The parameters that hold a task's values now. Raises ValueError for an unknown name."""
        if name not in self.slots:
            raise ValueError(
                f"no task {name!r} in the model: it has {', '.join(repr(own) for own in self.names()) or 'none'}; "
                "add_task or load_task brings one"
            )
        return self.live() if name == self.active else self.slots[name]

    def names(self) -> list[str]:
        return [name for name in self.slots if name is not None]

    @torch.no_grad()
    def switch(self, model: nn.Module, name: str | None) -> None:
        """Store the live values, then make ``name``'s the live ones."""
        target = self.parameters_of(model, name)
        if name == self.active:
            return
        _reshard(model)
        live = self.live()
        _copy(self.slots[self.active], live)
        _copy(live, target)
        self.active = name


def _copies(values: Mapping[str, Tensor], like: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    return {
        key: nn.Parameter(
            sharded_like(own, values[key].detach().to(own.device, own.dtype, copy=True)), own.requires_grad
        )
        for key, own in like.items()
    }


def _copy(to: Mapping[str, nn.Parameter], values: Mapping[str, nn.Parameter]) -> None:
    shares = [_share(sharded_like(parameter, values[key].detach())) for key, parameter in to.items()]
    torch._foreach_copy_([_share(parameter.detach()) for parameter in to.values()], shares)
    torch.clear_autocast_cache()  # of casts of the values before: autocast does not see that a parameter is written to


def _share(tensor: Tensor) -> Tensor:
    """What this rank has of ``tensor``, in its storage."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def _reshard(model: nn.Module) -> None:
    """FSDP2 leaves some parameters gathered after a forward pass that no backward follows: what is written into those
    is lost in the next pass.
    """
    if distributed.is_available() and distributed.is_initialized():
        from torch.distributed.fsdp import FSDPModule

        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


def _tasks_of(model: nn.Module) -> _Tasks | None:
    return vars(model).get(_ATTRIBUTE)


def _known_tasks(model: nn.Module) -> _Tasks:
    """The model's tasks, now kept. Raises ValueError if the model is not quantized."""
    tasks = _tasks_of(model)
    if tasks is None:
        models.require_quantized(model)
        tasks = _Tasks(model)
        setattr(model, _ATTRIBUTE, tasks)
    return tasks


def _check_new(model: nn.Module, name: str, overwrite: bool) -> None:
    tasks = _tasks_of(model)
    if check_task_name(name) in (() if tasks is None else tasks.names()) and not overwrite:
        raise ValueError(
            f"the model has a task {name!r} already: remove_task takes it away, overwrite=True replaces it"
        )


def add_task(model: nn.Module, name: str, *, overwrite: bool = False) -> None:
    """A new task that starts from the base's values, and is live at once: what trains from here on is its own.

    Raises ValueError for a bad name, one that the model has (unless ``overwrite``), or a model that is not quantized.
    """
    _check_new(model, name, overwrite)
    tasks = _known_tasks(model)
    base = {key: parameter.detach().clone() for key, parameter in tasks.parameters_of(model, None).items()}
    _put(model, tasks, name, base)


def _put(model: nn.Module, tasks: _Tasks, name: str, values: Mapping[str, Tensor]) -> None:
    tasks.switch(model, None)
    tasks.slots[name] = _copies(values, task_tensors(model))
    tasks.switch(model, name)


def set_task(model: nn.Module, name: str | None) -> None:
    """Make ``name`` the live task; the values of the one that is left are stored first. None: the base.

    Copies in place: no parameter is replaced, nothing is allocated or compiled again. Raises ValueError for an unknown
    name.
    """
    tasks = _tasks_of(model)
    if tasks is None and name is None:
        return
    _known_tasks(model).switch(model, name)


def active_task(model: nn.Module) -> str | None:
    """The live task's name; None: the base."""
    tasks = _tasks_of(model)
    return None if tasks is None else tasks.active


def list_tasks(model: nn.Module) -> list[str]:
    """Names of the model's tasks, in the order in which they came; the base is none of them."""
    tasks = _tasks_of(model)
    return [] if tasks is None else tasks.names()


def remove_task(model: nn.Module, name: str) -> None:
    """Forget a task. Where it is live, the base is afterwards. Raises ValueError for an unknown name."""
    tasks = _known_tasks(model)
    if name is None:
        raise ValueError("name must be a task, got None: the base cannot be removed")
    tasks.parameters_of(model, name)
    if tasks.active == name:
        tasks.switch(model, None)
    del tasks.slots[name]


def task_parameters(model: nn.Module, *names: str | None) -> list[nn.Parameter]:
    """The parameters that hold the values of these tasks, to train several at once in mixed batches: each gets
    gradients from its own rows only.

    For tasks that stay apart from the live one: a task that is live has the model's own parameters, which
    :func:`set_task` then fills with others. Raises ValueError for an unknown name.
    """
    tasks = _known_tasks(model)
    return [parameter for name in names for parameter in tasks.parameters_of(model, name).values()]


def save_task(
    model: nn.Module,
    name: str,
    path: str | os.PathLike,
    metadata: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write the task ``name`` to ``path``: outlier weights and head as ``dtype``, with ``metadata`` (scores,
    hyper-parameters: text or numbers).

    A model without named tasks is one task, and ``name`` names it. Raises ValueError for an unknown or bad name, or a
    metadata key that the format has for itself; OSError where the disk is full, and the old file stays.
    """
    tasks = _tasks_of(model)
    base = fingerprint(model)
    values = (
        task_tensors(model) if tasks is None or not tasks.names() else tasks.parameters_of(model, check_task_name(name))
    )
    write_task(path, name, values, base, metadata, dtype)


def load_task(
    model: nn.Module,
    path: str | os.PathLike,
    name: str | None = None,
    *,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
) -> dict[str, str]:
    """Add the task of a file, as ``name`` or by its own, and make it live. Returns the file's metadata. A refusal
    leaves the model as it was.

    allow_nonfinite  take NaN and Inf, too: to look at a training that diverged

    Raises FileNotFoundError; ValueError naming both sides where the base, the tensors, a shape or the format version
    differ, where the file is damaged or a tensor is not finite, or where the model has a task of that name (unless
    ``overwrite``).
    """
    metadata, tensors = read_task(path, allow_nonfinite=allow_nonfinite)
    name = metadata["name"] if name is None else name
    _check_new(model, name, overwrite)
    check_fits(path, metadata, tensors, model)
    _put(model, _known_tasks(model), name, tensors)
    return metadata


def merge(model: nn.Module, name: str | None = None) -> nn.Module:
    """Float layers again, in place, holding what the live task computes, or the task ``name``; the other tasks are
    forgotten. Returns ``model``.

    Raises ValueError for an unknown name, or if the model is not quantized.
    """
    if name is not None:
        set_task(model, name)
    merged = models.to_float(model)
    tasks = vars(model).pop(_ATTRIBUTE, None)
    if tasks is not None:
        tasks.row_tasks.remove()
    return merged
