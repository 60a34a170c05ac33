"""What each matrix loses at each width, and which bits each block should have within a size budget.  PreQuant, Section
5.5.

No data is read: a loss is the squared error of the weights, ``sum (w' - w)^2``, outlier dimensions taken from the
outlier weights. Losses of matrices are added as they are. Their sum is the square of ``Report.l2_error``, so that a
proposal can be checked by quantizing with it; and for inputs of equal power in every direction it is the power of the
error that the matrices add to their outputs. Relative errors would not do: matrices of one shape of distribution have
the same one at a given width, whatever they are for, and could not be told apart.

What it cannot see: how far an error travels. The paper's Table 5 finds 2 bits in the bottom blocks far worse than in
the top ones (T5 encoder, QNLI: 84.9 against 92.3), since every later block works on what an early one spoilt. A sum
over weights knows no order of blocks: try a proposal on a task.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn

from prequant_ext.blocks import Block, block_holding, blocks_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.families import Family
from prequant_ext.model import plan, progress
from prequant_ext.outliers import row_bands
from prequant_ext.quantize import quantize_matrix
from prequant_ext.reference import row_bytes
from prequant_ext.report import table
from prequant_ext.sites import family_of, find_sites

WIDTHS = (2, 3, 4, 8)


@dataclass(frozen=True)
class MatrixErrors:
    """One matrix (N, K). squared_norm of its float weights; squared_error and code_bytes (of its containers) by bits;
    block: None where it is in none.
    """

    name: str
    block: Block | None
    shape: tuple[int, int]
    squared_norm: float
    squared_error: Mapping[int, float]
    code_bytes: Mapping[int, int]

    def relative_error(self, bits: int) -> float:
        """``||w' - w|| / ||w||``; 0 for a matrix of zeros, which loses nothing."""
        return math.sqrt(self.squared_error[bits] / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class Sensitivity:
    """The errors of every matrix of a model at each of ``widths``. other_bytes: of the quantized model, all but these
    matrices' codes.
    """

    widths: tuple[int, ...]
    matrices: tuple[MatrixErrors, ...]
    other_bytes: int

    def by_block(self) -> dict[Block, list[MatrixErrors]]:
        """In the model's order. Raises ValueError where a matrix is in no block: layer_bits could not name it."""
        found: dict[Block, list[MatrixErrors]] = {}
        for matrix in self.matrices:
            if matrix.block is None:
                raise ValueError(
                    f"{matrix.name} is in no block that layer_bits could name: the family of the model is not known, "
                    "pass family=Family(...)"
                )
            found.setdefault(matrix.block, []).append(matrix)
        return found

    @property
    def weights(self) -> int:
        return sum(math.prod(matrix.shape) for matrix in self.matrices)


def sensitivity(
    model: nn.Module, config: PreQuantConfig, *, widths: Sequence[int] = WIDTHS, family: Family | None = None
) -> Sensitivity:
    """Quantize every matrix of a float model at each of ``widths``, with the other settings of ``config``, and keep the
    errors.

    The model stays as it is; ``bits`` and ``layer_bits`` of the config do not matter.

    Raises ValueError as find_sites and quantize_matrix, for a model on the meta device, and for widths that are not
    distinct integers from 2 to 8.
    """
    if (
        not widths
        or len(set(widths)) < len(widths)
        or any(type(bits) is not int or not 2 <= bits <= 8 for bits in widths)
    ):
        raise ValueError(f"widths must be distinct integers from 2 to 8, got {widths!r}")
    sites = [site for site in find_sites(model, config, family) if site.kind == "linear"]
    blocks = {block.name: block for block in blocks_of(model, family or family_of(model))}
    matrices = []
    for site in progress(sites, "measuring"):
        weight = _weight(model.get_submodule(site.name), site.is_transposed, site.name)
        errors, sizes = {}, {}
        for bits in widths:
            found = quantize_matrix(
                weight, config, name=site.name, axis=str(site.axis), bits=bits, hidden_size=site.hidden_size
            )
            errors[bits], sizes[bits] = found.squared_error, _code_bytes(site.shape, bits)
        matrices.append(
            MatrixErrors(site.name, block_holding(site.name, blocks), site.shape, _squared_norm(weight), errors, sizes)
        )
    return Sensitivity(tuple(widths), tuple(matrices), _other_bytes(model, config, family))


def _weight(module: Any, is_transposed: bool, name: str) -> Tensor:
    weight: Tensor = module.weight.detach()
    if weight.is_meta:
        raise ValueError(f"{name}: weight is on the meta device and holds no data: load the model first")
    return weight.T if is_transposed else weight


def _squared_norm(weight: Tensor) -> float:
    return sum(weight[begin:end].double().square().sum().item() for begin, end in row_bands(*weight.shape))


def _code_bytes(shape: tuple[int, int], bits: int) -> int:
    N, K = shape
    return N * row_bytes(K, bits)


def _other_bytes(model: nn.Module, config: PreQuantConfig, family: Family | None) -> int:
    """Of the model once quantized, as a checkpoint holds it, all but the codes of its matrices."""
    total = sum(parameter.nbytes for parameter in model.parameters())
    for row in plan(model, config, family):
        before = sum(parameter.nbytes for parameter in model.get_submodule(row.name).parameters())
        total += row.bytes - before - (_code_bytes(row.shape, row.bits) if row.kind == "linear" else 0)
    return total


# ---- the allocation --------------------------------------------------------------------------------------------------


class Choice(NamedTuple):
    """Blocks with the bits of each: what they take and what they lose."""

    bytes: int
    squared_error: float
    bits: tuple[int, ...]


def best_choices(options: Sequence[Sequence[Choice]], budget_bytes: float = math.inf) -> list[Choice]:
    """Every choice of one option a block that no smaller or equal choice beats, smallest first: the whole trade of size
    against error, up to a budget.

    Exact, by dynamic programming over the blocks, where going down the convex hull greedily would leave what the last
    step does not fill. It stays small: the blocks of a stack have one size, so the sums of n of them are few.
    """
    least_left = [min(option.bytes for option in own) for own in options]
    front = [Choice(0, 0.0, ())]
    for i, own in enumerate(options):
        room = budget_bytes - sum(least_left[i + 1 :])
        sums = (
            Choice(a.bytes + b.bytes, a.squared_error + b.squared_error, a.bits + b.bits) for a in front for b in own
        )
        front = _unbeaten(choice for choice in sums if choice.bytes <= room)
    return front


def _unbeaten(choices: Iterable[Choice]) -> list[Choice]:
    front: list[Choice] = []
    for choice in sorted(choices, key=lambda choice: (choice.bytes, choice.squared_error)):
        if not front or choice.squared_error < front[-1].squared_error:
            front.append(choice)
    return front


def propose_bits(options: Sequence[Mapping[int, tuple[int, float]]], budget_bytes: float) -> tuple[int, ...]:
    """Bits of each block, of least total squared error within ``budget_bytes``; ``options``: bits -> (bytes, squared
    error) of each block.

    A width whose container another one fills with less error is never proposed: 3 bits take the place of 4, and 5 to 7
    that of 8.

    Raises ValueError where even the smallest options do not fit.
    """
    smallest = sum(min(size for size, _ in own.values()) for own in options)
    if budget_bytes < smallest:
        raise ValueError(
            f"budget_bytes must be at least {smallest:,}, which the narrowest codes take, got {budget_bytes:,.0f}"
        )
    return best_choices(
        [[Choice(size, error, (bits,)) for bits, (size, error) in own.items()] for own in options], budget_bytes
    )[-1].bits


@dataclass(frozen=True)
class BlockBits:
    """A block with the bits proposed for it; squared_error and code_bytes of its matrices by bits."""

    block: Block
    bits: int
    weights: int
    squared_error: Mapping[int, float]
    code_bytes: Mapping[int, int]


@dataclass(frozen=True)
class Proposal:
    """Bits of each block within a budget. ``str()`` is a table.

    layer_bits       for PreQuantConfig, rules of whole runs of blocks
    model_bytes      of the quantized model, as a checkpoint holds it; bits_per_weight: stored bits of its matrices'
                     codes, on average
    squared_error    of all matrices
    """

    layer_bits: dict[str, int]
    blocks: tuple[BlockBits, ...]
    model_bytes: int
    bits_per_weight: float
    squared_error: float

    @property
    def titles(self) -> tuple[str, ...]:
        return (
            "block",
            "weights",
            *(f"L2 error, {bits} bits" for bits in self.blocks[0].squared_error),
            "proposed bits",
        )

    def cells(self) -> list[Sequence[str]]:
        """A row a block, below ``titles``."""
        return [
            (
                f"{own.block.stack}.{own.block.index}",
                f"{own.weights:,}",
                *(f"{math.sqrt(error):.4g}" for error in own.squared_error.values()),
                str(own.bits),
            )
            for own in self.blocks
        ]

    def caption(self) -> str:
        rules = ", ".join(f"{rule}={bits}" for rule, bits in self.layer_bits.items())
        size = f"{self.bits_per_weight:.2f} stored bits a weight, model of {self.model_bytes / 1e6:,.2f} MB"
        return f"proposed: {rules}\n{size}, L2 error of the matrices {math.sqrt(self.squared_error):.4g}"

    def __str__(self) -> str:
        return f"{table(self.titles, self.cells())}\n\n{self.caption()}"

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return dataclasses.asdict(self)


def propose_layer_bits(
    measured: Sensitivity, *, budget_bytes: float | None = None, bits_per_weight: float | None = None
) -> Proposal:
    """The ``layer_bits`` of least total squared error within a budget, exactly one of

    budget_bytes     of the whole quantized model, as a checkpoint holds it
    bits_per_weight  stored bits of the matrices' codes, on average

    Sizes are those of the containers (2, 4 or 8 bits).

    Raises ValueError for no budget or two, for one that is no positive number or that not even the narrowest widths
    meet, and where the blocks are unknown.
    """
    if (budget_bytes is None) == (bits_per_weight is None):
        raise ValueError(
            f"the budget is either budget_bytes or bits_per_weight, got {budget_bytes!r} and {bits_per_weight!r}"
        )
    name, budget = ("budget_bytes", budget_bytes) if budget_bytes is not None else ("bits_per_weight", bits_per_weight)
    if isinstance(budget, bool) or not isinstance(budget, int | float) or not math.isfinite(budget) or budget <= 0:
        raise ValueError(f"{name} must be a positive number, got {budget!r}")
    options = block_options(measured)
    smallest = sum(min(size for size, _ in own.values()) for own in options.values())
    code_budget = budget - measured.other_bytes if budget_bytes is not None else budget * measured.weights / 8
    if code_budget < smallest:
        narrowest, least = min(measured.widths), measured.other_bytes + smallest
        raise ValueError(
            f"{name} must be at least {least:,} ({least / 1e6:.2f} MB), the model with {narrowest} bits in every "
            f"block, got {budget:,.0f}"
            if budget_bytes is not None
            else f"{name} must be at least {8 * smallest / measured.weights:.4g}, what {narrowest} bits in every "
            f"block take, got {budget:g}"
        )
    bits = propose_bits([*options.values()], code_budget)
    return _proposal(measured, dict(zip(options, bits, strict=True)))


def block_options(measured: Sensitivity) -> dict[Block, dict[int, tuple[int, float]]]:
    """bits -> (code bytes, squared error) of each block. Raises ValueError as :meth:`Sensitivity.by_block`."""
    return {
        block: {
            bits: (sum(each.code_bytes[bits] for each in own), sum(each.squared_error[bits] for each in own))
            for bits in measured.widths
        }
        for block, own in measured.by_block().items()
    }


def _proposal(measured: Sensitivity, chosen: Mapping[Block, int]) -> Proposal:
    rows, by_block = [], measured.by_block()
    for block, options in block_options(measured).items():
        sizes, errors = ({bits: option[i] for bits, option in options.items()} for i in (0, 1))
        weights = sum(math.prod(each.shape) for each in by_block[block])
        rows.append(BlockBits(block, chosen[block], weights, errors, sizes))  # type: ignore[arg-type]
    size = sum(row.code_bytes[row.bits] for row in rows)
    error = sum(row.squared_error[row.bits] for row in rows)
    return Proposal(rules_of(chosen), tuple(rows), measured.other_bytes + size, 8 * size / measured.weights, error)


def rules_of(chosen: Mapping[Block, int]) -> dict[str, int]:
    """The rules of ``layer_bits`` for the bits of blocks in the model's order, one a run of neighbours with equal bits:
    {"encoder.0-3": 4, "encoder.4": 2}.
    """
    runs: list[tuple[Block, Block, int]] = []
    for block, bits in chosen.items():
        if runs and (runs[-1][1].stack, runs[-1][1].index + 1, runs[-1][2]) == (block.stack, block.index, bits):
            runs[-1] = (runs[-1][0], block, bits)
        else:
            runs.append((block, block, bits))
    return {
        f"{first.stack}.{first.index}{'' if first is last else f'-{last.index}'}": bits for first, last, bits in runs
    }
