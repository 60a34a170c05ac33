"""The matrices that every method quantizes or adapts: those that PreQuant would, so that all work on the same weights.
Embeddings stay float.
"""

import dataclasses
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from prequant_ext.config import PreQuantConfig
from prequant_ext.model import head_parameter_names
from prequant_ext.sites import Site, find_sites

Make = Callable[[Site, Tensor, Tensor | None], nn.Module]


def matrices_of(
    model: nn.Module, config: PreQuantConfig, *, group_size: int | None = None, has_hidden_groups: bool = False
) -> list[Site]:
    """In the model's order. Raises ValueError as find_sites.

    group_size, has_hidden_groups   what must divide each matrix's K: this number; the width of its residual stream
    """
    plain = dataclasses.replace(
        config,
        strategy="outlier_aware",
        group_size=None,
        r=0,
        selector="outlier",
        train_scales=False,
        embedding_bits=None,
    )
    if group_size is not None:
        plain = dataclasses.replace(plain, strategy="group_wise", group_size=group_size)
    return find_sites(model, dataclasses.replace(plain, train_scales=has_hidden_groups))


def replace_matrices(model: nn.Module, sites: Iterable[Site], make: Make) -> None:
    """Put ``make(site, weight (N, K), bias)`` in the place of each; none of them, if one cannot be made."""
    layers = {}
    for site in sites:
        module: Any = model.get_submodule(site.name)
        weight = module.weight.detach()
        layers[site.name] = make(site, weight.T if site.is_transposed else weight, module.bias).train(module.training)
    for name, layer in layers.items():
        model.set_submodule(name, layer)


def train_only(model: nn.Module, names: Iterable[str]) -> dict[str, nn.Parameter]:
    """Freeze everything but the parameters called ``names`` and the task head, and return those,
    in the model's order.
    """
    chosen = {*names, *head_parameter_names(model)}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in chosen)
    return {name: parameter for name, parameter in model.named_parameters() if name in chosen}


def parameters_called(model: nn.Module, kind: type[nn.Module], *own_names: str) -> list[str]:
    """Full names of these parameters of all modules of one kind."""
    return [
        f"{name}.{own}"
        for name, module in model.named_modules()
        if isinstance(module, kind)
        for own in own_names
        if getattr(module, own) is not None
    ]
