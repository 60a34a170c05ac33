"""Models for tasks: with a head that is the same for every method, made into what a method trains, the rest frozen."""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from prequant_ext.baselines import METHODS, Options
from prequant_ext.directory import classifier_class, load_tokenizer
from prequant_ext.glue.tasks import Task
from prequant_ext.linear import quantized_linears


def load_model(path: str, task: Task, seed: int) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer): the task's head on the backbone, float or quantized as it lies there.

    Head tensors that the checkpoint does not hold are drawn from ``seed`` by :func:`initialise_head`, so all methods
    start from the same head.

    Raises OSError where there is no such model, or no tokenizer beside it.
    """
    model_class = classifier_class(path)
    tokenizer = load_tokenizer(path)
    model, loading = model_class.from_pretrained(
        path, num_labels=task.num_labels, dtype=torch.float32, output_loading_info=True
    )
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    initialise_head(model, loading["missing_keys"], seed)
    return model, tokenizer


def make_ready(model: PreTrainedModel, method: str, options: Options | None) -> None:
    """What ``method`` trains, unfrozen, and the rest frozen. options: None for a model that is what the method trains
    already.

    Raises ValueError where a method gets the other kind of model, and what the method's ``prepare`` raises.
    """
    is_quantized = any(quantized_linears(model))
    trains_quantized = method in ("prequant", "prequant_alpha")
    if is_quantized and (options is not None or not trains_quantized):
        why = "quantizes it itself" if trains_quantized else "needs a float model"
        raise ValueError(f"method {method} {why}, but {model.config.name_or_path} is quantized already")
    if not is_quantized and options is None and trains_quantized:
        raise ValueError(
            f"method {method} needs a quantized model (prequant quantize), but {model.config.name_or_path} is a float "
            "one"
        )
    if options is not None:
        METHODS[method].prepare(model, options)
    METHODS[method].trainables(model)


@torch.no_grad()
def initialise_head(model: PreTrainedModel, missing: Sequence[str], seed: int) -> None:
    """Draw the parameters called ``missing``: matrices from N(0, initializer_range^2), norm weights 1, biases 0, in the
    order of their names.

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
