"""PreQuant-alpha (Table 2): no outlier dimensions; the scale of each hidden_size consecutive weights of a row is
trained instead.
"""

from torch import nn

from prequant_ext.baselines.options import Options
from prequant_ext.baselines.prequant import quantize, trainables

__all__ = ["prepare", "trainables"]


def prepare(model: nn.Module, options: Options) -> None:
    quantize(model, options, r=0, train_scales=True)
