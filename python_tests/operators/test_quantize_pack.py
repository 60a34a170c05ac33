"""quantize_pack: codes and packing in one pass, byte-identical everywhere."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import LAYERS, assert_identical, random_matrix, random_outliers, random_weight


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_identical_to_reference(layer, device):
    weight = random_matrix(layer.N, layer.K, layer.dtype, device) * 0.2
    _, scale, zero_point = random_weight(layer, device)
    dims, _ = random_outliers(layer, device)
    arguments = (weight, scale, zero_point, layer.bits, dims, layer.axis)
    assert_identical(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


def operands(N, K, blocks, bits, dtype, r, axis, device):
    """Weights beyond every code on both sides, scales of every granularity, and r outlier dimensions, in no order."""
    shape = {"tensor": (1, 1), "row": (N, 1), "group": (N, 4 if K % 4 == 0 else K)}[blocks]
    generator = torch.Generator().manual_seed(N * 1000 + K)
    scale = (0.02 + 0.3 * torch.rand(shape, generator=generator)).to(device)
    zero_point = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8).to(device)
    dims = torch.randperm(K if axis == 1 else N, generator=generator)[:r].to(device)
    return random_matrix(N, K, dtype, device) * 2 ** (bits - 3), scale, zero_point, bits, dims, axis


# The pairs of (bits, dtype) and (blocks, axis, r), and for each of them a K of whole vectors, of whole bytes, and of
# neither.
@pytest.mark.parametrize("bits", [2, 3, 4, 6, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("blocks", "axis", "r"), [("tensor", 1, 0), ("tensor", 0, 5), ("row", 1, 17), ("group", 0, 1), ("group", 1, 16)]
)
def test_every_width_type_and_granularity(bits, dtype, blocks, axis, r, device):
    for N, K in ((17, 64), (20, 36), (19, 65), (17, 17), (18, 1024)):
        arguments = operands(N, K, blocks, bits, dtype, r, axis, device)
        packed = ops.quantize_pack(*arguments)
        assert_identical(packed, reference.quantize_pack(*arguments))
        on_cpu = [argument.cpu() if isinstance(argument, torch.Tensor) else argument for argument in arguments]
        assert_identical(packed, torch.ops.prequant.quantize_pack(*on_cpu).to(packed.device))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (300, 2), (2, 9000), (0, 4), (4, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_thin_and_empty(shape, dtype, device):
    arguments = operands(*shape, "tensor", 4, dtype, min(1, *shape), 1, device)
    assert_identical(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weight_that_begins_inside_16_bytes(bits, dtype, device):
    _, *rest = operands(6, 64, "row", bits, dtype, 3, 1, device)
    weight = random_matrix(1, 6 * 64 + 1, dtype, device)[0, 1:].view(6, 64)
    assert_identical(ops.quantize_pack(weight, *rest), reference.quantize_pack(weight, *rest))


@pytest.mark.parametrize("axis", [0, 1])
def test_all_dimensions_are_outliers(axis, device):
    arguments = operands(40, 72, "row", 4, torch.float16, 72 if axis == 1 else 40, axis, device)
    codes = ops.unpack(ops.quantize_pack(*arguments), 72, 4)
    assert_identical(codes, arguments[2].expand(40, 72).contiguous())


@pytest.mark.parametrize("axis", [0, 1])
def test_dims_beyond_the_matrix(axis, device):
    weight, scale, zero_point, bits, dims, _ = operands(33, 65, "row", 4, torch.float32, 3, axis, device)
    beyond = torch.tensor([-1, 65 if axis == 1 else 33, 2**40, -(2**40)], device=device)
    arguments = (weight, scale, zero_point, bits, torch.cat([beyond, dims]), axis)
    if device == "cpu":
        with pytest.raises(
            RuntimeError,
            match="outlier_dims must be 0 to 64, got -1" if axis == 1 else "outlier_dims must be 0 to 32, got -1",
        ):
            ops.quantize_pack(*arguments)
    else:  # on a GPU the host does not read them, and the kernel passes them over
        assert_identical(
            ops.quantize_pack(*arguments), reference.quantize_pack(weight, scale, zero_point, bits, dims, axis)
        )


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
    scale, zero_point = (
        torch.full((12, 1), 0.2, device=device),
        torch.full((12, 1), 5, dtype=torch.uint8, device=device),
    )
    dims = torch.tensor([0, 3, 11], device=device)
    packed = ops.quantize_pack(weight, scale, zero_point, 4, dims, axis)
    dense = ops.dequantize(packed, scale, zero_point, 20, 4, torch.float32)
    assert (dense.index_select(axis, dims) == 0).all()
    without = ops.dequantize(
        ops.quantize_pack(weight, scale, zero_point, 4, dims[:0], axis), scale, zero_point, 20, 4, torch.float32
    )
    assert_identical(dense, without.index_fill(axis, dims, 0.0))


@pytest.mark.parametrize("K", [3, 4])  # one code at a time, and a vector
def test_extreme_weights_clip(K, device):
    weight = torch.tensor([[1e38, -1e38, 0.0, -0.0][:K]], device=device)
    scale, zero_point = (
        torch.full((1, 1), 2.0**-126, device=device),
        torch.full((1, 1), 3, dtype=torch.uint8, device=device),
    )
    packed = ops.quantize_pack(weight, scale, zero_point, 4, torch.zeros(0, dtype=torch.int64, device=device), 1)
    assert ops.unpack(packed, K, 4).tolist() == [[15, 0, 3, 3][:K]]


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_division_is_true_next_to_every_tie(bits, device):
    """The float32 weights on both sides of each boundary between two codes, for steps whose reciprocals round either
    way.
    """
    none, zero_point = (
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(1, 1, dtype=torch.uint8, device=device),
    )
    for step in (0.1, 0.3, 1 / 3, 0.7, 1.1e-3, 2.0**-126, 3e-39 * 2**20, 1e30):
        scale = torch.full((1, 1), step, device=device)
        ties = (torch.arange(2**bits, device=device) + 0.5) * scale[0]
        low, high = torch.nextafter(ties, -torch.ones_like(ties)), torch.nextafter(ties, ties + scale[0])
        arguments = (torch.stack([low, ties, high]), scale, zero_point, bits, none, 1)
        assert_identical(ops.quantize_pack(*arguments), reference.quantize_pack(*arguments))


def test_rejects(device):
    weight, dims = torch.zeros(4, 6, device=device), torch.zeros(0, dtype=torch.int64, device=device)
    scale, zero_point = torch.ones(4, 1, device=device), torch.zeros(4, 1, dtype=torch.uint8, device=device)
    with pytest.raises(RuntimeError, match="bits must be 2 to 8, got 1"):
        ops.quantize_pack(weight, scale, zero_point, 1, dims, 1)
    with pytest.raises(RuntimeError, match="scale must be float32, got float64"):
        ops.quantize_pack(weight, scale.double(), zero_point, 4, dims, 1)
    with pytest.raises(RuntimeError, match="outlier_dims must be int64, got int32"):
        ops.quantize_pack(weight, scale, zero_point, 4, dims.int(), 1)
