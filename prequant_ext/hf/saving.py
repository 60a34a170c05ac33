"""What a quantized model is to transformers, however it came to be: save_pretrained and Trainer know it."""

import copy
import functools
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from prequant_ext import checkpoint
from prequant_ext.config import PreQuantConfig
from prequant_ext.families import Family
from prequant_ext.frozen import FrozenWeight, quantized_modules
from prequant_ext.hf.config import METHOD, PreQuantHfConfig
from prequant_ext.hf.quantizer import PackedRenaming, PreQuantHfQuantizer
from prequant_ext.linear import PreQuantLinear
from prequant_ext.sites import Site, find_sites, without_base_prefix


def attach(model: PreTrainedModel, config: PreQuantConfig, family: Family | None = None) -> None:
    """Make a model that quantize_model has quantized what from_pretrained would have returned: save_pretrained and
    Trainer know it.

    ``family`` is stored with the model where it is not its row of the table; by default the one that quantize_model was
    given. The model gets a config object of its own: other models may have been made from the one it had.
    """
    _attach(model, PreQuantHfConfig(config, family=family or getattr(model, "_prequant_family", None)))


def _attach(model: PreTrainedModel, quantization_config: PreQuantHfConfig) -> None:
    quantizer = PreQuantHfQuantizer(quantization_config)
    quantizer.dtype = checkpoint.compute_dtype(model)
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # made from a config: what save_pretrained would assume
        conversions = [
            entry
            for entry in get_model_conversion_mapping(model, add_legacy=False)
            if not isinstance(entry, PrefixChange)
        ]
    model._weight_conversions = quantizer.update_weight_conversions(conversions, model)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = METHOD
    _set_config(model, copy.copy(model.config))
    model.config.quantization_config = quantizer.quantization_config


def _set_config(model: PreTrainedModel, config: PreTrainedConfig) -> None:
    """Give ``model`` another config object, and every part of it that reads the old one."""
    old = model.config
    for module in model.modules():
        if vars(module).get("config") is old:
            module.config = config


def detach(model: PreTrainedModel) -> None:
    """Undo :func:`attach` and what from_pretrained noted on a model that is float again: save_pretrained writes a plain
    checkpoint, Trainer trains it.
    """
    for owner, attributes in (
        (model, ("hf_quantizer", "is_quantized", "quantization_method", "_prequant_family")),
        *(
            (module.config, ("quantization_config", "_is_quantized"))
            for module in model.modules()
            if isinstance(module, PreTrainedModel)
        ),
    ):
        for attribute in attributes:
            owner.__dict__.pop(attribute, None)
    conversions = getattr(model, "_weight_conversions", None) or []
    model._weight_conversions = [entry for entry in conversions if not isinstance(entry, PackedRenaming)]


# ---- a model that holds quantized layers without having been given to quantize_model ---------------------------------


def describe(model: PreTrainedModel) -> PreQuantHfConfig:
    """The quantization_config with which from_pretrained makes of ``model``'s checkpoint what the model is now.

    It is told from the layers: a tower of a larger model may be quantized, an encoder within a wrapper, one of a pair.
    Raises ValueError naming a layer that from_pretrained would make otherwise, with the remedy.
    """
    layers = dict(quantized_modules(model))
    configs: list[PreQuantConfig] = []
    for name, layer in layers.items():
        if layer.quantized_with is None:
            raise _unsaveable(model, f"{name} was quantized by itself (from_linear)", "quantize the model as a whole")
        if layer.quantized_with not in configs:
            configs.append(layer.quantized_with)
    if len(configs) > 1:
        raise _unsaveable(
            model, f"its layers were quantized with {len(configs)} different settings", _save_parts(model)
        )
    family = getattr(model, "_prequant_family", None)
    plain = _without_quantization(model.config)
    try:
        with torch.device("meta"):
            fresh = type(model)(plain)
        sites = {site.name: site for site in find_sites(fresh, configs[0], family, allow_unmatched=True)}
    except ValueError as error:
        raise _unsaveable(model, str(error).splitlines()[0], _save_parts(model)) from error
    for name, layer in layers.items():
        if not _is_made_at(layer, sites.get(name)):
            raise _unsaveable(model, f"from_pretrained would not make {name} as it is", _save_parts(model))
    float_modules = sorted(without_base_prefix(model, name) for name in sites.keys() - layers.keys())
    return PreQuantHfConfig(configs[0], family=family, float_modules=float_modules)


