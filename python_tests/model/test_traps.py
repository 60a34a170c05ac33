"""The traps of transformers and of its neighbours, one test or more for each: they bit once."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    BertForSequenceClassification,
    GPT2LMHeadModel,
    T5EncoderModel,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
)
from transformers.pytorch_utils import Conv1D

from prequant_ext import PreQuantConfig, hf, ops
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import quantize_model, to_float, trainable_parameters
from prequant_ext.strictness import PreQuantWarning
from support.toys import make_toy, save_toy, toy_inputs, toy_output

CONFIG = PreQuantConfig(r=2)


def quantized_toy(name: str, config: PreQuantConfig = CONFIG) -> transformers.PreTrainedModel:
    model = make_toy(name)
    quantize_model(model, config)
    return model


def drop_tensors(directory: Path, part: str) -> None:
    """Take every tensor whose name contains ``part`` out of a checkpoint."""
    tensors = load_file(directory / "model.safetensors")
    kept = {key: tensor for key, tensor in tensors.items() if part not in key}
    assert len(kept) < len(tensors)
    save_file(kept, directory / "model.safetensors", metadata={"format": "pt"})


# ---- 1: no plug-in discovery -----------------------------------------------------------------------------------------

OPEN_WITHOUT_US = """
import sys, transformers
transformers.AutoModelForSequenceClassification.from_pretrained(sys.argv[1])
assert not any(name.startswith("prequant") for name in sys.modules)
print("opened")
"""


def test_trap_1_a_checkpoint_opened_without_prequant_ext_fails_loudly(tmp_path):
    quantized_toy("bert").save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", OPEN_WITHOUT_US, tmp_path], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert run.returncode != 0 and "opened" not in run.stdout
    assert "mismatch" in run.stderr and "RuntimeError" in run.stderr


def test_trap_1_saving_what_would_not_fail_loudly_warns(tmp_path, recwarn):
    """Eight bits everywhere: the codes have the shape of the weights."""
    quantized_toy("bert", PreQuantConfig(r=2, layer_bits=[8, 4])).save_pretrained(tmp_path)
    assert not [warning for warning in recwarn if issubclass(warning.category, PreQuantWarning)]
    with pytest.warns(PreQuantWarning, match="takes the codes for weights"):
        quantized_toy("bert", PreQuantConfig(r=2, bits=8)).save_pretrained(tmp_path)


def test_trap_1_saved_keys_are_the_float_names_with_nothing_leaked(tmp_path):
    model = make_toy("bert")
    names = {name for name in model.state_dict() if not name.endswith("position_ids")}
    quantize_model(model, CONFIG)
    model.save_pretrained(tmp_path)
    keys = load_file(tmp_path / "model.safetensors").keys()
    added = ("weight_scale", "weight_zero_point", "outlier_dims", "outlier_weight")
    assert {key for key in keys if not key.endswith(added)} == names


def test_trap_1_the_renaming_is_anchored():
    """A float module further down that is called like a quantized one keeps its key, and so do the tensors beside the
    weight.
    """
    (renaming,) = hf.PackedRenaming.of(quantized_toy("bert"))
    name = "encoder.layer.0.output.dense"
    for start in ("", "bert."):  # a base model's checkpoint, and a task model's
        assert renaming.rename_source_key(f"{start}{name}.weight")[0] == f"{start}{name}.weight_packed"
        assert (
            renaming.reverse_transform().rename_source_key(f"{start}{name}.weight_packed")[0] == f"{start}{name}.weight"
        )
    for kept in (
        f"extra.{name}.weight",
        f"bert.{name}.weight_scale",
        f"bert.{name}.bias",
        "bert.encoder.layer.0.output.LayerNorm.weight",
        "classifier.weight",
    ):
        assert renaming.rename_source_key(kept)[0] == kept


# ---- 2: what the packed tensor is called -----------------------------------------------------------------------------


def test_trap_2_the_layers_are_no_nn_linear_and_have_no_parameter_called_weight_or_qweight():
    for name in ("bert", "gpt2"):
        layers = [
            module for module in quantized_toy(name).modules() if isinstance(module, PreQuantLinear | PreQuantEmbedding)
        ]
        assert layers
        for layer in layers:
            assert not isinstance(layer, nn.Linear | nn.Embedding | Conv1D)
            assert not {"weight", "qweight"} & {parameter_name for parameter_name, _ in layer.named_parameters()}
            assert not hasattr(layer, "qweight")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_trap_2_weight_is_a_probe_of_the_right_shape_dtype_and_device(dtype):
    model = quantized_toy("bert").to(dtype)
    for layer, shape in (
        (model.bert.encoder.layer[0].intermediate.dense, (64, 32)),
        (model.bert.embeddings.word_embeddings, (99, 32)),
    ):
        probe = layer.weight
        assert probe.shape == shape and probe.dtype == dtype and probe.device == layer.weight_scale.device
        assert probe.stride() == (0, 0) and probe.isnan().all() and probe.untyped_storage().nbytes() <= 8


def test_trap_2_t5_does_not_cast_its_activations_to_the_codes_dtype():
    model = quantized_toy("t5", PreQuantConfig(r=2, activation_bits=None))
    assert isinstance(model.encoder.block[0].layer[1].DenseReluDense.wo, PreQuantLinear)
    before = toy_output(model)
    torch.testing.assert_close(toy_output(to_float(model)), before, rtol=1e-4, atol=1e-4)


# ---- 3: heads --------------------------------------------------------------------------------------------------------


def test_trap_3_a_head_with_a_bias_is_not_quantized(tmp_path):
    model_class = save_toy("bert", tmp_path)
    model = model_class.from_pretrained(tmp_path, quantization_config=CONFIG)
    assert type(model.classifier) is nn.Linear and type(model.bert.pooler.dense) is nn.Linear


def test_trap_3_modules_to_not_convert_is_honoured_and_travels(tmp_path):
    model_class = save_toy("bert", tmp_path / "float")
    config = PreQuantConfig(r=2, modules_to_not_convert=["layer.0.attention", "word_embeddings"])
    streamed = model_class.from_pretrained(tmp_path / "float", quantization_config=config)
    streamed.save_pretrained(tmp_path / "quantized")
    for model in (streamed, model_class.from_pretrained(tmp_path / "quantized")):
        assert (
            type(model.bert.encoder.layer[0].attention.self.query) is nn.Linear
            and type(model.bert.embeddings.word_embeddings) is nn.Embedding
        )
        assert isinstance(model.bert.encoder.layer[1].attention.self.query, PreQuantLinear)


# ---- 4: T5's wo, tied weights ----------------------------------------------------------------------------------------


def test_trap_4_wo_is_quantized_though_transformers_keeps_it_in_float32(tmp_path):
    assert "wo" in T5ForConditionalGeneration._keep_in_fp32_modules
    save_toy("t5", tmp_path / "float", torch.float16)
    streamed = T5ForConditionalGeneration.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    streamed.save_pretrained(tmp_path / "quantized")
    for model in (streamed, T5ForConditionalGeneration.from_pretrained(tmp_path / "quantized")):
        for block in [*model.encoder.block, *model.decoder.block]:
            dense = block.layer[-1].DenseReluDense
            assert isinstance(dense.wo, PreQuantLinear) and isinstance(dense.wi, PreQuantLinear)
            # as in the float model
            assert (dense.wi.weight.dtype, dense.wo.weight.dtype) == (torch.float16, torch.float32)


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5"])
def test_trap_4_tied_tables_and_language_model_heads_stay_float_and_tied(name, tmp_path):
    model_class = save_toy(name, tmp_path / "float")
    streamed = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    streamed.save_pretrained(tmp_path / "quantized")
    for model in (quantized_toy(name), streamed, model_class.from_pretrained(tmp_path / "quantized")):
        assert type(model.lm_head) is nn.Linear and type(model.get_input_embeddings()) is nn.Embedding
        assert (model.lm_head.weight is model.get_input_embeddings().weight) == model.config.tie_word_embeddings


# ---- 5: layers that the checkpoint lacks -----------------------------------------------------------------------------

ABSENT = {  # toy, module, its kind in float, a module of the same layer that is there
    "linear": ("bert", "bert.encoder.layer.1.output.dense", nn.Linear, "bert.encoder.layer.1.intermediate.dense"),
    "table": ("bert", "bert.embeddings.token_type_embeddings", nn.Embedding, "bert.embeddings.word_embeddings"),
    "conv1d": ("gpt2", "transformer.h.1.mlp.c_fc", Conv1D, "transformer.h.1.mlp.c_proj"),
    "t5": (
        "t5 encoder",
        "encoder.block.1.layer.0.SelfAttention.q",
        nn.Linear,
        "encoder.block.1.layer.0.SelfAttention.k",
    ),
}


@pytest.mark.parametrize(("toy", "name", "kind", "neighbour"), ABSENT.values(), ids=ABSENT.keys())
def test_trap_5_a_layer_absent_from_a_float_checkpoint_is_fresh_and_recorded(toy, name, kind, neighbour, tmp_path):
    model_class = save_toy(toy, tmp_path / "float")
    complete = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    drop_tensors(tmp_path / "float", f"{name}.")
    with pytest.warns(
        PreQuantWarning, match=f"absent from the checkpoint, now freshly initialised float layers: {name}"
    ):
        model = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    fresh = model.get_submodule(name)
    assert type(fresh) is kind and fresh.weight.isfinite().all() and 0 < fresh.weight.std() < 2
    assert getattr(fresh, "bias", None) is None or fresh.bias.abs().max() < 1
    assert torch.equal(model.get_submodule(neighbour).weight_packed, complete.get_submodule(neighbour).weight_packed)
    assert torch.equal(model.get_submodule(neighbour).weight_scale, complete.get_submodule(neighbour).weight_scale)

    model.save_pretrained(tmp_path / "quantized")
    stored = json.loads((tmp_path / "quantized" / "config.json").read_text())["quantization_config"]
    assert stored["float_modules"] == [name.removeprefix(f"{model.base_model_prefix}.")]
    loaded = model_class.from_pretrained(tmp_path / "quantized")
    assert type(loaded.get_submodule(name)) is kind
    assert torch.equal(toy_output(loaded), toy_output(model))


def test_trap_5_a_checkpoint_of_another_model_is_an_error(tmp_path):
    model_class = save_toy("bert", tmp_path)
    drop_tensors(tmp_path, "encoder.layer.")
    with pytest.raises(
        ValueError,
        match=r"has none of the weights that BertForSequenceClassification would quantize, such as "
        r"bert\.encoder\.layer\.0",
    ):
        model_class.from_pretrained(tmp_path, quantization_config=CONFIG)


def test_trap_5_a_layer_absent_from_a_quantized_checkpoint_is_an_error(tmp_path):
    model = quantized_toy("bert")
    model.save_pretrained(tmp_path)
    drop_tensors(tmp_path, "encoder.layer.1.output.dense.")
    with pytest.raises(
        ValueError, match=r"the quantized checkpoint has no bert\.encoder\.layer\.1\.output\.dense\.weight"
    ):
        type(model).from_pretrained(tmp_path)


def test_trap_5_a_quantized_encoder_does_not_pass_for_an_encoder_and_decoder(tmp_path):
    model = make_toy("t5 encoder")
    quantize_model(model, CONFIG)
    model.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"the quantized checkpoint has no decoder\.block\.0.* which T5ForConditionalGeneration needs"
    ):
        T5ForConditionalGeneration.from_pretrained(tmp_path)


# ---- 6: what trains --------------------------------------------------------------------------------------------------


def test_trap_6_everything_but_outlier_weights_and_head_is_frozen_after_loading(tmp_path):
    quantized_toy("bert").save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    frozen = {name.rpartition(".")[2] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    # the last of LayerNorms
    assert frozen == {"weight_packed", "weight_scale", "weight_zero_point", "outlier_dims", "bias", "weight"}
    assert all(
        parameter.requires_grad for name, parameter in model.named_parameters() if name.endswith("outlier_weight")
    )


def test_trap_6_trainer_takes_the_model(tmp_path):
    quantized_toy("bert").save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path)
    assert model.hf_quantizer.is_qat_trainable and model.hf_quantizer.is_trainable
    # refuses a quantized model that cannot be trained
    Trainer(model, TrainingArguments(tmp_path / "run", report_to=[], use_cpu=True))


def test_trap_6_nothing_to_train_is_an_error_but_loads(tmp_path):
    model = AutoModel.from_config(make_toy("distilbert").config)  # a base without a pooler
    quantize_model(model, PreQuantConfig(r=0))
    model.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    with pytest.raises(ValueError, match="nothing to train"):
        trainable_parameters(loaded)


# ---- 7: .to(bfloat16) ------------------------------------------------------------------------------------------------


def test_trap_7_forward_follows_x_and_masters_stay_float32():
    model = quantized_toy("bert")
    layer = model.bert.encoder.layer[0].output.dense
    scale, outliers = layer.weight_scale.clone(), layer.outlier_weight.clone()
    model.to(torch.bfloat16)
    assert toy_output(model).dtype == torch.bfloat16
    assert torch.equal(layer.weight_scale, scale) and torch.equal(layer.outlier_weight, outliers)
    assert layer(torch.randn(2, 64, dtype=torch.float32)).dtype == torch.float32


# ---- 8: the base is made in the checkpoint's own dtype ---------------------------------------------------------------


def test_trap_8_rounding_the_checkpoint_before_quantizing_warns(tmp_path, monkeypatch):
    model_class = save_toy("bert", tmp_path)
    with pytest.warns(PreQuantWarning, match=r"dtype=torch\.bfloat16 rounds the checkpoint's torch\.float32 weights"):
        rounded = model_class.from_pretrained(tmp_path, quantization_config=CONFIG, dtype=torch.bfloat16)
    own = model_class.from_pretrained(tmp_path, quantization_config=CONFIG)
    assert not torch.equal(
        rounded.bert.encoder.layer[0].output.dense.weight_packed, own.bert.encoder.layer[0].output.dense.weight_packed
    )
    monkeypatch.setenv("PREQUANT_STRICT", "1")
    with pytest.raises(PreQuantWarning, match="rounds the checkpoint's"):
        model_class.from_pretrained(tmp_path, quantization_config=CONFIG, dtype=torch.bfloat16)


@pytest.mark.parametrize("load", ["auto", torch.bfloat16, torch.float32], ids=str)
def test_trap_8_a_dtype_that_holds_the_checkpoints_values_makes_the_same_base(load, tmp_path, recwarn):
    model_class = save_toy("bert", tmp_path, torch.bfloat16)
    model = model_class.from_pretrained(tmp_path, quantization_config=CONFIG, dtype=load)
    own = model_class.from_pretrained(tmp_path)
    quantize_model(own, CONFIG)
    ours = own.bert.encoder.layer[0].output.dense, model.bert.encoder.layer[0].output.dense
    assert torch.equal(ours[0].weight_packed, ours[1].weight_packed) and torch.equal(
        ours[0].outlier_weight, ours[1].outlier_weight
    )
    assert not [warning for warning in recwarn if issubclass(warning.category, PreQuantWarning)]


# ---- 9: another config on reload -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (PreQuantConfig(r=5), "quantized with r = 2, not 5"),
        (PreQuantConfig(r=2, bits=8, axis="input"), "bits = 4, not 8; axis = 'hidden', not 'input'"),
        (PreQuantConfig(r=2, activation_bits=None), "activation_bits = 8, not None"),
    ],
)
def test_trap_9_a_config_that_contradicts_the_file_is_an_error(asked, message, tmp_path):
    quantized_toy("bert").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=asked)
    with pytest.raises(ValueError, match="must be a PreQuantConfig for a prequant checkpoint, got QuantoConfig"):
        BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=transformers.QuantoConfig())
    BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=CONFIG)


# ---- 11: parameters, not buffers; no writes in forward ---------------------------------------------------------------


def test_trap_11_codes_scales_and_indices_are_frozen_parameters():
    for name in ("bert", "gpt2"):
        for module in quantized_toy(name).modules():
            if isinstance(module, PreQuantLinear | PreQuantEmbedding):
                assert not list(module.buffers())
                frozen = {own for own, parameter in module.named_parameters() if not parameter.requires_grad}
                assert frozen >= {"weight_packed", "weight_scale", "weight_zero_point"}


def test_trap_11_forward_writes_no_attribute(monkeypatch):
    model, written = quantized_toy("bert").train(), []

    def refuse(self, attribute, value):
        written.append((type(self).__name__, attribute))
        object.__setattr__(self, attribute, value)

    for kind in (PreQuantLinear, PreQuantEmbedding):
        monkeypatch.setattr(kind, "__setattr__", refuse)
    model(**toy_inputs(model)).logits.sum().backward()
    assert written == []


# ---- 13: no silent fallback ------------------------------------------------------------------------------------------


class PretendedCuda(torch.Tensor):
    """A tensor that says it lives on a GPU, so that the operators' device check can be met without one."""

    @staticmethod
    def __new__(cls, *shape: int, dtype: torch.dtype) -> "PretendedCuda":
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device="cuda")

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} must reach the operator itself")


