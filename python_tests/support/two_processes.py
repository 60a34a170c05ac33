"""Trains the toy BERT under DDP and under FSDP2, each process on its half of every batch; test_distributed.py starts
two by torchrun.

torchrun --nproc-per-node 2 two_processes.py FOLDER      writes what each process has in the end
"""

import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import distributed, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict, set_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from prequant_ext import PreQuantConfig, prepare_model, quantize_model
from prequant_ext.task import add_task, load_task, save_task, set_task
from support.toys import make_toy

STEPS, BATCH = 3, 8
WHOLE = StateDictOptions(full_state_dict=True)


def quantized_bert() -> PreTrainedModel:
    """In eval mode: without dropout, whose draws two processes would not share."""
    model = make_toy("bert")
    quantize_model(model, PreQuantConfig(r=2))
    return model


def batches() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(3)
    for _ in range(STEPS):
        yield torch.randint(3, 99, (BATCH, 7), generator=generator), torch.randint(0, 2, (BATCH,), generator=generator)


def train(model: nn.Module, rank: int = 0, processes: int = 1) -> None:
    optimizer = torch.optim.SGD(
        [parameter for parameter in model.parameters() if parameter.requires_grad], lr=0.1, momentum=0.9
    )
    for ids, labels in batches():
        optimizer.zero_grad()
        model(input_ids=ids.chunk(processes)[rank], labels=labels.chunk(processes)[rank]).loss.backward()
        optimizer.step()


def live_through_tasks(model: nn.Module, folder: Path, name: str, rank: int = 0, processes: int = 1) -> None:
    """Train the task of fsdp0.task on, then a new one, then the first again: the switch back comes after a forward pass
    that no backward follows.
    """
    load_task(model, folder / "fsdp0.task", "first")
    train(model, rank, processes)
    add_task(model, "second")
    train(model, rank, processes)
    with torch.no_grad():
        model(input_ids=next(batches())[0])
    set_task(model, "first")
    train(model, rank, processes)
    for task in ("first", "second"):
        save_task(model, task, folder / f"{name}_{task}{rank}.task")


def shard(model: PreTrainedModel) -> None:
    for block in model.bert.encoder.layer:
        fully_shard(block)
    fully_shard(model)


def main(folder: Path) -> None:
    distributed.init_process_group("gloo")
    rank, processes = distributed.get_rank(), distributed.get_world_size()

    model = quantized_bert()
    train(DistributedDataParallel(prepare_model(model)), rank, processes)
    save_file(model.state_dict(), folder / f"ddp{rank}.safetensors")

    for name, arguments in {"fsdp": {"sharded": True}, "unprepared": {}}.items():
        model = prepare_model(quantized_bert(), **arguments)
        shard(model)
        start = get_model_state_dict(model, options=WHOLE)
        train(model, rank, processes)
        state = get_model_state_dict(model, options=WHOLE)
        save_file(state, folder / f"{name}{rank}.safetensors")
        save_task(model, "toy", folder / f"{name}{rank}.task")  # gathers: every process calls it
    if rank == 0:
        model.save_pretrained(folder / "saved", state_dict=state)

    distributed.barrier()  # fsdp0.task is there
    for name in ("late", "early"):
        model = prepare_model(quantized_bert(), sharded=True)
        if name == "early":
            add_task(model, "other")
        shard(model)
        live_through_tasks(model, folder, name, rank, processes)
    try:
        model(input_ids=next(batches())[0], task_names=["first"] * BATCH)
    except ValueError as error:
        (folder / f"mixed{rank}.txt").write_text(str(error))

    model = prepare_model(quantized_bert(), sharded=True)
    fully_shard(model)
    set_model_state_dict(model, state, options=WHOLE)
    save_file(get_model_state_dict(model, options=WHOLE), folder / f"loaded{rank}.safetensors")
    save_file(start, folder / f"start{rank}.safetensors")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
