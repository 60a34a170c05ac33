"""Which dimensions of a matrix stay in float32: weight -> outlier_dims.  PreQuant, Eq. 3 and Section 4.3; the selectors
of its Figure 3.

A dimension is an input column (axis 1) or an output row (axis 0) of weight (N, K). Every selector looks at the full
pre-trained matrix and returns ``r`` distinct dimensions as ascending int64.
"""

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from prequant_ext import ops
from prequant_ext.config import OutlierThreshold, PreQuantConfig

BAND = 2**18  # elements that are held in float64 at a time

DIMENSIONS = {"input": "input columns", "output": "output rows"}
AXES = {"input": 1, "output": 0}


@dataclass(frozen=True)
class Matrix:
    """What a selector may look at: the weight with its outlier counts, the scales that the strategy chose, and where
    given the fine-tuned weight.
    """

    name: str
    weight: Tensor  # (N, K)
    axis: str  # "input" or "output"
    counts: Tensor  # outliers of each dimension along axis
    energy: Tensor  # and their clipping energy
    bits: int
    scale: Tensor
    zero_point: Tensor
    tuned: Tensor | None = None  # (N, K)


def threshold_sigmas(threshold: OutlierThreshold, std: float, name: str) -> float:
    """k of ``|w - mean| > k * std``, the same tail as ``density(w) < eps`` with ``eps = exp(-k^2 / 2) / (std * sqrt(2
    pi))`` (Eq. 3).

    Raises ValueError naming the matrix where eps reaches the peak of its density: every weight would be an outlier.
    """
    if isinstance(threshold, float | int):
        return float(threshold)
    if std == 0:
        return 1.0  # a constant matrix has no outliers, whatever k
    form, value = threshold
    log_density = math.log(value) if form == "density" else value
    log_peak = -math.log(std * math.sqrt(2 * math.pi))
    if log_density >= log_peak:
        peak = math.exp(log_peak) if form == "density" else log_peak
        raise ValueError(
            f"{name}: outlier_threshold {threshold!r} must lie below the peak of the matrix's density, {peak:.6g} at "
            f"a standard deviation of {std:.6g}"
        )
    return math.sqrt(2 * (log_peak - log_density))


# ---- sums that come out the same on every device ---------------------------------------------------------------------


