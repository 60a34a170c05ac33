"""weight_stats: one order of summation on every device, so CPU and GPU make byte-identical bases."""

import pytest
import torch
from operands import assert_identical, random_matrix

from prequant_ext import ops, reference

WEIGHTS = {  # N, K, block_size: why
    "whole matrix, several tiles": (96, 384, 96 * 384),
    "ragged last tile": (5, 1000, 5000),
    "rows": (7, 384, 384),
    "rows longer than a tile": (3, 9001, 9001),
    "groups": (6, 256, 128),
    "groups of one": (2, 3, 1),
    "one weight": (1, 1, 1),
    "odd K": (9, 33, 33),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_identical_to_reference(shape, dtype, device):
    N, K, block_size = shape
    weight = random_matrix(N, K, dtype, device)
    for actual, expected in zip(ops.weight_stats(weight, block_size), reference.weight_stats(weight, block_size), strict=True):
        assert_identical(actual, expected)


def test_mean_far_from_zero_keeps_its_deviation(device):
    weight = 1000 + random_matrix(64, 300, torch.float32, device)
    mean, std, *_ = ops.weight_stats(weight, weight.numel())
    assert abs(std.item() / weight.double().std(correction=0).item() - 1) < 1e-12
    assert abs(mean.item() - weight.double().mean().item()) < 1e-9


def test_constant_has_no_deviation(device):
    mean, std, low, high = ops.weight_stats(torch.full((50, 123), 0.1, device=device), 50 * 123)
    assert std.item() == 0 and mean.item() == low.item() == high.item() == torch.tensor(0.1).double().item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 4095, 4096, 9999])
def test_reports_non_finite(bad, position, device):
    weight = random_matrix(100, 100, torch.float32, device)
    weight.view(-1)[position] = bad
    *_, low, high = ops.weight_stats(weight, weight.numel())
    assert not (torch.isfinite(low) & torch.isfinite(high)).item()


def test_non_contiguous_weight(device):
    weight = random_matrix(40, 60, torch.float32, device).T
    for actual, expected in zip(ops.weight_stats(weight, 40), reference.weight_stats(weight.contiguous(), 40), strict=True):
        assert_identical(actual, expected)


@pytest.mark.parametrize(
    ("weight", "block_size", "message"),
    [
        (torch.zeros(2, 6), 4, r"block_size must be N \* K = 12 or divide K = 6, got 4"),
        (torch.zeros(2, 6, dtype=torch.float64), 6, "weight must be float32, float16 or bfloat16, got float64"),
        (torch.zeros(6), 6, r"weight must have 2 dimensions, got shape \(6\)"),
        (torch.zeros(0, 6), 6, "weight is empty"),
    ],
)
def test_rejects(weight, block_size, message, device):
    with pytest.raises(RuntimeError, match=message):
        ops.weight_stats(weight.to(device), block_size)
