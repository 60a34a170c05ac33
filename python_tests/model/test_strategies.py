"""How each strategy chooses its range: the formulas of Eq. 1 and 2 and Section 4.2."""

import math

import pytest
import torch

from prequant_ext import config as config_module
from prequant_ext.quantize import STRATEGIES
from support.quantized_matrices import quantized, random_weight, settings_of


def blocks_of(weight: torch.Tensor, granularity: str) -> torch.Tensor:
    """(blocks, weights of a block) float64."""
    return weight.double().reshape({"tensor": (1, -1), "row": (len(weight), -1), "group": (-1, 16)}[granularity])


def test_the_table_is_what_the_config_admits():
    assert tuple(STRATEGIES) == config_module.STRATEGY_NAMES


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["outlier_aware", "row_wise", "group_wise_sigma"])
def test_sigma_strategies(strategy, bits):
    """scale = 6 sigma / 2^bits, zero_point = rint(2^(bits - 1) - mean / scale), in float64 and rounded once."""
    weight = random_weight(200, 64) * 0.04 + torch.linspace(-0.05, 0.05, 200)[:, None]
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    blocks = blocks_of(weight, STRATEGIES[strategy].granularity)
    scale = 6 * blocks.std(1, correction=0) / 2**bits
    zero_point = (2 ** (bits - 1) - blocks.mean(1) / scale).round()
    assert torch.equal(matrix.weight_scale.flatten(), scale.float())
    assert torch.equal(matrix.weight_zero_point.flatten(), zero_point.clamp(0, 2**bits - 1).to(torch.uint8))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("strategy", ["min_max", "group_wise"])
def test_range_strategies(strategy, bits):
    """scale = (max - min) / 2^bits, zero_point = rint(-min / scale)."""
    weight = random_weight(64, 64) * 0.04 + 0.01
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    blocks = blocks_of(weight, STRATEGIES[strategy].granularity)
    scale = (blocks.amax(1) - blocks.amin(1)) / 2**bits
    assert torch.equal(matrix.weight_scale.flatten(), scale.float())
    assert torch.equal(
        matrix.weight_zero_point.flatten(), (-blocks.amin(1) / scale).round().clamp(0, 2**bits - 1).to(torch.uint8)
    )


def test_alpha_is_divided_by_two_to_the_bits_as_printed():
    """At 6 sigma and 4 bits the codes reach from -3 sigma to +2.625 sigma."""
    weight = random_weight(64, 64)
    weight = weight - weight.mean()
    matrix = quantized(weight, r=0)
    sigma = weight.double().std(correction=0).item()
    scale, zero_point = matrix.weight_scale.item(), matrix.weight_zero_point.item()
    assert zero_point == 8
    assert -zero_point * scale == pytest.approx(-3 * sigma, rel=1e-6) and (15 - zero_point) * scale == pytest.approx(
        2.625 * sigma, rel=1e-6
    )


DISTRIBUTIONS = {  # each one is here for a reason
    "a real layer's shape": random_weight(300, 300),  # ranked on the histogram
    "small": random_weight(64, 64),
    "tiny": random_weight(4, 8),  # the error is ragged: each code change shows
    "shifted": random_weight(280, 280) + 0.3,
    "0 near the edge": random_weight(64, 64) - 2.5,  # narrow clip points are stretched, wide ones are not
    "far from 0": random_weight(64, 64) * 0.1 + 10,  # all are stretched
    "skewed": random_weight(64, 96).exp(),
    "skewed to the left": -random_weight(64, 96).exp(),
    # weights beyond the histogram's bins
    "heavy tails": random_weight(300, 300).exp() - random_weight(300, 300, seed=1).exp(),
    "one row of outliers": torch.cat([random_weight(511, 32), torch.full((1, 32), 100.0)]),
    "one huge weight": torch.cat(
        [random_weight(200, 1000), torch.zeros(1, 1000).index_fill_(1, torch.tensor([3]), 1e4)]
    ),
    "two bumps": torch.cat([random_weight(32, 64) * 0.1 + 1, random_weight(32, 64) * 0.1 - 1]),
    "uniform": torch.rand(64, 64, generator=torch.Generator().manual_seed(0)),
}


def dense_grid_best(weight: torch.Tensor, bits: int) -> float:
    """Least squared error over a plain grid of clip points, each one measured."""
    values, top = weight.double().flatten(), 2**bits - 1
    mean, std, low, high = (
        values.mean().item(),
        values.std(correction=0).item(),
        values.min().item(),
        values.max().item(),
    )
    best = math.inf
    steps = torch.linspace(2 * std, high - low, 1500 if weight.numel() < 10_000 else 300, dtype=torch.float64)
    for alpha in [*steps.tolist(), 6 * std]:
        bottom, ceiling = mean - alpha / 2, mean + alpha / 2
        if bottom > 0 or ceiling < 0:
            bottom = min(bottom, 0.0)
            scale = (max(ceiling, 0.0) - bottom) / 2**bits
            zero_point = round(-bottom / scale)
        else:
            scale = alpha / 2**bits
            zero_point = round(2 ** (bits - 1) - mean / scale)
        zero_point = min(max(zero_point, 0), top)
        codes = ((values / scale).round() + zero_point).clamp(0, top)
        best = min(best, ((codes - zero_point) * scale - values).square().sum().item())
    return best


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("weight", DISTRIBUTIONS.values(), ids=DISTRIBUTIONS.keys())
def test_mse_is_never_worse_than_min_max_and_as_good_as_a_dense_grid(weight, bits):
    found = quantized(weight, strategy="mse", bits=bits, r=0).squared_error
    assert found <= quantized(weight, strategy="min_max", bits=bits, r=0).squared_error
    assert found <= quantized(weight, strategy="outlier_aware", bits=bits, r=0).squared_error * 1.001
    assert found <= dense_grid_best(weight, bits) * 1.001


def test_mse_of_two_values_has_only_the_full_range():
    """For equally frequent values 2 sigma is the full range."""
    weight = torch.tensor([[-0.5, 0.5], [0.5, -0.5]])
    mse, min_max = quantized(weight, strategy="mse", r=0), quantized(weight, strategy="min_max", r=0)
    assert torch.equal(mse.weight_scale, min_max.weight_scale)
    assert mse.squared_error == min_max.squared_error
