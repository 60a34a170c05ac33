"""prepare_model: what a quantized model needs before it is trained. It casts nothing: layers follow their input's
dtype, masters are float32 already.
"""

import os
import sys
from typing import Any

import torch
from torch import nn

from prequant_ext.guards import memory_guard, nan_guard
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import require_in_memory, trainable_parameters
from prequant_ext.sites import is_pretrained_model


def prepare_model(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = False,
    use_reentrant: bool = False,
    sharded: bool = False,
    biases: bool = False,
    layer_norms: bool = False,
    guard_nan: bool = False,
    guard_memory: bool = False,
) -> nn.Module:
    """Make a quantized ``model`` ready for training, in place, and return it: the base frozen, outlier weights (or
    scales) and the head trained.

    gradient_checkpointing  of a transformers model: blocks are run again in the backward pass instead of kept, and the
                            cache of keys and values is off
    use_reentrant           torch's older way to do it; the embeddings, frozen as they are, then have an output with a
                            gradient, which it needs
    sharded                 for FSDP2, before ``fully_shard``: packed codes stay in the layout of the files, whose rows
                            can be cut and filled anywhere
    biases, layer_norms     train those of the base, too, as in :func:`trainable_parameters`
    guard_nan, guard_memory install :func:`nan_guard` and :func:`memory_guard` for good

    Raises ValueError where the model is not quantized, has nothing to train, is offloaded, cannot be checkpointed, or
    where FSDP1 or DeepSpeed's ZeRO-3 is about to take it.
    """
    check_strategy()
    require_in_memory(model)
    if use_reentrant and not gradient_checkpointing:
        raise ValueError("use_reentrant=True is a way of gradient checkpointing and needs gradient_checkpointing=True")
    if gradient_checkpointing and not (is_pretrained_model(model) and model.supports_gradient_checkpointing):
        raise ValueError(
            f"gradient_checkpointing=True needs a transformers model that supports it, got {type(model).__name__}"
        )
    trainable_parameters(model, biases=biases, layer_norms=layer_norms)
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
        model.config.use_cache = False  # type: ignore[union-attr]
    if sharded:
        for module in model.modules():
            if isinstance(module, PreQuantLinear):
                module.stays_canonical = True
                module.unprepack_()
    if guard_nan:
        nan_guard(model)
    if guard_memory:
        memory_guard(model)
    return model


# ---- strategies of distributed training, refused as early as they can be seen ----------------------------------------


def check_strategy() -> None:
    """Raises ValueError where accelerate, its launcher or transformers is set to a strategy that cannot train a
    quantized model, with the reason.
    """
    state = _accelerate_state()
    plugin = getattr(state, "fsdp_plugin", None)
    if getattr(plugin, "fsdp_version", None) == 1 or (
        _is_launched_with("FSDP") and os.environ.get("FSDP_VERSION") == "1"
    ):
        raise ValueError(
            "FSDP1 flattens the parameters of a block into one tensor of floats, which the uint8 codes and int64 "
            "indices of quantized layers cannot join: "
            "use DDP, or FSDP2 (fsdp_version 2)"
        )
    param_dtype = getattr(getattr(plugin, "mixed_precision_policy", None), "param_dtype", None)
    if param_dtype not in (None, torch.float32):
        raise ValueError(
            f"FSDP2 with mixed precision gathers every float parameter in {param_dtype}, but scales and outlier "
            "weights are float32: leave mixed precision off "
            "and load the model in that dtype, which its layers follow"
        )
    if _is_zero3(state):
        raise ValueError(
            "DeepSpeed's ZeRO-3 partitions every parameter, frozen ones too, and leaves it an empty tensor between "
            "uses, but a quantized layer tells the "
            "layout of its codes by their shape: use ZeRO-1, ZeRO-2, DDP or FSDP2"
        )


def _accelerate_state() -> Any:
    """What accelerate is set to, or None: it is optional, and unless it is in use, nothing is."""
    module = sys.modules.get("accelerate.state")
    return module.AcceleratorState() if module is not None and module.AcceleratorState._shared_state else None


def _is_launched_with(strategy: str) -> bool:
    """By ``accelerate launch``, whose settings stand in the environment before there is an Accelerator."""
    return os.environ.get(f"ACCELERATE_USE_{strategy}", "false").lower() == "true"


def _is_zero3(state: Any) -> bool:
    integration = sys.modules.get("transformers.integrations.deepspeed")  # knows of TrainingArguments(deepspeed=...)
    return (
        (integration is not None and integration.is_deepspeed_zero3_enabled())
        or getattr(getattr(state, "deepspeed_plugin", None), "zero_stage", None) == 3
        or (_is_launched_with("DEEPSPEED") and os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE") == "3")
    )
