"""What --toy stands for: a two-layer BERT of random weights, a tokenizer of a few dozen words, and generated rows.
Offline, and quick on one core.
"""

from pathlib import Path

import torch
from transformers import BertConfig, BertModel, BertTokenizerFast

from prequant_ext.glue.synthetic import FILLERS, TOPICS
from prequant_ext.glue.tasks import get_task, load_rows


def save_model(folder: Path) -> str:
    """Write the model and its tokenizer to ``folder``, which is returned."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *FILLERS, *(word for topic in TOPICS for word in topic)]
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "max_position_embeddings": 64,
    }
    BertModel(BertConfig(vocab_size=len(words), initializer_range=0.1, **sizes)).save_pretrained(folder)
    BertTokenizerFast(vocab={word: i for i, word in enumerate(words)}).save_pretrained(folder)
    return str(folder)


def rows(task: str, split: str) -> tuple[list[str], list[int]]:
    """(texts, labels) of a generated task of the shape of a GLUE task of single sentences."""
    found = load_rows(get_task(task), split, source="synthetic")
    return [row["sentence"] for row in found], [row["label"] for row in found]
