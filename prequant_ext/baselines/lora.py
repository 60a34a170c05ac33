"""LoRA (Hu et al., 2022): a trained update of low rank beside each frozen float matrix."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant_ext.baselines.matrices import matrices_of, parameters_called, train_only
from prequant_ext.baselines.options import Options

ALPHA = 2  # lora_alpha / rank, as is usual


class LowRankLinear(nn.Module):
    """base(x) + ALPHA * (x A^T) B^T with A (rank, K) drawn uniformly and B (N, rank) zero: at first the base alone.

    ``base`` is frozen and may be of any kind, quantized too.
    """

    def __init__(self, base: nn.Module, N: int, K: int, rank: int):
        super().__init__()
        device = next(base.parameters()).device
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.empty(rank, K, device=device))
        self.up = nn.Parameter(torch.zeros(N, rank, device=device))
        if not self.down.is_meta:
            nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        update = functional.linear(functional.linear(x, self.down.to(x.dtype)), self.up.to(x.dtype))
        return self.base(x) + ALPHA * update


def prepare(model: nn.Module, options: Options) -> None:
    for site in matrices_of(model, options.config):
        model.set_submodule(site.name, LowRankLinear(model.get_submodule(site.name), *site.shape, options.rank))


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, parameters_called(model, LowRankLinear, "down", "up"))
