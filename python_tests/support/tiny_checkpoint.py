"""A two-layer BERT with random weights and a word-level tokenizer of the generated task's words, as a directory: real
code paths in seconds.
"""

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from prequant_ext.glue.synthetic import FILLERS, TOPICS

WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "[MASK]",
    *dict.fromkeys([*FILLERS, *(word for words in TOPICS for word in words)]),
]


def save_float_model(folder):
    """Write the model to ``folder`` and return it as text."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    config = BertConfig(vocab_size=len(WORDS), initializer_range=0.2, **sizes)
    folder.mkdir(parents=True, exist_ok=True)
    BertModel(config).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder)
    return str(folder)
