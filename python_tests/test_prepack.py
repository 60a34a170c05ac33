"""prepack and unprepack: canonical storage to the kernels' panels and back, nothing lost."""

import pytest
import torch
from operands import assert_identical

from prequant_ext import ops, reference


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shape", [(1, 1), (16, 8), (17, 9), (33, 100), (384, 1536), (5, 31)], ids=str)
def test_identical_to_reference_and_back(shape, bits, device):
    N, K = shape
    packed = reference.pack(torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8), bits).to(device)
    prepacked = ops.prepack(packed, K, bits)
    assert_identical(prepacked, reference.prepack(packed, K, bits))
    assert_identical(ops.unprepack(prepacked, N, K, bits), packed)
    assert_identical(reference.unprepack(prepacked, N, K, bits), packed)


def test_a_panel_word_is_four_bytes_of_sixteen_rows(device):
    packed = torch.arange(16 * 8, dtype=torch.uint8, device=device).view(16, 8)
    prepacked = ops.prepack(packed, 16, 4)
    assert prepacked.shape == (1, 2, 64)
    assert prepacked[0, 1].view(16, 4)[3].tolist() == packed[3, 4:8].tolist()


def test_rejects(device):
    prepacked = torch.zeros(1, 2, 64, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match=r"prepacked must have shape \(2, 2, 64\) for N = 17, K = 16"):
        ops.unprepack(prepacked, 17, 16, 4)
    with pytest.raises(RuntimeError, match="prepack has K = 20 but weight_packed packs 16"):
        ops.prepack(torch.zeros(4, 8, dtype=torch.uint8, device=device), 20, 4)
