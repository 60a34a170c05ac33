"""One training: what is asked, and what came of it. Both travel between processes, and into runs.jsonl, as JSON."""

import dataclasses
import json
from dataclasses import dataclass
from typing import Any

from prequant_ext.baselines import METHODS
from prequant_ext.glue.tasks import get_task

# Of a small model; larger ones want less (the paper: 1e-4 to 9e-4 for PreQuant, 1e-5 to 4e-5 for full fine-tuning).
LEARNING_RATES = dict.fromkeys(METHODS, 5e-3) | {
    **dict.fromkeys(("ft", "ptq", "qat", "qat_vanilla"), 5e-5),
    **dict.fromkeys(("alphatuning", "prequant_alpha"), 5e-4),  # scales are a few hundredths
    **dict.fromkeys(("lora", "qlora", "bitfit"), 2e-3),
}
FLOAT_METHODS = ("ft", "bitfit", "lora")  # that quantize nothing
L1_STRENGTH = 1e-5  # of the distance in the first run of prequant_ticket
PLACES = ("model", "data_dir")  # settings that say where something is, not what the run is
ASKED_FOR = ("options", "first_lr", "l1_strength")  # settings that a line of runs.jsonl has where they are no default


@dataclass(frozen=True)
class RunSettings:
    """One run.

    model          a directory or a hub name
    lr             None: LEARNING_RATES of the method; of ptq, that of its full fine-tuning
    first_lr       of the full fine-tuning that prequant_ticket begins with; None: LEARNING_RATES of ft
    quantization   the PreQuantConfig of methods that quantize; None: its defaults, but for prequant and prequant_alpha,
                   whose model is then quantized already
    options        of the method: settings of baselines.Options by name, config, calibration and tuned apart
    l1_strength    ft: of the L1 distance to the pre-trained weights that is added to the loss

    Raises ValueError for an unknown task or method, numbers out of range, and settings that the method does not have.
    """

    model: str
    task: str
    method: str = "prequant"
    data: str = "glue"
    data_dir: str | None = None
    epochs: int = 3
    lr: float | None = None
    seed: int = 0
    batch_size: int = 32
    max_length: int = 128
    max_train: int | None = None
    quantization: dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    first_lr: float | None = None
    l1_strength: float = 0.0

    def __post_init__(self) -> None:
        get_task(self.task)
        if self.method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {self.method!r}")
        for name in ("epochs", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("lr", "first_lr"):
            rate = getattr(self, name)
            if rate is not None and not rate > 0:
                raise ValueError(f"{name} must be positive, got {rate}")
        if self.method in FLOAT_METHODS and self.quantization is not None:
            raise ValueError(f"method {self.method} trains a float model; quantization must be None")
        if not self.l1_strength >= 0 or (self.l1_strength > 0 and self.method != "ft"):
            raise ValueError(
                f"l1_strength must be at least 0, and 0 unless the method is ft, got {self.l1_strength} with "
                f"{self.method}"
            )
        if self.first_lr is not None and METHODS[self.method].begins_with != "ticket":
            raise ValueError(
                f"first_lr is of a full fine-tuning that comes first, and {self.method} begins with none; got "
                f"{self.first_lr}"
            )

    def first_run(self) -> "RunSettings | None":
        """The full fine-tuning that the method begins with."""
        begins_with = METHODS[self.method].begins_with
        if begins_with is None:
            return None
        is_ticket = begins_with == "ticket"
        lr, strength = (self.first_lr, L1_STRENGTH) if is_ticket else (self.lr, 0.0)
        return dataclasses.replace(
            self, method="ft", lr=lr, first_lr=None, quantization=None, options=None, l1_strength=strength
        )

    @property
    def learning_rate(self) -> float:
        return LEARNING_RATES[self.method] if self.lr is None else self.lr

    @property
    def wanted(self) -> dict[str, Any]:
        """What makes two runs of a model the same, as a line of runs.jsonl has it."""
        left_out = {name for name in ASKED_FOR if getattr(self, name) == getattr(RunSettings, name)}
        return {name: value for name, value in vars(self).items() if name not in {*PLACES, *left_out}}

    @property
    def identity(self) -> str:
        """``wanted`` as text: equal for two runs of a model that are the same."""
        return json.dumps(self.wanted, sort_keys=True)

    def describe(self) -> str:
        """For people: the task, the method with what is not its default, rate, seed, length."""
        changes = (self.quantization or {}) | (self.options or {})
        changed = ", ".join(f"{name} {value}" for name, value in changes.items())
        rows = f", {self.max_train:,} rows" if self.max_train else ""
        name = f"{self.method} ({changed})" if changed else self.method
        return f"{self.task} {name}, lr {self.learning_rate:g}, seed {self.seed}, {self.epochs} epochs{rows}"


@dataclass(frozen=True)
class RunResult:
    """What came of a run: what it scored, what it cost. Scores are fractions of 1, of the best epoch."""

    task: str
    method: str
    score: float
    scores: dict[str, float]
    best_epoch: int
    epoch_scores: list[float]
    lr: float
    seed: int
    epochs: int
    batch_size: int
    max_length: int
    n_train: int
    n_validation: int
    trainable_parameters: int
    seconds: float  # training with its evaluations; loading not counted
    peak_memory_mb: float  # above what the imports hold
    model_bytes: int  # all tensors of the model
    task_bytes: int  # those that were trained
    model: str
    data: str
    quantization: dict[str, Any] | None
    environment: dict[str, Any]
    predictions: str  # of the best epoch, one for each validation example in file order; see metrics.pack
    labels: str
    # sqrt(sum (w' - w)^2) over the matrices that were quantized in this run
    quantization_error: float | None = None
    # Jaccard, of the dimensions with those that have most outliers, mean over matrices; None where those were chosen
    overlap: float | None = None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RunResult":
        return cls(**json.loads(text))


@dataclass(frozen=True)
class FinishedRun:
    """A line of runs.jsonl. ``settings.model`` is the name that the line keeps, wherever the model lay."""

    settings: RunSettings
    result: RunResult

    def to_line(self) -> str:
        line = {"wanted": self.settings.wanted} | dataclasses.asdict(self.result) | {"model": self.settings.model}
        return json.dumps(line) + "\n"

    @classmethod
    def from_line(cls, text: str) -> "FinishedRun":
        line = json.loads(text)
        return cls(RunSettings(line["model"], **line.pop("wanted")), RunResult(**line))
