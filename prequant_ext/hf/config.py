"""PreQuantConfig as transformers keeps it: ``quantization_config`` of a model's config.json."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from prequant_ext.config import FORMAT_VERSION, PreQuantConfig
from prequant_ext.families import Family

METHOD = PreQuantConfig.quant_method


class PreQuantHfConfig(QuantizationConfigMixin):
    """A :class:`PreQuantConfig` as ``quantization_config`` of a model's config.json, with what a reader of the files
    must know besides.

    config         the settings
    family         the family row the model was quantized with, where it is not the table's own
    float_modules  modules that the float checkpoint lacked, hence fresh float layers; names without the base model's
                   prefix
    dtype          of the float part. The model's own ``dtype`` would name that of the first parameter, often a float32
                   scale

    Raises ValueError on an unknown setting, or a ``format_version`` newer than this library's.
    """

    def __init__(
        self,
        config: PreQuantConfig | None = None,
        *,
        format_version: int = FORMAT_VERSION,
        family: Family | Mapping[str, Any] | None = None,
        float_modules: Iterable[str] = (),
        dtype: str | None = None,
        quant_method: str = METHOD,
        **settings: Any,
    ):
        if not isinstance(format_version, int) or format_version < 1:
            raise ValueError(f"format_version must be an integer of at least 1, got {format_version!r}")
        if format_version > FORMAT_VERSION:  # before the settings, which a newer version may have added to
            raise ValueError(
                f"the checkpoint has format_version {format_version}, but this prequant_ext reads up to "
                f"format_version {FORMAT_VERSION}: upgrade prequant_ext"
            )
        self.quant_method = quant_method
        self.format_version = format_version
        self.config = PreQuantConfig.from_dict(settings) if config is None else config
        self.family = Family(**family) if isinstance(family, Mapping) else family
        self.float_modules = tuple(float_modules)
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype must name a torch dtype, such as bfloat16, got {dtype!r}")
        self.dtype = dtype

    @classmethod
    def wrap(cls, config: Any) -> "PreQuantHfConfig":
        """``config`` itself, or around a PreQuantConfig or the dict of a config.json."""
        if isinstance(config, cls):
            return config
        if isinstance(config, PreQuantConfig):
            return cls(config)
        if isinstance(config, Mapping):
            return cls(**config)
        raise ValueError(
            f"quantization_config must be a PreQuantConfig for a prequant checkpoint, got {type(config).__name__}"
        )

    def to_dict(self) -> dict[str, Any]:
        family = None if self.family is None else dataclasses.asdict(self.family)
        own = {"family": family, "float_modules": list(self.float_modules), "dtype": self.dtype}
        return {"quant_method": self.quant_method, "format_version": self.format_version, **self.config.to_dict()} | {
            k: v for k, v in own.items() if v
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict has it: where a loaded model's config is passed on, transformers asks its quantization_config like
        the dict of a config.json.
        """
        return self.to_dict().get(key, default)

    def check_agrees(self, asked: "PreQuantHfConfig") -> None:
        """Raises ValueError naming the settings that differ from ``asked``'s: the file's codes cannot follow another
        config.
        """
        stored, wanted = self.config.to_dict(), asked.config.to_dict()
        differing = [
            f"{name} = {stored[name]!r}, not {wanted[name]!r}" for name in stored if stored[name] != wanted[name]
        ]
        if differing:
            raise ValueError(
                f"quantization_config contradicts the checkpoint, which was quantized with {'; '.join(differing)}; "
                "leave it out to load the file as it is"
            )
