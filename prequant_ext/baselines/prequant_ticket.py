"""PreQuant on the dimensions that fine-tuning moves most (Figure 3; the lottery tickets of Gong et al., 2022): they are
found by a full fine-tuning first, whose loss has the L1 distance to the pre-trained weights added, so that only few of
them move.
"""

import torch
from torch import Tensor, nn

from prequant_ext.baselines.matrices import matrices_of
from prequant_ext.baselines.options import Options
from prequant_ext.baselines.prequant import quantize, trainables
from prequant_ext.config import PreQuantConfig
from prequant_ext.linear import quantized_linears
from prequant_ext.outliers import jaccard

__all__ = ["L1Distance", "overlap", "prepare", "trainables"]


class L1Distance:
    """The penalty of the first run, ``strength * sum |W - W0|`` over the matrices that will be quantized; W0 are the
    weights at hand when this is made.
    """

    def __init__(self, model: nn.Module, config: PreQuantConfig, strength: float):
        if strength < 0:
            raise ValueError(f"strength must be at least 0, got {strength}")
        self.strength = strength
        weights = [model.get_parameter(f"{site.name}.weight") for site in matrices_of(model, config)]
        self.pairs = [(weight, weight.detach().clone()) for weight in weights]

    def __call__(self) -> Tensor:
        return self.strength * torch.stack([(weight - start).abs().sum() for weight, start in self.pairs]).sum()


def prepare(model: nn.Module, options: Options) -> None:
    """Raises ValueError without ``options.tuned``, the outcome of the first run."""
    if options.tuned is None:
        raise ValueError(
            "tuned must be the weights after the L1-distance run, got None: prequant_ticket ranks dimensions by how "
            "far they moved"
        )
    quantize(model, options, selector="ticket")


def overlap(model: nn.Module, other: nn.Module) -> dict[str, float]:
    """Matrix name -> Jaccard overlap of the dimensions that two quantized models selected in it."""
    dims, others = _outlier_dims(model), _outlier_dims(other)
    if dims.keys() != others.keys():
        raise ValueError(
            f"the two models must have the same quantized matrices, got {len(dims)} and {len(others)} that differ in "
            "their names"
        )
    return {name: jaccard(dims[name], others[name]) for name in dims}


def _outlier_dims(model: nn.Module) -> dict[str, Tensor]:
    return {name: layer.outlier_dims for name, layer in quantized_linears(model)}
