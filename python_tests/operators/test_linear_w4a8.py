"""linear_w4a8: integer products, exact before the float epilogue."""

from dataclasses import replace

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
    covering,
    random_matrix,
    random_outliers,
    random_weight,
)

# Blocks take 7, 15, 31, 64 or 128 tokens, 16 to 128 rows of the weight, and stages of 128 to 2048 columns.
COVERING = covering(
    (F32, F16, BF16),
    M=(0, 1, 3, 7, 8, 15, 16, 17, 31, 32, 63, 64, 65, 128, 200),
    K=(24, 64, 65, 128, 200, 320, 576),
    N=(8, 17, 64, 129, 136),
    bits=(4, 4, 2, 8),
)
# Ways of making a product that the shapes above are too small for, or too regular: each is here for a branch of
# csrc/cuda/linear_w4a8.cu.
LARGE = {
    "several stages, 7 tokens": Layer(5, 4200, 24, blocks="row"),
    "pieces, 7 tokens": Layer(6, 2128, 20),
    "pieces, 15 tokens, rows not aligned": Layer(9, 2061, 33, dtype=F16),
    "pieces, 31 tokens": Layer(24, 2304, 70, axis=0, blocks="row", dtype=BF16),
    "pieces, 64 tokens": Layer(50, 2176, 72, r=17, blocks="row", dtype=F16),
    "pieces, 128 tokens, a chunk left over": Layer(70, 2112, 34, axis=0),
    "pieces of groups": Layer(3, 66_000, 5, blocks="group", group_size=33_000, bits=8),
    "pieces of groups, 64 tokens": Layer(33, 65_664, 4, blocks="group", group_size=32_832, dtype=F16),
    "groups across chunks": Layer(6, 240, 40, blocks="group", group_size=80),
    "groups across chunks, rows not aligned": Layer(12, 75, 36, blocks="group", group_size=25, dtype=F16),
    "groups across chunks, many tokens": Layer(40, 144, 33, blocks="group", group_size=48, axis=0, dtype=BF16),
    "groups of 192, few tokens": Layer(5, 576, 40, blocks="group", group_size=192),
    "groups larger than a stage": Layer(20, 1152, 20, blocks="group", group_size=576),
    "groups of one column": Layer(33, 5, 9, blocks="group", group_size=1, r=2),
    "groups of 128, many tokens": Layer(100, 384, 130, blocks="group", group_size=128, dtype=F16),
    "odd groups of 8-bit codes": Layer(33, 99, 17, blocks="group", group_size=33, bits=8),
}


def operands(layer: Layer, device: str, per_token: bool = True):
    x, bias = (
        random_matrix(layer.M, layer.K, layer.dtype, device),
        random_matrix(1, layer.N, torch.float32, device, seed=3)[0],
    )
    weight = random_weight(layer, device)
    G = weight[1].shape[1]
    activations = reference.quantize_activations(x, per_token, layer.K // G if G > 1 else 0)
    return x, activations, (*weight, *random_outliers(layer, device), bias, layer.bits, layer.axis, False)


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "tensor"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, per_token, device):
    x, activations, rest = operands(layer, device, per_token)
    y = ops.linear_w4a8(x, *activations, *rest)
    assert y.dtype == layer.dtype
    assert_as_accurate(
        y, reference.linear_w4a8(x, *activations, *rest), reference.linear_w4a8(x.double(), *activations, *rest)
    )


@pytest.mark.parametrize(
    "layer",
    [layer for layer in LAYERS.values() if layer.dtype == torch.float32],
    ids=[k for k, v in LAYERS.items() if v.dtype == torch.float32],
)
def test_integer_part_is_exact(layer, device):
    """Without outliers and bias nothing is left but the integer sums and their scales: every bit agrees."""
    x, activations, rest = operands(replace(layer, r=0), device)
    rest = (*rest[:5], None, *rest[6:])
    assert_identical(ops.linear_w4a8(x, *activations, *rest), reference.linear_w4a8(x, *activations, *rest))


