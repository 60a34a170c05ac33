"""The PEFT tuner: ``get_peft_model(model, PreQuantColumnsConfig())`` on a quantized model. Importing this module
registers it; peft must be installed.

An adapter is a task: absolute float32 values of every outlier weight, and the head. r and the outlier dimensions belong
to the base, whose fingerprint stands in adapter_config.json: PEFT itself would load an adapter on any base of the same
shapes. The frozen codes are shared by all adapters.

Reading one needs this module imported, else PEFT stops with KeyError: 'PREQUANT_COLUMNS'.
PeftModel.from_pretrained(base, directory) and base.load_adapter(directory) work with any base;
AutoModel...from_pretrained(directory) where the base has a name on the hub or lies in the same directory. Beyond a
tuner's reach: PEFT resumes an adapter without reading its adapter_config.json, hence unchecked; and its README.md names
a local base by its path.
"""

import contextlib
import enum
import functools
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from prequant_ext import neighbours

neighbours.require("peft", "the PEFT tuner")

from peft import PeftConfig
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import SAFETENSORS_WEIGHTS_NAME, AuxiliaryTrainingWrapper
from safetensors.torch import load_file, save
from torch import Tensor, nn

from prequant_ext import model as models
from prequant_ext.frozen import keeping_dtype
from prequant_ext.linear import PreQuantLinear, quantized_linears
from prequant_ext.row_tasks import BASE_NAME
from prequant_ext.task_file import fingerprint, read_task, write_atomically, write_task

__all__ = [
    "PreQuantColumnsConfig",
    "PreQuantColumnsLayer",
    "PreQuantColumnsModel",
    "adapter_to_task",
    "task_to_adapter",
]

ON_DISK = "base_model.model."  # what PEFT puts before the names of a model's tensors


class PreQuantPeftType(str, enum.Enum):
    """Takes the place of a member of peft.PeftType, which other packages cannot extend; PEFT compares and looks up
    these types as text.
    """

    PREQUANT_COLUMNS = "PREQUANT_COLUMNS"


@dataclass
class PreQuantColumnsConfig(PeftConfig):
    """An adapter of outlier weights and head. Which layers and dimensions it has is settled by the base: there is
    nothing to choose here but

    modules_to_save   names of modules (or how they end) that are trained and saved whole; the task head, pooler
                      included, always is
    base_fingerprint  SHA-256 of the base that the adapter fits (prequant_ext.task_file.fingerprint); filled in by
                      get_peft_model

    The base's name is saved where it is a name of the hub; the path of a local directory means nothing elsewhere and is
    not.
    """

    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "modules to train and save beside the head"}
    )
    base_fingerprint: str | None = field(
        default=None, metadata={"help": "SHA-256 of the quantized base, filled in by get_peft_model"}
    )

    target_modules: ClassVar[None] = None  # PEFT looks at it; the tuner finds its layers by their type

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PreQuantPeftType.PREQUANT_COLUMNS

    def to_dict(self) -> dict[str, Any]:
        settings = super().to_dict()
        name = settings["base_model_name_or_path"]
        is_path = name is not None and (os.path.isabs(name) or os.path.isdir(name))
        return settings | {"base_model_name_or_path": None if is_path else name}