def test_trap_13_a_missing_kernel_names_the_operator_the_device_and_the_rebuild_command(request, monkeypatch):
    if "scatter_outlier_" in torch.ops.prequant.build_info().partition("cuda_ops=")[2]:
        # The same host functions built without CUDA: the emulated library knows tensors of the CPU alone.
        monkeypatch.setattr(ops.calls, "library", request.getfixturevalue("emulated_library"))
    message = r"prequant::scatter_outlier_ has no kernel for cuda.*PREQUANT_CUDA=1 pip install"
    with pytest.raises(RuntimeError, match=message), torch._C._DisableTorchDispatch():
        dense, dims, values = (
            PretendedCuda(4, 6, dtype=torch.float32),
            PretendedCuda(2, dtype=torch.int64),
            PretendedCuda(4, 2, dtype=torch.float32),
        )
        # the operator that allocates nothing, which no pretended tensor could
        ops.scatter_outlier_(dense, dims, values, 1, False)


def test_trap_13_strict_turns_warnings_into_errors(tmp_path, monkeypatch):
    save_toy("gpt2", tmp_path)
    drop_tensors(tmp_path, "h.1.mlp.c_fc.")
    monkeypatch.setenv("PREQUANT_STRICT", "1")
    with pytest.raises(PreQuantWarning, match="absent from the checkpoint"):
        GPT2LMHeadModel.from_pretrained(tmp_path, quantization_config=CONFIG)


def test_the_t5_encoder_toy_is_an_encoder():
    assert isinstance(make_toy("t5 encoder"), T5EncoderModel)
