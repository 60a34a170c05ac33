"""PreQuantConfig: every setting of the method, validated here and nowhere else."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

FORMAT_VERSION = 1  # of the checkpoint: raised when a reader of the old one would go wrong

STRATEGY_NAMES = ("outlier_aware", "min_max", "mse", "row_wise", "group_wise", "group_wise_sigma")
SELECTOR_NAMES = ("outlier", "random", "ticket", "error")
DEFAULT_GROUP_SIZE = 128

LayerBits = Sequence[int] | Mapping[str, int]
OutlierThreshold = float | tuple[str, float]


def _require(condition: bool, name: str, wanted: str, value: object) -> None:
    if not condition:
        raise ValueError(f"{name} must be {wanted}, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class PreQuantConfig:
    """Settings of PreQuant (Gong et al., Findings of ACL 2023). Frozen; two equal configs make byte-identical bases.

    bits                    width of the weight codes, 2 to 8 (stored in 2-, 4- or 8-bit containers)
    strategy                how the range of a scale is chosen: outlier_aware (6 sigma, Section 4.2), min_max, mse,
                            row_wise, group_wise, group_wise_sigma
    group_size              weights per scale of the group strategies; None: 128
    r                       outlier dimensions of each matrix, kept in float32 and trained; 0: none
    axis                    "hidden": input columns of matrices that read the residual stream, output rows of those that
                            write it (the paper); "input": columns everywhere; "output": rows everywhere
    selector                how the r dimensions are chosen: outlier (Eq. 3), random, ticket, error
    outlier_threshold       k of ``|w - mean| > k * sigma``, or ("density", eps) or ("log_density", v), natural
                            logarithm
    activation_bits         8: activations entering each quantized layer are quantized dynamically; None: weight-only
    activation_granularity  "token": a range for each row; "tensor": one range
    embedding_bits          8: embedding tables are quantized; None: they stay float
    layer_bits              bits of single blocks: a list with one entry a block (encoder first), or rules such as
                            {"layers.0-7": 2}, later ones win
    init                    first value of the outlier weights: "original", or "dequantized" (what the codes would have
                            given)
    train_scales            PreQuant-alpha (Table 2): r = 0, one trained scale per hidden_size consecutive weights of a
                            row
    modules_to_not_convert  names or dotted suffixes of modules that stay float
    seed                    of the random selector
    embedding_granularity   "row": a range for each row of a table; "tensor": one range
    raw_outlier_activations leave the outlier columns out of the 8-bit activation range and multiply them from x itself
    (input-axis layers)

    Raises ValueError naming the setting, what was wanted and what came.
    """

    quant_method: ClassVar[str] = "prequant"  # by which transformers knows whose quantization_config this is

    bits: int = 4
    strategy: str = "outlier_aware"
    group_size: int | None = None
    r: int = 5
    axis: str = "hidden"
    selector: str = "outlier"
    outlier_threshold: OutlierThreshold = 3.0
    activation_bits: int | None = 8
    activation_granularity: str = "token"
    embedding_bits: int | None = 8
    layer_bits: LayerBits | None = None
    init: str = "original"
    train_scales: bool = False
    modules_to_not_convert: tuple[str, ...] | None = None
    seed: int = 0
    embedding_granularity: str = "row"
    raw_outlier_activations: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.bits) and 2 <= self.bits <= 8, "bits", "an integer from 2 to 8", self.bits)
        _require(self.strategy in STRATEGY_NAMES, "strategy", f"one of {', '.join(STRATEGY_NAMES)}", self.strategy)
        _require(
            self.group_size is None or (_is_int(self.group_size) and self.group_size > 0),
            "group_size",
            "a positive integer or None",
            self.group_size,
        )
        if self.group_size is not None and not self.strategy.startswith("group_wise"):
            raise ValueError(
                f"group_size = {self.group_size} needs a group strategy (group_wise, group_wise_sigma), got "
                f"strategy={self.strategy!r}"
            )
        _require(_is_int(self.r) and self.r >= 0, "r", "an integer of at least 0", self.r)
        _require(self.axis in ("hidden", "input", "output"), "axis", "hidden, input or output", self.axis)
        _require(self.selector in SELECTOR_NAMES, "selector", f"one of {', '.join(SELECTOR_NAMES)}", self.selector)
        object.__setattr__(self, "outlier_threshold", _checked_threshold(self.outlier_threshold))
        for name in ("activation_bits", "embedding_bits"):
            width = getattr(self, name)
            _require(width is None or (_is_int(width) and width == 8), name, "8 or None", width)
        _require(
            self.activation_granularity in ("token", "tensor"),
            "activation_granularity",
            "token or tensor",
            self.activation_granularity,
        )
        object.__setattr__(self, "layer_bits", _checked_layer_bits(self.layer_bits))
        _require(self.init in ("original", "dequantized"), "init", "original or dequantized", self.init)
        _require(isinstance(self.train_scales, bool), "train_scales", "True or False", self.train_scales)
        if self.train_scales and self.r != 0:
            raise ValueError(
                "train_scales=True (PreQuant-alpha) trains scales instead of outlier dimensions and needs r = 0, got "
                f"r = {self.r}"
            )
        if self.train_scales and self.strategy not in ("outlier_aware", "min_max", "mse"):
            raise ValueError(
                "train_scales=True starts from one scale per tensor (outlier_aware, min_max or mse), got "
                f"strategy={self.strategy!r}"
            )
        if self.modules_to_not_convert is not None:
            names = self.modules_to_not_convert
            is_list = (
                not isinstance(names, str)
                and isinstance(names, Sequence)
                and all(isinstance(name, str) for name in names)
            )
            _require(is_list, "modules_to_not_convert", "a list of module names or None", names)
            object.__setattr__(self, "modules_to_not_convert", tuple(names))
        _require(_is_int(self.seed), "seed", "an integer", self.seed)
        _require(
            self.embedding_granularity in ("row", "tensor"),
            "embedding_granularity",
            "row or tensor",
            self.embedding_granularity,
        )
        _require(
            isinstance(self.raw_outlier_activations, bool),
            "raw_outlier_activations",
            "True or False",
            self.raw_outlier_activations,
        )

    @classmethod
    def paper(cls, **changes: Any) -> "PreQuantConfig":
        """The settings as printed: activations and embedding tables per tensor, outlier weights started from their
        dequantized values.

        ``changes`` override single settings. The library's defaults differ from these three only: a range per token and
        per row loses less where one value dwarfs the rest, and starting from the original values loses nothing where
        quantization hurts most.
        """
        printed = {"activation_granularity": "tensor", "embedding_granularity": "tensor", "init": "dequantized"}
        return cls(**(printed | changes))

    @classmethod
    def best(cls, **changes: Any) -> "PreQuantConfig":
        """The settings that come closest to full fine-tuning of those tried (docs/results.md): a scale per 128 weights,
        and the dimensions of largest error.

        ``changes`` override single settings. As many weights are trained as by default; scales and zero points add 0.31
        bits a weight. Every matrix's in_features must be a multiple of 128, or ``group_size`` another divisor.
        """
        return cls(**({"strategy": "group_wise", "selector": "error"} | changes))

    @property
    def group(self) -> int:
        """Weights per scale of the group strategies."""
        return self.group_size or DEFAULT_GROUP_SIZE

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready settings; the inverse of :meth:`from_dict`."""
        settings = dataclasses.asdict(self)
        for name in ("outlier_threshold", "layer_bits", "modules_to_not_convert"):
            if isinstance(settings[name], tuple):
                settings[name] = list(settings[name])
        return settings

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> "PreQuantConfig":
        """Settings from :meth:`to_dict`. An unknown name is a ValueError: it may be a setting of a newer version that
        changes the meaning.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(settings) - known)
        if unknown:
            raise ValueError(f"PreQuantConfig knows no setting {', '.join(unknown)}; it has {', '.join(sorted(known))}")
        return cls(**settings)


def _checked_threshold(threshold: Any) -> OutlierThreshold:
    wanted = 'a positive number k, ("density", eps > 0) or ("log_density", v)'
    if _is_number(threshold):
        _require(threshold > 0, "outlier_threshold", wanted, threshold)
        return float(threshold)
    is_pair = (
        isinstance(threshold, tuple | list)
        and len(threshold) == 2
        and threshold[0] in ("density", "log_density")
        and _is_number(threshold[1])
    )
    _require(is_pair and (threshold[0] == "log_density" or threshold[1] > 0), "outlier_threshold", wanted, threshold)
    return (threshold[0], float(threshold[1]))


def _checked_layer_bits(layer_bits: Any) -> LayerBits | None:
    if layer_bits is None:
        return None
    is_rules = isinstance(layer_bits, Mapping)
    is_list = isinstance(layer_bits, Sequence) and not isinstance(layer_bits, str)
    _require(is_rules or is_list, "layer_bits", "a list with one entry a block, or a dict of rules", layer_bits)
    entries = layer_bits.values() if is_rules else layer_bits
    for entry in entries:
        _require(_is_int(entry) and 2 <= entry <= 8, "layer_bits", "bits from 2 to 8", entry)
    if not is_rules:
        return tuple(layer_bits)
    for rule in layer_bits:
        _require(isinstance(rule, str) and bool(rule), "layer_bits", 'rules like "layers.0-7" or "encoder.3"', rule)
    return dict(layer_bits)
