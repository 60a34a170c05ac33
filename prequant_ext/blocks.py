"""The blocks of a model, and the bits that ``layer_bits`` gives to each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from prequant_ext.config import LayerBits
from prequant_ext.families import Family

ALL_STACKS = "layers"  # in a rule: blocks counted through all stacks, in the order of the list form


@dataclass(frozen=True)
class Block:
    """One transformer block: ``index`` counts within its stack."""

    stack: str
    index: int
    name: str


def is_part_of(name: str, part: str) -> bool:
    """Whether the dotted ``part`` occurs in ``name`` as whole components: "layer.0" is a part of
    "encoder.layer.0.output".
    """
    return f".{part}." in f".{name}."


def ends_with(name: str, ending: str) -> bool:
    """Whether ``name`` ends with the dotted ``ending``, as whole components."""
    return f".{name}".endswith(f".{ending}")


def block_lists(model: nn.Module) -> dict[str, nn.Module]:
    """Modules that hold others under the names 0, 1, 2, ..."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList | nn.Sequential) and name
    }


def blocks_of(model: nn.Module, family: Family) -> list[Block]:
    """The blocks of every stack of ``family`` that the model has (an encoder alone has one stack of two).

    Raises ValueError if it has none of them.
    """
    lists = block_lists(model)
    blocks: list[Block] = []
    for stack, path in family.stacks.items():
        found: list[Block] = []
        for name, module in lists.items():
            is_nested = any(name.startswith(f"{block.name}.") for block in found)
            if ends_with(name, path) and not is_nested:
                found += [Block(stack, len(found) + i, f"{name}.{i}") for i in range(len(module))]  # type: ignore[arg-type]
        blocks += found
    if family.stacks and not blocks:
        wanted = ", ".join(family.stacks.values())
        raise ValueError(
            f"{type(model).__name__} has no block list {wanted}; its block lists are {', '.join(lists) or 'none'}"
        )
    return blocks


def block_holding(name: str, blocks: Mapping[str, Block]) -> Block | None:
    """The block that the module called ``name`` is in; ``blocks`` by name."""
    parts = name.split(".")
    prefixes = (".".join(parts[:length]) for length in range(1, len(parts)))
    return next((blocks[prefix] for prefix in prefixes if prefix in blocks), None)


def bits_by_block(layer_bits: LayerBits | None, blocks: list[Block]) -> dict[str, int]:
    """Block name -> bits, for the blocks that ``layer_bits`` names; later rules win.

    Raises ValueError naming a list of the wrong length, or a rule that is malformed or names no block.
    """
    if layer_bits is None:
        return {}
    if not blocks:
        raise ValueError("layer_bits needs to know the blocks of the model: pass family=Family(stacks={...}, ...)")
    if not isinstance(layer_bits, Mapping):
        if len(layer_bits) != len(blocks):
            raise ValueError(
                f"layer_bits must have one entry for each of the {len(blocks)} blocks ({_counts(blocks)}), got "
                f"{len(layer_bits)}"
            )
        return {block.name: bits for block, bits in zip(blocks, layer_bits, strict=True)}
    by_name: dict[str, int] = {}
    for rule, bits in layer_bits.items():
        by_name |= {block.name: bits for block in _blocks_of_rule(rule, blocks)}
    return by_name


def _blocks_of_rule(rule: str, blocks: list[Block]) -> list[Block]:
    match = re.fullmatch(r"(\w+)\.(\d+)(?:-(\d+))?", rule)
    if match is None:
        raise ValueError(
            f'layer_bits: a rule is a stack and a block or a range, such as "layers.0-7" or "encoder.3", got {rule!r}'
        )
    stack, first, last = match[1], int(match[2]), int(match[3] or match[2])
    chosen = [block for block in blocks if block.stack == stack] or (blocks if stack == ALL_STACKS else [])
    if not chosen:
        raise ValueError(
            f"layer_bits: {rule!r} names no stack of this model; it has {_counts(blocks)}, or {ALL_STACKS} for all of "
            "them"
        )
    if not first <= last < len(chosen):
        raise ValueError(
            f"layer_bits: {rule!r} must lie within blocks 0-{len(chosen) - 1} of {stack}, the smaller number first"
        )
    return chosen[first : last + 1]


def _counts(blocks: list[Block]) -> str:
    stacks = dict.fromkeys(block.stack for block in blocks)
    return ", ".join(f"{stack} {sum(block.stack == stack for block in blocks)}" for stack in stacks)
