"""weight_stats: one order of summation on every device, so CPU and GPU make byte-identical bases."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import assert_identical, random_matrix

WEIGHTS = {  # N, K, block_size: why
    "whole matrix, several tiles": (96, 384, 96 * 384),
    "ragged last tile": (5, 1000, 5000),
    "rows": (7, 384, 384),
    "rows longer than a tile": (3, 9001, 9001),
    "groups": (6, 256, 128),
    "groups of one": (2, 3, 1),
    "one weight": (1, 1, 1),
    "odd K": (9, 33, 33),
    "one row": (1, 700, 700),
    "a tile but one": (1, 4095, 4095),
    "one tile": (1, 4096, 4096),
    "a tile and one": (1, 4097, 4097),
    "more tiles than lanes": (2, 67600, 2 * 67600),
    "rows of a tile and one": (3, 4097, 4097),
    "groups that 16 bytes do not divide": (40, 99, 11),
    "more groups than one round of warps": (33, 160, 32),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", WEIGHTS.values(), ids=WEIGHTS.keys())
def test_identical_to_reference(shape, dtype, device):
    N, K, block_size = shape
    weight = random_matrix(N, K, dtype, device)
    for actual, expected in zip(
        ops.weight_stats(weight, block_size), reference.weight_stats(weight, block_size), strict=True
    ):
        assert_identical(actual, expected)


def assert_same_bits(actual, expected):
    """All but NaN: which one it is says nothing."""
    for one, other in zip(actual, expected, strict=True):
        assert_identical(one, other)
        assert torch.equal(one.isnan() | (one.signbit() == other.signbit()), torch.ones_like(one, dtype=torch.bool))


def cpu_stats(weight, block_size):
    """Those of the CPU kernel, on the device of the weight."""
    return [statistic.to(weight.device) for statistic in torch.ops.prequant.weight_stats(weight.cpu(), block_size)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("blocks", ["tensor", "rows", "groups"])
def test_same_bits_as_the_cpu_kernel(blocks, dtype, device):
    weight = random_matrix(12, 4200, dtype, device) * torch.logspace(-3, 3, 12, device=device)[:, None].to(dtype)
    weight[:, 7::5] = 0.0
    weight[3:, 9::5] = -0.0
    weight[5] = weight[5].abs()
    weight[5, 4100], weight[5, 33] = 0.0, -0.0  # the smallest of their row, and equal: the first one's sign stays
    block_size = {"tensor": weight.numel(), "rows": 4200, "groups": 60}[blocks]
    assert_same_bits(ops.weight_stats(weight, block_size), cpu_stats(weight, block_size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 4096, 4096), (3, 5000, 15000), (4, 4608, 4608), (6, 96, 48)], ids=str)
def test_weight_that_begins_inside_16_bytes(shape, dtype, device):
    N, K, block_size = shape
    weight = random_matrix(1, N * K + 1, dtype, device)[0, 1:].view(N, K)
    assert_same_bits(ops.weight_stats(weight, block_size), cpu_stats(weight, block_size))


def test_mean_far_from_zero_keeps_its_deviation(device):
    weight = 1000 + random_matrix(64, 300, torch.float32, device)
    mean, std, *_ = ops.weight_stats(weight, weight.numel())
    assert abs(std.item() / weight.double().std(correction=0).item() - 1) < 1e-12
    assert abs(mean.item() - weight.double().mean().item()) < 1e-9


def test_mean_of_1000_sigma_in_rows_and_groups(device):
    weight = 1000 + random_matrix(3, 4200, torch.float32, device)
    for block_size in (4200, 300):
        mean, std, *_ = ops.weight_stats(weight, block_size)
        blocks = weight.double().view(3, -1, block_size)
        assert ((std / blocks.std(-1, correction=0) - 1).abs() < 1e-12).all()
        assert ((mean - blocks.mean(-1)).abs() < 1e-9).all()


@pytest.mark.parametrize("size", [1, 31, 4095, 4096, 4097, 50 * 123])
def test_constant_has_no_deviation(size, device):
    mean, std, low, high = ops.weight_stats(torch.full((1, size), 0.1, device=device), size)
    assert std.item() == 0 and mean.item() == low.item() == high.item() == torch.tensor(0.1).double().item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("position", [0, 4095, 4096, 9999])
def test_reports_non_finite(bad, position, device):
    weight = random_matrix(100, 100, torch.float32, device)
    weight.view(-1)[position] = bad
    *_, low, high = ops.weight_stats(weight, weight.numel())
    assert not (torch.isfinite(low) & torch.isfinite(high)).item()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("block_size", [4200, 60])
def test_non_finite_stays_in_its_block(bad, block_size, device):
    weight = random_matrix(4, 4200, torch.float16, device)
    weight[1, 77], weight[2, 4199] = bad, bad
    blocks = weight.view(4, -1, block_size)
    *_, low, high = ops.weight_stats(weight, block_size)
    assert torch.equal(torch.isfinite(low) & torch.isfinite(high), torch.isfinite(blocks).all(-1))
    for actual, expected in zip(ops.weight_stats(weight, block_size), cpu_stats(weight, block_size), strict=True):
        assert_identical(actual, expected)


def test_non_contiguous_weight(device):
    weight = random_matrix(40, 60, torch.float32, device).T
    for actual, expected in zip(
        ops.weight_stats(weight, 40), reference.weight_stats(weight.contiguous(), 40), strict=True
    ):
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
