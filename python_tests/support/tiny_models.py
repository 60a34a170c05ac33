"""Two-block models of every family with random weights, and one that no family knows.

The heads together are wider than the hidden size where a configuration allows it: shapes then tell readers from
writers.
"""

import copy
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
)

from prequant_ext.families import Family

HIDDEN, VOCAB = 32, 50

_BERT = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_LLAMA = {**_BERT, "num_key_value_heads": 2, "head_dim": 12, "pad_token_id": 0}

SETTINGS: dict[str, dict[str, Any]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "distilbert": {"dim": HIDDEN, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 40},
    "electra": {**_BERT, "embedding_size": 16},
    "mpnet": _BERT,
    "deberta-v2": {
        **_BERT,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "share_att_key": False,
        "position_buckets": 8,
    },
    "modernbert": {
        **_BERT,
        "pad_token_id": 0,
        "cls_token_id": 1,
        "sep_token_id": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "t5": {
        "d_model": HIDDEN,
        "num_layers": 2,
        "num_decoder_layers": 2,
        "d_ff": 64,
        "d_kv": 12,
        "num_heads": 4,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    },
    "gpt2": {
        "n_embd": HIDDEN,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 40,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 1,
    },
    "opt": {**_BERT, "ffn_dim": 64, "word_embed_proj_dim": 16},
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": {**_LLAMA, "head_dim": 8},
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
}
_CLASSES = {
    "base": AutoModel,
    "classifier": AutoModelForSequenceClassification,
    "masked_lm": AutoModelForMaskedLM,
    "causal_lm": AutoModelForCausalLM,
}


def tiny_model(model_type: str, head: str = "classifier", *, device: str = "cpu", **changes: Any) -> PreTrainedModel:
    """A model in eval mode; the same weights at every call. ``changes`` go to its configuration."""
    config = AutoConfig.for_model(model_type, **({"vocab_size": VOCAB} | SETTINGS.get(model_type, _LLAMA) | changes))
    return from_config(config, _CLASSES[head], device)


def from_config(config: Any, model_class: Any, device: str = "cpu") -> PreTrainedModel:
    torch.manual_seed(0)
    make = model_class.from_config if hasattr(model_class, "from_config") else model_class
    with torch.device(device):
        model = make(config).eval()
    for module in model.modules():
        if device != "meta" and isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.2)  # transformers' 0.02 would leave the blocks next to nothing to say
    return model


def token_ids() -> torch.Tensor:
    # T5's classifier wants an end
    return torch.randint(3, VOCAB, (2, 7), generator=torch.Generator().manual_seed(1)).index_fill(
        1, torch.tensor([6]), 1
    )


@torch.no_grad()
def outputs(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or the last hidden state of a bare model."""
    inputs = {"input_ids": token_ids()}
    if type(model).__name__ in ("T5Model", "T5ForConditionalGeneration"):
        inputs["decoder_input_ids"] = token_ids()
    result = model(**inputs)
    return result.logits if "logits" in result else result.last_hidden_state


class Plain(nn.Module):
    """A module that knows nothing of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(2)
        )
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.classifier(x)


PLAIN_FAMILY = Family({"encoder": "blocks"}, reads=("up",), writes=("down",), heads=("classifier",))


def snapshot(model):
    """Everything that a refusal must leave alone."""
    tensors = {
        name: (id(parameter), parameter.requires_grad, parameter.detach().clone())
        for name, parameter in model.named_parameters()
    }
    return (
        tensors,
        {name: id(module) for name, module in model.named_modules()},
        sorted(vars(model)),
        copy.deepcopy(getattr(model, "config", None)),
    )


def assert_unchanged(model, before):
    tensors, modules, attributes, config = snapshot(model)
    assert modules == before[1] and attributes == before[2] and tensors.keys() == before[0].keys()
    for new, old in zip(tensors.values(), before[0].values(), strict=True):
        assert new[:2] == old[:2]
        torch.testing.assert_close(new[2], old[2], rtol=0, atol=0, equal_nan=True)
    if config is not None:
        assert config.to_dict() == before[3].to_dict()