class _Float32Parameters(nn.ParameterDict):
    """Outlier weights of the adapters by name; like a PreQuantLinear's own, they stay in float32 whatever
    ``.to(dtype)`` asks for.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "_Float32Parameters":
        return super()._apply(keeping_dtype(fn), recurse)


class PreQuantColumnsLayer(nn.Module, BaseTunerLayer):
    """A PreQuantLinear, and for each adapter the outlier weights that take the place of its own."""

    adapter_layer_names = ("prequant_columns_weight",)
    base_layer: PreQuantLinear
    active_adapters: list[str]

    def __init__(self, base_layer: PreQuantLinear, adapter_name: str):
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.prequant_columns_weight = _Float32Parameters()
        self.add(adapter_name)
        self.train(base_layer.training)

    def add(self, adapter_name: str) -> None:
        """An adapter that starts from the base's values."""
        self.prequant_columns_weight[adapter_name] = nn.Parameter(self.base_layer.outlier_weight.detach().clone())

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        if not isinstance(adapter_names, str) and len(adapter_names) > 1:
            raise ValueError(
                f"adapters hold absolute values, so one at a time can be active, got {adapter_names}; adapter_names= "
                "mixes them within a batch"
            )
        super().set_adapter(adapter_names, inference_mode)

    def forward(self, x: Tensor, adapter_names: Sequence[str] | None = None) -> Tensor:
        if adapter_names is not None:
            if x.dim() > 2 and len(x) != len(adapter_names):
                raise ValueError(
                    f"adapter_names must have one name for each row of the batch, got {len(adapter_names)} where a "
                    f"layer meets {len(x)} rows"
                )
            return self.base_layer(x, torch.stack([self._weight_of(name) for name in adapter_names]))
        if self.disable_adapters or not self.active_adapters:
            return self.base_layer(x)
        return self.base_layer(x, self._weight_of(self.active_adapters[0]))

    def _weight_of(self, name: str) -> Tensor:
        return self.base_layer.outlier_weight if name == BASE_NAME else self.prequant_columns_weight[name]

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT would cast adapters that it fills late to the layer's dtype
        return self.base_layer.outlier_weight.device, torch.float32


