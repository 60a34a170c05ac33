"""How much each matrix of a model loses to its codes, by strategy (Figure 4): no training, one file of records."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from prequant_ext.blocks import block_holding, blocks_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.directory import resolve_model
from prequant_ext.quantize import quantize_matrix
from prequant_ext.sites import family_of, find_sites
from prequant_ext.task_file import write_atomically

FILE = "fig4.json"
STRATEGIES = ("min_max", "outlier_aware", "mse", "row_wise")


@dataclasses.dataclass(frozen=True)
class MatrixError:
    """||w' - w|| / ||w|| of one matrix. block: its number, encoder first; matrix: its name within the block."""

    strategy: str
    block: int
    matrix: str
    error: float


def error_map(model: nn.Module, config: PreQuantConfig | None = None) -> list[MatrixError]:
    """Of every matrix in the blocks of ``model``, without outlier dimensions. Raises ValueError as find_sites, and
    where the blocks are not known.
    """
    plain = dataclasses.replace(config or PreQuantConfig(), r=0, embedding_bits=None)
    blocks = {block.name: number for number, block in enumerate(blocks_of(model, family_of(model)))}
    if not blocks:
        raise ValueError(f"the blocks of {type(model).__name__} are not known: its errors have no place in a map")
    by_name = {block.name: block for block in blocks_of(model, family_of(model))}
    errors = []
    for strategy in STRATEGIES:
        chosen = dataclasses.replace(plain, strategy=strategy)
        for site in find_sites(model, chosen):
            block = block_holding(site.name, by_name)
            if block is None:
                continue
            module: Any = model.get_submodule(site.name)
            weight = module.weight.detach().T if site.is_transposed else module.weight.detach()
            quantized = quantize_matrix(
                weight, chosen, name=site.name, axis=str(site.axis), bits=site.bits, hidden_size=site.hidden_size
            )
            error = quantized.squared_error**0.5 / weight.double().norm().item()
            errors.append(MatrixError(strategy, blocks[block.name], site.name.removeprefix(f"{block.name}."), error))
    return errors


def write_error_map(folder: Path, model_name: str, errors: list[MatrixError]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(
        folder / FILE,
        json.dumps({"model": model_name, "errors": [dataclasses.asdict(error) for error in errors]}).encode(),
    )


def measure_errors(model: str, out: Path) -> None:
    """Write the error map of a float model to OUT."""
    loaded = AutoModel.from_pretrained(resolve_model(model), dtype=torch.float32)
    write_error_map(out, model, error_map(loaded))


def read_error_map(folder: Path) -> tuple[str, list[MatrixError]] | None:
    """(model, errors); None where there is no map."""
    path = folder / FILE
    if not path.exists():
        return None
    record = json.loads(path.read_text())
    return record["model"], [MatrixError(**error) for error in record["errors"]]
