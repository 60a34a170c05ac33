"""The transformers plug-in: from_pretrained quantizes and loads, save_pretrained writes."""

import contextlib
import gc
import importlib
import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    BertModel,
    Trainer,
    TrainingArguments,
)

from prequant_ext import PreQuantConfig, hf, quantize
from prequant_ext.config import FORMAT_VERSION
from prequant_ext.families import Family
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import quantize_model, to_float, trainable_parameters
from prequant_ext.strictness import PreQuantWarning
from support.toys import TOYS, assert_same, make_toy, save_toy, toy_inputs, toy_output

CONFIG = PreQuantConfig(r=2)
CONFIGS = {
    "weight only, no embeddings": PreQuantConfig(r=2, activation_bits=None, embedding_bits=None),
    "paper": PreQuantConfig.paper(r=2),
    "no outliers": PreQuantConfig(r=0),
    "rows, 2 bits": PreQuantConfig(r=1, bits=2, strategy="row_wise"),
    "groups, 8 bits": PreQuantConfig(r=2, bits=8, layer_bits={"layers.1": 5}, strategy="group_wise", group_size=16),
    "bits by block": PreQuantConfig(r=2, layer_bits=[2, 8]),
    "bits by rule": PreQuantConfig(r=2, layer_bits={"layers.1": 3}),
    "trained scales": PreQuantConfig(r=0, train_scales=True),
    "random columns": PreQuantConfig(r=3, selector="random", axis="input", seed=5),
    "density": PreQuantConfig(r=2, outlier_threshold=("log_density", -4.0)),
}


# ---- the round trip --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOYS)
def test_streaming_equals_quantize_model_and_reloads_bit_exactly(name, tmp_path):
    model_class = save_toy(name, tmp_path / "float")
    streamed = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    in_place = model_class.from_pretrained(tmp_path / "float")
    quantize_model(in_place, CONFIG)
    assert_same(streamed, in_place)
    streamed.save_pretrained(tmp_path / "streamed")
    in_place.save_pretrained(tmp_path / "in place", max_shard_size="20KB")
    assert len(list((tmp_path / "in place").glob("*.safetensors"))) > 1
    assert_same(streamed, model_class.from_pretrained(tmp_path / "streamed"))
    assert_same(streamed, model_class.from_pretrained(tmp_path / "in place"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["bert", "t5", "gpt2", "llama"])
def test_half_precision_checkpoints_reload_in_their_dtype(name, dtype, tmp_path):
    model_class = save_toy(name, tmp_path / "float", dtype)
    streamed = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG)
    in_place = model_class.from_pretrained(tmp_path / "float")
    quantize_model(in_place, CONFIG)
    assert_same(streamed, in_place)
    streamed.save_pretrained(tmp_path / "quantized")
    loaded = model_class.from_pretrained(tmp_path / "quantized")
    assert_same(streamed, loaded)
    assert toy_output(loaded).dtype == dtype


@pytest.mark.filterwarnings("ignore:every matrix is stored in 8 bits")
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_every_setting_survives_the_round_trip(config, float_dir, tmp_path):
    streamed = BertForSequenceClassification.from_pretrained(float_dir, quantization_config=config)
    in_place = BertForSequenceClassification.from_pretrained(float_dir)
    quantize_model(in_place, config)
    assert_same(streamed, in_place)
    streamed.save_pretrained(tmp_path / "quantized")
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "quantized")
    assert_same(streamed, loaded)
    assert loaded.config.quantization_config.config == config
    assert [name for name, p in loaded.named_parameters() if p.requires_grad] == [
        name for name, p in in_place.named_parameters() if p.requires_grad
    ]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_masters_stay_float32_whatever_dtype_a_reload_asks_for(dtype, quantized_dir):
    stored = load_file(quantized_dir / "model.safetensors")
    model = BertForSequenceClassification.from_pretrained(quantized_dir, dtype=dtype)
    layer = model.bert.encoder.layer[0].output.dense
    assert layer.outlier_weight.dtype == layer.weight_scale.dtype == torch.float32
    assert torch.equal(layer.outlier_weight, stored["bert.encoder.layer.0.output.dense.outlier_weight"])
    assert layer.bias.dtype == model.classifier.weight.dtype == dtype
    assert toy_output(model).dtype == dtype


def test_a_model_made_from_a_config_saves_like_one_that_was_loaded(tmp_path):
    model = make_toy("bert")
    quantize_model(model, CONFIG)
    model.save_pretrained(tmp_path)
    assert_same(model, BertForSequenceClassification.from_pretrained(tmp_path))


