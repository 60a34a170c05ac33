"""Tiny transformers models with random weights, one of each family that the tests go through."""

from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

_SIZES = {
    "vocab_size": 99,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 40,
}
_GPT2 = {
    "vocab_size": 99,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 2,
    "n_positions": 40,
    "bos_token_id": 1,
    "eos_token_id": 1,
    "pad_token_id": 0,
}
_T5 = {
    "vocab_size": 99,
    "d_model": 32,
    "d_kv": 16,
    "d_ff": 64,
    "num_layers": 2,
    "num_heads": 2,
    "decoder_start_token_id": 0,
}
_LLAMA = _SIZES | {"num_key_value_heads": 1, "head_dim": 16, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}

TOYS = {  # name: class of the model, class of its config, sizes
    "bert": ("BertForSequenceClassification", "BertConfig", _SIZES),
    "roberta": ("RobertaForSequenceClassification", "RobertaConfig", _SIZES),
    "mpnet": ("MPNetForSequenceClassification", "MPNetConfig", _SIZES),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"vocab_size": 99, "dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    ),
    "electra": ("ElectraForSequenceClassification", "ElectraConfig", _SIZES | {"embedding_size": 16}),
    "deberta-v2": (
        "DebertaV2ForSequenceClassification",
        "DebertaV2Config",
        _SIZES
        | {
            "relative_attention": True,
            "pos_att_type": ["c2p", "p2c"],
            "position_buckets": 8,
            "norm_rel_ebd": "layer_norm",
        },
    ),
    "modernbert": (
        "ModernBertForSequenceClassification",
        "ModernBertConfig",
        _SIZES | {"pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2},
    ),
    "t5": ("T5ForConditionalGeneration", "T5Config", _T5),
    "t5 encoder": ("T5EncoderModel", "T5Config", _T5 | {"feed_forward_proj": "gated-gelu"}),
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", _GPT2),
    "opt": ("OPTForCausalLM", "OPTConfig", _SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}),
    "llama": ("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": ("MistralForCausalLM", "MistralConfig", _LLAMA),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", _LLAMA),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", _LLAMA),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", _LLAMA),
}


def make_toy(name: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> PreTrainedModel:
    """The toy ``name`` in eval mode. Weights are ten times as large as usual,
    so that every layer shows in the output.
    """
    model_class, config_class, sizes = TOYS[name]
    torch.manual_seed(seed)
    model = getattr(transformers, model_class)(
        getattr(transformers, config_class)(**sizes, initializer_range=0.2) if "t5" not in name else _t5_config(sizes)
    )
    return model.to(dtype).eval()


def _t5_config(sizes: dict) -> transformers.T5Config:
    return transformers.T5Config(**sizes, initializer_factor=1.0)


def save_toy(name: str, directory: Path, dtype: torch.dtype = torch.float32) -> type[PreTrainedModel]:
    """Write the toy's float checkpoint; returns its class."""
    model = make_toy(name, dtype)
    model.save_pretrained(directory)
    return type(model)


def toy_inputs(model: PreTrainedModel, batch: int = 3, length: int = 7) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 99, (batch, length), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids} | (
        {"decoder_input_ids": ids} if model.config.is_encoder_decoder and hasattr(model, "lm_head") else {}
    )


def toy_output(model: PreTrainedModel) -> torch.Tensor:
    """Logits, or the last hidden state of a model without a head, on the toy inputs."""
    with torch.no_grad():
        return model(**toy_inputs(model))[0]


def assert_same(model: nn.Module, other: nn.Module) -> None:
    """Same tensors, bit for bit, and the same output."""
    left, right = model.state_dict(), other.state_dict()
    assert left.keys() == right.keys()
    differing = [key for key in left if left[key].dtype != right[key].dtype or not torch.equal(left[key], right[key])]
    assert not differing
    assert torch.equal(toy_output(model), toy_output(other))
