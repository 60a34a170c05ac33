"""What there is to tell of a quantized model: its matrices, the dimensions that they share, how they are clipped, what
a task changed. Numbers only.
"""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from prequant_ext.bit_allocation import Proposal, Sensitivity, propose_layer_bits, sensitivity
from prequant_ext.blocks import Block, block_holding, blocks_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.directory import float_model, is_quantized_directory, model_config, own_class, stored_report
from prequant_ext.linear import PreQuantLinear, is_conv1d, quantized_linears
from prequant_ext.model import quantize_model
from prequant_ext.outliers import AXES
from prequant_ext.report import Report, ReportRow
from prequant_ext.sites import family_of, role_of, without_base_prefix
from prequant_ext.task_file import fingerprint, read_task

BINS = 121  # of a histogram of float weights
# of a page's proposal: half-way between 2 and 4 bits, where blocks are told apart
DEFAULT_BUDGET = {"bits_per_weight": 3.0}


@dataclass(frozen=True)
class Matrix:
    """A quantized matrix. block: None where the blocks are not known; part: its name within its block.

    weight      the float one (N, K), or None where only the codes are left; norm: of the float weight, else of the
                stored one
    is_hidden   its outlier dimensions are dimensions of the residual stream, and can be compared with those of other
                matrices
    """

    row: ReportRow
    layer: PreQuantLinear
    block: Block | None
    part: str
    is_hidden: bool
    weight: Tensor | None
    norm: float

    @property
    def relative_error(self) -> float:
        return self.row.l2_error / self.norm if self.norm else 0.0

    @property
    def dims(self) -> list[int]:
        """Its outlier dimensions, ascending."""
        return self.layer.outlier_dims.tolist()


@dataclass(frozen=True)
class Inspection:
    """A quantized model and its report;
    ``measured`` where it was quantized from float weights that are still at hand.
    """

    name: str
    model: nn.Module
    config: PreQuantConfig
    report: Report
    matrices: tuple[Matrix, ...]
    measured: Sensitivity | None

    @property
    def is_float(self) -> bool:
        return self.measured is not None


def inspect_float(name: str, model: nn.Module, config: PreQuantConfig) -> Inspection:
    """Measure a float model, then quantize it in place. Holds both in memory. Raises ValueError as quantize_model."""
    measured = sensitivity(model, config)
    modules: dict[str, Any] = {matrix.name: model.get_submodule(matrix.name) for matrix in measured.matrices}
    weights = {
        name: module.weight.detach().T if is_conv1d(module) else module.weight.detach()
        for name, module in modules.items()
    }
    norms = {matrix.name: math.sqrt(matrix.squared_norm) for matrix in measured.matrices}
    report = quantize_model(model, config)
    return Inspection(name, model, config, report, tuple(_matrices(model, report, weights, norms)), measured)


def inspect_quantized(name: str, model: Any, report: Report) -> Inspection:
    """A model as it was loaded from a quantized directory, with the report that lies there. Raises ValueError where
    they are not of each other.
    """
    return Inspection(
        name, model, model.config.quantization_config.config, report, tuple(_matrices(model, report, {}, {})), None
    )


def inspected(name: str, config: PreQuantConfig) -> Inspection:
    """A quantized directory with its stored report, or a float model, measured and quantized in memory. Raises as
    stored_report and inspect_float.
    """
    if not is_quantized_directory(name):
        return inspect_float(name, float_model(name), config)
    report = stored_report(name)
    return inspect_quantized(name, own_class(model_config(name)).from_pretrained(name), report)


def proposed(inspection: Inspection, budget: Mapping[str, float] | None) -> Proposal | None:
    """Bits of blocks within ``budget`` (of propose_layer_bits). Without one DEFAULT_BUDGET, or None where nothing can
    be proposed.

    Raises ValueError as propose_layer_bits, and for a budget where there are no float weights.
    """
    if inspection.measured is None:
        if budget is not None:
            raise ValueError(
                f"budget needs float weights, to measure other widths, but {inspection.name} is quantized already"
            )
        return None
    if budget is None and any(matrix.block is None for matrix in inspection.measured.matrices):
        return None
    return propose_layer_bits(inspection.measured, **(DEFAULT_BUDGET if budget is None else budget))


