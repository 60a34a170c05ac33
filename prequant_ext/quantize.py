"""weight -> codes, scale, zero_point and outlier weights.  PreQuant, Eq. 1, 2 and Section 4.2.

    step  scale = alpha / 2^bits        code  q = clip(rint(w / scale) + zero_point, 0, 2^bits - 1)        value  (q -
          zero_point) * scale

A strategy chooses alpha and zero_point for each block of weights (the tensor, a row, a group of a row). Statistics and
outlier counts are of the full pre-trained matrix, so that codes do not depend on r but for the zeroed outlier
dimensions. A scale is float64 until it is rounded, once, to float32.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from prequant_ext import ops
from prequant_ext.config import PreQuantConfig
from prequant_ext.outliers import (
    AXES,
    Matrix,
    check_r,
    dequantized_rows,
    ordered_sum,
    row_bands,
    select_outliers,
    threshold_sigmas,
)
from prequant_ext.reference import MIN_SCALE

SIGMAS = 6.0  # alpha of the sigma strategies, Section 4.2


class BlockStats(NamedTuple):
    """Float64 statistics of each block, in the shape of the scales."""

    mean: Tensor
    std: Tensor
    low: Tensor
    high: Tensor


class Steps(NamedTuple):
    """scale and zero_point as float64, not yet rounded to their storage types."""

    scale: Tensor
    zero_point: Tensor


# ---- strategies (Section 4.2, Table 3) -------------------------------------------------------------------------------


def _steps_of_range(low: Tensor, high: Tensor, bits: int) -> Steps:
    """The range [low, high] with zero_point = rint(-low / scale), stretched to hold 0: clipping the zero point of a
    range without 0 would destroy its block.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    scale = ((high - low) / 2**bits).clamp(min=MIN_SCALE)
    return Steps(scale, (-low / scale).round().clamp(0, 2**bits - 1))


def _centred(mean: Tensor, alpha: Tensor, bits: int) -> Steps:
    """The range mean ± alpha / 2 with zero_point = rint(2^(bits - 1) - mean / scale),
    stretched where 0 lies outside.
    """
    low, high = mean - alpha / 2, mean + alpha / 2
    is_outside = (low > 0) | (high < 0)
    stretched = _steps_of_range(low, high, bits)
    scale = (alpha / 2**bits).clamp(min=MIN_SCALE)
    zero_point = (2 ** (bits - 1) - mean / scale).round().clamp(0, 2**bits - 1)
    return Steps(
        torch.where(is_outside, stretched.scale, scale), torch.where(is_outside, stretched.zero_point, zero_point)
    )


def _six_sigma(weight: Tensor, stats: BlockStats, bits: int) -> Steps:
    return _centred(stats.mean, SIGMAS * stats.std, bits)


def _full_range(weight: Tensor, stats: BlockStats, bits: int) -> Steps:
    return _steps_of_range(stats.low, stats.high, bits)


# ---- the strategy mse: rank many clip points on a histogram, measure the best few exactly ----------------------------

BINS = 2**16  # of the histogram; no bin is wider than 1/16 of the smallest step searched (8 bits, alpha = 2 sigma)
# the bins span mean ± 16 sigma; the weights beyond, at most one in 256 (Chebyshev), are kept one by one
BIN_SIGMAS = 16.0
CLIP_POINTS = 4096  # first ranking, in equal ratios from 2 sigma to the full range
ZOOMED = 64  # clip points whose neighbourhood is searched again, twice,
ZOOM = 16  # each time this many times finer
FINALISTS = 8  # measured exactly


class _Histogram(NamedTuple):
    points: Tensor  # (P,) ascending
    moments: Tensor  # (3, P + 1): count, sum and sum of squares of the weights before each point


