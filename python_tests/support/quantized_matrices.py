"""Small matrices and their quantized forms, for the tests of strategies and of what every strategy promises."""

import torch

from prequant_ext.config import PreQuantConfig
from prequant_ext.quantize import STRATEGIES, QuantizedMatrix, quantize_matrix


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(
    weight: torch.Tensor, axis: str = "input", *, name: str = "encoder.query.weight", hidden_size=None, **settings
) -> QuantizedMatrix:
    return quantize_matrix(weight, PreQuantConfig(**settings), name=name, axis=axis, hidden_size=hidden_size)


def settings_of(strategy: str, **settings) -> dict:
    """Settings for a small matrix: groups of 16."""
    groups = {"group_size": 16} if STRATEGIES[strategy].granularity == "group" else {}
    return {"strategy": strategy, "r": 0} | groups | settings