def test_trained_values_survive_the_round_trip(float_dir, tmp_path):
    model = BertForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rows = [{"input_ids": torch.randint(3, 99, (7,)), "labels": torch.tensor(row % 2)} for row in range(8)]
    arguments = TrainingArguments(
        tmp_path / "run",
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    Trainer(model, arguments, train_dataset=rows).train()
    model.eval()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    trained = {name for name in before if name.endswith("outlier_weight") or "pooler" in name or "classifier" in name}
    assert moved == trained
    model.save_pretrained(tmp_path / "trained")
    assert_same(model, BertForSequenceClassification.from_pretrained(tmp_path / "trained"))


@pytest.mark.parametrize("by_name", [True, False], ids=["by name", "by position"])
def test_a_state_dict_given_to_save_pretrained_is_what_is_saved(by_name, quantized_dir, tmp_path):
    """transformers replaces it by what the quantizer returns, without asking: a gathered or averaged state would not be
    written, and nobody told.
    """
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    name = "bert.encoder.layer.0.output.dense.outlier_weight"
    state = {key: tensor + 1 if key == name else tensor for key, tensor in model.state_dict().items()}
    if by_name:
        model.save_pretrained(tmp_path / "given", state_dict=state)
    else:
        model.save_pretrained(tmp_path / "given", True, state)
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "given").state_dict()
    assert torch.equal(loaded[name], model.state_dict()[name] + 1)
    assert all(torch.equal(tensor, model.state_dict()[key]) for key, tensor in loaded.items() if key != name)
    model.save_pretrained(tmp_path / "own")  # what was given before is forgotten
    assert_same(model, BertForSequenceClassification.from_pretrained(tmp_path / "own"))


def test_the_disk_holds_the_names_dtypes_and_shapes_of_the_format(quantized_dir):
    with safe_open(quantized_dir / "model.safetensors", "pt") as file:
        parts = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        held = {key: (part.get_dtype(), part.get_shape()) for key, part in parts.items()}
    reader, writer, table = (
        "bert.encoder.layer.0.intermediate.dense",
        "bert.encoder.layer.0.output.dense",
        "bert.embeddings.word_embeddings",
    )
    assert {key.removeprefix(f"{reader}."): value for key, value in held.items() if key.startswith(reader)} == {
        "weight": ("U8", [64, 16]),
        "weight_scale": ("F32", [1, 1]),
        "weight_zero_point": ("U8", [1, 1]),
        "outlier_dims": ("I64", [2]),
        "outlier_weight": ("F32", [64, 2]),
        "bias": ("F32", [64]),
    }
    assert held[f"{writer}.outlier_weight"] == ("F32", [2, 64])
    assert held[f"{table}.weight"] == ("U8", [99, 32]) and held[f"{table}.weight_scale"] == ("F32", [99, 1])
    assert not any("packed" in key for key in held)


# ---- configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "form",
    [lambda c: c, lambda c: hf.PreQuantHfConfig(c), lambda c: hf.PreQuantHfConfig(c).to_dict()],
    ids=["dataclass", "wrapper", "dict"],
)
def test_the_config_is_accepted_as(form, float_dir, quantized_dir):
    for directory in (float_dir, quantized_dir):
        model = BertForSequenceClassification.from_pretrained(directory, quantization_config=form(CONFIG))
        assert isinstance(model.bert.encoder.layer[0].output.dense, PreQuantLinear)
        assert model.config.quantization_config.config == model.hf_quantizer.quantization_config.config == CONFIG


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_config_round_trips_through_json(config):
    wrapped = hf.PreQuantHfConfig(
        config,
        float_modules=("pooler",),
        dtype="bfloat16",
        family=Family(stacks={"encoder": "layers"}, reads=("a",), writes=("b",)),
    )
    again = hf.PreQuantHfConfig.from_dict(json.loads(wrapped.to_json_string()))
    assert vars(again) == vars(wrapped)


def test_one_config_serves_two_models(float_dir, tmp_path):
    incomplete = _float_without(float_dir, tmp_path, "bert.encoder.layer.1.output.dense")
    shared = hf.PreQuantHfConfig(CONFIG)
    with pytest.warns(PreQuantWarning):
        BertForSequenceClassification.from_pretrained(incomplete, quantization_config=shared)
    assert shared.float_modules == ()


