"""Selectors: which dimensions become outlier dimensions, and what is refused."""

import math

import pytest
import torch

from prequant_ext import config as config_module
from prequant_ext import outliers, reference
from prequant_ext.config import PreQuantConfig
from prequant_ext.outliers import SELECTORS, jaccard, threshold_sigmas
from prequant_ext.quantize import quantize_matrix

AXES = {"input": 1, "output": 0}


def random_weight(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def selected(weight, axis, *, name="encoder.query.weight", tuned=None, **settings) -> list[int]:
    return quantize_matrix(weight, PreQuantConfig(**settings), name=name, axis=axis, tuned=tuned).outlier_dims.tolist()


def test_the_table_is_what_the_config_admits():
    assert tuple(SELECTORS) == config_module.SELECTOR_NAMES


# ---- every selector --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("selector", SELECTORS)
@pytest.mark.parametrize("r", [0, 1, 7])
def test_dimensions_are_distinct_ascending_int64(selector, axis, r):
    weight = random_weight(24, 32)
    dims = quantize_matrix(
        weight, PreQuantConfig(selector=selector, r=r), name="w", axis=axis, tuned=random_weight(24, 32, seed=1)
    ).outlier_dims
    assert dims.dtype == torch.int64 and dims.shape == (r,)
    assert dims.tolist() == sorted(set(dims.tolist()))
    assert all(0 <= dim < weight.shape[AXES[axis]] for dim in dims.tolist())


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("selector", SELECTORS)
def test_r_equal_to_the_axis_takes_every_dimension(selector, axis):
    weight = random_weight(6, 8)
    length = weight.shape[AXES[axis]]
    assert selected(weight, axis, selector=selector, r=length, tuned=weight + 1) == list(range(length))


@pytest.mark.parametrize(
    ("axis", "dimensions"), [("input", "8, the number of input columns"), ("output", "6, the number of output rows")]
)
@pytest.mark.parametrize("selector", SELECTORS)
def test_r_beyond_the_axis_is_refused_naming_the_matrix(selector, axis, dimensions):
    with pytest.raises(
        ValueError, match=rf"^encoder\.query\.weight: r = 9 must be at most {dimensions} of its \(6, 8\) weight"
    ):
        selected(random_weight(6, 8), axis, selector=selector, r=9, tuned=random_weight(6, 8))


@pytest.mark.parametrize("selector", SELECTORS)
def test_the_same_twice(selector):
    weight, tuned = random_weight(40, 48), random_weight(40, 48, seed=1)
    assert selected(weight, "input", selector=selector, tuned=tuned) == selected(
        weight.clone(), "input", selector=selector, tuned=tuned
    )


# ---- outlier (Eq. 3) -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("axis", AXES)
def test_outlier_finds_planted_dimensions(axis):
    weight = random_weight(64, 64)
    planted = torch.tensor([3, 17, 40])
    view = weight if axis == "input" else weight.T
    view[:8, planted] = 20.0
    assert selected(weight, axis, r=3) == planted.tolist()


def test_outlier_ties_go_to_energy_then_to_the_lower_index():
    weight = torch.zeros(64, 64)
    # one outlier a column, the mean pulled up by 2 / 4096
    weight[0, 10], weight[1, 20], weight[2, 30], weight[3, 40] = 1.0, -1.5, 1.0, 1.5
    assert selected(weight, "input", r=1) == [20]  # -1.5 lies farther from a positive mean than 1.5
    assert selected(weight, "input", r=2) == [20, 40]
    assert selected(weight, "input", r=3) == [10, 20, 40]
    assert selected(weight, "input", r=5) == [0, 10, 20, 30, 40]


def test_a_constant_matrix_has_no_outliers_and_gives_its_first_dimensions():
    quantized = quantize_matrix(torch.full((4, 6), 0.3), PreQuantConfig(r=2), name="w", axis="input")
    assert quantized.num_outliers == 0 and quantized.outlier_dims.tolist() == [0, 1]


@pytest.mark.parametrize("threshold", [3.0, 2.0, ("density", 0.01), ("log_density", -4.0)], ids=str)
def test_num_outliers_counts_weights_below_the_density(threshold):
    weight = random_weight(50, 60) * 0.7 + 0.1
    values = weight.double()
    mean, std = values.mean(), values.std(correction=0)
    density = torch.exp(-(((values - mean) / std) ** 2) / 2) / (std * math.sqrt(2 * math.pi))
    if isinstance(threshold, float):
        limit = math.exp(-(threshold**2) / 2) / (std * math.sqrt(2 * math.pi))
    else:
        limit = threshold[1] if threshold[0] == "density" else math.exp(threshold[1])
    quantized = quantize_matrix(weight, PreQuantConfig(outlier_threshold=threshold), name="w", axis="input")
    assert quantized.num_outliers == int((density < limit).sum()) > 0


@pytest.mark.parametrize("k", [0.5, 3.0, 6.0])
@pytest.mark.parametrize("std", [1e-3, 0.04, 7.0])
def test_density_thresholds_convert_to_sigmas(k, std):
    density = math.exp(-(k**2) / 2) / (std * math.sqrt(2 * math.pi))
    assert threshold_sigmas(("density", density), std, "w") == pytest.approx(k, rel=1e-12)
    assert threshold_sigmas(("log_density", math.log(density)), std, "w") == pytest.approx(k, rel=1e-12)
    assert threshold_sigmas(k, std, "w") == k


@pytest.mark.parametrize("threshold", [("density", 0.4), ("log_density", math.log(0.4)), ("log_density", 2.0)], ids=str)
@pytest.mark.parametrize("selector", SELECTORS)
def test_density_at_or_above_the_peak_is_refused_naming_the_matrix(threshold, selector):
    weight = random_weight(50, 60)  # peak 0.3989 / sigma
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: outlier_threshold .* below the peak"):
        selected(weight, "input", selector=selector, outlier_threshold=threshold, tuned=weight)


def test_density_just_at_the_peak_is_refused():
    log_peak = -math.log(0.5 * math.sqrt(2 * math.pi))
    with pytest.raises(ValueError, match=r"^w: outlier_threshold"):
        threshold_sigmas(("log_density", log_peak), 0.5, "w")
    assert threshold_sigmas(("log_density", math.nextafter(log_peak, -math.inf)), 0.5, "w") > 0


# ---- random, ticket, error -------------------------------------------------------------------------------------------


def test_random_draws_from_seed_and_module_name_alone():
    first = selected(random_weight(64, 256), "input", selector="random", name="a", seed=0)
    assert selected(random_weight(64, 256, seed=9), "input", selector="random", name="a", seed=0) == first
    torch.manual_seed(123)
    assert selected(random_weight(64, 256), "input", selector="random", name="a", seed=0) == first
    assert selected(random_weight(64, 256), "input", selector="random", name="b", seed=0) != first
    assert selected(random_weight(64, 256), "input", selector="random", name="a", seed=1) != first


def test_random_reaches_every_dimension():
    drawn = {
        dim for seed in range(60) for dim in selected(random_weight(2, 16), "input", selector="random", r=2, seed=seed)
    }
    assert drawn == set(range(16))


def test_random_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    selected(random_weight(8, 8), "input", selector="random")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_ticket_ranks_by_how_far_dimensions_moved(axis, dtype):
    weight = random_weight(1024, 640).to(dtype)  # several row chunks
    tuned = weight.clone()
    view = tuned if axis == "input" else tuned.T
    view[:, 5] += 1.0
    view[:, 600] -= 2.0
    view[:2, 7] += 100.0  # two weights that moved by 100, and a thousand others that did not
    assert selected(weight, axis, selector="ticket", r=2, tuned=tuned) == [5, 600]


def test_ticket_without_tuned_says_how_to_pass_it():
    with pytest.raises(
        ValueError, match=r"^encoder\.query\.weight: selector 'ticket' .*quantize_model\(model, config, tuned=\.\.\.\)"
    ):
        selected(random_weight(8, 8), "input", selector="ticket")


def test_ticket_refuses_a_tuned_weight_of_another_shape():
    with pytest.raises(ValueError, match=r"tuned must have the weight's shape \(8, 16\), got \(16, 8\)"):
        selected(random_weight(8, 16), "input", selector="ticket", tuned=random_weight(16, 8))


def test_ticket_refuses_a_tuned_weight_with_nan():
    tuned = random_weight(8, 16)
    tuned[3, 3] = math.nan
    with pytest.raises(ValueError, match=r"^encoder\.query\.weight: tuned must be finite"):
        selected(random_weight(8, 16), "input", selector="ticket", tuned=tuned)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("strategy", config_module.STRATEGY_NAMES)
def test_error_ranks_by_quantization_error_of_the_strategy_in_use(strategy, axis):
    weight = random_weight(300, 1024)  # two row chunks
    weight[:, ::7] *= torch.linspace(0.2, 3, len(weight[0, ::7]))
    settings = {"strategy": strategy, "bits": 3}
    full = quantize_matrix(weight, PreQuantConfig(r=0, **settings), name="w", axis=axis)
    values = reference.dequantize(full.weight_packed, full.weight_scale, full.weight_zero_point, 1024, 3, torch.float32)
    energy = (values.double() - weight.double()).square().sum(1 - AXES[axis])
    assert selected(weight, axis, selector="error", r=9, **settings) == energy.topk(9).indices.sort().values.tolist()


@pytest.mark.parametrize("axis", AXES)
def test_error_ties_go_to_the_lower_index(axis):
    dimension = random_weight(64, 1)
    weight = dimension.repeat(1, 32)
    weight = weight if axis == "input" else weight.T
    assert selected(weight, axis, selector="error", r=3) == [0, 1, 2]


# ---- overlap, and the sums that every device makes alike -------------------------------------------------------------


def test_jaccard():
    a, b, empty = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4]), torch.tensor([], dtype=torch.int64)
    assert jaccard(a, b) == 0.5 and jaccard(a, a) == 1.0 and jaccard(a, empty) == 0.0 and jaccard(empty, empty) == 1.0


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 1000])
def test_ordered_sum_is_a_sum(length):
    values = random_weight(length, 3).double()
    torch.testing.assert_close(outliers.ordered_sum(values.clone()), values.sum(0), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("N", "K"), [(1, 1), (1000, 700), (3, 2**19)])
def test_row_bands_cover_every_row_once(N, K):
    rows = [row for begin, end in outliers.row_bands(N, K) for row in range(begin, end)]
    assert rows == list(range(N))
    assert all(end - begin == 1 or (end - begin) * K <= outliers.BAND for begin, end in outliers.row_bands(N, K))
