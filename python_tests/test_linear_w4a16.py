"""linear_w4a16: float activations on frozen codes."""

import pytest
import torch
from operands import LAYERS, Layer, assert_as_accurate, random_matrix, random_outliers, random_weight

from prequant_ext import ops, reference


def operands(layer: Layer, device: str):
    x, bias = random_matrix(layer.M, layer.K, layer.dtype, device), random_matrix(1, layer.N, layer.dtype, device, seed=3)[0]
    return x, (*random_weight(layer, device), *random_outliers(layer, device), bias, layer.bits, layer.axis)


def plain_torch(x, weight_packed, scale, zero_point, outlier_dims, outlier_weight, bias, bits, axis):
    """The same layer the way a user without this library would write it: one dense weight in x's dtype."""
    dense = reference.dequantize(weight_packed, scale, zero_point, x.shape[1], bits, torch.float32)
    dense = reference.scatter_outlier_(dense, outlier_dims, outlier_weight, axis, True)
    return torch.nn.functional.linear(x, dense.to(x.dtype), bias.to(x.dtype))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, device):
    x, rest = operands(layer, device)
    y = ops.linear_w4a16(x, *rest)
    assert y.dtype == layer.dtype
    assert_as_accurate(y, plain_torch(x, *rest), reference.linear_w4a16(x.double(), *rest))


def test_non_contiguous_x_and_no_bias(device):
    layer = LAYERS["odd K"]
    x, rest = operands(layer, device)
    x, rest = x.T.contiguous().T, (*rest[:5], None, *rest[6:])
    assert_as_accurate(ops.linear_w4a16(x, *rest), reference.linear_w4a16(x, *rest), reference.linear_w4a16(x.double(), *rest))


@pytest.mark.parametrize("name", ["off every tile", "groups, output axis", "minilm query", "bfloat16"])
def test_gradients(name, device):
    layer = LAYERS[name]
    x, rest = operands(layer, device)
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device, seed=4)
    gradients = []
    for call, given in ((ops.linear_w4a16, x), (plain_gradient_reference, x), (reference.linear_w4a16, x.double())):
        leaves = [given.clone().requires_grad_(), rest[4].clone().requires_grad_(), rest[5].clone().requires_grad_()]
        call(leaves[0], *rest[:4], leaves[1], leaves[2], *rest[6:]).backward(grad_y.to(given.dtype))
        gradients.append([leaf.grad for leaf in leaves])
    for actual, plain, exact in zip(*gradients, strict=True):
        assert_as_accurate(actual, plain, exact)


def plain_gradient_reference(x, weight_packed, scale, zero_point, outlier_dims, outlier_weight, bias, bits, axis):
    dense = reference.dequantize(weight_packed, scale, zero_point, x.shape[1], bits, torch.float32)
    dense = dense.index_copy(axis, outlier_dims, outlier_weight)
    return torch.nn.functional.linear(x, dense.to(x.dtype), bias.to(x.dtype))


def test_rejects(device):
    layer = LAYERS["one token"]
    x, rest = operands(layer, device)
    with pytest.raises(RuntimeError, match="x has K = 66 but weight_packed packs 64"):
        ops.linear_w4a16(torch.zeros(1, 66, device=device), *rest)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        ops.linear_w4a16(x.double(), *rest)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(32\), got \(31\)"):
        ops.linear_w4a16(x, *rest[:5], rest[5][:31], *rest[6:])
    with pytest.raises(RuntimeError, match="outlier_weight must be float32, got bfloat16"):
        ops.linear_w4a16(x, *rest[:4], rest[4].bfloat16(), *rest[5:])
    with pytest.raises(RuntimeError, match=r"outlier_weight must have shape \(32, 5\), got \(5, 32\)"):
        ops.linear_w4a16(x, *rest[:4], rest[4].T, *rest[5:])
    if device == "cpu":
        with pytest.raises(RuntimeError, match="outlier_dims must be 0 to 63, got -1 at position 0"):
            ops.linear_w4a16(x, *rest[:3], rest[3] * 0 - 1, *rest[4:])
