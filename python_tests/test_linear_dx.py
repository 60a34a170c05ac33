"""linear_dx: the input's gradient, from the same packed words."""

import pytest
import torch
from operands import LAYERS, assert_as_accurate, random_matrix, random_outliers, random_weight

from prequant_ext import ops, reference


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, device):
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    weight, outliers = random_weight(layer, device), random_outliers(layer, device)
    rest = (*weight, *outliers, layer.K, layer.bits, layer.axis)
    dense = reference.scatter_outlier_(reference.dequantize(*weight, layer.K, layer.bits, torch.float32), *outliers, layer.axis, True)
    dx = ops.linear_dx(grad_y, *rest)
    assert dx.dtype == layer.dtype
    assert_as_accurate(dx, grad_y @ dense.to(layer.dtype), reference.linear_dx(grad_y.double(), *rest))


def test_small_scales_do_not_underflow(device):
    """Row scales sit on the reduction index: folded into a half-precision dy they would vanish."""
    layer = LAYERS["float16"]
    weight_packed, _, zero_point = random_weight(layer, device)
    scale = torch.full((1, 1), 1e-6, device=device)
    grad_y = random_matrix(layer.M, layer.N, torch.float16, device) * 1e-2
    rest = (weight_packed, scale, zero_point, *(random_outliers(layer, device)), layer.K, layer.bits, layer.axis)
    exact = reference.linear_dx(grad_y.double(), *rest)
    assert_as_accurate(ops.linear_dx(grad_y, *rest), reference.linear_dx(grad_y, *rest), exact)


def test_rejects(device):
    layer = LAYERS["one token"]
    weight, outliers = random_weight(layer, device), random_outliers(layer, device)
    with pytest.raises(RuntimeError, match="grad_y has N = 31 but weight_packed has 32 rows"):
        ops.linear_dx(torch.zeros(2, 31, device=device), *weight, *outliers, layer.K, 4, 1)
    with pytest.raises(RuntimeError, match="linear_dx has K = 70 but weight_packed packs 64"):
        ops.linear_dx(torch.zeros(2, 32, device=device), *weight, *outliers, 70, 4, 1)
