"""linear_dx: the input's gradient, from the same packed words."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import (
    BF16,
    F16,
    F32,
    LAYERS,
    Layer,
    assert_as_accurate,
    assert_identical,
    block_bound,
    covering,
    random_matrix,
    random_outliers,
    random_weight,
    uneven_matrix,
)

COVERING = covering((F16, BF16))
# Layers that the emulated GPU, of 108 multiprocessors, makes in other ways than those above: each is here for a branch
# of csrc/cuda/dispatch.h.
LARGE = {
    "reduction cut in parts, 16 tokens": Layer(13, 40, 1224, r=17, axis=0, dtype=F16),
    "reduction cut in parts, 64 tokens": Layer(70, 34, 1032, blocks="row", dtype=BF16),
    "odd K in parts": Layer(16, 33, 1088, bits=8, dtype=F16),
    "groups of 128": Layer(20, 384, 520, blocks="group", group_size=128, dtype=F16),
    "large weight, tiles of 64 tokens": Layer(20, 2056, 512, blocks="row", dtype=F16),
    "513 tokens go the dense way": Layer(513, 64, 24, dtype=F16),
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, device):
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    weight, outliers = random_weight(layer, device), random_outliers(layer, device)
    rest = (*weight, *outliers, layer.K, layer.bits, layer.axis)
    dense = reference.scatter_outlier_(
        reference.dequantize(*weight, layer.K, layer.bits, torch.float32), *outliers, layer.axis, True
    )
    dx = ops.linear_dx(grad_y, *rest)
    assert dx.dtype == layer.dtype
    assert_as_accurate(dx, grad_y @ dense.to(layer.dtype), reference.linear_dx(grad_y.double(), *rest))


@pytest.mark.parametrize("layer", COVERING.values(), ids=COVERING.keys())
def test_every_edge(layer, device):
    test_as_accurate_as_torch(layer, device)


@pytest.mark.parametrize("layer", LARGE.values(), ids=LARGE.keys())
def test_large_layers(layer, device):
    test_as_accurate_as_torch(layer, device)


BLOCKS = covering((F32,), M=(1, 2, 5, 9, 40))


@pytest.mark.parametrize("layer", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_int16_stay_within_their_bound(layer, device):
    """in_float32=False: the CPU rounds grad_y, times its columns' scales where rows have their own, in blocks; groups
    stay in float32.
    """
    grad_y = uneven_matrix(layer.M, layer.N, layer.dtype, device)
    weight, outliers = random_weight(layer, device), random_outliers(layer, device)
    rest = (*weight, *outliers, layer.K, layer.bits, layer.axis)
    exact = reference.linear_dx(grad_y.double(), *rest)
    signed = reference.dequantize(weight[0], torch.ones_like(weight[1]), weight[2], layer.K, layer.bits, torch.float32)
    scaled = grad_y * weight[1].T if weight[1].shape[1] == 1 else grad_y * weight[1].amax()
    slack = 2e-6 * exact.abs().amax() if exact.numel() else 0
    assert ((ops.linear_dx(grad_y, *rest, False).double() - exact).abs() <= block_bound(scaled, signed) + slack).all()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("M", [12, 70])
def test_on_a_gpu_without_cp_async(M, dtype, device, monkeypatch):
    """sm_75: a ring of two slots, and bfloat16 goes the dense way."""
    monkeypatch.setenv("PREQUANT_EMULATED_SM", "75")
    test_as_accurate_as_torch(Layer(M, 328, 136, dtype=dtype), device)


@pytest.mark.parametrize("M", [12, 70])
def test_misaligned_grad_y(M, device):
    """Rows of grad_y that do not lie on 16 bytes."""
    layer = Layer(M, 72, 24, dtype=F16)
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device)
    rest = (*random_weight(layer, device), *random_outliers(layer, device), layer.K, layer.bits, layer.axis)
    shifted = torch.cat([grad_y.new_zeros(1), grad_y.flatten()])[1:].view_as(grad_y)
    assert_identical(ops.linear_dx(shifted, *rest), ops.linear_dx(grad_y, *rest))


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
