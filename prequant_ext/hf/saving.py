"""What a quantized model is to transformers, however it came to be: save_pretrained and Trainer know it."""

import functools
import inspect
from typing import Any

from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import PrefixChange

from prequant_ext import checkpoint
from prequant_ext.config import PreQuantConfig
from prequant_ext.families import Family
from prequant_ext.hf.config import METHOD, PreQuantHfConfig
from prequant_ext.hf.quantizer import PackedRenaming, PreQuantHfQuantizer


def attach(model: PreTrainedModel, config: PreQuantConfig, family: Family | None = None) -> None:
    """Make a model that quantize_model has quantized what from_pretrained would have returned: save_pretrained and
    Trainer know it.

    ``family`` is stored with the model where it is not its row of the table; by default the one that quantize_model was
    given.
    """
    quantizer = PreQuantHfQuantizer(PreQuantHfConfig(config, family=family or getattr(model, "_prequant_family", None)))
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
    model.config.quantization_config = quantizer.quantization_config


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


def hook_save_pretrained() -> None:
    """Let save_pretrained write the ``state_dict`` that it is given (gathered from FSDP2's ranks, averaged).

    transformers replaces it by what the model's quantizer returns, and tells the quantizer nothing of it: not in the
    arguments of get_state_dict_and_metadata, the one call between the two, nor anywhere that it can ask. So the method
    of every transformers model hands it over. A second import of the plug-in replaces the first one's hook.
    """
    save = getattr(PreTrainedModel.save_pretrained, "_without_prequant", PreTrainedModel.save_pretrained)
    signature = inspect.signature(save)

    @functools.wraps(save)
    def save_pretrained(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        quantizer = getattr(self, "hf_quantizer", None)
        if not isinstance(quantizer, PreQuantHfQuantizer):
            return save(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments.get("state_dict")
        with quantizer.saving(given):
            return save(self, *args, **kwargs)

    save_pretrained._without_prequant = save  # type: ignore[attr-defined]
    PreTrainedModel.save_pretrained = save_pretrained
