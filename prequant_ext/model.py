"""A whole model: plan, quantize, choose what trains, make it float again. Walk, swap, freeze."""

import math
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from prequant_ext import neighbours
from prequant_ext.config import PreQuantConfig
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.families import Family
from prequant_ext.frozen import FrozenWeight, quantized_modules
from prequant_ext.linear import PreQuantLinear
from prequant_ext.quantize import quantize_matrix, quantize_table
from prequant_ext.report import PlanRow, Report, ReportRow
from prequant_ext.sites import (
    Site,
    Uncovered,
    family_of,
    find_sites,
    head_names,
    is_pretrained_model,
    names_outside_base,
    survey,
)
from prequant_ext.strictness import warn

__all__ = [
    "PlanRow",
    "Report",
    "ReportRow",
    "Site",
    "Uncovered",
    "empty_layer",
    "find_sites",
    "freeze_base",
    "head_parameter_names",
    "on_pretrained_models",
    "plan",
    "quantize_model",
    "require_in_memory",
    "require_quantized",
    "to_float",
    "trainable_parameters",
]

ERROR_ROWS = 4096  # of an embedding table are dequantized at a time to measure its error


def empty_layer(
    site: Site, module: Any, config: PreQuantConfig, device: torch.device | str = "meta"
) -> PreQuantLinear | PreQuantEmbedding:
    """The quantized layer that takes the place of ``module``, its tensors not filled in."""
    layer: PreQuantLinear | PreQuantEmbedding
    if site.kind == "embedding":
        layer = PreQuantEmbedding(
            *site.shape,
            padding_idx=module.padding_idx,
            granularity=config.embedding_granularity,
            dtype=module.weight.dtype,
            device=device,
        )
    else:
        layer = PreQuantLinear(
            site.shape[1],
            site.shape[0],
            bias=module.bias is not None,
            axis=str(site.axis),
            config=config,
            bits=site.bits,
            hidden_size=site.hidden_size,
            is_transposed=site.is_transposed,
            dtype=module.weight.dtype,
            device=device,
        )
    layer.quantized_with = config
    return layer


def plan(model: nn.Module, config: PreQuantConfig, family: Family | None = None) -> list[PlanRow]:
    """What ``quantize_model`` would do, one row a module. No data is touched: a model on the meta device will do.
    Raises as :func:`find_sites`.
    """
    return [
        _plan_row(site, empty_layer(site, model.get_submodule(site.name), config))
        for site in find_sites(model, config, family)
    ]


def _plan_row(site: Site, layer: nn.Module) -> PlanRow:
    trainable = sum(parameter.numel() for parameter in layer.parameters() if parameter.requires_grad)
    return PlanRow(
        site.name, site.kind, site.shape, site.axis, site.bits, getattr(layer, "r", 0), trainable, _bytes(layer)
    )


def _bytes(module: nn.Module) -> int:
    if isinstance(module, FrozenWeight):
        return module.stored_bytes()
    return sum(parameter.nbytes for parameter in module.parameters())


def quantize_model(
    model: nn.Module,
    config: PreQuantConfig,
    *,
    family: Family | None = None,
    tuned: nn.Module | Mapping[str, Tensor] | None = None,
) -> Report:
    """Quantize ``model`` in place, once for all tasks; afterwards the outlier weights (or scales) and the task head
    train, the rest is frozen.

    family  where the model reads and writes its residual stream, for a model without a row in FAMILIES
    tuned   the fine-tuned model, or its state dict: selector "ticket" ranks dimensions by how far they moved

    All or nothing: whatever is refused, the model stays as it was. Memory peaks at the float model and the quantized
    one.

    Raises ValueError as :func:`find_sites`, for a model on the meta device, and naming the parameter for weights that
    are not finite. Warns when most of the weights that should be quantized cannot be.
    """
    callbacks = _callbacks() if is_pretrained_model(model) else None
    sites, uncovered = survey(model, config, family)
    modules = {site.name: model.get_submodule(site.name) for site in sites}
    on_meta = next((site.name for site in sites if modules[site.name].weight.is_meta), None)
    if on_meta is not None:
        raise ValueError(
            f"{on_meta}: weight is on the meta device and holds no data: load the model first, or use plan"
        )
    tuned_weights = _tuned_weights(sites, config, tuned)

    layers: dict[str, nn.Module] = {}
    rows = []
    for site in progress(sites, "quantizing"):
        layer, error, num_outliers = _quantize(site, modules[site.name], config, tuned_weights.get(site.name))
        layer.train(modules[site.name].training)
        layers[site.name] = layer
        bytes_before = _bytes(modules[site.name])
        rows.append(
            ReportRow(
                **vars(_plan_row(site, layer)),
                bytes_before=bytes_before,
                l2_error=math.sqrt(error),
                num_outliers=num_outliers,
            )
        )
    before = _bytes(model)
    saved = sum(row.bytes_before - row.bytes for row in rows)
    total_weights = sum(parameter.numel() for parameter in model.parameters())
    report = Report(tuple(rows), tuple(uncovered), total_weights, before, before - saved)
    if report.is_low:
        warn(report.coverage_line())

    try:
        _swap(model, layers)
        if callbacks is not None:
            callbacks.quantized(model, config, family)
    except BaseException:
        _swap(model, modules)
        raise
    if family is not None:
        model._prequant_family = family  # type: ignore[assignment]  # tells the heads of a model that has no row
    freeze_base(model)
    return report


