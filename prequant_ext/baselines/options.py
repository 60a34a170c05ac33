"""What a method is given besides the model, and what it hands to the runner."""

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from prequant_ext.config import DEFAULT_GROUP_SIZE, PreQuantConfig

if TYPE_CHECKING:  # a list of methods and their settings needs no torch
    from torch import Tensor, nn

Batch = Mapping[str, "Tensor"]  # what the model is called with, labels apart


@dataclass(frozen=True)
class Options:
    """One set of choices for all methods; each reads its own.

    config              bits, layer_bits and activation_bits of every method that quantizes; all of it for PreQuant's
                        own and qlora
    group_size          ptq, qat: weights of a row that share a scale; it must divide each matrix's K
    calibration         batches that ptq, qat and quadapter set their ranges with
    activation_groups   ptq: ranges for the channels of a matrix, each for those whose own ranges are alike (Bondarenko
                        et al., 2021); 1: a single one
    bits_per_weight     PreQuant's own: the bits of blocks within this average, by what each loses (bit_allocation.py),
                        in the place of the config's
    rank                lora, qlora: of the update
    refinements         alphatuning: alternations of the binary coding after its greedy start
    calibration_steps   quadapter: of Adam, on each block
    tuned               prequant_ticket: the weights after the L1-distance run, as a model or its state dict

    Raises ValueError naming the option, what was wanted and what came.
    """

    config: PreQuantConfig = field(default_factory=PreQuantConfig)
    calibration: Sequence[Batch] = ()
    group_size: int = DEFAULT_GROUP_SIZE
    activation_groups: int = 1
    bits_per_weight: float | None = None
    rank: int = 8
    refinements: int = 15
    calibration_steps: int = 50
    tuned: "nn.Module | Mapping[str, Tensor] | None" = None

    def __post_init__(self) -> None:
        for name, least in (
            ("group_size", 1),
            ("activation_groups", 1),
            ("rank", 1),
            ("refinements", 0),
            ("calibration_steps", 0),
        ):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")


@dataclass(frozen=True)
class Method:
    """A method, by the name of its module.

    begins_with   the training that comes first, on the float model: "ft", or "ticket" (L1 distance to the pre-trained
                  weights); None: the pre-trained model
    is_trained    false where nothing is left to train after ``prepare``
    """

    name: str
    title: str
    begins_with: str | None = None
    is_trained: bool = True
    needs_calibration: bool = False

    def prepare(self, model: "nn.Module", options: Options) -> None:
        """Make of a float model, in place, what the method trains or evaluates."""
        self._module().prepare(model, options)

    def trainables(self, model: "nn.Module") -> "dict[str, nn.Parameter]":
        """What trains, by name; the rest is frozen."""
        return self._module().trainables(model)

    def _module(self) -> Any:
        return importlib.import_module(f"prequant_ext.baselines.{self.name}")
