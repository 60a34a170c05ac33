"""PreQuant: frozen codes, made once for all tasks, and r outlier dimensions of each matrix that are trained."""

import dataclasses

from torch import nn

from prequant_ext.baselines.options import Options
from prequant_ext.bit_allocation import propose_layer_bits, sensitivity
from prequant_ext.config import PreQuantConfig
from prequant_ext.model import quantize_model, trainable_parameters


def prepare(model: nn.Module, options: Options) -> None:
    quantize(model, options)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    chosen = {id(parameter) for parameter in trainable_parameters(model)}
    return {name: parameter for name, parameter in model.named_parameters() if id(parameter) in chosen}


def quantize(model: nn.Module, options: Options, **changes: object) -> None:
    """quantize_model by the options' config, with some settings of it changed."""
    config: PreQuantConfig = dataclasses.replace(options.config, **changes)  # type: ignore[arg-type]
    if options.bits_per_weight is not None:
        proposal = propose_layer_bits(sensitivity(model, config), bits_per_weight=options.bits_per_weight)
        config = dataclasses.replace(config, layer_bits=proposal.layer_bits)
    quantize_model(model, config, tuned=options.tuned if config.selector == "ticket" else None)
