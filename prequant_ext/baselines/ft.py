"""Full fine-tuning: every weight, in 32 bits."""

from torch import nn

from prequant_ext.baselines.matrices import train_only
from prequant_ext.baselines.options import Options


def prepare(model: nn.Module, options: Options) -> None:
    """Nothing to do."""


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, [name for name, _ in model.named_parameters()])
