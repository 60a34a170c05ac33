"""scale_grad: the gradient of PreQuant-alpha's scales, tile by tile."""

import pytest
import torch
from operands import LAYERS, assert_as_accurate, random_matrix, random_weight

from prequant_ext import ops, reference


@pytest.mark.parametrize("quantized", [True, False], ids=["codes", "float"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, quantized, device):
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    weight_packed, _, zero_point = random_weight(layer, device)
    x = random_matrix(layer.M, layer.K, layer.dtype, device, seed=5)
    scale = x_zero_point = None
    if quantized:
        x, scale, x_zero_point, _ = reference.quantize_activations(x, True, 0)
    arguments = (x, scale, x_zero_point, weight_packed, zero_point, layer.bits)
    gradient = ops.scale_grad(grad_y, *arguments)
    assert_as_accurate(gradient, reference.scale_grad(grad_y, *arguments), reference.scale_grad(grad_y.double(), *arguments))


def test_agrees_with_autograd_through_the_weight(device):
    layer = LAYERS["groups of 32"]
    weight_packed, scale, zero_point = random_weight(layer, device)
    x, grad_y = random_matrix(layer.M, layer.K, torch.float32, device), random_matrix(layer.M, layer.N, torch.float32, device, seed=4)
    leaf = scale.double().requires_grad_()
    steps = (reference.unpack(weight_packed, layer.K, 4).double().unflatten(1, (leaf.shape[1], -1)) - zero_point.double().unsqueeze(-1)) * leaf.unsqueeze(-1)
    (x.double() @ steps.flatten(1).T).backward(grad_y.double())
    assert_as_accurate(ops.scale_grad(grad_y, x, None, None, weight_packed, zero_point, 4), leaf.grad.float(), leaf.grad)


def test_rejects(device):
    layer = LAYERS["one token"]
    weight_packed, _, zero_point = random_weight(layer, device)
    with pytest.raises(RuntimeError, match="x has K = 60 but weight_packed packs 64"):
        ops.scale_grad(torch.zeros(2, 32, device=device), torch.zeros(2, 60, device=device), None, None, weight_packed, zero_point, 4)
    with pytest.raises(RuntimeError, match="grad_y has N = 30 but weight_packed has 32 rows"):
        ops.scale_grad(torch.zeros(2, 30, device=device), torch.zeros(2, 64, device=device), None, None, weight_packed, zero_point, 4)