def test_a_family_row_of_the_users_travels_with_the_model(float_dir, tmp_path):
    family = Family(
        stacks={"encoder": "encoder.layer"},
        reads=("query", "key", "value"),
        writes=("output.dense",),
        heads=("pooler",),
        lm_heads=(),
    )
    streamed = BertForSequenceClassification.from_pretrained(
        float_dir, quantization_config=hf.PreQuantHfConfig(CONFIG, family=family)
    )
    in_place = BertForSequenceClassification.from_pretrained(float_dir)
    quantize_model(in_place, CONFIG, family=family)
    assert_same(streamed, in_place)
    for model in (streamed, in_place):
        model.save_pretrained(tmp_path)
        loaded = BertForSequenceClassification.from_pretrained(tmp_path)
        assert type(loaded.bert.encoder.layer[0].intermediate.dense) is nn.Linear
        assert_same(model, loaded)


def test_a_loaded_models_config_can_be_passed_on(quantized_dir):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    assert_same(model, BertForSequenceClassification.from_pretrained(quantized_dir, config=model.config))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "load"}, "dtype must name a torch dtype, such as bfloat16, got 'load'"),
        ({"format_version": "1"}, "format_version must be an integer of at least 1, got '1'"),
        ({"bits": 9}, "bits must be an integer from 2 to 8, got 9"),
    ],
)
def test_a_config_file_with_a_bad_entry_is_refused(changes, message, quantized_dir):
    file = quantized_dir / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= changes
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(quantized_dir)


def test_registering_twice_replaces_the_first():
    importlib.reload(hf)
    try:
        model = make_toy("bert")
        quantize_model(model, CONFIG)
        assert isinstance(model.hf_quantizer, transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING["prequant"])
    finally:
        importlib.reload(hf)


# ---- parts that a checkpoint lacks -----------------------------------------------------------------------------------


def _float_without(float_dir: Path, tmp_path: Path, *modules: str, suffix: str = "") -> Path:
    """A copy of the checkpoint without some modules' tensors."""
    incomplete = tmp_path / "incomplete"
    incomplete.mkdir()
    (incomplete / "config.json").write_text((float_dir / "config.json").read_text())
    tensors = load_file(float_dir / "model.safetensors")
    kept = {
        key: tensor
        for key, tensor in tensors.items()
        if not any(key.startswith(f"{module}.{suffix}") for module in modules)
    }
    assert len(kept) < len(tensors)
    save_file(kept, incomplete / "model.safetensors", metadata={"format": "pt"})
    return incomplete


def test_an_absent_head_is_fresh_and_float(float_dir, tmp_path):
    BertModel.from_pretrained(float_dir).save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "base", quantization_config=CONFIG, num_labels=3
    )
    assert (
        type(model.classifier) is nn.Linear and model.classifier.weight.std() < 1 and model.classifier.bias.eq(0).all()
    )
    assert model.classifier.weight.requires_grad
    assert isinstance(model.bert.encoder.layer[0].output.dense, PreQuantLinear)


def test_a_quantized_base_takes_a_fresh_head(float_dir, tmp_path):
    base = AutoModel.from_pretrained(float_dir, quantization_config=CONFIG)
    base.save_pretrained(tmp_path / "base")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", num_labels=3)
    assert toy_output(model).shape == (3, 3)
    assert all(torch.equal(tensor, model.bert.state_dict()[name]) for name, tensor in base.state_dict().items())
    model.save_pretrained(tmp_path / "classifier")
    assert_same(model, AutoModelForSequenceClassification.from_pretrained(tmp_path / "classifier"))
    assert_same(base, AutoModel.from_pretrained(tmp_path / "classifier"))


def test_an_absent_bias_starts_at_zero(float_dir, tmp_path):
    incomplete = _float_without(float_dir, tmp_path, "bert.encoder.layer.1.output.dense", suffix="bias")
    model = BertForSequenceClassification.from_pretrained(incomplete, quantization_config=CONFIG)
    assert model.bert.encoder.layer[1].output.dense.bias.eq(0).all()


def test_a_quantized_checkpoint_with_a_table_that_must_be_tied_is_refused(float_dir, tmp_path):
    AutoModel.from_pretrained(float_dir, quantization_config=CONFIG).save_pretrained(tmp_path / "base")
    with pytest.raises(
        ValueError,
        match=r"embeddings\.word_embeddings\.weight is quantized in the checkpoint but must be float in "
        r"BertForMaskedLM",
    ):
        transformers.BertForMaskedLM.from_pretrained(tmp_path / "base")


# ---- refusals --------------------------------------------------------------------------------------------------------