@pytest.mark.parametrize("layer", {**COVERING, **LARGE}.values(), ids={**COVERING, **LARGE}.keys())
def test_every_edge(layer, device):
    per_token = layer.N % 2 == 0
    test_as_accurate_as_torch(layer, per_token, device)
    test_integer_part_is_exact(replace(layer, dtype=F32), device)


def test_a_gpu_of_one_multiprocessor_cuts_nothing(device, monkeypatch):
    """The pieces of K are sums of integers: with them and without, every bit is the same."""
    x, activations, rest = operands(LARGE["pieces, 128 tokens, a chunk left over"], device)
    y = ops.linear_w4a8(x, *activations, *rest)
    monkeypatch.setenv("PREQUANT_EMULATED_MULTIPROCESSORS", "1")
    assert_identical(ops.linear_w4a8(x, *activations, *rest), y)


@pytest.mark.parametrize("M", [2, 12, 40])
def test_misaligned_codes(M, device):
    """Rows of codes that do not lie on 16 bytes."""
    x, activations, rest = operands(Layer(M, 80, 24), device)
    codes = torch.cat([activations[0].new_zeros(1), activations[0].flatten()])[1:].view_as(activations[0])
    assert_identical(ops.linear_w4a8(x, codes, *activations[1:], *rest), ops.linear_w4a8(x, *activations, *rest))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("M", [5, 12, 20, 50, 100])
def test_a_scale_of_nan_is_its_token_alone(M, axis, device):
    x, activations, rest = operands(Layer(M, 64, 40, axis=axis, dtype=F16), device)
    y = ops.linear_w4a8(x, *activations, *rest)
    activations[1][M - 2] = float("nan")
    actual = ops.linear_w4a8(x, *activations, *rest)
    assert torch.isnan(actual[M - 2]).all()
    others = torch.arange(M, device=device) != M - 2
    assert_identical(actual[others], y[others])


@pytest.mark.slow
@pytest.mark.parametrize("x_code", [0, 255])
@pytest.mark.parametrize("w_code", [0, 255])
@pytest.mark.parametrize("K", [4_096, 4_097, 32_768, 32_769, 33_025, 33_026, 140_000])
def test_no_accumulator_overflows(K, w_code, x_code, device):
    """All-extreme data just below and above a span (4,096), what the CPU adds up in int32 (32,768), INT32_MAX / 255^2
    products (33,025), and far beyond.
    """
    x_codes = torch.full((2, K), x_code, dtype=torch.uint8, device=device)
    x_zero = torch.full((2, 1), 255 - x_code, dtype=torch.uint8, device=device)
    x_scale = torch.full((2, 1), 2.0**-10, device=device)
    packed = torch.full((3, K), w_code, dtype=torch.uint8, device=device)
    zero_point = torch.full((1, 1), 255 - w_code, dtype=torch.uint8, device=device)
    scale = torch.full((1, 1), 2.0**-8, device=device)
    none = torch.zeros(0, dtype=torch.int64, device=device)
    sums = x_codes.sum(1, keepdim=True, dtype=torch.int32)
    y = ops.linear_w4a8(
        torch.zeros(2, K, device=device),
        x_codes,
        x_scale,
        x_zero,
        sums,
        packed,
        scale,
        zero_point,
        none,
        torch.zeros(3, 0, device=device),
        None,
        8,
        1,
        False,
    )
    product = (2 * x_code - 255) * (2 * w_code - 255) * K
    assert_identical(y, torch.full((2, 3), product, dtype=torch.float64, device=device).float() * 2.0**-18)


