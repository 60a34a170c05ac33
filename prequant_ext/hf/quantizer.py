"""What transformers calls before, while and after it loads a model: quantize a float checkpoint weight by weight, or
check a quantized one.
"""

import copy
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    rename_source_key,
)
from transformers.integrations.accelerate import get_device
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import HfQuantizer

from prequant_ext import checkpoint, quantize
from prequant_ext.distributed import check_strategy
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.frozen import quantized_modules
from prequant_ext.hf.config import PreQuantHfConfig
from prequant_ext.linear import PreQuantLinear, quantized_linears
from prequant_ext.model import empty_layer, freeze_base, to_float
from prequant_ext.reference import container_bits
from prequant_ext.sites import Site, find_sites, without_base_prefix
from prequant_ext.strictness import warn

# a table has the first three
TENSORS = ("weight_packed", "weight_scale", "weight_zero_point", "outlier_dims", "outlier_weight")


class PackedRenaming(WeightRenaming):
    """X.weight on disk <-> X.weight_packed in memory, for the quantized modules of one model."""

    __slots__ = ()

    @classmethod
    def of(cls, model: PreTrainedModel) -> "list[PackedRenaming]":
        prefix = f"{model.base_model_prefix}."
        names = [name.removeprefix(prefix) for name, _ in quantized_modules(model)]
        if not names:
            return []
        # Names in full, with and without the base model's prefix (the loader adds or strips it afterwards). No "$": it
        # would stay in saved keys.
        spelled = "|".join(re.escape(f"{start}{name}") for name in names for start in ("", prefix))
        return [cls(rf"^({spelled})\.weight", r"\1.weight_packed")]


class _Refusal(dict):
    """A conversion's result that raises when the loader takes it up, as the loader would swallow an exception of the
    conversion itself.
    """

    def __init__(self, error: Exception):
        super().__init__()
        self.error = error

    def items(self) -> Any:
        raise self.error


class QuantizeWhileLoading(ConversionOps):
    """One float weight, just read from disk -> the tensors of its quantized module. The loader calls it weight by
    weight, and drops the float one after.
    """

    def __init__(self, quantizer: "PreQuantHfQuantizer"):
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], model: Any = None, full_layer_name: str = "", **_: Any
    ) -> dict[str, Tensor]:
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        name = full_layer_name.rpartition(".")[0]
        try:
            return {
                f"{name}.{key}": tensor
                for key, tensor in self.quantizer.quantized(model.get_submodule(name), weight, name).items()
            }
        except Exception as error:
            return _Refusal(error)