class PreQuantColumnsModel(BaseTuner):
    """What PEFT makes of a quantized model. Made by get_peft_model, PeftModel.from_pretrained or transformers'
    load_adapter.
    """

    prefix = "prequant_columns_"
    tuner_layer_cls = PreQuantColumnsLayer

    # ---- wrapping

    def _check_new_adapter_config(self, config: PreQuantColumnsConfig) -> None:
        """The first that PEFT calls: a refusal leaves the model as it was. Raises ValueError, with both hashes where an
        adapter is of another base.
        """
        base = fingerprint(self.model)
        if config.base_fingerprint not in (None, base):
            raise ValueError(
                f"the adapter was trained on the base {config.base_fingerprint} but the model's base is {base}"
            )
        layers = [layer for _, layer in quantized_linears(self.model)]
        if not any(layer.r > 0 for layer in layers):
            raise ValueError(
                "model must have outlier dimensions to adapt (r > 0); the scales of train_scales=True are tasks of "
                "add_task"
            )
        if any(layer.row_weights is not None for layer in layers):
            raise ValueError(
                "model has tasks of add_task or load_task, which adapters would not see: write them by save_task, and "
                "wrap a model without"
            )
        config.base_fingerprint = base

    def _prepare_adapter_config(
        self, peft_config: PreQuantColumnsConfig, model_config: dict[str, Any]
    ) -> PreQuantColumnsConfig:
        given = list(peft_config.modules_to_save or ())
        wrapped = [name for name, module in self.model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]
        split = next(
            (
                (name, entry)
                for name in wrapped
                for entry in given
                if _is_within(name, entry) and not name.endswith(entry)
            ),
            None,
        )
        if split is not None:
            raise ValueError(
                f"modules_to_save has {split[1]!r}, but another adapter has {split[0]} within it as a module of its "
                "own: name modules alike"
            )
        head = [name for name in _head_modules(self.model) if not any(_is_within(name, entry) for entry in given)]
        peft_config.modules_to_save = [*given, *head] or None
        return peft_config

    # PEFT's is static and sees names only
    def _check_target_module_exists(self, peft_config: PreQuantColumnsConfig, key: str) -> bool:
        module = self.model.get_submodule(key)
        return isinstance(module, PreQuantColumnsLayer) or (isinstance(module, PreQuantLinear) and module.r > 0)

    def _create_and_replace(
        self,
        peft_config: PreQuantColumnsConfig,
        adapter_name: str,
        target: Any,
        target_name: str,
        parent: nn.Module,
        current_key: str,
    ) -> None:
        if isinstance(target, PreQuantColumnsLayer):
            target.add(adapter_name)
        else:
            self._replace_module(parent, target_name, PreQuantColumnsLayer(target, adapter_name), target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        setattr(parent, child_name, new_module)  # PEFT's own would write to the layer's `weight`, a stand-in

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: PreQuantColumnsConfig, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Raises ValueError where a file lacks outlier weights: PEFT would warn, and leave the base's."""
        found = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        layers = [name for name, module in model.named_modules() if isinstance(module, PreQuantColumnsLayer)]
        missing = [name for name in layers if f"{name}.prequant_columns_weight.{adapter_name}" not in found]
        if missing:
            raise ValueError(
                f"the adapter's file has no outlier weights for {missing[0]} ({len(missing)} of {len(layers)} "
                "layers): it is damaged"
            )
        return found

    # ---- mixed batches

    @contextlib.contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """What PeftModel's forward and generate run in: ``adapter_names`` reaches every layer and head, one name for
        each row that it is called with.
        """
        names = kwargs.get("adapter_names")
        if names is None:
            yield
            return
        self._check_names(names)
        # of each row in a decoder; the encoder runs before they are made
        copies = max(kwargs.get("num_beams") or 1, kwargs.get("num_return_sequences") or 1)
        repeated = [name for name in names for _ in range(copies)]
        is_encoder_decoder = getattr(getattr(self.model, "config", None), "is_encoder_decoder", False)
        encoder = set(self.model.get_encoder().modules()) if is_encoder_decoder else set()
        handles = [
            module.register_forward_pre_hook(
                functools.partial(_pass_names, list(names) if module in encoder else repeated), with_kwargs=True
            )
            for module in self.model.modules()
            if isinstance(module, PreQuantColumnsLayer | AuxiliaryTrainingWrapper)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _check_names(self, names: Any) -> None:
        if isinstance(names, str) or not isinstance(names, Sequence):
            raise ValueError(
                f"adapter_names must be a list with one name a row, {BASE_NAME!r} for the base, got {names!r}"
            )
        unknown = sorted({str(name) for name in names} - {BASE_NAME, *self.peft_config})
        if unknown:
            raise ValueError(
                f"adapter_names has {', '.join(map(repr, unknown))}, but the model has "
                f"{', '.join(map(repr, self.peft_config))}"
            )
        if self.training:
            raise ValueError(
                "adapter_names is for inference: call model.eval(); tasks of add_task train in mixed batches, too"
            )

    # ---- unwrapping

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        """merge: float layers that hold the adapter's values, and its head; else the quantized base, with its own
        values and head.
        """
        if merge:
            self._move_into_base(list(self.active_adapters if adapter_names is None else adapter_names), safe_merge)
        else:
            for module in self.model.modules():
                if isinstance(module, AuxiliaryTrainingWrapper):
                    module.set_adapter([])
        super()._unload_and_optionally_merge(merge=False, progressbar=progressbar)
        if merge:
            return models.to_float(self.model)
        models.freeze_base(self.model)
        return self.model

    @torch.no_grad()
    def _move_into_base(self, names: list[str], safe_merge: bool) -> None:
        if len(names) != 1 or names[0] not in self.peft_config:
            raise ValueError(
                f"one adapter can be merged, out of {', '.join(map(repr, self.peft_config)) or 'none'}, got {names}"
            )
        layers = {
            name: module for name, module in self.model.named_modules() if isinstance(module, PreQuantColumnsLayer)
        }
        for name, layer in layers.items():
            if safe_merge and not bool(torch.isfinite(layer.prequant_columns_weight[names[0]]).all()):
                raise ValueError(f"the outlier weights of {name} in the adapter {names[0]!r} are not finite")
        self.set_adapter(names[0])
        for layer in layers.values():
            layer.base_layer.outlier_weight.copy_(layer.prequant_columns_weight[names[0]])


def _pass_names(
    names: list[str], module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, kwargs | {"adapter_names": names}


def _head_modules(model: nn.Module) -> list[str]:
    """Names of the outermost modules that own parameters of the head, as they were before PEFT wrapped them. Raises
    ValueError where the model itself does.
    """
    owners: dict[str, None] = {}
    for name in models.head_parameter_names(model):
        wrapper, is_wrapped, _ = name.partition(".original_module.")
        owner = wrapper if is_wrapped else name.rpartition(".")[0]
        if not owner:
            raise ValueError(
                f"{name} is a parameter of the task head that belongs to no module: PEFT saves modules whole and "
                "cannot hold it"
            )
        if ".modules_to_save." not in name:
            owners[owner] = None
    return [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]


def _is_within(name: str, entry: str) -> bool:
    """Whether PEFT's matching of ``entry`` finds the module ``name`` or one around it."""
    parts = name.split(".")
    return any(".".join(parts[:end]).endswith(entry) for end in range(1, len(parts) + 1))


# ---- files -----------------------------------------------------------------------------------------------------------


def task_to_adapter(path: str | os.PathLike, directory: str | os.PathLike) -> None:
    """Write the task file ``path`` as an adapter directory. Raises ValueError for a file that is damaged, or holds
    scales (train_scales=True).
    """
    metadata, tensors = read_task(path)
    scales = [key for key in tensors if key.endswith(".weight_scale")]
    if scales:
        raise ValueError(f"{path} holds trained scales ({scales[0]}), and an adapter holds outlier weights")
    head = dict.fromkeys(key.rpartition(".")[0] for key in tensors if not key.endswith(".outlier_weight"))
    config = PreQuantColumnsConfig(
        modules_to_save=list(head) or None, base_fingerprint=metadata["base_fingerprint"], inference_mode=True
    )
    named = {
        ON_DISK + re.sub(r"\.outlier_weight$", ".prequant_columns_weight", key): tensor
        for key, tensor in tensors.items()
    }
    Path(directory).mkdir(parents=True, exist_ok=True)
    write_atomically(Path(directory) / SAFETENSORS_WEIGHTS_NAME, save(named, {"format": "pt"}))
    config.save_pretrained(os.fspath(directory))


def adapter_to_task(
    directory: str | os.PathLike, path: str | os.PathLike, name: str, metadata: Mapping[str, Any] | None = None
) -> None:
    """Write an adapter directory as the task file ``path``. Raises ValueError for an adapter of another kind, and as
    write_task.
    """
    config = PeftConfig.from_pretrained(os.fspath(directory))
    if not isinstance(config, PreQuantColumnsConfig) or config.base_fingerprint is None:
        raise ValueError(
            f"{directory} must hold an adapter of PreQuantColumnsConfig with its base's fingerprint, got a "
            f"{type(config).__name__}"
        )
    named = load_file(Path(directory) / SAFETENSORS_WEIGHTS_NAME)
    tensors = {
        re.sub(r"\.prequant_columns_weight$", ".outlier_weight", key.removeprefix(ON_DISK)): tensor
        for key, tensor in named.items()
    }
    write_task(path, name, tensors, config.base_fingerprint, metadata)


PEFT_TYPE_TO_CONFIG_MAPPING[PreQuantPeftType.PREQUANT_COLUMNS] = PreQuantColumnsConfig
PEFT_TYPE_TO_TUNER_MAPPING[PreQuantPeftType.PREQUANT_COLUMNS] = PreQuantColumnsModel
PEFT_TYPE_TO_PREFIX_MAPPING[PreQuantPeftType.PREQUANT_COLUMNS] = PreQuantColumnsModel.prefix
