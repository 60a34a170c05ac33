"""BitFit (Ben Zaken et al., 2022): the biases of a float model, those of its LayerNorms too."""

from torch import nn

from prequant_ext.baselines.matrices import train_only
from prequant_ext.baselines.options import Options


def prepare(model: nn.Module, options: Options) -> None:
    """Raises ValueError for a model without biases, such as T5: nothing but its head would train."""
    if not _biases(model):
        raise ValueError(f"bitfit trains biases, and {type(model).__name__} has none")


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, _biases(model))


def _biases(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters() if name.split(".")[-1] == "bias"]
