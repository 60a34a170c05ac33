"""quantize_activations: dynamic 8-bit codes, exact to the bit on every device."""

import pytest
import torch

from prequant_ext import ops, reference
from support.emulated_kernels import emulated_kernels
from support.operands import assert_identical, random_matrix

CASES = {  # M, K, group_size
    "one token": (1, 64, 0),
    "ragged": (7, 131, 0),
    "groups": (5, 96, 32),
    "groups of one": (3, 4, 1),
    "minilm": (64, 384, 0),
    "no tokens": (0, 8, 0),
    "no columns": (3, 0, 0),
    "a warp's row, the ninth begins a block": (9, 512, 128),
    "a warp's row of halves": (2, 1024, 64),
    "more than a warp holds": (3, 1032, 0),
    "128 threads' row, groups of three vectors": (2, 2040, 24),
    "512 threads' row, groups that vectors straddle": (1, 4104, 12),
    "512 threads' row of halves": (1, 16384, 4096),
    "longer than any tile": (2, 16392, 0),
    "longer than any tile, group after group": (1, 16640, 128),
    "single values, more than a warp holds": (3, 515, 5),
    "single values, longer than a tile": (2, 8197, 7),
}


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_identical_to_reference(case, dtype, per_token, device):
    M, K, group_size = case
    x = random_matrix(M, K, dtype, device) * 3 + 0.5
    for actual, expected in zip(
        ops.quantize_activations(x, per_token, group_size),
        reference.quantize_activations(x, per_token, group_size),
        strict=True,
    ):
        assert_identical(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_off_alignment(dtype, device):
    x = random_matrix(1, 5 * 96 + 1, dtype, device).flatten()[1:].view(5, 96)
    for actual, expected in zip(
        ops.quantize_activations(x, True, 32), reference.quantize_activations(x, True, 32), strict=True
    ):
        assert_identical(actual, expected)


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "tensor"])
def test_hard_rows(per_token, device):
    """All zero, tiny, positive only, negative only, huge, one outlier, and rows with NaN and Inf."""
    normal = random_matrix(1, 40, torch.float32, device)
    rows = [
        torch.zeros_like(normal),
        normal * 1e-40,
        normal.abs() + 1,
        -normal.abs() - 1,
        normal * 1e38,
        normal.index_fill(1, torch.tensor([3], device=device), 1000.0),
    ]
    for bad in (float("nan"), float("inf"), float("-inf")):
        rows.append(normal.index_fill(1, torch.tensor([39], device=device), bad))
    for x in [*rows, torch.cat(rows), torch.cat(rows[:6])]:
        for actual, expected in zip(
            ops.quantize_activations(x, per_token, 0), reference.quantize_activations(x, per_token, 0), strict=True
        ):
            assert_identical(actual, expected)


def test_a_row_with_nan_makes_its_own_scale_nan_only(device):
    x = random_matrix(3, 8, torch.float32, device)
    x[1, 4] = float("nan")
    codes, scale, zero_point, sums = ops.quantize_activations(x, True, 0)
    assert torch.isnan(scale).flatten().tolist() == [False, True, False]
    assert not codes[1].any() and not zero_point[1].any() and not sums[1].any()


def test_excluded_dims_leave_the_range_to_the_rest(device):
    x = random_matrix(4, 32, torch.float32, device)
    x[:, 7] = 1000.0
    dims = torch.tensor([7], device=device)
    actual = ops.quantize_activations(x, True, 0, dims)
    for result, expected in zip(actual, reference.quantize_activations(x, True, 0, dims), strict=True):
        assert_identical(result, expected)
    codes, scale, zero_point, _ = actual
    assert (codes[:, 7:8] == zero_point).all() and scale.max() < 0.1


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "tensor"])
@pytest.mark.parametrize("K", [40, 43, 1400, 16392], ids=str)
def test_excluded_dims_anywhere_in_a_row(K, per_token, device):
    x = random_matrix(3, K, torch.float16, device)
    dims = torch.tensor([0, 7, 8, 31, K - 2, K - 1], device=device)
    x[:, dims] *= 500
    for result, expected in zip(
        ops.quantize_activations(x, per_token, 0, dims),
        reference.quantize_activations(x, per_token, 0, dims),
        strict=True,
    ):
        assert_identical(result, expected)


def test_excluded_dims_out_of_range_are_skipped():
    """On a GPU the host function does not read them back."""
    M, K = 5, 72
    x = random_matrix(M, K, torch.float32, "cpu")
    dims = torch.tensor([-(2**40), -1, 3, K, K + 5, 511, 2**40])
    codes, scale = torch.empty(M, K, dtype=torch.uint8), torch.empty(M, 1)
    zero_point, sums = torch.empty(M, 1, dtype=torch.uint8), torch.empty(M, 1, dtype=torch.int32)
    results = (codes, scale, zero_point, sums)
    emulated_kernels().quantize_tokens(
        x.data_ptr(), 0, M, K, dims.data_ptr(), len(dims), *(result.data_ptr() for result in results)
    )
    for result, expected in zip(results, reference.quantize_activations(x, True, 0, torch.tensor([3])), strict=True):
        assert_identical(result, expected)


def test_error_is_half_a_step(device):
    x = random_matrix(16, 100, torch.float32, device)
    codes, scale, zero_point, sums = ops.quantize_activations(x, True, 0)
    restored = (codes.float() - zero_point.float()) * scale
    inside = codes < 255  # the top of the range, hi = 256 steps, is one code away
    assert ((restored - x).abs() <= 0.5001 * scale)[inside].all()
    assert_identical(sums.flatten(), codes.sum(1, dtype=torch.int32))


def test_rejects(device):
    with pytest.raises(RuntimeError, match=r"group_size must be 0 \(one group\) or divide K = 6, got 4"):
        ops.quantize_activations(torch.zeros(2, 6, device=device), True, 4)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        ops.quantize_activations(torch.zeros(2, 6, device=device, dtype=torch.float64), True, 0)
    with pytest.raises(RuntimeError, match=r"x must have 2 dimensions, got shape \(2, 3, 6\)"):
        ops.quantize_activations(torch.zeros(2, 3, 6, device=device), True, 0)
