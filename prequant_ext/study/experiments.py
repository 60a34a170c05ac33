"""The paper's tables and figures as data: which methods, with which settings, make the rows of each.  Gong et al.,
2023, Section 5.

An arm is one row. Equal arms of two experiments are one run: what identifies a run is its settings, not the table that
it stands in.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from prequant_ext.config import PreQuantConfig

# Learning rates that are tried, of small models; the paper's, for larger ones, are 1e-4 to 9e-4 for PreQuant and 1e-5
# to 4e-5 for full fine-tuning.
GRIDS: dict[str, tuple[float, ...]] = {
    "ft": (3e-5, 1e-4, 2e-4),
    "ptq": (3e-5, 1e-4, 2e-4),
    "qat": (3e-5, 1e-4, 2e-4),
    "qat_vanilla": (3e-5, 1e-4, 2e-4),
    "alphatuning": (1e-4, 5e-4, 2e-3),
    "quadapter": (1e-3, 5e-3, 2e-2),
    "prequant": (2e-3, 5e-3, 1e-2),
    "prequant_alpha": (1e-4, 5e-4, 2e-3),
    "prequant_random": (2e-3, 5e-3, 1e-2),
    "prequant_ticket": (2e-3, 5e-3, 1e-2),
    "qlora": (5e-4, 2e-3, 5e-3),
    "bitfit": (1e-3, 3e-3, 1e-2),
    "lora": (5e-4, 2e-3, 5e-3),
}
TABLE4_R = (1, 3, 5, 10, 20, 96, 384)
TABLE6_ROWS = (500, 1000, 2000, 4000, 8000)
FIGURE5_BITS = (2, 3, 4, 8)
ERROR_MAP = "fig4"  # which trains nothing: error_map.py


@dataclass(frozen=True)
class Arm:
    """One row: a method, and what of its settings differs from the defaults.

    options         of the method, settings of baselines.Options by name
    grid            learning rates that are tried, where those of the method do not fit
    seeds_selector  the run's seed also draws the dimensions
    against         the title of the arm that this one's score is compared with, where it is not the experiment's
    """

    title: str
    method: str
    quantization: Mapping[str, Any] | None = None
    max_train: int | None = None
    seeds_selector: bool = False
    options: Mapping[str, Any] | None = None
    grid: tuple[float, ...] | None = None
    against: str | None = None


@dataclass(frozen=True)
class Experiment:
    """against: the title of the arm that the others' scores are compared with; or, where arms name their own, what
    those have in common; None: of none.
    """

    title: str
    arms: tuple[Arm, ...]
    tasks: tuple[str, ...] = ("sst2", "mrpc")
    against: str | None = None


def _prequant(title: str, **changes: Any) -> Arm:
    """With the settings that are no defaults: those that are would make another run of the same."""
    return Arm(
        title, "prequant", {name: value for name, value in changes.items() if value != getattr(PreQuantConfig(), name)}
    )


FT = Arm("full fine-tuning", "ft")
PREQUANT = _prequant("PreQuant")
RANDOM = Arm("PreQuant, random dimensions", "prequant_random", {}, seeds_selector=True)


def table1(blocks: int) -> Experiment:
    paper = PreQuantConfig.paper()
    printed = {name: getattr(paper, name) for name in ("activation_granularity", "embedding_granularity", "init")}
    best = PreQuantConfig.best()
    arms = (
        FT,
        Arm("PTQ, 4 bit", "ptq", {}),
        Arm("QAT, 4 bit", "qat", {}),
        PREQUANT,
        _prequant("PreQuant, the paper's settings", **printed),
        _prequant("PreQuant, best()", strategy=best.strategy, selector=best.selector),
    )
    return Experiment("Methods on GLUE tasks (Table 1)", arms, ("sst2", "mrpc", "qnli"), against=FT.title)


def table2(blocks: int) -> Experiment:
    arms = (
        FT,
        Arm("Quadapter, 8 bit", "quadapter", {}),
        Arm("AlphaTuning, 4 bit", "alphatuning", {}),
        Arm("PreQuant-alpha, 4 bit", "prequant_alpha", {}),
        PREQUANT,
        Arm("LoRA on the 4-bit base, r = 8", "qlora", {}),
        Arm("BitFit, float", "bitfit"),
        Arm("LoRA, float, r = 8", "lora"),
    )
    return Experiment("Parameter-efficient methods (Table 2)", arms, against=PREQUANT.title)


def table3(blocks: int) -> Experiment:
    strategies = ("min_max", "outlier_aware", "mse", "row_wise")
    arms = tuple(_prequant(name, strategy=name) for name in strategies)
    return Experiment("Quantization strategies: error and score (Table 3)", arms, against=PreQuantConfig.strategy)


def table4(blocks: int) -> Experiment:
    arms = tuple(dataclasses.replace(_prequant(f"r = {r}", r=r), grid=_grid_of_r(r)) for r in TABLE4_R)
    return Experiment("Outlier dimensions of a matrix (Table 4)", (*arms, FT), against=f"r = {PreQuantConfig.r}")


def _grid_of_r(r: int) -> tuple[float, ...] | None:
    """The more is trained, the smaller the rate: with 10 dimensions training ends at chance at the largest rate of the
    grid.
    """
    if r < 10:
        return None
    return (1e-3, 2e-3, 5e-3) if r < 96 else (2e-4, 5e-4, 1e-3)


def table5(blocks: int) -> Experiment:
    """2 bits on a third or two of the blocks, counted from the embeddings up; and as many bits in all, given to blocks
    by what they lose.
    """
    if blocks < 3:
        raise ValueError(
            f"table5 gives thirds of the blocks 2 bits: the model must have at least 3 blocks, got {blocks}"
        )
    third, two_thirds = blocks // 3, 2 * blocks // 3

    def rule(first: int, last: int) -> dict[str, int]:
        return {f"layers.{first}-{last}": 2}

    arms = (
        _prequant("4 bits everywhere"),
        _prequant("2 bits on the bottom third", layer_bits=rule(0, third - 1)),
        _prequant("2 bits on the bottom two thirds", layer_bits=rule(0, two_thirds - 1)),
        _prequant("2 bits on the top third", layer_bits=rule(blocks - third, blocks - 1)),
        _prequant("2 bits on the top two thirds", layer_bits=rule(blocks - two_thirds, blocks - 1)),
        Arm("2 bits on a third, by sensitivity", "prequant", {}, options={"bits_per_weight": 4 - 2 * third / blocks}),
        Arm(
            "2 bits on two thirds, by sensitivity",
            "prequant",
            {},
            options={"bits_per_weight": 4 - 2 * two_thirds / blocks},
        ),
    )
    return Experiment("Mixed precision (Table 5)", arms, against=arms[0].title)


def table6(blocks: int) -> Experiment:
    arms = []
    for rows in TABLE6_ROWS:
        tuned = dataclasses.replace(FT, title=f"{FT.title}, {rows:,} rows", max_train=rows)
        arms += [
            tuned,
            dataclasses.replace(
                PREQUANT, title=f"{PREQUANT.title}, {rows:,} rows", max_train=rows, against=tuned.title
            ),
        ]
    return Experiment("Few training rows (Table 6)", tuple(arms), ("sst2",), against=FT.title)


def fig3(blocks: int) -> Experiment:
    tickets, errors = (
        Arm("PreQuant, ticket dimensions", "prequant_ticket", {}),
        _prequant("PreQuant, dimensions of largest error", selector="error"),
    )
    return Experiment(
        "How dimensions are selected (Figure 3)", (PREQUANT, RANDOM, tickets, errors, FT), against=PREQUANT.title
    )


def settings(blocks: int) -> Experiment:
    """Beyond the paper: what may bring PreQuant closer to full fine-tuning, with as many trained weights and, but for
    the scales of groups, as many bits.
    """
    arms = (
        FT,
        PREQUANT,
        _prequant("scales per row", strategy="row_wise"),
        _prequant("scales per group of 128", strategy="group_wise"),
        _prequant("scales per group of 128, dimensions of largest error", strategy="group_wise", selector="error"),
        _prequant("outlier activations left out of the range", raw_outlier_activations=True),
        _prequant("range of least error", strategy="mse"),
    )
    return Experiment("Settings beyond the paper", arms, against=PREQUANT.title)


def fig5(blocks: int) -> Experiment:
    methods = (("PTQ", "ptq"), ("QAT", "qat"), ("PreQuant", "prequant"))
    changes = {bits: {} if bits == PreQuantConfig.bits else {"bits": bits} for bits in FIGURE5_BITS}
    # At 2 bits and the largest rate of its grid, PreQuant ends at chance.
    grids = {("prequant", 2): (1e-3, 2e-3, 5e-3)}
    arms = [
        Arm(f"{title}, {bits} bit", method, changes[bits], grid=grids.get((method, bits)))
        for bits in FIGURE5_BITS
        for title, method in methods
    ]
    return Experiment("Bits of a weight (Figure 5)", (FT, *arms), ("sst2",), against=FT.title)


EXPERIMENTS: dict[str, Callable[[int], Experiment]] = {
    "table1": table1,
    "table2": table2,
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "fig3": fig3,
    "settings": settings,
    "fig5": fig5,
}