def ordered_sum(values: Tensor) -> Tensor:
    """Sum over the first dimension by halving, overwriting values: additions in one order, where a library's own
    reduction may differ between devices.
    """
    while len(values) > 1:
        half = -(-len(values) // 2)
        values[: len(values) - half] += values[half:]
        values = values[:half]
    return values[0]


def row_bands(N: int, K: int) -> Iterator[tuple[int, int]]:
    """Row ranges of about BAND elements: float64 temporaries of a whole matrix would double the peak memory."""
    rows = max(1, BAND // max(K, 1))
    return ((begin, min(begin + rows, N)) for begin in range(0, N, rows))


def dequantized_rows(
    weight_packed: Tensor, scale: Tensor, zero_point: Tensor, K: int, bits: int
) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, float32 values) of codes, band by band."""
    for begin, end in row_bands(len(weight_packed), K):
        yield begin, end, ops.dequantize(weight_packed, scale, zero_point, K, bits, torch.float32, begin, end)


def _sum_by_dimension(bands: Iterable[Tensor], axis: str) -> Tensor:
    """Sums of a matrix given as float64 row bands along each column (input) or each row (output)."""
    if axis == "output":
        return torch.cat([ordered_sum(band.T.contiguous()) for band in bands])
    total = None
    for band in bands:
        columns = ordered_sum(band)
        total = columns.clone() if total is None else total + columns
    assert total is not None  # a matrix has rows
    return total


def _largest(scores: Tensor, r: int) -> Tensor:
    """The r largest scores' indices, ascending; ties to the lower index."""
    return scores.sort(descending=True, stable=True).indices[:r].sort().values


# ---- selectors -------------------------------------------------------------------------------------------------------


def _by_outliers(matrix: Matrix, config: PreQuantConfig) -> Tensor:
    """Most outliers; ties to the larger clipping energy, then to the lower index (Section 4.3)."""
    return ops.select_outlier_dims(matrix.counts, matrix.energy, config.r)


def _at_random(matrix: Matrix, config: PreQuantConfig) -> Tensor:
    """Uniform draws from (seed, module name): the same for a module in whatever order, and on whatever device, a model
    is quantized.
    """
    digest = hashlib.sha256(f"{config.seed}/{matrix.name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)
    return torch.randperm(len(matrix.counts), generator=generator)[: config.r].sort().values.to(matrix.weight.device)


def _by_movement(matrix: Matrix, config: PreQuantConfig) -> Tensor:
    """Largest L1 distance between pre-trained and fine-tuned weights (the lottery tickets of Gong et al., 2022, which
    an L1 penalty singles out).
    """
    tuned, weight = matrix.tuned, matrix.weight
    if tuned is None:
        raise ValueError(
            f"{matrix.name}: selector 'ticket' ranks dimensions by how far fine-tuning moved them and needs the "
            "fine-tuned weights: "
            "quantize_model(model, config, tuned=...), or tuned= of quantize_matrix and PreQuantLinear.from_linear"
        )
    if tuned.shape != weight.shape:
        raise ValueError(
            f"{matrix.name}: tuned must have the weight's shape {tuple(weight.shape)}, got {tuple(tuned.shape)}"
        )
    tuned = tuned.detach().to(weight.device)
    bands = ((tuned[begin:end].double() - weight[begin:end].double()).abs() for begin, end in row_bands(*weight.shape))
    movement = _sum_by_dimension(bands, matrix.axis)
    if not movement.isfinite().all():
        raise ValueError(f"{matrix.name}: tuned must be finite, but it holds NaN or Inf")
    return _largest(movement, config.r)


def _by_error(matrix: Matrix, config: PreQuantConfig) -> Tensor:
    """Largest quantization error energy ``sum (w' - w)^2`` of the strategy in use on the full matrix."""
    weight, K = matrix.weight, matrix.weight.shape[1]
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    weight_packed = ops.quantize_pack(weight, matrix.scale, matrix.zero_point, matrix.bits, none, AXES[matrix.axis])
    rows = dequantized_rows(weight_packed, matrix.scale, matrix.zero_point, K, matrix.bits)
    return _largest(
        _sum_by_dimension(
            ((values.double() - weight[begin:end].double()).square_() for begin, end, values in rows), matrix.axis
        ),
        config.r,
    )


SELECTORS: dict[str, Callable[[Matrix, PreQuantConfig], Tensor]] = {
    "outlier": _by_outliers,
    "random": _at_random,
    "ticket": _by_movement,
    "error": _by_error,
}


def check_r(config: PreQuantConfig, N: int, K: int, axis: str, name: str) -> None:
    """Raises ValueError naming the matrix where r does not fit its sliced axis.
    r equal to the axis's length is legal.
    """
    length = K if axis == "input" else N
    if config.r > length:
        raise ValueError(
            f"{name}: r = {config.r} must be at most {length}, the number of {DIMENSIONS[axis]} of its ({N}, {K}) "
            "weight"
        )


def select_outliers(matrix: Matrix, config: PreQuantConfig) -> Tensor:
    """The ``config.r`` outlier dimensions that ``config.selector`` chooses: int64, ascending, distinct.

    Raises ValueError naming the matrix where r does not fit the sliced axis, or where selector "ticket" is given no
    fine-tuned weight.
    """
    N, K = matrix.weight.shape
    check_r(config, N, K, matrix.axis, matrix.name)
    if config.r == 0:
        return torch.empty(0, dtype=torch.int64, device=matrix.weight.device)
    return SELECTORS[config.selector](matrix, config)


def jaccard(a: Tensor, b: Tensor) -> float:
    """Overlap of two selections: the dimensions in both over the dimensions in either. 1 for two empty ones."""
    first, second = set(a.tolist()), set(b.tolist())
    return len(first & second) / len(first | second) if first | second else 1.0
