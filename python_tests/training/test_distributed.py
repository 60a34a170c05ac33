"""DDP and FSDP2 on two processes: what they end with is what one process makes of the whole batches."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BertForSequenceClassification

from prequant_ext.task import load_task
from prequant_ext.task_file import fingerprint, task_tensors
from support import two_processes
from support.toys import assert_same

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """What two processes wrote."""
    path = tmp_path_factory.mktemp("two")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        two_processes.__file__,
        str(path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr[-6000:]
    return path


@pytest.fixture(scope="module")
def alone() -> BertForSequenceClassification:
    model = two_processes.quantized_bert()
    two_processes.train(model)
    return model


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "unprepared"])
def test_ranks_are_equal_and_end_where_one_process_does(strategy, folder, alone):
    first, second = (load_file(folder / f"{strategy}{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == alone.state_dict().keys()
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    start = two_processes.quantized_bert().state_dict()
    trained = {name for name, parameter in alone.named_parameters() if parameter.requires_grad}
    for name, tensor in alone.state_dict().items():
        if name in trained:
            moved = (tensor - start[name]).abs().max().item()
            assert moved > 1e-4
            # sums of halves; a rounded activation may tip over
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-3 * moved, msg=name)
        else:
            assert torch.equal(first[name], tensor), name


def test_a_gathered_state_is_what_save_pretrained_writes(folder):
    model = BertForSequenceClassification.from_pretrained(folder / "saved")
    state = load_file(folder / "unprepared0.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_task_file_of_a_sharded_model_fits_the_base(folder):
    base, other = two_processes.quantized_bert(), two_processes.quantized_bert()
    for rank, model in enumerate((base, other)):
        assert load_task(model, folder / f"fsdp{rank}.task")["base_fingerprint"] == fingerprint(model)
    state = load_file(folder / "fsdp0.safetensors")
    assert all(torch.equal(tensor, state[name]) for name, tensor in base.state_dict().items())
    assert_same(base, other)


@pytest.mark.parametrize("when", ["late", "early"])
def test_tasks_of_a_sharded_model_end_where_those_of_one_process_do(when, folder, tmp_path):
    """early: the model had a task before it was sharded, late: it had none."""
    model = two_processes.quantized_bert()
    shutil.copy(folder / "fsdp0.task", tmp_path)
    two_processes.live_through_tasks(model, tmp_path, "alone")
    for task in ("first", "second"):
        one, first, second = (
            load_file(path)
            for path in (tmp_path / f"alone_{task}0.task", *(folder / f"{when}_{task}{rank}.task" for rank in range(2)))
        )
        start = load_file(folder / "fsdp0.task") if task == "first" else task_tensors(two_processes.quantized_bert())
        assert one.keys() == first.keys() == second.keys() == start.keys()
        for name, tensor in one.items():
            assert torch.equal(first[name], second[name])
            moved = (tensor - start[name]).abs().max().item()
            assert moved > 1e-4
            torch.testing.assert_close(first[name], tensor, rtol=0, atol=1e-3 * moved, msg=name)


def test_a_mixed_batch_needs_whole_parameters(folder):
    assert all(
        (folder / f"mixed{rank}.txt").read_text().startswith("task_names needs the tasks' whole parameters, but FSDP2")
        for rank in range(2)
    )


def test_a_sharded_model_takes_a_gathered_state(folder):
    state, start = load_file(folder / "unprepared0.safetensors"), load_file(folder / "start0.safetensors")
    for rank in range(2):
        loaded = load_file(folder / f"loaded{rank}.safetensors")
        assert all(torch.equal(loaded[name], tensor) for name, tensor in state.items())
    assert not all(torch.equal(tensor, state[name]) for name, tensor in start.items())