class _Callbacks(NamedTuple):
    """What a transformers model needs to be saved and loaded as a quantized one."""

    quantized: Callable[[Any, PreQuantConfig, Family | None], None]
    made_float: Callable[[Any], None]


_registered: _Callbacks | None = None


def on_pretrained_models(
    quantized: Callable[[Any, PreQuantConfig, Family | None], None], made_float: Callable[[Any], None]
) -> None:
    """Call ``quantized(model, config, family)`` after :func:`quantize_model` and ``made_float(model)`` after
    :func:`to_float` of a transformers model. The plug-in registers both when it is imported.
    """
    global _registered
    _registered = _Callbacks(quantized, made_float)


def _callbacks() -> _Callbacks:
    """Raises ImportError where the plug-in could not be imported: the model could not be saved then."""
    if _registered is None:
        neighbours.require("transformers", "a quantized transformers model")
        raise ImportError("a quantized transformers model needs the plug-in prequant_ext.hf, which is not imported")
    return _registered


def _quantize(
    site: Site, module: Any, config: PreQuantConfig, tuned: Tensor | None
) -> tuple[PreQuantLinear | PreQuantEmbedding, float, int]:
    """The layer for a site, its squared error and its number of outliers."""
    layer = empty_layer(site, module, config)
    weight = module.weight.detach()
    if isinstance(layer, PreQuantEmbedding):
        layer.load_quantized(*quantize_table(weight, config, name=site.name))
        layer.squared_error = _table_error(weight, layer)
        return layer, layer.squared_error, 0
    if site.is_transposed:
        weight, tuned = weight.T, None if tuned is None else tuned.T
    quantized = quantize_matrix(
        weight, config, name=site.name, axis=str(site.axis), bits=site.bits, hidden_size=site.hidden_size, tuned=tuned
    )
    layer.load_quantized(quantized, module.bias)
    return layer, quantized.squared_error, quantized.num_outliers


def _table_error(weight: Tensor, layer: PreQuantEmbedding) -> float:
    ids = torch.arange(len(weight), device=weight.device)
    return sum((layer(rows).double() - weight[rows].double()).square().sum().item() for rows in ids.split(ERROR_ROWS))


def _tuned_weights(
    sites: list[Site], config: PreQuantConfig, tuned: nn.Module | Mapping[str, Tensor] | None
) -> dict[str, Tensor]:
    """Site name -> fine-tuned weight, as the site's module stores it."""
    if (tuned is not None) != (config.selector == "ticket"):
        wanted = (
            "the fine-tuned model or its state dict" if tuned is None else 'selector="ticket", which alone reads it'
        )
        raise ValueError(f"tuned needs {wanted}, got tuned={type(tuned).__name__} and selector={config.selector!r}")
    if tuned is None:
        return {}
    weights = dict(tuned.named_parameters()) if isinstance(tuned, nn.Module) else dict(tuned)
    names = [site.name for site in sites if site.kind == "linear"]
    missing = next((name for name in names if f"{name}.weight" not in weights), None)
    if missing is not None:
        raise ValueError(f"tuned has no {missing}.weight, which selector='ticket' compares with the model's")
    return {name: weights[f"{name}.weight"].detach() for name in names}


