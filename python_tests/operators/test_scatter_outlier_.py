"""scatter_outlier_: outlier weights into a dense matrix, in place."""

import pytest
import torch

from prequant_ext import ops, reference
from support.emulated_kernels import emulated_kernels
from support.operands import LAYERS, assert_identical, random_matrix, random_outliers


@pytest.mark.parametrize("accumulate", [False, True], ids=["assign", "add"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_identical_to_reference(layer, accumulate, device):
    dense = random_matrix(layer.N, layer.K, layer.dtype, device)
    outliers = random_outliers(layer, device)
    expected = reference.scatter_outlier_(dense.clone(), *outliers, layer.axis, accumulate)
    assert_identical(ops.scatter_outlier_(dense, *outliers, layer.axis, accumulate), expected)
    assert_identical(dense, expected)


@pytest.mark.parametrize("accumulate", [False, True], ids=["assign", "add"])
@pytest.mark.parametrize("axis", [1, 0], ids=["columns", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dims_out_of_range_are_skipped(dtype, axis, accumulate):
    """On a GPU the host function does not read them back."""
    N, K = 6, 20
    length = K if axis == 1 else N
    dims = torch.tensor([-(2**40), -1, 0, length - 1, length, 2**40])
    values = (
        random_matrix(N, len(dims), torch.float32, "cpu")
        if axis == 1
        else random_matrix(len(dims), K, torch.float32, "cpu")
    )
    dense = random_matrix(N, K, dtype, "cpu", seed=3)
    inside = (dims >= 0) & (dims < length)
    expected = reference.scatter_outlier_(
        dense.clone(), dims[inside], values[:, inside] if axis == 1 else values[inside], axis, accumulate
    )
    code = [torch.float32, torch.float16, torch.bfloat16].index(dtype)  # in the order of Dtype in kernels.h
    emulated_kernels().scatter_outlier(
        dense.data_ptr(), code, N, K, dims.data_ptr(), values.data_ptr(), len(dims), axis, accumulate
    )
    assert_identical(dense, expected)


@pytest.mark.parametrize("call", [ops.scatter_outlier_, torch.ops.prequant.scatter_outlier_], ids=["ops", "torch.ops"])
def test_bumps_the_version_counter(call, device):
    dense = torch.zeros(4, 6, device=device)
    before = dense._version
    call(dense, torch.tensor([1], device=device), torch.ones(4, 1, device=device), 1, False)
    assert dense._version > before


def test_rejects(device):
    dense, dims, values = (
        torch.zeros(4, 6, device=device),
        torch.tensor([1, 9], device=device),
        torch.ones(4, 2, device=device),
    )
    if device == "cpu":
        with pytest.raises(RuntimeError, match="outlier_dims must be 0 to 5, got 9 at position 1"):
            ops.scatter_outlier_(dense, dims, values, 1, False)
    dims = torch.tensor([1, 2], device=device)
    with pytest.raises(RuntimeError, match=r"outlier_weight must have shape \(2, 6\), got \(4, 2\)"):
        ops.scatter_outlier_(dense, dims, values, 0, False)
    with pytest.raises(RuntimeError, match=r"axis must be 1 \(input columns\) or 0 \(output rows\), got 2"):
        ops.scatter_outlier_(dense, dims, values, 2, False)
    with pytest.raises(RuntimeError, match="dense must be contiguous"):
        ops.scatter_outlier_(torch.zeros(6, 4, device=device).T, dims, values, 1, False)
