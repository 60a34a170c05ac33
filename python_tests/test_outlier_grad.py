"""outlier_grad: the gradient of the r trained dimensions, and nothing of the frozen ones."""

import pytest
import torch
from operands import LAYERS, assert_as_accurate, assert_identical, random_matrix, random_outliers

from prequant_ext import ops, reference


@pytest.mark.parametrize("kind", ["codes per token", "codes per tensor", "float"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, kind, device):
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    dims, _ = random_outliers(layer, device)
    x = random_matrix(layer.M, layer.K, layer.dtype, device, seed=5)
    scale = zero_point = None
    if kind != "float":
        x, scale, zero_point, _ = reference.quantize_activations(x, kind == "codes per token", 0)
    if layer.axis == 1:
        x = x[:, dims]
    arguments = (x, scale, zero_point, dims, layer.axis)
    gradient = ops.outlier_grad(grad_y, *arguments)
    assert gradient.dtype == torch.float32
    assert_as_accurate(gradient, reference.outlier_grad(grad_y, *arguments), reference.outlier_grad(grad_y.double(), *arguments))


@pytest.mark.parametrize("axis", [0, 1])
def test_bits_do_not_depend_on_the_thread_count(axis):
    grad_y, dims = random_matrix(1000, 60, torch.float32, "cpu"), torch.arange(5)
    x = random_matrix(1000, 5 if axis == 1 else 90, torch.float32, "cpu", seed=5)
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(ops.outlier_grad(grad_y, x, None, None, dims, axis))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert_identical(result, results[0])


def test_rejects(device):
    grad_y, dims = torch.zeros(4, 6, device=device), torch.tensor([0, 2], device=device)
    with pytest.raises(RuntimeError, match="x has M = 5 rows but grad_y has 4"):
        ops.outlier_grad(grad_y, torch.zeros(5, 2, device=device), None, None, dims, 1)
    with pytest.raises(RuntimeError, match="x must hold the r = 2 outlier columns, got 3 columns"):
        ops.outlier_grad(grad_y, torch.zeros(4, 3, device=device), None, None, dims, 1)
    with pytest.raises(RuntimeError, match="x_scale and x_zero_point must be given together"):
        ops.outlier_grad(grad_y, torch.zeros(4, 2, device=device), torch.ones(1, 1, device=device), None, dims, 1)
