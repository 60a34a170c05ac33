"""A generated task in the shape of any GLUE task: for trying the commands without data, and used only when asked for by
name.

The label is the topic that most words of the first text belong to (a regression's: the share of words of topic 0, times
5). It says nothing about GLUE.
"""

import random
from typing import Any

TOPICS = (
    ["river", "forest", "mountain", "valley", "meadow", "ocean", "island", "desert", "canyon", "glacier"],
    ["engine", "circuit", "hammer", "bolt", "wire", "motor", "switch", "valve", "piston", "gear"],
    ["violin", "melody", "rhythm", "chorus", "concert", "trumpet", "singer", "tempo", "harmony", "drum"],
)
FILLERS = [
    "the",
    "a",
    "of",
    "and",
    "near",
    "with",
    "under",
    "some",
    "every",
    "this",
    "old",
    "small",
    "quiet",
    "one",
    "other",
]
ROWS = {"train": 512, "validation": 128}
TOP_LABEL = 5.0


def generate(fields: tuple[str, ...], num_labels: int, split: str) -> list[dict[str, Any]]:
    """The same rows at every call. ``num_labels`` 1: a regression."""
    rng = random.Random(f"{split} {fields} {num_labels}")
    return [_row(rng, fields, num_labels, number) for number in range(ROWS[split])]


def _row(rng: random.Random, fields: tuple[str, ...], num_labels: int, number: int) -> dict[str, Any]:
    label: int | float
    if num_labels == 1:
        of_first = number % 6
        topics = [0] * of_first + [1] * (5 - of_first)
        label = of_first / 5 * TOP_LABEL
    else:
        label = number % num_labels
        other = (label + rng.randrange(1, num_labels)) % num_labels
        # a minority word of another topic: one word alone must not give the answer away
        topics = [label] * 3 + [other] * rng.randrange(2)
    words = [rng.choice(TOPICS[topic]) for topic in topics] + rng.choices(FILLERS, k=rng.randrange(2, 9))
    rng.shuffle(words)
    texts = {field: " ".join(rng.choices(FILLERS, k=rng.randrange(3, 7))) for field in fields[1:]}
    return {fields[0]: " ".join(words)} | texts | {"label": label}