def _is_made_at(layer: FrozenWeight, site: Site | None) -> bool:
    if site is None or site.shape != layer.shape:
        return False
    if isinstance(layer, PreQuantLinear):
        made = (layer.axis, layer.bits, layer.is_transposed)
        return site.kind == "linear" and made == (site.axis, site.bits, site.is_transposed)
    return site.kind == "embedding"


def _save_parts(model: nn.Module) -> str:
    """The remedy: parts of ``model`` that can be saved."""
    parts = [
        name
        for name, module in model.named_modules()
        if name
        and isinstance(module, PreTrainedModel)
        and isinstance(getattr(module, "hf_quantizer", None), PreQuantHfQuantizer)
    ]
    if not parts:
        return "quantize the model as a whole"
    return f"save its parts on their own: {', '.join(f'model.{name}.save_pretrained' for name in parts)}"


def _unsaveable(model: nn.Module, reason: str, remedy: str) -> ValueError:
    return ValueError(
        f"{type(model).__name__} holds quantized layers, and a checkpoint of it would not load as it is: {reason}. "
        f"{remedy[0].upper()}{remedy[1:]}, or make it float first with merge"
    )


def _without_quantization(config: PreTrainedConfig) -> PreTrainedConfig:
    """A copy of ``config`` that says nothing of quantization, nor do the configs within it."""
    plain = copy.deepcopy(config)
    for part in (plain, *(value for value in vars(plain).values() if isinstance(value, PreTrainedConfig))):
        vars(part).pop("quantization_config", None)
    return plain


@contextmanager
def _described(model: PreTrainedModel) -> Iterator[PreQuantHfQuantizer]:
    """``model`` described for as long as it is saved. Then it is what it was: its parts may become float again."""
    noted = ("hf_quantizer", "is_quantized", "quantization_method", "_weight_conversions")
    before, old = {name: vars(model)[name] for name in noted if name in vars(model)}, model.config
    quantization_config = describe(model)
    try:
        model.config = _without_quantization(old)
        _attach(model, quantization_config)
        yield model.hf_quantizer
    finally:
        for name in noted:
            vars(model).pop(name, None)
        vars(model).update(before)
        model.config = old


def hook_save_pretrained() -> None:
    """Let save_pretrained of every transformers model see the quantized layers that the model holds.

    A model that from_pretrained or quantize_model returned is saved as it is. One that merely holds quantized layers
    would be written as codes that nobody could read: it is described by :func:`describe`, or refused.

    And the ``state_dict`` that the method is given (gathered from FSDP2's ranks, averaged) reaches the file:
    transformers replaces it by what the model's quantizer returns, and tells the quantizer nothing of it, neither in
    the arguments of get_state_dict_and_metadata, the one call between the two, nor anywhere that it can ask.

    A second import of the plug-in replaces the first one's hook.
    """
    save = getattr(PreTrainedModel.save_pretrained, "_without_prequant", PreTrainedModel.save_pretrained)
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
        quantizer = getattr(self, "hf_quantizer", None)
        if isinstance(quantizer, PreQuantHfQuantizer):
            with quantizer.saving(given):
                return save(self, *args, **kwargs)
        if not any(quantized_modules(self)):
            return save(self, *args, **kwargs)
        with _described(self) as quantizer, quantizer.saving(given):
            return save(self, *args, **kwargs)

    save_pretrained._without_prequant = save  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
