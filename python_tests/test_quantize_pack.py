"""quantize_pack: codes and packing in one pass, byte-identical everywhere."""

import pytest
import torch
from operands import LAYERS, assert_identical, random_matrix, random_outliers, random_weight

from prequant_ext import ops, reference


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_identical_to_reference(layer, device):
    weight = random_matrix(layer.N, layer.K, layer.dtype, device) * 0.2
    _, scale, zero_point = random_weight(layer, device)
    dims, _ = random_outliers(layer, device)
    arguments = (weight, scale, zero_point, layer.bits, dims, layer.axis)
    assert_identical(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


def test_ties_round_to_even_and_division_is_true(device):
    scale, zero_point = torch.full((1, 1), 0.1, device=device), torch.full((1, 1), 8, dtype=torch.uint8, device=device)
    steps = torch.arange(-8, 8, device=device) + 0.5
    weight = torch.cat([steps * scale.item(), steps * 0.3])[None].float()
    none = torch.zeros(0, dtype=torch.int64, device=device)
    codes = ops.unpack(ops.quantize_pack(weight, scale, zero_point, 4, none, 1), weight.shape[1], 4)
    assert codes.tolist() == ((weight / scale).round() + 8).clamp(0, 15).to(torch.uint8).tolist()


@pytest.mark.parametrize("axis", [0, 1])
def test_outlier_dims_are_worth_nothing(axis, device):
    weight = random_matrix(12, 20, torch.float32, device)
    scale, zero_point = torch.full((12, 1), 0.2, device=device), torch.full((12, 1), 5, dtype=torch.uint8, device=device)
    dims = torch.tensor([0, 3, 11], device=device)
    packed = ops.quantize_pack(weight, scale, zero_point, 4, dims, axis)
    dense = ops.dequantize(packed, scale, zero_point, 20, 4, torch.float32)
    assert (dense.index_select(axis, dims) == 0).all()
    without = ops.dequantize(ops.quantize_pack(weight, scale, zero_point, 4, dims[:0], axis), scale, zero_point, 20, 4, torch.float32)
    assert_identical(dense, without.index_fill(axis, dims, 0.0))


def test_extreme_weights_clip(device):
    weight = torch.tensor([[1e38, -1e38, 0.0]], device=device)
    scale, zero_point = torch.full((1, 1), 2.0**-126, device=device), torch.full((1, 1), 3, dtype=torch.uint8, device=device)
    packed = ops.quantize_pack(weight, scale, zero_point, 4, torch.zeros(0, dtype=torch.int64, device=device), 1)
    assert ops.unpack(packed, 3, 4).tolist() == [[15, 0, 3]]


def test_rejects(device):
    weight, dims = torch.zeros(4, 6, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    scale, zero_point = torch.ones(4, 1, device=device), torch.zeros(4, 1, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="bits must be 2 to 8, got 1"):
        ops.quantize_pack(weight, scale, zero_point, 1, dims, 1)
    with pytest.raises(RuntimeError, match="scale must be float32, got float64"):
        ops.quantize_pack(weight, scale.double(), zero_point, 4, dims, 1)
    with pytest.raises(RuntimeError, match="outlier_dims must be int64, got int32"):
        ops.quantize_pack(weight, scale, zero_point, 4, dims.int(), 1)
