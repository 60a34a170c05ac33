"""outlier_counts: weights beyond k sigma, counted for each column and each row."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import assert_identical, random_matrix


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 77), (130, 3), (96, 384), (515, 70), (33, 257)], ids=str)
def test_identical_to_reference(shape, dtype, threshold, device):
    weight = random_matrix(*shape, dtype, device)
    mean, std, *_ = reference.weight_stats(weight, weight.numel())
    for actual, expected in zip(
        ops.outlier_counts(weight, mean, std, threshold),
        reference.outlier_counts(weight, mean, std, threshold),
        strict=True,
    ):
        assert_identical(actual, expected)


def one(value, device):
    return torch.full((1, 1), value, dtype=torch.float64, device=device)


def from_cpu(weight, mean, std, threshold):
    """What the CPU kernel counts, on the device of the weight."""
    return [
        result.to(weight.device)
        for result in torch.ops.prequant.outlier_counts(weight.cpu(), mean.cpu(), std.cpu(), threshold)
    ]


# Rows of a batch, of a band and of the next one; columns of a segment (128 floats, 256 halves) and of the next one; no
# row of 16 bytes.
@pytest.mark.parametrize(
    "shape", [(7, 128), (8, 132), (9, 256), (31, 264), (32, 8), (33, 129), (64, 12), (65, 4), (1100, 16)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_every_edge_of_a_tile(shape, dtype, device):
    weight = random_matrix(*shape, dtype, device)
    weight[0, 0], weight[-1, -1], weight[0, -1], weight[-1, 0] = 9.0, -9.0, 8.0, -8.0
    arguments = (weight, one(0.01, device), one(0.97, device), 1.5)
    for actual, expected, cpu in zip(
        ops.outlier_counts(*arguments), reference.outlier_counts(*arguments), from_cpu(*arguments), strict=True
    ):
        assert_identical(actual, expected)
        assert_identical(actual, cpu)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(4, 16384), (2100, 136)], ids=str)
def test_long_bands_and_many_segments(shape, device):
    weight = random_matrix(*shape, torch.float16, device)
    arguments = (weight, one(0.0, device), one(1.0, device), 2.5)
    for actual, cpu in zip(ops.outlier_counts(*arguments), from_cpu(*arguments), strict=True):
        assert_identical(actual, cpu)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_weight_that_begins_inside_16_bytes(dtype, device):
    weight = random_matrix(1, 20 * 64 + 1, dtype, device)[0, 1:].view(20, 64)
    arguments = (weight, one(0.0, device), one(1.0, device), 1.0)
    for actual, cpu in zip(ops.outlier_counts(*arguments), from_cpu(*arguments), strict=True):
        assert_identical(actual, cpu)


def test_mean_of_1000_sigma(device):
    weight = 1000 + random_matrix(40, 96, torch.float32, device)
    mean, std, *_ = reference.weight_stats(weight, weight.numel())
    for actual, cpu in zip(ops.outlier_counts(weight, mean, std, 2.0), from_cpu(weight, mean, std, 2.0), strict=True):
        assert_identical(actual, cpu)
        assert actual.any()


def test_limit_itself_is_no_outlier(device):
    above = torch.nextafter(torch.tensor(3.0), torch.tensor(4.0)).item()
    weight = torch.tensor([[3.0, above, -3.0, -above]], device=device)
    counts, *_ = ops.outlier_counts(weight, one(0.0, device), one(1.0, device), 3.0)
    assert counts.tolist() == [0, 1, 0, 1]


def test_counts_what_the_eye_counts(device):
    weight = torch.zeros(4, 5, device=device)
    weight[1, 2], weight[3, 2], weight[3, 0] = 10.0, -10.0, 7.0
    mean, std = (
        torch.zeros(1, 1, dtype=torch.float64, device=device),
        torch.ones(1, 1, dtype=torch.float64, device=device),
    )
    column_counts, column_energy, row_counts, row_energy = ops.outlier_counts(weight, mean, std, 6.0)
    assert column_counts.tolist() == [1, 0, 2, 0, 0] and row_counts.tolist() == [0, 1, 0, 2]
    assert column_energy.tolist() == [2**20, 0, 2 * 16 * 2**20, 0, 0] and row_energy.tolist() == [
        0,
        16 * 2**20,
        0,
        17 * 2**20,
    ]


def test_energy_saturates_instead_of_wrapping(device):
    weight = torch.tensor([[1e30, 1e30], [0.0, 1e6]], device=device)
    mean, std = (
        torch.zeros(1, 1, dtype=torch.float64, device=device),
        torch.ones(1, 1, dtype=torch.float64, device=device),
    )
    _, column_energy, _, row_energy = ops.outlier_counts(weight, mean, std, 1.0)
    top = torch.iinfo(torch.int64).max
    assert column_energy.tolist() == [top, top] and row_energy[0].item() == top and 0 < row_energy[1].item() < top


def test_sums_saturate_where_no_term_does(device):
    weight = torch.full((40, 6), 2.5e6, device=device)  # 2^20 * 2.5e6^2 = 0.71 * 2^63: two of them are too many
    weight[:, 1] = 0.0
    weight[3:, 2] = 0.0
    weight[1:, 3] = 0.0
    arguments = (weight, one(0.0, device), one(1.0, device), 1e-9)
    results = ops.outlier_counts(*arguments)
    top = torch.iinfo(torch.int64).max
    assert results[1].tolist()[:3] == [top, 0, top] and 0 < results[1][3].item() < top and (results[3] == top).all()
    for actual, expected, cpu in zip(results, reference.outlier_counts(*arguments), from_cpu(*arguments), strict=True):
        assert_identical(actual, expected)
        assert_identical(actual, cpu)


def test_infinite_weight_saturates_and_nan_counts_nothing(device):
    weight = torch.zeros(5, 9, device=device)
    weight[1, 2], weight[3, 4], weight[4, 4] = float("inf"), float("-inf"), float("nan")
    column_counts, column_energy, row_counts, row_energy = ops.outlier_counts(
        weight, one(0.0, device), one(1.0, device), 3.0
    )
    top = torch.iinfo(torch.int64).max
    assert column_counts.tolist() == [0, 0, 1, 0, 1, 0, 0, 0, 0] and row_counts.tolist() == [0, 1, 0, 1, 0]
    assert column_energy.tolist() == [0, 0, top, 0, top, 0, 0, 0, 0] and row_energy.tolist() == [0, top, 0, top, 0]


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)], ids=str)
def test_empty_matrix(shape, device):
    results = ops.outlier_counts(torch.zeros(shape, device=device), one(0.0, device), one(1.0, device), 3.0)
    assert [result.tolist() for result in results] == [[0] * shape[1]] * 2 + [[0] * shape[0]] * 2


def test_constant_matrix_has_no_outliers(device):
    weight = torch.full((3, 4), 2.0, device=device)
    mean, std, *_ = ops.weight_stats(weight, 12)
    assert all(not result.any() for result in ops.outlier_counts(weight, mean, std, 3.0))


def test_rejects_bad_statistics(device):
    weight = torch.zeros(2, 3, device=device)
    one = torch.ones(1, 1, dtype=torch.float64, device=device)
    with pytest.raises(RuntimeError, match="mean must be float64, got float32"):
        ops.outlier_counts(weight, one.float(), one, 3.0)
    with pytest.raises(RuntimeError, match=r"std must have shape \(1, 1\), got \(2, 1\)"):
        ops.outlier_counts(weight, one, one.expand(2, 1), 3.0)
    with pytest.raises(RuntimeError, match="threshold must be positive, got -1"):
        ops.outlier_counts(weight, one, one, -1.0)
