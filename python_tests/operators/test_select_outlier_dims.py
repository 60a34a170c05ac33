"""select_outlier_dims: top r by count, then energy, then the lower index; never a matter of chance."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import assert_identical


@pytest.mark.parametrize("r", [0, 1, 5, 100, 384])
def test_identical_to_reference_with_many_ties(r, device):
    generator = torch.Generator().manual_seed(r)
    counts = torch.randint(0, 4, (384,), generator=generator).to(device)
    energy = torch.randint(0, 3, (384,), generator=generator).to(device)
    assert_identical(ops.select_outlier_dims(counts, energy, r), reference.select_outlier_dims(counts, energy, r))


# Around the 32 lanes, the 8 items of a warp and the 64 of a block.
@pytest.mark.parametrize("size", [1, 7, 8, 9, 31, 32, 33, 63, 64, 65, 127, 129, 1000])
def test_every_size_and_every_r(size, device):
    generator = torch.Generator().manual_seed(size)
    counts = torch.randint(0, max(2, size // 8), (size,), generator=generator).to(device)
    energy = torch.randint(0, 4, (size,), generator=generator).to(device)
    for r in sorted({0, 1, min(5, size), min(16, size), min(17, size), size // 2, size - 1, size}):
        chosen = ops.select_outlier_dims(counts, energy, r)
        assert_identical(chosen, reference.select_outlier_dims(counts, energy, r))
        assert_identical(
            chosen, torch.ops.prequant.select_outlier_dims(counts.cpu(), energy.cpu(), r).to(chosen.device)
        )


def test_all_equal_gives_the_lowest(device):
    same = torch.full((100,), 3, device=device)
    assert ops.select_outlier_dims(same, same, 67).tolist() == list(range(67))


def test_keys_of_64_bits(device):
    top, bottom = torch.iinfo(torch.int64).max, torch.iinfo(torch.int64).min
    counts = torch.tensor([2**32, 1, 2**32, -1, bottom], device=device)
    energy = torch.tensor([top - 1, top, top, 0, top], device=device)
    assert [ops.select_outlier_dims(counts, energy, r).tolist() for r in range(1, 5)] == [
        [2],
        [0, 2],
        [0, 1, 2],
        [0, 1, 2, 3],
    ]


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
