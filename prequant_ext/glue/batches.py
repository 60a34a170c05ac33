"""From rows of text to batches of tokens: encoding, batches of similar length, dynamic padding."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import Sampler

from prequant_ext.glue.tasks import Row, Task

Example = dict[str, Any]
# batches that are sorted by length together: enough to save most padding, few enough to keep the order random
MEGA_BATCHES = 50


def encode(rows: Sequence[Row], tokenizer: Any, task: Task, max_length: int) -> list[Example]:
    """Token ids of each row, cut at ``max_length``, with ``labels``."""
    if max_length < 2:
        raise ValueError(f"max_length must be at least 2, got {max_length}")
    texts = [[row[field] for row in rows] for field in task.fields]
    encoded = tokenizer(*texts, truncation=True, max_length=max_length)
    return [
        {key: values[i] for key, values in encoded.items()} | {"labels": row["label"]} for i, row in enumerate(rows)
    ]


def by_length(examples: Sequence[Example]) -> list[int]:
    """Indices from the longest example to the shortest, ties in order: evaluation reads examples so, with little
    padding and its peak at the start.
    """
    return sorted(range(len(examples)), key=lambda i: -len(examples[i]["input_ids"]))


class Collator:
    """Pads a batch to its own longest example."""

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("tokenizer must have a pad token: batches are padded to their longest example")
        self.padding = {
            "input_ids": tokenizer.pad_token_id,
            "token_type_ids": tokenizer.pad_token_type_id,
            "attention_mask": 0,
        }
        self.pads_left = tokenizer.padding_side == "left"

    def __call__(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        longest = max(len(example["input_ids"]) for example in examples)
        batch = {}
        for key in examples[0]:
            if key == "labels":
                batch[key] = torch.tensor([example[key] for example in examples])
                continue
            rows = []
            for example in examples:
                padding = [self.padding[key]] * (longest - len(example[key]))
                rows.append(padding + example[key] if self.pads_left else example[key] + padding)
            batch[key] = torch.tensor(rows)
        return batch


class LengthGroupedSampler(Sampler[int]):
    """Every index once an epoch, so that ``batch_size`` consecutive ones have similar lengths; batches come in random
    order.

    The order is a function of (seed, epoch) alone: a resumed run sees what an uninterrupted one would have seen.
    transformers' own sampler leaves each mega-batch sorted from long to short, which ties the length of a batch to the
    learning rate of its step.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths, self.batch_size, self.seed, self.epoch = list(lengths), batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + self.epoch)
        indices = torch.randperm(len(self.lengths), generator=generator).tolist()
        # The incomplete batch has to be the last one: the batch sampler cuts every batch_size indices.
        whole = len(indices) - len(indices) % self.batch_size
        rest = indices[whole:]
        batches = []
        span = self.batch_size * MEGA_BATCHES
        for begin in range(0, whole, span):
            mega = sorted(indices[begin : min(begin + span, whole)], key=self.lengths.__getitem__)
            batches += [mega[i : i + self.batch_size] for i in range(0, len(mega), self.batch_size)]
        order = torch.randperm(len(batches), generator=generator).tolist()
        return iter([index for i in order for index in batches[i]] + rest)
