"""Small quantized models with PEFT adapters that differ from their base."""

import torch
from peft import get_peft_model

from prequant_ext import PreQuantConfig, quantize_model
from prequant_ext.peft import PreQuantColumnsConfig
from support.tiny_models import tiny_model, token_ids


def quantized(model_type="bert", head="classifier", **changes):
    model = tiny_model(model_type, head)
    quantize_model(model, PreQuantConfig(**({"r": 3} | changes)))
    return model


@torch.no_grad()
def train_a_little(model, seed=0):
    """Move everything that is trained, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def adapted(base=None, name="default", **settings):
    """A model with one adapter that differs from the base."""
    return train_a_little(
        get_peft_model(quantized() if base is None else base, PreQuantColumnsConfig(**settings), name)
    ).eval()


@torch.no_grad()
def logits(model, **kwargs):
    return model(input_ids=token_ids(), **kwargs).logits


def two_adapters(base=None, **settings):
    """The adapters mrpc and sst2; sst2 is active."""
    model = adapted(base, "mrpc", **settings)
    model.add_adapter("sst2", PreQuantColumnsConfig(**settings))
    model.set_adapter("sst2")
    return train_a_little(model, 1)
