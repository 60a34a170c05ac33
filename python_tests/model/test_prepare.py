"""prepare_model: what trains, gradient checkpointing, and the strategies of distributed training that are refused."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
from transformers.integrations import deepspeed

from prequant_ext import PreQuantConfig, prepare_model, quantize_model, trainable_parameters
from prequant_ext.linear import PreQuantLinear
from support.tiny_models import Plain
from support.toys import make_toy, toy_inputs, toy_output

CONFIG = PreQuantConfig(r=2)


def quantized_toy(name: str = "bert", config: PreQuantConfig = CONFIG) -> nn.Module:
    model = make_toy(name)
    quantize_model(model, config)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---- what trains -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("changes", [{}, {"biases": True, "layer_norms": True}], ids=["default", "biases and norms"])
def test_the_base_is_frozen_and_nothing_is_cast(changes):
    """Trap 12: peft's counterpart upcasts everything and marks the model as bitsandbytes'."""
    model, other = (quantized_toy().to(torch.bfloat16) for _ in range(2))
    trainable_parameters(other, **changes)
    model.requires_grad_(False)  # what a user may have done
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    assert prepare_model(model, **changes) is model
    assert trained_names(model) == trained_names(other)
    assert {name: parameter.dtype for name, parameter in model.named_parameters()} == dtypes
    assert not any(hasattr(model, flag) for flag in ("is_loaded_in_4bit", "is_loaded_in_8bit"))
    assert model.config.use_cache


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: make_toy("bert"), {}, "BertForSequenceClassification is not quantized: call quantize_model first"),
        (lambda: quantized_toy("gpt2", PreQuantConfig(r=0)), {}, "nothing to train in GPT2LMHeadModel"),
        (
            quantized_toy,
            {"use_reentrant": True},
            "use_reentrant=True is a way of gradient checkpointing and needs gradient_checkpointing=True",
        ),
        (
            Plain,
            {"gradient_checkpointing": True},
            "gradient_checkpointing=True needs a transformers model that supports it, got Plain",
        ),
    ],
    ids=["float", "nothing", "reentrant alone", "plain"],
)
def test_refused_before_anything_changes(model, arguments, message):
    model = model()
    before = trained_names(model)
    with pytest.raises(ValueError, match=message):
        prepare_model(model, **arguments)
    assert trained_names(model) == before


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5"])
def test_gradient_checkpointing_changes_no_gradient(name):
    gradients, blocks_run = {}, {}
    for mode, arguments in {
        "none": {},
        "non-reentrant": {"gradient_checkpointing": True},
        "reentrant": {"gradient_checkpointing": True, "use_reentrant": True},
    }.items():
        model = prepare_model(quantized_toy(name), **arguments).train()
        calls = []
        first = next(module for module in model.modules() if isinstance(module, PreQuantLinear))
        first.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(0)  # dropout: the second run of a block must draw what the first drew
        model(**toy_inputs(model))[0].square().sum().backward()
        gradients[mode] = {
            name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad
        }
        blocks_run[mode] = len(calls)
        assert mode == "none" or not model.config.use_cache
    assert blocks_run == {"none": 1, "non-reentrant": 2, "reentrant": 2}
    for mode in ("non-reentrant", "reentrant"):
        for name, gradient in gradients[mode].items():  # a residual stream's gradients may be added up in another order
            torch.testing.assert_close(
                gradient, gradients["none"][name], rtol=0, atol=1e-5 * gradient.abs().max().item()
            )


def test_a_model_to_be_sharded_keeps_the_layout_of_the_files():
    model, other = quantized_toy(), quantized_toy()
    prepare_model(model, sharded=True)
    model.to(torch.bfloat16).to(torch.float32)
    layers = [module for module in model.modules() if isinstance(module, PreQuantLinear)]
    assert layers and not any(layer.is_prepacked for layer in layers)
    assert all(layer.is_prepacked for layer in other.modules() if isinstance(layer, PreQuantLinear))
    model.load_state_dict(other.state_dict())
    assert not any(layer.is_prepacked for layer in layers)
    assert torch.equal(toy_output(model), toy_output(other))


# ---- strategies that cannot hold a quantized model -------------------------------------------------------------------

FSDP1 = r"FSDP1 flattens .* use DDP, or FSDP2"
ZERO3 = r"ZeRO-3 partitions every parameter, .* use ZeRO-1, ZeRO-2, DDP or FSDP2"


@pytest.fixture
def accelerate_state():
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, FSDP1),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ZERO3),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}, None),
        ({"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}, None),
    ],
    ids=["fsdp 1", "zero 3", "fsdp 2", "zero 2"],
)
def test_what_accelerate_launch_is_set_to_is_seen_before_anything_is_loaded(
    environment, message, monkeypatch, tmp_path
):
    model = quantized_toy()
    model.save_pretrained(tmp_path)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for attempt in (lambda: BertForSequenceClassification.from_pretrained(tmp_path), lambda: prepare_model(model)):
        if message is None:
            attempt()
        else:
            with pytest.raises(ValueError, match=message):
                attempt()


class TrainerWithPlugin(Trainer):
    """accelerate takes an FSDP plugin into its state on GPUs only; this does so on a CPU."""

    plugin: FullyShardedDataParallelPlugin

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        self.accelerator.state.fsdp_plugin = self.plugin


@pytest.mark.parametrize(
    ("version", "mixed_precision", "message"),
    [
        (1, None, FSDP1),
        (
            2,
            "bf16",
            r"FSDP2 with mixed precision gathers every float parameter in torch\.bfloat16, but scales and outlier "
            r"weights are float32",
        ),
        (2, None, None),
    ],
)
def test_trainer_refuses_when_it_is_made(version, mixed_precision, message, accelerate_state, tmp_path):
    plugin = FullyShardedDataParallelPlugin(fsdp_version=version)
    if mixed_precision:
        plugin.set_mixed_precision(mixed_precision)
    kind = type("Trainer", (TrainerWithPlugin,), {"plugin": plugin})
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    if message is None:
        kind(quantized_toy(), arguments)
    else:
        with pytest.raises(ValueError, match=message):
            kind(quantized_toy(), arguments)
    assert kind(make_toy("bert"), arguments).model is not None  # a float model is none of our business


class Stage3:
    """What TrainingArguments(deepspeed=...) leaves with transformers; making one takes DeepSpeed."""

    def is_zero3(self) -> bool:
        return True


def test_trainer_refuses_zero_3(tmp_path, accelerate_state):
    model, settings = quantized_toy(), Stage3()
    arguments = TrainingArguments(tmp_path, report_to=[], use_cpu=True)
    deepspeed.set_hf_deepspeed_config(settings)
    try:
        with pytest.raises(ValueError, match=ZERO3):
            Trainer(model, arguments)
        with pytest.raises(ValueError, match=ZERO3):
            prepare_model(model)
    finally:
        deepspeed.unset_hf_deepspeed_config()
    Trainer(model, arguments)


def test_zero_3_of_an_accelerator_is_refused(accelerate_state, monkeypatch):
    Accelerator(cpu=True)
    monkeypatch.setattr(AcceleratorState, "deepspeed_plugin", type("Plugin", (), {"zero_stage": 3})())
    with pytest.raises(ValueError, match=ZERO3):
        prepare_model(quantized_toy())


def test_fsdp_1_refuses_the_model_itself_when_it_is_wrapped():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="Cannot flatten integer dtype tensors"):
            FullyShardedDataParallel(quantized_toy(), device_id=torch.device("cpu"), use_orig_params=True)
    finally:
        distributed.destroy_process_group()