def _histogram(weight: Tensor, mean: float, std: float) -> _Histogram:
    """Weights as at most BINS + N * K / 256 weighted points, in the CPU's memory. Integer counts: the same on every
    device.
    """
    if weight.numel() <= BINS:
        points = weight.double().flatten().cpu()
        counts = torch.ones_like(points)
    else:
        bins = torch.zeros(BINS, dtype=torch.int64, device=weight.device)
        # filled in place: small pieces would fragment the heap
        tail = torch.empty(weight.numel() // 256 + 1, dtype=torch.float64, device=weight.device)
        filled = 0
        for begin, end in row_bands(*weight.shape):
            values = weight[begin:end].double().flatten()
            position = (values - mean) / (BIN_SIGMAS * std)
            is_inside = position.abs() < 1
            index = ((position[is_inside] + 1) * (BINS / 2)).long().clamp(max=BINS - 1)
            bins += torch.bincount(index, minlength=BINS)
            beyond = values[~is_inside]
            tail[filled : filled + len(beyond)] = beyond
            filled += len(beyond)
        tail = tail[:filled].cpu()
        centres = mean + BIN_SIGMAS * std * ((torch.arange(BINS, dtype=torch.float64) + 0.5) * (2 / BINS) - 1)
        bins = bins.cpu()
        points = torch.cat([centres[bins > 0], tail])
        counts = torch.cat([bins[bins > 0].double(), torch.ones_like(tail)])
    points, order = points.sort()
    counts = counts[order]
    moments = torch.stack([counts, counts * points, counts * points * points]).cumsum(1)
    return _Histogram(points, torch.nn.functional.pad(moments, (1, 0)))


def _estimated_errors(histogram: _Histogram, steps: Steps, bits: int) -> Tensor:
    """Squared error of each of C steps, (C,). The points between two rounding edges share a code, so a few look-ups a
    code replace a pass over the weights.
    """
    errors = []
    for scale, zero_point in zip(steps.scale.split(2**16 >> bits), steps.zero_point.split(2**16 >> bits), strict=True):
        values = (torch.arange(2**bits, dtype=torch.float64) - zero_point[:, None]) * scale[:, None]
        edges = torch.searchsorted(histogram.points, (values[:, :-1] + values[:, 1:]) / 2)
        edges = torch.nn.functional.pad(torch.nn.functional.pad(edges, (1, 0)), (0, 1), value=len(histogram.points))
        count, total, squares = histogram.moments[:, edges].diff(dim=-1)
        errors.append((squares - 2 * values * total + values * values * count).sum(1))
    return torch.cat(errors)


def _least_error(weight: Tensor, stats: BlockStats, bits: int) -> Steps:
    """The (alpha, zero_point) of least ``sum (w' - w)^2`` among clip points from 2 sigma to the full range, and
    min_max's own pair.
    """
    full_range = _full_range(weight, stats, bits)
    mean, std, low, high = (statistic.item() for statistic in stats)
    if low == high:
        return full_range  # a constant: nothing to search
    widest = high - low
    narrowest = min(2 * std, widest)  # no range is below 2 sigma, but for rounding
    histogram = _histogram(weight, mean, std)

    def rank(alpha: Tensor) -> tuple[Tensor, Tensor]:
        alpha = alpha.clamp(narrowest, widest)
        errors, order = _estimated_errors(histogram, _centred(torch.full_like(alpha, mean), alpha, bits), bits).sort(
            stable=True
        )
        return alpha[order], errors

    # The error jumps where the zero point steps to its next integer, at scale = mean / (j + 1/2): the best clip point
    # may lie just beside a jump.
    jumps = 2**bits * abs(mean) / (torch.arange(2 ** (bits - 1), dtype=torch.float64) + 0.5)
    jumps = jumps[(jumps > narrowest) & (jumps < widest)]
    ratio = (widest / narrowest) ** (1 / (CLIP_POINTS - 1))
    alpha, errors = rank(
        torch.cat(
            [
                narrowest * ratio ** torch.arange(CLIP_POINTS, dtype=torch.float64),
                jumps * (1 - 1e-9),
                jumps * (1 + 1e-9),
            ]
        )
    )
    for _ in range(2):
        neighbours = (torch.arange(-ZOOM, ZOOM + 1, dtype=torch.float64) / ZOOM)[None, :]
        finer, finer_errors = rank((alpha[:ZOOMED, None] * ratio**neighbours).flatten())
        ratio = ratio ** (1 / ZOOM)
        errors, order = torch.cat([errors, finer_errors]).sort(stable=True)
        alpha = torch.cat([alpha, finer])[order]

    ranked = _centred(torch.full_like(alpha, mean), alpha, bits)
    finalists = [full_range]
    for scale, zero_point in zip(ranked.scale[: 4 * FINALISTS], ranked.zero_point[: 4 * FINALISTS], strict=True):
        steps = Steps(scale.view(1, 1).to(weight.device), zero_point.view(1, 1).to(weight.device))
        if all(
            steps.scale.float() != other.scale.float() or steps.zero_point != other.zero_point for other in finalists
        ):
            finalists.append(steps)
    return min(finalists[: FINALISTS + 1], key=lambda steps: _exact_error(weight, steps, bits))


def _exact_error(weight: Tensor, steps: Steps, bits: int) -> float:
    """``sum (w' - w)^2`` in float64 of the codes that the operators make."""
    scale, zero_point = steps.scale.float(), steps.zero_point.to(torch.uint8)
    none = torch.empty(0, dtype=torch.int64, device=weight.device)
    weight_packed = ops.quantize_pack(weight, scale, zero_point, bits, none, 1)
    return _squared_error(weight, weight_packed, scale, zero_point, bits)


class Strategy(NamedTuple):
    """A granularity ("tensor", "row" or "group") and the rule that chooses the steps of its blocks: (weight, statistics
    of the blocks, bits) -> Steps.
    """

    granularity: str
    choose: Callable[[Tensor, BlockStats, int], Steps]


STRATEGIES: dict[str, Strategy] = {
    "outlier_aware": Strategy("tensor", _six_sigma),
    "min_max": Strategy("tensor", _full_range),
    "mse": Strategy("tensor", _least_error),
    "row_wise": Strategy("row", _six_sigma),
    "group_wise": Strategy("group", _full_range),
    "group_wise_sigma": Strategy("group", _six_sigma),
}


# ---- a matrix --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class QuantizedMatrix:
    """A quantized weight (N, K) as it is stored, with its error.

    weight_packed      uint8 (N, B), canonical; codes of outlier dimensions are weight_zero_point
    weight_scale       float32 (1, 1), (N, 1) or (N, G)      weight_zero_point  uint8, the same shape
    outlier_dims       int64 (r,), ascending                 outlier_weight     float32 (N, r) for axis "input", (r, K)
                       for "output"
    squared_error      sum of (w' - w)^2, outlier dimensions taken from outlier_weight
    num_outliers       weights with |w - mean| > k * sigma in the full matrix
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor
    outlier_dims: Tensor
    outlier_weight: Tensor
    squared_error: float
    num_outliers: int


def scale_shape(config: PreQuantConfig, N: int, K: int, hidden_size: int | None = None) -> tuple[int, int]:
    """(rows, G) of a weight's scales: (1, 1) per tensor, (N, 1) per row, (N, K / group_size) per group; PreQuant-alpha:
    (N, K / hidden_size).

    Raises ValueError naming group_size or hidden_size, and K, where the one does not divide the other.
    """
    if config.train_scales:
        if hidden_size is None:
            raise ValueError(
                "train_scales=True (PreQuant-alpha) has one scale for each hidden_size weights of a row and needs "
                "hidden_size, got None"
            )
        if hidden_size <= 0 or K % hidden_size:
            raise ValueError(
                f"train_scales=True needs a hidden_size that divides K, got hidden_size = {hidden_size} and K = {K}"
            )
        return N, K // hidden_size
    granularity = STRATEGIES[config.strategy].granularity
    if granularity == "group" and K % config.group:
        raise ValueError(f"group_size must divide K, got group_size = {config.group} and K = {K}")
    return {"tensor": (1, 1), "row": (N, 1), "group": (N, K // config.group)}[granularity]


def quantize_matrix(
    weight: Tensor,
    config: PreQuantConfig,
    *,
    name: str,
    axis: str,
    bits: int | None = None,
    hidden_size: int | None = None,
    tuned: Tensor | None = None,
) -> QuantizedMatrix:
    """The whole of PreQuant's first stage for one weight: statistics -> strategy -> outlier dimensions -> codes.

    weight       (N, K) float32, float16 or bfloat16; needs about its own size of memory beside it
    name         of the parameter, for errors and for the random selector
    axis         "input": outlier dimensions are columns; "output": rows
    bits         instead of config.bits, for layers that have their own
    hidden_size  of the model, for train_scales
    tuned        the fine-tuned weight (N, K), for selector "ticket"

    Raises ValueError naming the parameter: not a matrix, NaN or Inf, a scale or a value beyond float32, K not a
    multiple of the group, r beyond the sliced axis, a density threshold at or above the peak, no ``tuned`` for
    "ticket".
    """
    if axis not in AXES:
        raise ValueError(f"{name}: axis must be input or output, got {axis!r}")
    weight = _checked_matrix(weight, name)
    bits = config.bits if bits is None else bits
    N, K = weight.shape
    try:
        shape = scale_shape(config, N, K, hidden_size)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    check_r(config, N, K, axis, name)

    whole = BlockStats(*ops.weight_stats(weight, N * K))
    if not (whole.low.isfinite() & whole.high.isfinite()):
        raise ValueError(f"{name}: weight must be finite, but it holds NaN or Inf")
    scale, zero_point = _chosen_steps(weight, whole, config, bits, name)
    # PreQuant-alpha starts every scale from the tensor's
    scale, zero_point = scale.expand(shape).contiguous(), zero_point.expand(shape).contiguous()

    sigmas = threshold_sigmas(config.outlier_threshold, whole.std.item(), name)
    column_counts, column_energy, row_counts, row_energy = ops.outlier_counts(weight, whole.mean, whole.std, sigmas)
    counts, energy = (column_counts, column_energy) if axis == "input" else (row_counts, row_energy)
    dims = select_outliers(Matrix(name, weight, axis, counts, energy, bits, scale, zero_point, tuned), config)

    weight_packed = ops.quantize_pack(weight, scale, zero_point, bits, dims, AXES[axis])
    outlier_weight = weight.index_select(AXES[axis], dims).float()
    if config.init == "dequantized" and len(dims):
        outlier_weight = _requantized(outlier_weight, scale, zero_point, bits, dims, axis, K)
    squared_error = _squared_error(weight, weight_packed, scale, zero_point, bits, dims, outlier_weight, axis)
    if not torch.tensor(squared_error).isfinite():
        raise ValueError(f"{name}: weight is too large: its dequantized values do not fit float32")
    return QuantizedMatrix(
        weight_packed, scale, zero_point, dims, outlier_weight, squared_error, int(column_counts.sum())
    )


def quantize_table(weight: Tensor, config: PreQuantConfig, *, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """8-bit min-max codes of an embedding table (V, D), a range for each row or one for all: the formula of
    quantize_activations.

    Returns codes uint8 (V, D), scale float32 and zero_point uint8, (V, 1) or (1, 1). Raises ValueError naming the
    parameter: not a matrix, NaN or Inf.
    """
    weight = _checked_matrix(weight, name)
    codes, scale, zero_point, _ = ops.quantize_activations(weight, config.embedding_granularity == "row", 0)
    if not scale.isfinite().all():
        raise ValueError(f"{name}: weight must be finite, but it holds NaN or Inf")
    return codes, scale, zero_point


def _checked_matrix(weight: Tensor, name: str) -> Tensor:
    if weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(
            f"{name}: weight must be float32, float16 or bfloat16, got {str(weight.dtype).removeprefix('torch.')}"
        )
    if weight.dim() != 2 or not weight.numel():
        raise ValueError(f"{name}: weight must be a non-empty matrix (N, K), got shape {tuple(weight.shape)}")
    return weight.detach().contiguous()


def _chosen_steps(
    weight: Tensor, whole: BlockStats, config: PreQuantConfig, bits: int, name: str
) -> tuple[Tensor, Tensor]:
    """scale float32 and zero_point uint8 of the strategy's blocks."""
    strategy = STRATEGIES[config.strategy]
    N, K = weight.shape
    block_size = {"tensor": N * K, "row": K, "group": config.group}[strategy.granularity]
    stats = whole if block_size == N * K else BlockStats(*ops.weight_stats(weight, block_size))
    steps = strategy.choose(weight, stats, bits)

    # A block of one value c round-trips exactly: scale |c| and code 1, or -1 for a negative c.
    value, is_constant = stats.low, stats.low == stats.high
    scale = torch.where(
        is_constant, torch.where(value == 0, 1.0, value.abs().clamp(min=MIN_SCALE)), steps.scale
    ).float()
    zero_point = torch.where(is_constant, (value < 0).double(), steps.zero_point).to(torch.uint8)
    if not scale.isfinite().all():
        raise ValueError(
            f"{name}: weight is too large for {bits} bits with strategy {config.strategy!r}: a scale does not fit "
            "float32"
        )
    return scale, zero_point


def _requantized(
    slices: Tensor, scale: Tensor, zero_point: Tensor, bits: int, dims: Tensor, axis: str, K: int
) -> Tensor:
    """What the codes of outlier dimensions would have given, had they not been zeroed. slices (N, r) or (r, K),
    float32.
    """
    if axis == "output" and len(scale) > 1:
        scale, zero_point = scale[dims], zero_point[dims]
    if axis == "input" and scale.shape[1] > 1:  # each column brings the scale of its group: r groups of one column
        group = dims // (K // scale.shape[1])
        scale, zero_point = scale[:, group].contiguous(), zero_point[:, group].contiguous()
    none = torch.empty(0, dtype=torch.int64, device=slices.device)
    weight_packed = ops.quantize_pack(slices.contiguous(), scale, zero_point, bits, none, AXES[axis])
    return ops.dequantize(weight_packed, scale, zero_point, slices.shape[1], bits, torch.float32)


def _squared_error(
    weight: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    outlier_dims: Tensor | None = None,
    outlier_weight: Tensor | None = None,
    axis: str = "input",
) -> float:
    """``sum (w' - w)^2`` in float64, in one order on every device; outlier dimensions, where given, are taken from
    outlier_weight.
    """
    total = 0.0
    for begin, end, values in dequantized_rows(weight_packed, scale, zero_point, weight.shape[1], bits):
        if outlier_dims is not None and outlier_weight is not None:
            if axis == "input":
                values[:, outlier_dims] = outlier_weight[begin:end]
            else:
                is_here = (outlier_dims >= begin) & (outlier_dims < end)
                values[outlier_dims[is_here] - begin] = outlier_weight[is_here]
        total += ordered_sum((values.double() - weight[begin:end].double()).square_().flatten()).item()
    return total
