"""LoRA on the quantized base (after QLoRA, Dettmers et al., 2023): PreQuant's own codes without outlier dimensions, and
an update of low rank beside them.

Merging the update would make the base float again, which is why the paper leaves this rival out; unmerged, as here, the
base stays in its codes.
"""

import dataclasses

from torch import nn

from prequant_ext.baselines.lora import LowRankLinear, trainables
from prequant_ext.baselines.options import Options
from prequant_ext.linear import quantized_linears
from prequant_ext.model import quantize_model

__all__ = ["prepare", "trainables"]


def prepare(model: nn.Module, options: Options) -> None:
    quantize_model(model, dataclasses.replace(options.config, r=0))
    for name, layer in list(quantized_linears(model)):
        model.set_submodule(name, LowRankLinear(layer, layer.out_features, layer.in_features, options.rank))