def test_a_newer_format_is_refused_naming_both_versions(quantized_dir):
    file = quantized_dir / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= {"format_version": FORMAT_VERSION + 1, "setting_of_the_future": 3}
    file.write_text(json.dumps(config))
    with pytest.raises(
        ValueError, match=f"format_version {FORMAT_VERSION + 1}.* up to format_version {FORMAT_VERSION}"
    ):
        BertForSequenceClassification.from_pretrained(quantized_dir)


def test_an_unknown_setting_in_the_file_is_refused(quantized_dir):
    file = quantized_dir / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"]["rotation"] = "hadamard"
    file.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="knows no setting rotation"):
        BertForSequenceClassification.from_pretrained(quantized_dir)


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
@pytest.mark.parametrize("name", ["bert.encoder.layer.1.intermediate.dense", "bert.embeddings.word_embeddings"])
def test_weights_that_are_not_finite_are_refused_by_name(name, bad, float_dir):
    file = float_dir / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{name}.weight"][3, 1] = bad
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"{name}.*NaN or Inf"):
        BertForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG)


def test_a_float_checkpoint_saved_by_torch_is_quantized_alike(float_dir, tmp_path):
    model = BertForSequenceClassification.from_pretrained(float_dir)
    model.config.save_pretrained(tmp_path / "bin")
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_same(
        BertForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG),
        BertForSequenceClassification.from_pretrained(tmp_path / "bin", quantization_config=CONFIG),
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def _live_float_bytes() -> int:
    """Bytes of all storages behind live floating-point tensors, but those that gc.freeze has put away."""
    storages = {}
    with contextlib.suppress(ReferenceError):
        for thing in gc.get_objects():
            if type(thing) in (torch.Tensor, nn.Parameter) and thing.device.type == "cpu" and thing.is_floating_point():
                storages[thing.untyped_storage().data_ptr()] = thing.untyped_storage().nbytes()
    return sum(storages.values())


@pytest.fixture
def frozen_heap():
    """What is alive before the test is not looked at in it."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


def test_loading_never_holds_more_than_the_quantized_model_and_one_float_tensor(frozen_heap, tmp_path, monkeypatch):
    config = transformers.BertConfig(
        vocab_size=500, hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256
    )
    model = BertModel(config)
    largest, total = max(p.nbytes for p in model.parameters()), sum(p.nbytes for p in model.parameters())
    model.save_pretrained(tmp_path)
    del model
    gc.collect()
    before, seen = _live_float_bytes(), []
    for function in ("quantize_matrix", "quantize_table"):
        original = getattr(quantize, function)

        def watched(weight, *args, original=original, **kwargs):
            seen.append(_live_float_bytes() - before)
            return original(weight, *args, **kwargs)

        monkeypatch.setattr(quantize, function, watched)
    model = BertModel.from_pretrained(tmp_path, quantization_config=CONFIG)
    quantized = sum(p.nbytes for p in model.parameters())
    assert len(seen) == 4 * 6 + 3
    assert max(seen) <= quantized + largest < total / 2


# ---- training and merging --------------------------------------------------------------------------------------------


def test_only_outlier_weights_and_the_head_train_after_loading(float_dir, quantized_dir):
    for model in (
        BertForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG),
        BertForSequenceClassification.from_pretrained(quantized_dir),
    ):
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained == {
            name
            for name, _ in model.named_parameters()
            if "outlier_weight" in name or "pooler" in name or "classifier" in name
        }
        assert len(trainable_parameters(model)) == len(trained)


def test_a_merged_model_saves_a_plain_float_checkpoint(quantized_dir, tmp_path):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    dense = model.bert.encoder.layer[0].output.dense.dequantize()
    to_float(model)
    model.save_pretrained(tmp_path / "merged")
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    loaded = BertForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not getattr(loaded, "is_quantized", False) and not getattr(model, "is_quantized", False)
    assert torch.equal(loaded.bert.encoder.layer[0].output.dense.weight, dense)
    assert_same(model, loaded)
    loaded.half()  # transformers forbids it for quantized models


def test_transformers_own_dequantize_merges(quantized_dir):
    model = BertForSequenceClassification.from_pretrained(quantized_dir).dequantize()
    assert type(model.bert.encoder.layer[0].output.dense) is nn.Linear


def test_inputs_of_the_toys_reach_every_layer():
    """Guards the tests above: an output that ignored a layer would call any two models the same."""
    model = make_toy("bert")
    output = toy_output(model)
    with torch.no_grad():
        model.bert.encoder.layer[0].intermediate.dense.weight *= 1.5
    assert not torch.equal(toy_output(model), output)
    assert toy_inputs(model)["input_ids"].shape == (3, 7)