class PreQuantHfQuantizer(HfQuantizer):
    """What transformers calls before, while and after it loads a model."""

    requires_calibration = False
    quantization_config: PreQuantHfConfig

    def __init__(self, quantization_config: Any, pre_quantized: bool = True, **kwargs: Any):
        # A copy: loading writes into it, and the caller's may serve several models.
        super().__init__(
            copy.deepcopy(PreQuantHfConfig.wrap(quantization_config)), pre_quantized=pre_quantized, **kwargs
        )
        self.sites: dict[str, Site] = {}
        self.dtype = torch.get_default_dtype()
        self.given_state_dict: dict[str, Tensor] | None = None

    # ---- before

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        check_strategy()

    def update_attn_implementation(self, config: Any) -> Any:
        """The one place that sees the model's config before ``dtype="auto"`` is settled: it must find the model's
        dtype, not the first scale's.
        """
        if self.pre_quantized and self.quantization_config.dtype is not None:
            config.dtype = getattr(torch, self.quantization_config.dtype)
        return config

    def update_dtype(self, dtype: torch.dtype) -> torch.dtype:
        self.dtype = dtype
        return dtype

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, device_map: Any = None, **_: Any
    ) -> None:
        stored = self.quantization_config
        if stored.family is not None:
            model._prequant_family = stored.family
        sites = find_sites(model, stored.config, stored.family, allow_unmatched=self.pre_quantized)
        self.sites = {
            site.name: site for site in sites if without_base_prefix(model, site.name) not in stored.float_modules
        }
        # "auto" is settled only once the modules are in place
        if not self.pre_quantized and isinstance(device_map, Mapping):
            checkpoint.refuse_disk(
                name for name in self.sites if get_device(device_map, f"{name}.weight_packed") == "disk"
            )
        for site in self.sites.values():
            model.set_submodule(site.name, self._empty_module(model, site))  # on the meta device: nothing is allocated
        if checkpoint_files is None:  # a state_dict was given: its tensors are checked once they are loaded
            return
        headers = _by_name_in_memory(model, self, checkpoint.read_headers(checkpoint_files))
        if self.pre_quantized:
            checkpoint.check_quantized_headers(model, headers)
        else:
            checkpoint.check_float_headers(model, headers)
            self._warn_if_rounded(headers)

    def _empty_module(self, model: Any, site: Site) -> PreQuantLinear | PreQuantEmbedding:
        module = empty_layer(site, model.get_submodule(site.name), self.quantization_config.config)
        # T5's wo in float16: the layer computes as the float one would
        kept_in_float32 = model._get_dtype_plan(self.dtype)
        if kept_in_float32 and build_glob_alternation(list(kept_in_float32))[0].search(f"{site.name}.weight"):
            return module.to(torch.float32)
        return module

    def _warn_if_rounded(self, headers: Mapping[str, checkpoint.Header]) -> None:
        """A dtype that cannot hold the checkpoint's values rounds them before they are quantized: other codes, another
        base.
        """
        weights = {headers[key].dtype for key in (f"{name}.weight_packed" for name in self.sites) if key in headers}
        rounded = [
            str(dtype)
            for dtype in weights
            if isinstance(dtype, torch.dtype) and torch.promote_types(dtype, self.dtype) != self.dtype
        ]
        if rounded:
            warn(
                f"dtype={self.dtype} rounds the checkpoint's {', '.join(sorted(rounded))} weights before they are "
                "quantized: this base differs from the one "
                'made in the checkpoint\'s own dtype, and task files do not fit both. Quantize with dtype="auto", '
                "save, and load that with any dtype"
            )

    # ---- while

    def param_needs_quantization(self, model: Any, param_name: str, **kwargs: Any) -> bool:
        name, _, parameter_name = param_name.rpartition(".")
        return not self.pre_quantized and parameter_name == "weight_packed" and name in self.sites

    def get_quantize_ops(self) -> QuantizeWhileLoading:
        return QuantizeWhileLoading(self)

    def quantized(self, module: PreQuantLinear | PreQuantEmbedding, weight: Tensor, name: str) -> dict[str, Tensor]:
        """The parameters of ``module`` from its float weight: the same calls that quantize_model makes."""
        config, site = self.quantization_config.config, self.sites[name]
        if isinstance(module, PreQuantEmbedding):
            table = quantize.quantize_table(weight, config, name=name)
            return dict(zip(TENSORS, table, strict=False))
        weight = weight.T if site.is_transposed else weight
        matrix = quantize.quantize_matrix(
            weight, config, name=name, axis=module.axis, bits=site.bits, hidden_size=site.hidden_size
        )
        module.squared_error = matrix.squared_error
        return {key: getattr(matrix, key) for key in TENSORS}

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any) -> list[Any]:
        return weight_conversions + PackedRenaming.of(model)

    # ---- after

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        if not self.pre_quantized:
            checkpoint.refuse_disk(name for name in self.sites if model.get_submodule(name).weight_packed.is_meta)
        absent = [name for name in self.sites if not checkpoint.is_loaded(model.get_submodule(name).weight_packed)]
        if absent and self.pre_quantized:
            raise ValueError(
                f"the quantized checkpoint has no {absent[0]}.weight, which {type(model).__name__} needs "
                f"({len(absent)} absent in all)"
            )
        if absent and not any(site.kind == "linear" for name, site in self.sites.items() if name not in absent):
            raise ValueError(
                f"the checkpoint has none of the weights that {type(model).__name__} would quantize, such as "
                f"{absent[0]}.weight: is it of another model?"
            )
        for name in absent:
            self._put_fresh_layer(model, name)
        if absent:
            self.quantization_config.float_modules = tuple(
                sorted(
                    {*self.quantization_config.float_modules, *(without_base_prefix(model, name) for name in absent)}
                )
            )
            warn(f"absent from the checkpoint, now freshly initialised float layers: {checkpoint.some(absent)}")
        for name in self.sites.keys() - set(absent):
            bias = getattr(model.get_submodule(name), "bias", None)
            if bias is not None and not checkpoint.is_loaded(bias):
                if self.pre_quantized:
                    raise ValueError(f"the quantized checkpoint has no {name}.bias, which {type(model).__name__} needs")
                nn.init.zeros_(bias)  # what transformers' own initialisation would do; it passes over our class
        for name, module in quantized_modules(model):
            checkpoint.check_values(name, module)
            if isinstance(module, PreQuantLinear):
                module.prepack_()
        freeze_base(model)  # the loader has turned on requires_grad of every float tensor
        return model

    def _put_fresh_layer(self, model: Any, name: str) -> None:
        """Replace a module whose weight the float checkpoint lacks, uninitialised memory by now, with the float layer
        that transformers would make.
        """
        site, empty = self.sites.pop(name), model.get_submodule(name)
        N, K = site.shape
        if isinstance(empty, PreQuantEmbedding):
            layer: nn.Module = nn.Embedding(N, K, padding_idx=empty.padding_idx)
        else:
            layer = Conv1D(N, K) if site.is_transposed else nn.Linear(K, N, bias=empty.bias is not None)
        layer = layer.to(dtype=empty.compute_dtype, device=empty.weight_packed.device)
        bias = getattr(empty, "bias", None)
        if bias is not None and checkpoint.is_loaded(bias):
            layer.bias = bias
        model.set_submodule(name, layer)
        # T5 initialises its layers from their parent; what is loaded is flagged and stays
        model._init_weights(model.get_submodule(name.rpartition(".")[0]))
        model._init_weights(layer)

    # ---- saving and training

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """Called before the config is written: the moment to note the model's dtype. What this returns is saved: the
        ``state_dict`` that save_pretrained was given, or None for the model's own.
        """
        linears = [module for _, module in quantized_linears(model)]
        if all(container_bits(module.bits) == 8 for module in linears):
            warn(
                "every matrix is stored in 8 bits a weight, which is the shape of the float one: a program that opens "
                "this checkpoint without "
                "`import prequant_ext` takes the codes for weights and only logs it; with fewer bits in one matrix it "
                "would stop"
            )
        model.config.quantization_config.dtype = str(checkpoint.compute_dtype(model)).removeprefix("torch.")
        return self.given_state_dict, {}

    @contextmanager
    def saving(self, state_dict: dict[str, Tensor] | None) -> Iterator[None]:
        """While save_pretrained runs, which was given ``state_dict``."""
        self.given_state_dict = state_dict
        try:
            yield
        finally:
            self.given_state_dict = None

    def _dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        return to_float(model)

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        """Read by Trainer's constructor once its Accelerator is there:
        the first moment at which the strategy is known.
        """
        check_strategy()
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Else Trainer refuses a quantized model that PEFT has not wrapped."""
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def _by_name_in_memory(
    model: PreTrainedModel, quantizer: PreQuantHfQuantizer, headers: Mapping[str, checkpoint.Header]
) -> dict[str, checkpoint.Header]:
    """``headers`` by the names that the loader will give to the tensors."""
    conversions = get_model_conversion_mapping(model, hf_quantizer=quantizer)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    in_memory = model.state_dict()
    return {
        rename_source_key(key, renamings, converters, model.base_model_prefix, in_memory)[0]: header
        for key, header in headers.items()
    }
