"""outlier_counts: weights beyond k sigma, counted for each column and each row."""

import pytest
import torch
from operands import assert_identical, random_matrix

from prequant_ext import ops, reference


@pytest.mark.parametrize("threshold", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (1, 77), (130, 3), (96, 384), (515, 70)], ids=str)
def test_identical_to_reference(shape, dtype, threshold, device):
    weight = random_matrix(*shape, dtype, device)
    mean, std, *_ = reference.weight_stats(weight, weight.numel())
    for actual, expected in zip(ops.outlier_counts(weight, mean, std, threshold), reference.outlier_counts(weight, mean, std, threshold), strict=True):
        assert_identical(actual, expected)


def test_counts_what_the_eye_counts(device):
    weight = torch.zeros(4, 5, device=device)
    weight[1, 2], weight[3, 2], weight[3, 0] = 10.0, -10.0, 7.0
    mean, std = torch.zeros(1, 1, dtype=torch.float64, device=device), torch.ones(1, 1, dtype=torch.float64, device=device)
    column_counts, column_energy, row_counts, row_energy = ops.outlier_counts(weight, mean, std, 6.0)
    assert column_counts.tolist() == [1, 0, 2, 0, 0] and row_counts.tolist() == [0, 1, 0, 2]
    assert column_energy.tolist() == [2**20, 0, 2 * 16 * 2**20, 0, 0] and row_energy.tolist() == [0, 16 * 2**20, 0, 17 * 2**20]


def test_energy_saturates_instead_of_wrapping(device):
    weight = torch.tensor([[1e30, 1e30], [0.0, 1e6]], device=device)
    mean, std = torch.zeros(1, 1, dtype=torch.float64, device=device), torch.ones(1, 1, dtype=torch.float64, device=device)
    _, column_energy, _, row_energy = ops.outlier_counts(weight, mean, std, 1.0)
    top = torch.iinfo(torch.int64).max
    assert column_energy.tolist() == [top, top] and row_energy[0].item() == top and 0 < row_energy[1].item() < top


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
