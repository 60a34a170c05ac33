"""outlier_grad: the gradient of the r trained dimensions, and nothing of the frozen ones."""

import pytest
import torch

from prequant_ext import ops, reference
from support.covering import case_id, pairwise
from support.operands import (
    BF16,
    F16,
    F32,
    LAYERS,
    Layer,
    assert_as_accurate,
    assert_identical,
    random_matrix,
    random_outliers,
)

KINDS = ["codes per token", "codes per tensor", "float"]
# A tile has 128 or 256 columns and 5 or 8 outliers, and takes 128 rows at a time; rows of 8 (16-bit floats, codes) or 4
# numbers load whole.
EDGES = pairwise(
    M=[0, 1, 3, 8, 16, 17, 63, 64, 65, 128, 200],
    r=[0, 1, 5, 16, 17],
    columns=[24, 65, 132, 256, 257],  # of dy (axis 1) or of x (axis 0), whichever is wide
    axis=[1, 0],
    kind=KINDS,
    dtype=[F32, F16, BF16],
    x_dtype=[F32, F16, BF16],
)


def check(layer: Layer, kind: str, device: str, x_dtype: torch.dtype) -> None:
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    dims, _ = random_outliers(layer, device)
    x = random_matrix(layer.M, layer.K, x_dtype, device, seed=5)
    scale = zero_point = None
    if kind != "float":
        x, scale, zero_point, _ = reference.quantize_activations(x, kind == "codes per token", 0)
    if layer.axis == 1:
        x = x[:, dims]
    arguments = (x, scale, zero_point, dims, layer.axis)
    gradient = ops.outlier_grad(grad_y, *arguments)
    assert gradient.dtype == torch.float32
    assert_as_accurate(
        gradient, reference.outlier_grad(grad_y, *arguments), reference.outlier_grad(grad_y.double(), *arguments)
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, kind, device):
    check(layer, kind, device, layer.dtype)


@pytest.mark.parametrize("case", EDGES, ids=case_id)
def test_edges_of_tiles(case, device):
    columns, other = case["columns"], 40
    N, K = (columns, other) if case["axis"] == 1 else (other, columns)
    check(
        Layer(case["M"], K, N, r=case["r"], axis=case["axis"], dtype=case["dtype"]),
        case["kind"],
        device,
        case["x_dtype"],
    )


@pytest.mark.parametrize("axis", [0, 1])
def test_two_runs_give_the_same_bits(axis, device):
    grad_y, dims = random_matrix(400, 60, F32, device), torch.arange(5, device=device)
    x = random_matrix(400, 5 if axis == 1 else 90, F32, device, seed=5)
    first = ops.outlier_grad(grad_y, x, None, None, dims, axis)
    assert_identical(ops.outlier_grad(grad_y, x, None, None, dims, axis), first)


@pytest.mark.parametrize("axis", [0, 1])
def test_a_token_of_nan_is_seen(axis, device):
    """Its scale is NaN; it reaches every number of the gradient, as it does in torch."""
    x = random_matrix(20, 32, F32, device)
    x[3, 4] = torch.nan
    codes, scale, zero_point, _ = reference.quantize_activations(x, True, 0)
    dims = torch.tensor([1, 7], device=device)
    gradient = ops.outlier_grad(
        random_matrix(20, 48, F32, device), codes[:, dims] if axis == 1 else codes, scale, zero_point, dims, axis
    )
    assert gradient.isnan().all()


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