@pytest.mark.parametrize("M", [2, 9])
@pytest.mark.parametrize("x_code", [0, 255])
@pytest.mark.parametrize("w_code", [0, 15])
@pytest.mark.parametrize("K", [524_288, 524_304])
def test_no_accumulator_of_4_bit_codes_overflows(K, w_code, x_code, M):
    """All-extreme data at what the CPU multiplies as bytes (2^19) and one word beyond; 2 tokens go without a panel, 9
    with one.
    """
    x_codes = torch.full((M, K), x_code, dtype=torch.uint8)
    x_zero, x_scale = torch.full((M, 1), 255 - x_code, dtype=torch.uint8), torch.full((M, 1), 2.0**-10)
    packed, zero_point = (
        torch.full((3, K // 2), 17 * w_code, dtype=torch.uint8),
        torch.full((1, 1), 15 - w_code, dtype=torch.uint8),
    )
    none, sums = torch.zeros(0, dtype=torch.int64), x_codes.sum(1, keepdim=True, dtype=torch.int32)
    y = ops.linear_w4a8(
        torch.zeros(M, K),
        x_codes,
        x_scale,
        x_zero,
        sums,
        packed,
        torch.full((1, 1), 2.0**-8),
        zero_point,
        none,
        torch.zeros(3, 0),
        None,
        4,
        1,
        False,
    )
    product = (2 * x_code - 255) * (2 * w_code - 15) * K
    assert_identical(y, torch.full((M, 3), product, dtype=torch.float64).float() * 2.0**-18)


def test_few_tokens_too_long_to_be_copied_at_once():
    """On the CPU rows off whole words are copied a MiB at a time: 7 of these 8."""
    layer = Layer(8, 140_001, 3, r=0)
    x, activations, rest = operands(layer, "cpu")
    rest = (*rest[:5], None, *rest[6:])
    assert_identical(ops.linear_w4a8(x, *activations, *rest), reference.linear_w4a8(x, *activations, *rest))


@pytest.mark.parametrize("per_token", [True, False])
@pytest.mark.parametrize("raw_outliers", [False, True])
@pytest.mark.parametrize(
    "layer", [Layer(3, 130, 50), Layer(20, 256, 64, blocks="group"), Layer(6, 64, 40, dtype=BF16)], ids=str
)
def test_without_codes_x_is_quantized_by_the_operator(layer, raw_outliers, per_token, device):
    x, _, rest = operands(layer, device)
    rest = (*rest[:-1], raw_outliers)
    group_size = layer.K // rest[1].shape[1] if rest[1].shape[1] > 1 else 0
    activations = ops.quantize_activations(x, per_token, group_size, rest[3] if raw_outliers else None)
    assert_identical(
        ops.linear_w4a8(x, None, None, None, None, *rest, None, per_token), ops.linear_w4a8(x, *activations, *rest)
    )


def test_codes_come_together_or_not_at_all(device):
    x, activations, rest = operands(Layer(3, 64, 32), device)
    with pytest.raises(RuntimeError, match="x_codes, x_scale, x_zero_point and x_sums must be given together"):
        ops.linear_w4a8(x, activations[0], None, None, None, *rest)


def test_a_token_with_nan_gives_nan_and_leaves_the_others(device):
    layer = LAYERS["groups of 32"]
    x, _, rest = operands(layer, device)
    x[3, 5] = float("nan")
    y = ops.linear_w4a8(x, *ops.quantize_activations(x, True, layer.K // rest[1].shape[1]), *rest)
    assert torch.isnan(y[3]).all() and torch.isfinite(y[:3]).all() and torch.isfinite(y[4:]).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_raw_outliers_multiply_x_itself(dtype, device):
    """A dimension 1000 times the rest: excluded from the range and multiplied raw, it costs the others nothing."""
    layer = Layer(M=16, K=128, N=48, dtype=dtype)
    x, _, rest = operands(layer, device)
    dims = rest[3]
    x[:, dims[0]] *= 1000
    activations = ops.quantize_activations(x, True, 0, dims)
    rest = (*rest[:-1], True)
    exact = reference.linear_w4a8(x.double(), *activations, *rest)
    assert_as_accurate(ops.linear_w4a8(x, *activations, *rest), reference.linear_w4a8(x, *activations, *rest), exact)


@pytest.mark.parametrize("raw", [False, True], ids=["quantized", "raw"])
@pytest.mark.parametrize("name", ["off every tile", "groups, output axis", "minilm query", "8 bits, rows, bfloat16"])
def test_gradients_are_straight_through(name, raw, device):
    layer = LAYERS[name]
    if raw and layer.axis == 0:
        pytest.skip("raw outliers are input columns")
    x, activations, rest = operands(layer, device)
    rest = (*rest[:-1], raw)
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device, seed=4)
    weight, (dims, values, bias) = rest[:3], rest[3:6]
    leaves = [x.clone().requires_grad_(), values.clone().requires_grad_(), bias.clone().requires_grad_()]
    ops.linear_w4a8(leaves[0], *activations, *weight, dims, leaves[1], leaves[2], *rest[6:]).backward(grad_y)

    quantized = (activations[0].double() - activations[2].double()) * activations[1].double()
    source = x.double() if raw else quantized
    for index, (high, given) in enumerate(((torch.float32, grad_y), (torch.float64, grad_y.double()))):
        dx = reference.linear_dx(given, *weight, dims, values, layer.K, layer.bits, layer.axis)
        columns = source.to(high)[:, dims] if layer.axis == 1 else source.to(high)
        expected = [dx, reference.outlier_grad(given, columns, None, None, dims, layer.axis), given.to(high).sum(0)]
        if index == 0:
            plain = expected
    for actual, plain_one, exact in zip([leaf.grad for leaf in leaves], plain, expected, strict=True):
        assert_as_accurate(actual, plain_one, exact)


def test_rejects(device):
    layer = LAYERS["one token"]
    x, activations, rest = operands(layer, device)
    codes, x_scale, x_zero_point, sums = activations
    with pytest.raises(RuntimeError, match=r"x_codes must have shape \(1, 64\), got \(1, 63\)"):
        ops.linear_w4a8(x, codes[:, :63], x_scale, x_zero_point, sums, *rest)
    with pytest.raises(RuntimeError, match=r"x_sums must have shape \(1, 1\), got \(1, 2\)"):
        ops.linear_w4a8(x, codes, x_scale, x_zero_point, sums.expand(1, 2), *rest)
    with pytest.raises(RuntimeError, match=r"x_scale must have shape \(1, 1\) or \(1, 1\), got \(2, 1\)"):
        ops.linear_w4a8(x, codes, x_scale.expand(2, 1), x_zero_point, sums, *rest)
    with pytest.raises(RuntimeError, match="x has K = 66 but weight_packed packs 64"):
        ops.linear_w4a8(torch.zeros(1, 66, device=device), *activations, *rest)
    output_axis = (
        *rest[:3],
        torch.zeros(0, dtype=torch.int64, device=device),
        torch.zeros(0, 64, device=device),
        None,
        4,
        0,
        True,
    )
    with pytest.raises(RuntimeError, match="raw_outliers multiplies input columns and needs axis = 1"):
        ops.linear_w4a8(x, *activations, *output_axis)


@pytest.mark.parametrize("per_token", [True, False], ids=["token", "tensor"])
@pytest.mark.parametrize("K", [1, 126, 127, 128, 129, 257, 1000])
@pytest.mark.parametrize("M", range(1, 10))
def test_few_tokens_are_exact(M, K, per_token, device):
    """The CPU reads packed rows directly up to 8 tokens, in lines of 128 codes and 1 to 8 rows at a time: every count,
    and both sides of a line's end.
    """
    x, activations, rest = operands(Layer(M, K, 41, r=0, blocks="row"), device, per_token)
    rest = (*rest[:5], None, *rest[6:])
    assert_identical(ops.linear_w4a8(x, *activations, *rest), reference.linear_w4a8(x, *activations, *rest))