def _matrices(
    model: nn.Module, report: Report, weights: Mapping[str, Tensor], norms: Mapping[str, float]
) -> Iterator[Matrix]:
    family = family_of(model)
    blocks = {block.name: block for block in blocks_of(model, family)}
    rows = {row.name: row for row in report.rows if row.kind == "linear"}
    layers = dict(quantized_linears(model))
    differing = sorted(
        {(name, row.shape) for name, row in rows.items()} ^ {(name, layer.shape) for name, layer in layers.items()}
    )
    if differing:
        raise ValueError(
            f"the report is of another model: report and model differ in {differing[0][0]} {differing[0][1]}"
        )
    for name, layer in layers.items():
        block = block_holding(name, blocks)
        part = name.removeprefix(f"{block.name}.") if block else name
        is_hidden = block is not None and role_of(part, family) == layer.axis
        norm = norms[name] if name in norms else layer.dequantize().double().norm().item()
        yield Matrix(rows[name], layer, block, part, is_hidden, weights.get(name), norm)


# ---- outlier dimensions ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Recurrence:
    """How often each dimension of a stack's residual stream is an outlier dimension.

    counts     dimension -> number of matrices, most first, then by dimension
    strengths  of each matrix, dimension -> root mean square of its slice over that of the matrix
    width      dimensions that there are
    """

    stack: str
    matrices: tuple[Matrix, ...]
    counts: dict[int, int]
    strengths: tuple[dict[int, float], ...]
    width: int

    @property
    def by_chance(self) -> float:
        """In how many matrices a dimension would be, had all been drawn at random."""
        return sum(self.counts.values()) / self.width

    def holding(self, dim: int) -> list[Matrix]:
        return [matrix for matrix, own in zip(self.matrices, self.strengths, strict=True) if dim in own]

    def mean_strength(self, dim: int) -> float:
        own = [strengths[dim] for strengths in self.strengths if dim in strengths]
        return sum(own) / len(own)


def recurrences(inspection: Inspection) -> list[Recurrence]:
    """One a stack: encoder and decoder have a residual stream each. Empty without outlier dimensions, or where no
    matrix is known to have them in a stream.
    """
    hidden = [matrix for matrix in inspection.matrices if matrix.is_hidden and matrix.layer.r]
    found = []
    for stack in dict.fromkeys(matrix.block.stack for matrix in hidden if matrix.block):
        own = tuple(matrix for matrix in hidden if matrix.block and matrix.block.stack == stack)
        counts = Counter(dim for matrix in own for dim in matrix.dims)
        ordered = dict(sorted(counts.items(), key=lambda entry: (-entry[1], entry[0])))
        width = own[0].layer.shape[AXES[own[0].layer.axis]]
        found.append(Recurrence(stack, own, ordered, tuple(_strengths(matrix) for matrix in own), width))
    return found


def slice_norms(outlier_weight: Tensor, axis: str) -> list[float]:
    """Of each column of (N, r), or row of (r, K)."""
    return outlier_weight.detach().double().norm(dim=1 - AXES[axis]).tolist()


def _strengths(matrix: Matrix) -> dict[int, float]:
    N, K = matrix.layer.shape
    length = N if matrix.layer.axis == "input" else K
    mean = matrix.norm / math.sqrt(N * K)
    norms = slice_norms(matrix.layer.outlier_weight, matrix.layer.axis)
    return {dim: norm / math.sqrt(length) / mean if mean else 0.0 for dim, norm in zip(matrix.dims, norms, strict=True)}


# ---- histograms ------------------------------------------------------------------------------------------------------


class ClipRange(NamedTuple):
    """The values of the lowest and the highest code; medians where a matrix has several scales."""

    low: float
    high: float
    scales: int


def clip_range(layer: PreQuantLinear) -> ClipRange:
    low, high = _ranges(layer)
    return ClipRange(low.median().item(), high.median().item(), low.numel())


def _ranges(layer: PreQuantLinear) -> tuple[Tensor, Tensor]:
    """Values of the lowest and the highest code, in the shape of the scales."""
    scale, zero_point = layer.weight_scale.detach(), layer.weight_zero_point.float()
    return -zero_point * scale, (2**layer.bits - 1 - zero_point) * scale


@dataclass(frozen=True)
class Histogram:
    """Counts of weights between ``edges``: those held as codes, and those of the outlier dimensions, which are not
    clipped.

    beyond   the weights outside of the edges, which are counted in the outermost bins
    clipped  of float weights, the share of those held as codes that lie beyond the range by more than rounding
             explains, half a step
    """

    edges: np.ndarray
    codes: np.ndarray
    outliers: np.ndarray
    beyond: tuple[float, ...]
    clipped: float | None


