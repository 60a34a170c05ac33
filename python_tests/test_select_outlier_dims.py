"""select_outlier_dims: top r by count, then energy, then the lower index; never a matter of chance."""

import pytest
import torch
from operands import assert_identical

from prequant_ext import ops, reference


@pytest.mark.parametrize("r", [0, 1, 5, 100, 384])
def test_identical_to_reference_with_many_ties(r, device):
    generator = torch.Generator().manual_seed(r)
    counts = torch.randint(0, 4, (384,), generator=generator).to(device)
    energy = torch.randint(0, 3, (384,), generator=generator).to(device)
    assert_identical(ops.select_outlier_dims(counts, energy, r), reference.select_outlier_dims(counts, energy, r))


def test_order_of_the_keys(device):
    counts, energy = torch.tensor([1, 2, 2, 0, 2], device=device), torch.tensor([9, 5, 7, 99, 5], device=device)
    chosen = [ops.select_outlier_dims(counts, energy, r).tolist() for r in range(6)]
    assert chosen == [[], [2], [1, 2], [1, 2, 4], [0, 1, 2, 4], [0, 1, 2, 3, 4]]


def test_rejects(device):
    counts = torch.zeros(4, dtype=torch.int64, device=device)
    with pytest.raises(RuntimeError, match="r must be 0 to 4, the number of dimensions, got 5"):
        ops.select_outlier_dims(counts, counts, 5)
    with pytest.raises(RuntimeError, match="counts must be int64, got int32"):
        ops.select_outlier_dims(counts.int(), counts, 1)
    with pytest.raises(RuntimeError, match=r"energy must have shape \(4\), got \(3\)"):
        ops.select_outlier_dims(counts, counts[:3], 1)
