"""PreQuantConfig: every setting of the method, validated here and nowhere else."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
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


def _any_of(choices: Sequence[str]) -> str:
    """Such as "hidden, input or output"; more than three are a list."""
    return f"one of {', '.join(choices)}" if len(choices) > 3 else f"{', '.join(choices[:-1])} or {choices[-1]}"


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass(frozen=True)
class Option:
    """An option of the command line that takes a value for a setting.

    type   of what is typed: int, float, str, or list[str] for an option that may be repeated
    help   what --help says; ``{default}`` in it is the setting's default
    name   of the option, where it is not the setting's
    read   makes the setting's value of what was typed, where the two are not the same
    """

    type: Any
    help: str
    name: str | None = None
    read: Callable[[Any], Any] | None = None


@dataclass(frozen=True)
class Flag:
    """An option of the command line that takes no value, and gives the setting the value ``sets``.

    implies   other settings that it changes, unless they are given
    """

    name: str
    help: str
    sets: Any
    implies: Mapping[str, Any] = field(default_factory=dict)


def _offered(*options: Option | Flag, choices: Sequence[str] = (), after: str | None = None) -> dict[str, Any]:
    """A field's metadata. choices: the values that it may have; after: the setting behind whose options --help has
    these, where that is not the one above.
    """
    return {"options": options, "choices": tuple(choices), "after": after}


def layer_rules(texts: Sequence[str]) -> dict[str, int]:
    """layer_bits of rules such as ``layers.0-7=2``. Raises ValueError for anything else."""
    rules = {}
    for text in texts:
        blocks, separator, bits = text.rpartition("=")
        if not separator or not bits.isdecimal():
            raise ValueError(f"layer_bits must be rules such as layers.0-7=2, got {text!r}")
        rules[blocks] = int(bits)
    return rules


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

    bits: int = field(
        default=4, metadata=_offered(Option(int, "width of the weight codes, 2 to 8 (default: {default})"))
    )
    strategy: str = field(
        default="outlier_aware",
        metadata=_offered(
            Option(str, "how the range of a scale is chosen (default: {default})"), choices=STRATEGY_NAMES
        ),
    )
    group_size: int | None = field(
        default=None,
        metadata=_offered(Option(int, f"weights per scale of the group strategies (default: {DEFAULT_GROUP_SIZE})")),
    )
    r: int = field(default=5, metadata=_offered(Option(int, "outlier dimensions of each matrix (default: {default})")))
    axis: str = field(
        default="hidden",
        metadata=_offered(
            Option(str, "which dimensions may be outlier dimensions (default: {default})"),
            choices=("hidden", "input", "output"),
        ),
    )
    selector: str = field(
        default="outlier",
        metadata=_offered(Option(str, "how they are chosen (default: {default})"), choices=SELECTOR_NAMES),
    )
    outlier_threshold: OutlierThreshold = field(
        default=3.0, metadata=_offered(Option(float, "k of |w - mean| > k sigma (default: {default:g})"))
    )
    activation_bits: int | None = field(
        default=8,
        metadata=_offered(
            Option(int, "width of the activation codes: 8"), Flag("weight_only", "leave activations float", sets=None)
        ),
    )
    activation_granularity: str = field(
        default="token",
        metadata=_offered(
            Option(str, "one range a token, or one a tensor (default: {default})"), choices=("token", "tensor")
        ),
    )
    embedding_bits: int | None = field(
        default=8, metadata=_offered(Flag("float_embeddings", "leave embedding tables float", sets=None))
    )
    layer_bits: LayerBits | None = field(
        default=None,
        metadata=_offered(
            Option(list[str], "bits of single blocks, such as layers.0-7=2; may be repeated", read=layer_rules),
            after="bits",
        ),
    )
    init: str = field(
        default="original",
        metadata=_offered(
            Option(str, "first value of the outlier weights (default: {default})"), choices=("original", "dequantized")
        ),
    )
    train_scales: bool = field(
        default=False,
        metadata=_offered(
            Flag(
                "train_scales",
                "PreQuant-alpha: train scales instead of outlier dimensions",
                sets=True,
                implies={"r": 0},
            )
        ),
    )
    modules_to_not_convert: tuple[str, ...] | None = field(
        default=None,
        metadata=_offered(Option(list[str], "a module that stays float; may be repeated", name="exclude", read=tuple)),
    )
    seed: int = field(default=0, metadata=_offered(Option(int, "of the random selector (default: {default})")))
    embedding_granularity: str = field(default="row", metadata=_offered(choices=("row", "tensor")))
    raw_outlier_activations: bool = False

    def __post_init__(self) -> None:
        _require(_is_int(self.bits) and 2 <= self.bits <= 8, "bits", "an integer from 2 to 8", self.bits)
        for setting in dataclasses.fields(self):
            if choices := setting.metadata.get("choices"):
                value = getattr(self, setting.name)
                _require(value in choices, setting.name, _any_of(choices), value)
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
        object.__setattr__(self, "outlier_threshold", _checked_threshold(self.outlier_threshold))
        for name in ("activation_bits", "embedding_bits"):
            width = getattr(self, name)
            _require(width is None or (_is_int(width) and width == 8), name, "8 or None", width)
        object.__setattr__(self, "layer_bits", _checked_layer_bits(self.layer_bits))
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
