"""Strategies of distributed training that cannot train a quantized model: refused as early as they can be seen."""

import os
import sys
from typing import Any

import torch


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
