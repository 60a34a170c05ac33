"""Plain transformers.Trainer and Accelerate on a quantized model: resume, bf16 autocast, gradient checkpointing,
torch.compile, gradient scaling.
"""

import math
import os
from unittest import mock

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

from prequant_ext import PreQuantConfig, prepare_model, quantize_model, trainable_parameters
from support.toys import make_toy, toy_inputs

ROWS = [
    {"input_ids": torch.randint(3, 99, (7,), generator=torch.Generator().manual_seed(row)), "labels": row % 2}
    for row in range(16)
]


def quantized_bert(config: PreQuantConfig | None = None) -> PreTrainedModel:
    model = make_toy("bert")
    quantize_model(model, config or PreQuantConfig(r=2))
    return model


def trainer(model, folder, **changes) -> Trainer:
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
    }
    arguments = TrainingArguments(folder, report_to=[], use_cpu=True, disable_tqdm=True, **(settings | changes))
    return Trainer(model, arguments, train_dataset=ROWS)


def trained(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters() if parameter.requires_grad}


def losses(run: Trainer) -> list[float]:
    return [line["loss"] for line in run.state.log_history if "loss" in line]


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    """Dropout, shuffling, Adam's moments and the learning rate's decay go on where the checkpoint was written."""
    whole = trainer(quantized_bert(), tmp_path / "whole", max_steps=6, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = trainer(quantized_bert(), tmp_path / "resumed", max_steps=6)
    fresh = {name: tensor.clone() for name, tensor in resumed.model.state_dict().items()}
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == 6 and losses(resumed) == losses(whole)
    moved = set()
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], tensor), name
        moved |= set() if torch.equal(fresh[name], tensor) else {name}
    assert moved == set(trained(whole.model))


def test_bf16_autocast_trains_float32_masters(tmp_path):
    exact = trainer(quantized_bert(), tmp_path)
    exact.train()
    # made after the other has trained: making one sets the seed that dropout draws from
    mixed = trainer(quantized_bert(), tmp_path, bf16=True)
    dtypes = []
    mixed.model.bert.encoder.layer[0].intermediate.dense.register_forward_hook(
        lambda module, args, output: dtypes.append(output.dtype)
    )
    mixed.train()
    assert set(dtypes) == {torch.bfloat16}
    assert {parameter.dtype for parameter in trained(mixed.model).values()} == {torch.float32}
    assert losses(mixed) != losses(exact)
    torch.testing.assert_close(losses(mixed), losses(exact), rtol=0.05, atol=0.02)


@pytest.mark.parametrize("use_reentrant", [False, True], ids=["non-reentrant", "reentrant"])
def test_trainers_own_gradient_checkpointing(use_reentrant, tmp_path):
    """Reentrant, no gradient would get past a frozen embedding whose output has none."""
    plain = trainer(quantized_bert(), tmp_path)
    plain.train()
    model = prepare_model(quantized_bert(), gradient_checkpointing=True, use_reentrant=use_reentrant)
    checkpointed = trainer(
        model, tmp_path, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": use_reentrant}
    )
    calls = []
    model.bert.encoder.layer[0].output.dense.register_forward_hook(lambda *_: calls.append(1))
    checkpointed.train()
    assert len(calls) == 2 * 4
    torch.testing.assert_close(trained(checkpointed.model), trained(plain.model), rtol=1e-3, atol=1e-5)


@pytest.fixture
def accelerate_of_its_own():
    """TrainingArguments tell accelerate through the environment what to compile, and it remembers that for the whole
    process: the tests that follow would compile, too.
    """
    with mock.patch.dict(os.environ):
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_trainer_compiles(backend, tmp_path, accelerate_of_its_own):
    runs = [
        trainer(quantized_bert(), tmp_path),
        trainer(quantized_bert(), tmp_path, torch_compile=True, torch_compile_backend=backend),
    ]
    for run in runs:
        for module in run.model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0  # a compiled one draws other numbers
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    for run in runs:
        run.train()
    assert (
        torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1 and not torch._dynamo.utils.counters["graph_break"]
    )
    torch.testing.assert_close(losses(runs[1]), losses(runs[0]), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("activation_bits", [8, None], ids=["w4a8", "w4a16"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf], ids=str)
def test_a_gradient_scaler_sees_activations_that_are_not_finite(bad, activation_bits):
    """Quantizing an activation hides no NaN or Inf: the step is skipped, and the scale goes down."""
    model = quantized_bert(PreQuantConfig(r=2, activation_bits=activation_bits))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer = torch.optim.SGD(trainable_parameters(model), lr=0.1)
    layer = model.bert.encoder.layer[0].intermediate.dense

    def spoil(module, args):
        x = args[0].clone()
        x[1, 2, 3] = bad
        return (x,)

    for is_spoiled in (True, False):
        before = {name: tensor.clone() for name, tensor in trained(model).items()}
        handle = layer.register_forward_pre_hook(spoil) if is_spoiled else None
        optimizer.zero_grad()
        scaler.scale(model(**toy_inputs(model), labels=torch.tensor([0, 1, 1])).loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(tensor, before[name]) for name, tensor in trained(model).items()) == is_spoiled
        assert scaler.get_scale() == 512.0
        if handle is not None:
            handle.remove()


def test_a_gradient_scaler_sees_gradients_that_overflow():
    """In the outlier weights alone: nothing else trains."""
    model = quantized_bert()
    layer = model.bert.encoder.layer[0].output.dense
    layer.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient * 1e38) and None
    )
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    optimizer = torch.optim.SGD([layer.outlier_weight], lr=0.1)
    before = layer.outlier_weight.detach().clone()
    scaler.scale(model(**toy_inputs(model), labels=torch.tensor([0, 1, 1])).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert (
        not layer.outlier_weight.grad.isfinite().all()
        and torch.equal(layer.outlier_weight, before)
        and scaler.get_scale() == 2.0**15
    )


def test_accelerate_saves_and_loads_its_state(tmp_path):
    accelerator = Accelerator(cpu=True)

    def prepared():
        model = quantized_bert()
        return accelerator.prepare(model, torch.optim.AdamW(trainable_parameters(model), lr=1e-2))

    def step(model, optimizer):
        optimizer.zero_grad()
        accelerator.backward(model(**toy_inputs(model), labels=torch.tensor([0, 1, 1])).loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    model, optimizer = prepared()
    step(model, optimizer)
    accelerator.save_state(tmp_path)
    step(model, optimizer)
    accelerator.free_memory()
    again, optimizer = prepared()
    accelerator.load_state(tmp_path)
    assert not any(torch.equal(tensor, trained(model)[name]) for name, tensor in trained(again).items())
    step(again, optimizer)
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())