def _swap(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    for name, module in modules.items():
        model.set_submodule(name, module)


def progress(sites: list[Site], what: str) -> Iterable[Site]:
    """``sites`` behind a progress bar, unless transformers' switch turns bars off or no bar is installed."""
    logging = sys.modules.get("transformers.utils.logging")
    if logging is not None:
        return logging.tqdm(sites, desc=what, unit="module", leave=False)
    try:
        from tqdm import tqdm
    except ImportError:
        return sites
    return tqdm(sites, desc=what, unit="module", leave=False)


# ---- what trains -----------------------------------------------------------------------------------------------------


def head_parameter_names(model: nn.Module) -> list[str]:
    """Parameters of the task head: those outside a transformers model's base, and its pooler; language-model heads are
    none.

    A bare base model has its pooler or nothing; a model of an unknown family its ``pooler``, whatever that is.
    """
    return head_names(model, family_of(model))


def trainable_parameters(model: nn.Module, *, biases: bool = False, layer_norms: bool = False) -> list[nn.Parameter]:
    """The outlier weights (with train_scales: the scales) and the task head, pooler included; freezes the rest.

    biases, layer_norms  train those of the base model, too

    Raises ValueError for a model that is not quantized, where nothing would train, or where a head holds frozen parts
    of a quantized layer.
    """
    require_quantized(model)
    names = _trainable_names(model, biases, layer_norms)
    for name, module in quantized_modules(model):
        frozen = {"weight_packed", "weight_scale", "weight_zero_point", "outlier_dims"}.difference(module.trained_names)
        chosen = sorted(f"{name}.{own}" for own in frozen if f"{name}.{own}" in names)
        if chosen:
            raise ValueError(
                f"{chosen[0]} belongs to the frozen base but also to the task head: exclude {name} with "
                "modules_to_not_convert"
            )
    if not names:
        raise ValueError(
            f"nothing to train in {type(model).__name__}: it has no outlier weights (r = 0) and no task head; "
            "quantize with r > 0 or train_scales=True, "
            "or load the model with a head"
        )
    _train_only(model, names)
    return [parameter for name, parameter in model.named_parameters() if name in names]


def freeze_base(model: nn.Module) -> None:
    """What :func:`trainable_parameters` trains by default is trainable, the rest is not; a model with nothing to train
    is frozen whole, ready for inference.
    """
    _train_only(model, _trainable_names(model))


def _trainable_names(model: nn.Module, biases: bool = False, layer_norms: bool = False) -> set[str]:
    names = set(head_parameter_names(model))
    in_lm_head = set(names_outside_base(model)) - names
    for name, module in model.named_modules():
        own = {own_name for own_name, _ in module.named_parameters(recurse=False)}
        chosen: set[str] = set()
        is_norm = "norm" in type(module).__name__.lower()
        if isinstance(module, FrozenWeight):
            chosen.update(module.trained_names)
        if biases and not is_norm:
            chosen |= own & {"bias"}
        if layer_norms and is_norm:
            chosen |= own
        names |= {f"{name}.{own_name}".lstrip(".") for own_name in chosen} - in_lm_head
    return names


def _train_only(model: nn.Module, names: set[str]) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in names)


def require_quantized(model: nn.Module) -> None:
    """Raises ValueError where no layer of ``model`` is quantized."""
    if not any(quantized_modules(model)):
        raise ValueError(f"{type(model).__name__} is not quantized: call quantize_model first")


def require_in_memory(model: nn.Module) -> None:
    """Raises ValueError naming a quantized layer without data: device_map has put it on disk, or on the CPU beside a
    GPU, and it is read at each use.
    """
    for name, module in quantized_modules(model):
        if module.weight_scale.is_meta:
            raise ValueError(
                f"{name} is offloaded, which serves inference alone: load the model without offloading "
                "(device_map=None)"
            )


# ---- back to float ---------------------------------------------------------------------------------------------------


def to_float(model: nn.Module) -> nn.Module:
    """Float layers again, in place: ``nn.Linear`` (Conv1D where it was one) and ``nn.Embedding``, holding
    ``dequantize()``. Returns ``model``.

    Every parameter trains again, as in a freshly made model. Raises ValueError if the model is not quantized, or
    offloaded.
    """
    require_quantized(model)
    require_in_memory(model)
    for name, module in list(quantized_modules(model)):
        layer = module.to_embedding() if isinstance(module, PreQuantEmbedding) else module.to_linear()  # type: ignore[operator]
        model.set_submodule(name, layer.train(module.training))
    if is_pretrained_model(model):
        _callbacks().made_float(model)
    vars(model).pop("_prequant_family", None)
    return model.requires_grad_(True)
