"""pack and unpack: the canonical format, the only one on disk."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import assert_identical

SHAPES = [(1, 1), (3, 7), (5, 64), (17, 33), (64, 768), (2, 100003), (0, 8), (4, 0)]


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_identical_to_reference_and_back(shape, bits, device):
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(bits), dtype=torch.uint8).to(
        device
    )
    packed = ops.pack(codes, bits)
    assert_identical(packed, reference.pack(codes, bits))
    assert_identical(ops.unpack(packed, shape[1], bits), codes)


def test_even_k_is_the_low_nibble_and_padding_is_zero(device):
    assert ops.pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8, device=device), 4).tolist() == [[0x21, 0x03]]
    assert ops.pack(torch.tensor([[1, 2, 3, 0, 1]], dtype=torch.uint8, device=device), 2).tolist() == [
        [0b00111001, 0b01]
    ]


def test_non_contiguous_codes(device):
    codes = torch.randint(0, 16, (9, 14), dtype=torch.uint8).to(device).T
    assert_identical(ops.pack(codes, 4), reference.pack(codes, 4))


def test_rejects(device):
    codes = torch.zeros(2, 5, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="bits must be 2 to 8, got 9"):
        ops.pack(codes, 9)
    with pytest.raises(RuntimeError, match="codes must be uint8, got int32"):
        ops.pack(codes.int(), 4)
    with pytest.raises(RuntimeError, match=r"codes must have 2 dimensions, got shape \(10\)"):
        ops.pack(codes.view(-1), 4)
    with pytest.raises(RuntimeError, match="unpack has K = 11 but weight_packed packs 10"):
        ops.unpack(codes, 11, 4)
