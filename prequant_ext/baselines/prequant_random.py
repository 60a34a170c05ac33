"""PreQuant on as many dimensions drawn at random (Figure 3): what the selection by outliers is worth. The config's seed
draws them.
"""

from torch import nn

from prequant_ext.baselines.options import Options
from prequant_ext.baselines.prequant import quantize, trainables

__all__ = ["prepare", "trainables"]


def prepare(model: nn.Module, options: Options) -> None:
    quantize(model, options, selector="random")
