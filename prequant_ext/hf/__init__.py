"""The transformers plug-in: quantize while a float checkpoint streams in, save_pretrained, from_pretrained. Importing
this module registers it.

A module X has on disk X.weight (packed codes), X.weight_scale, X.weight_zero_point, and a linear X.outlier_dims and
X.outlier_weight. The codes keep the float weight's name there, so that a program without the plug-in stops at their
shape; under any other name it would start from random weights. In memory they are X.weight_packed (see frozen.py).
"""

from typing import Any

from prequant_ext import neighbours

neighbours.require("transformers", "the transformers plug-in")

from transformers.quantizers import register_quantization_config, register_quantizer
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING, AutoHfQuantizer

from prequant_ext.checkpoint import save_model_dir
from prequant_ext.hf.config import METHOD, PreQuantHfConfig
from prequant_ext.hf.quantizer import PackedRenaming, PreQuantHfQuantizer
from prequant_ext.hf.saving import attach, detach, hook_save_pretrained
from prequant_ext.model import on_pretrained_models

__all__ = [
    "METHOD",
    "PackedRenaming",
    "PreQuantHfConfig",
    "PreQuantHfQuantizer",
    "attach",
    "detach",
    "save_model_dir",
]


def _register() -> None:
    """Enter the plug-in into transformers' tables; on a second import of this module, in place of the first."""
    for table in (AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING):
        if getattr(table.get(METHOD), "__module__", "").startswith(__name__):
            del table[METHOD]
    register_quantization_config(METHOD)(PreQuantHfConfig)
    register_quantizer(METHOD)(PreQuantHfQuantizer)

    merge_configs = AutoHfQuantizer.merge_quantization_configs
    merge_configs = getattr(merge_configs, "_without_prequant", merge_configs)

    def merge_quantization_configs(quantization_config: Any, quantization_config_from_args: Any) -> Any:
        """transformers drops the caller's config with a warning when the file has one; ours must not contradict the
        file.
        """
        method = (
            quantization_config.get("quant_method")
            if isinstance(quantization_config, dict)
            else quantization_config.quant_method
        )
        if method != METHOD:
            return merge_configs(quantization_config, quantization_config_from_args)
        stored = PreQuantHfConfig.wrap(quantization_config)
        if quantization_config_from_args is not None:
            stored.check_agrees(PreQuantHfConfig.wrap(quantization_config_from_args))
        return stored

    merge_quantization_configs._without_prequant = merge_configs  # type: ignore[attr-defined]
    AutoHfQuantizer.merge_quantization_configs = staticmethod(merge_quantization_configs)


_register()
hook_save_pretrained()
on_pretrained_models(attach, detach)
