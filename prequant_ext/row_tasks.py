"""Mixed-task batches: ``model(**batch, task_names=[...])``, a task for every row of one batch, in inference and in
training.

Tasks share the base and its outlier dimensions, so a layer makes its frozen product once for all rows and adds one
batched product of the gathered columns with each row's own outlier weights (PreQuantLinear). Heads follow their rows by
torch.vmap.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from prequant_ext.frozen import is_sharded
from prequant_ext.linear import PreQuantLinear, quantized_linears

BASE_NAME = "__base__"  # in task_names, as None: no task may be called so

ParametersOf = Callable[[nn.Module, str | None], Mapping[str, nn.Parameter]]


def _stacked(rows: list[Mapping[str, nn.Parameter]], key: str) -> Tensor:
    return torch.stack([values[key] for values in rows])


class RowTasks:
    """The tasks of a batch's rows during one call of ``model``; between calls none. Not for calls of one model from
    several threads at once.

    names          the parameters of a task
    parameters_of  (model, task) -> the values of that task by parameter name; raises ValueError for an unknown task
    """

    def __init__(self, model: nn.Module, names: Sequence[str], parameters_of: ParametersOf):
        self.parameters_of = parameters_of
        self.rows: list[Mapping[str, nn.Parameter]] | None = None
        self.handles = [
            model.register_forward_pre_hook(self._begin, with_kwargs=True),
            model.register_forward_hook(self._end, always_call=True),
        ]
        owned = set(names)
        units: list[str] = []
        for name, module in model.named_modules():
            if isinstance(module, PreQuantLinear):
                module.row_weights = functools.partial(self.values_of, f"{name}.outlier_weight")
            elif not any(name.startswith(f"{unit}.") for unit in units) and owned & {
                f"{name}.{own}" for own, _ in module.named_parameters(recurse=False)
            }:
                units.append(name)
                self.handles.append(module.register_forward_hook(functools.partial(self._run_head, name)))
        self.layers = [layer for _, layer in quantized_linears(model)]

    def remove(self) -> None:
        """Take the hooks away: the model has no tasks any more."""
        for handle in self.handles:
            handle.remove()
        for layer in self.layers:
            layer.row_weights = None

    def values_of(self, key: str) -> Tensor | None:
        """(B, ...): the parameter ``key`` of each row's task; None in a call without ``task_names``."""
        return None if self.rows is None else _stacked(self.rows, key)

    def _begin(
        self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if "task_names" not in kwargs:
            return None
        kwargs = dict(kwargs)
        names = kwargs.pop("task_names")
        if names is None:
            return args, kwargs
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(f"task_names must be a list with one name a row, None for the base, got {names!r}")
        batch = next(
            (value for value in (*args, *kwargs.values()) if isinstance(value, Tensor) and value.dim() > 0), None
        )
        if batch is None or len(names) != len(batch):
            raise ValueError(
                f"task_names must have one name for each row of the batch, got {len(names)} for "
                f"{0 if batch is None else len(batch)} rows"
            )
        if any(layer.train_scales for layer in self.layers):
            raise ValueError(
                "task_names needs tasks of outlier weights, but this model trains scales (train_scales=True), which "
                "all rows of a product share"
            )
        if (
            model.training
            and torch.is_grad_enabled()
            and any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        ):
            raise ValueError(
                "task_names cannot be combined with gradient checkpointing, which runs layers again when the rows' "
                "tasks are gone; disable it"
            )
        tasks = {name: self.parameters_of(model, None if name == BASE_NAME else name) for name in dict.fromkeys(names)}
        if any(is_sharded(parameter) for values in tasks.values() for parameter in values.values()):
            raise ValueError(
                "task_names needs the tasks' whole parameters, but FSDP2 has sharded them: make one task live with "
                "set_task, or use DDP"
            )
        self.rows = [tasks[name] for name in names]
        return args, kwargs

    def _end(self, model: nn.Module, args: Any, output: Any) -> None:
        self.rows = None

    def _run_head(self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        """The module's output with each row's own parameters. Its first output, with the live ones, is dropped."""
        if self.rows is None:
            return None
        for x in args:
            if not isinstance(x, Tensor) or len(x) != len(self.rows):
                got = tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__
                raise ValueError(
                    f"{name}: task_names needs inputs of {len(self.rows)} rows, as the batch has, got {got}"
                )
        parameters = {
            own: _stacked(self.rows, f"{name}.{own}").to(parameter.dtype)
            for own, parameter in module.named_parameters()
        }

        def of_one_row(own: dict[str, Tensor], *inputs: Tensor) -> Tensor:
            return torch.func.functional_call(module, own, tuple(x.unsqueeze(0) for x in inputs)).squeeze(0)

        rows, self.rows = self.rows, None  # functional_call runs this hook, too
        try:
            return torch.vmap(of_one_row, randomness="different")(parameters, *args)
        finally:
            self.rows = rows