def histogram(matrix: Matrix) -> Histogram:
    """Of the float weights; where they are gone, of the values of the codes, a bin a code. Up to one width of the clip
    range to either side of it.
    """
    layer, axis, reach = matrix.layer, AXES[matrix.layer.axis], clip_range(matrix.layer)
    dense = layer.dequantize() if matrix.weight is None else matrix.weight.float()
    is_outlier = torch.zeros(dense.shape[axis], dtype=torch.bool, device=dense.device)
    is_outlier[layer.outlier_dims] = True
    as_codes, outliers = (
        dense.index_select(axis, index.nonzero().flatten()).flatten().cpu().numpy()
        for index in (~is_outlier, is_outlier)
    )
    margin = reach.high - reach.low
    low, high = max(dense.min().item(), reach.low - margin), min(dense.max().item(), reach.high + margin)
    if matrix.weight is None and reach.scales == 1:
        step = layer.weight_scale.item()
        edges = (np.arange(round(low / step), round(high / step) + 2) - 0.5) * step
    else:
        edges = np.linspace(low, high if high > low else low + margin, BINS + 1)
    codes, outlier_counts = (
        np.histogram(values.clip(edges[0], edges[-1]), edges)[0] for values in (as_codes, outliers)
    )
    beyond = dense[(dense < edges[0]) | (dense > edges[-1])]
    clipped = None if matrix.weight is None else _clipped_share(layer, dense, is_outlier)
    return Histogram(edges, codes, outlier_counts, tuple(sorted(beyond.tolist())), clipped)


def _clipped_share(layer: PreQuantLinear, dense: Tensor, is_outlier: Tensor) -> float:
    K = layer.in_features
    half, (low, high) = layer.weight_scale.detach() / 2, _ranges(layer)
    lowest, highest = (bound.repeat_interleave(K // bound.shape[1], dim=1) for bound in (low - half, high + half))
    is_clipped = (dense < lowest) | (dense > highest)
    kept = is_clipped[:, ~is_outlier] if layer.axis == "input" else is_clipped[~is_outlier]
    return kept.double().mean().item() if kept.numel() else 0.0


def telling(matrices: Sequence[Matrix]) -> list[tuple[str, Matrix]]:
    """The matrices of the largest, the median and the least relative error; fewer where there are fewer."""
    ranked = sorted(matrices, key=lambda matrix: -matrix.relative_error)
    chosen = {len(ranked) // 2: "median", len(ranked) - 1: "least error", 0: "largest error"}
    return [(chosen[i], ranked[i]) for i in sorted(chosen)]


# ---- tasks -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TaskChange:
    """What a task made of the outlier weights. norms: of each matrix, the norm of each slice's change; base_norm: of
    the base's outlier weights.
    """

    name: str
    file: str
    metadata: Mapping[str, str]
    norms: tuple[tuple[float, ...], ...]
    base_norm: float

    @property
    def norm(self) -> float:
        return math.hypot(*(norm for own in self.norms for norm in own))


def task_changes(inspection: Inspection, paths: Sequence[Path]) -> list[TaskChange]:
    """The change that each task file makes to the outlier weights of the model, whose base must be the file's.

    Raises FileNotFoundError and ValueError as read_task; ValueError for another base, and for outlier weights that are
    missing or of another shape.
    """
    base = fingerprint(inspection.model)
    changes = []
    for path in paths:
        metadata, tensors = read_task(path)
        if metadata["base_fingerprint"] != base:
            raise ValueError(
                f"{path} was trained on the base {metadata['base_fingerprint']} but the model's base is {base}"
            )
        changes.append(_change(inspection, Path(path), metadata, tensors))
    return changes


def _change(
    inspection: Inspection, path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> TaskChange:
    by_name = {without_base_prefix(inspection.model, name): tensor for name, tensor in tensors.items()}
    norms, base_norms = [], []
    for matrix in inspection.matrices:
        original = matrix.layer.outlier_weight.detach()
        name = f"{without_base_prefix(inspection.model, matrix.row.name)}.outlier_weight"
        tuned = by_name.get(name) if matrix.layer.r else original  # of no outlier dimensions nothing is stored
        if tuned is None or tuned.shape != original.shape:
            found = "has none" if tuned is None else f"has shape {tuple(tuned.shape)}"
            raise ValueError(f"{name} must have shape {tuple(original.shape)}, but {path} {found}")
        norms.append(tuple(slice_norms(tuned.to(original.device) - original, matrix.layer.axis)))
        base_norms += slice_norms(original, matrix.layer.axis)
    return TaskChange(metadata["name"], path.name, metadata, tuple(norms), math.hypot(*base_norms))
