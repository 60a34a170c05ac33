"""quantize_model, trainable_parameters and to_float on small models of every family."""

import copy
import math

import pytest
import torch
from transformers import BertForPreTraining, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D

from prequant_ext import model as model_module
from prequant_ext.config import PreQuantConfig
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.families import FAMILIES
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import head_parameter_names, plan, quantize_model, to_float, trainable_parameters
from support.tiny_models import (
    HIDDEN,
    PLAIN_FAMILY,
    SETTINGS,
    Plain,
    assert_unchanged,
    from_config,
    outputs,
    snapshot,
    tiny_model,
)

WEIGHT_ONLY = PreQuantConfig(r=2, activation_bits=None)
every_family = pytest.mark.parametrize("model_type", FAMILIES)


# ---- every family ----------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("head", ["base", "classifier"])
def test_a_quantized_model_computes_what_its_merged_twin_does(model_type, head):
    model = tiny_model(model_type, head)
    before = outputs(model)
    quantize_model(model, WEIGHT_ONLY)
    twin = to_float(copy.deepcopy(model))
    torch.testing.assert_close(outputs(model), outputs(twin), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs(model), before, atol=1e-5)  # 4 bits do show


@every_family
def test_eight_bit_activations_stay_close_to_float_ones(model_type):
    model = tiny_model(model_type, "base")
    quantize_model(model, PreQuantConfig(r=2))
    exact, got = outputs(to_float(copy.deepcopy(model))), outputs(model)
    assert 0 < (got - exact).norm() / exact.norm() < 0.1


@every_family
def test_outlier_weights_run_along_the_hidden_size(model_type):
    model = tiny_model(model_type)
    quantize_model(model, PreQuantConfig(r=3))
    layers = [module for module in model.modules() if isinstance(module, PreQuantLinear)]
    for layer in layers:
        columns = layer.axis == "input"
        assert layer.outlier_weight.shape == ((layer.out_features, 3) if columns else (3, layer.in_features))
        assert (layer.in_features if columns else layer.out_features) == HIDDEN
    assert {layer.axis for layer in layers} == {"input", "output"}


@every_family
@pytest.mark.parametrize("axis", ["input", "output"])
def test_one_axis_everywhere(model_type, axis):
    rows = quantize_model(tiny_model(model_type), PreQuantConfig(r=1, axis=axis)).rows
    assert {row.axis for row in rows if row.kind == "linear"} == {axis}
    assert [row.name for row in rows] == [row.name for row in plan(tiny_model(model_type), PreQuantConfig(r=1))]


@every_family
def test_gradients_reach_the_outlier_weights_and_the_head_alone(model_type):
    model = tiny_model(model_type)
    quantize_model(model, PreQuantConfig(r=2))
    ids = torch.full((1, 3), 1)
    model.train()(input_ids=ids, labels=torch.tensor([1])).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    expected = {name for name, _ in model.named_parameters() if name.endswith("outlier_weight")} | set(
        head_parameter_names(model)
    )
    assert with_gradient == expected
    if model_type == "t5":  # cross-attention and the decoder included
        assert any("EncDecAttention.k" in name for name in with_gradient)


def test_activations_are_not_cast_to_the_type_of_the_codes():
    """T5 casts what enters ``wo`` to ``wo.weight.dtype``: uint8 would be a silent disaster."""
    model = from_config(T5Config(vocab_size=50, **SETTINGS["t5"]), T5ForConditionalGeneration)
    quantize_model(model, WEIGHT_ONLY)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, PreQuantLinear) and wo.weight.dtype == torch.float32
    torch.testing.assert_close(outputs(model), outputs(to_float(copy.deepcopy(model))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_stays_one(dtype):
    model = tiny_model("bert").to(dtype)
    quantize_model(model, WEIGHT_ONLY)
    assert outputs(model).dtype == dtype
    assert model.bert.encoder.layer[0].output.dense.outlier_weight.dtype == torch.float32
    assert {parameter.dtype for parameter in to_float(model).parameters()} == {dtype}


# ---- all or nothing --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["bert.encoder.layer.1.output.dense", "bert.embeddings.position_embeddings"])
def test_a_bad_weight_is_named_and_leaves_the_model_alone(name, value):
    model = tiny_model("bert")
    model.get_submodule(name).weight.data[1, 2] = value
    before = snapshot(model)
    with pytest.raises(ValueError, match=f"{name}.*must be finite"):
        quantize_model(model, PreQuantConfig(r=1))
    assert_unchanged(model, before)


def test_an_interrupt_at_the_last_step_leaves_the_model_alone(monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "_registered", model_module._Callbacks(interrupted, interrupted))
    model = tiny_model("bert")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt):
        quantize_model(model, PreQuantConfig(r=1))
    assert_unchanged(model, before)


def test_r_beyond_the_axis_is_refused():
    model = tiny_model("bert")
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer\.0\.attention\.self\.query: r = 33 must be at most 32"):
        quantize_model(model, PreQuantConfig(r=33))
    assert_unchanged(model, before)


def test_quantizing_twice_is_refused():
    model = tiny_model("bert")
    quantize_model(model, PreQuantConfig(r=1))
    for again in (quantize_model, plan):
        with pytest.raises(ValueError, match="BertForSequenceClassification is already quantized"):
            again(model, PreQuantConfig(r=1))


def test_a_model_without_data_is_refused():
    with pytest.raises(ValueError, match="weight is on the meta device and holds no data"):
        quantize_model(tiny_model("bert", device="meta"), PreQuantConfig(r=1))


# ---- what trains -----------------------------------------------------------------------------------------------------


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_quantize_model_freezes_as_trainable_parameters_does():
    model = tiny_model("bert")
    report = quantize_model(model, PreQuantConfig(r=2))
    names = trained(model)
    model.requires_grad_(False)
    parameters = trainable_parameters(model)
    assert trained(model) == names
    assert [id(parameter) for parameter in parameters] == [
        id(parameter) for parameter in model.parameters() if parameter.requires_grad
    ]
    assert {name for name in names if not name.endswith("outlier_weight")} == set(head_parameter_names(model))
    assert (
        sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("outlier_weight"))
        == report.trainable
    )


def test_biases_and_layer_norms_on_request():
    model = tiny_model("bert")
    quantize_model(model, PreQuantConfig(r=2))
    plain = trained(model)
    trainable_parameters(model, biases=True)
    biases = trained(model) - plain
    assert len(biases) == 12 and all(name.endswith("dense.bias") or ".self." in name for name in biases)
    trainable_parameters(model, layer_norms=True)
    norms = trained(model) - plain
    assert len(norms) == 2 * 5 and all("LayerNorm" in name for name in norms)
    trainable_parameters(model)
    assert trained(model) == plain


def test_language_model_heads_do_not_train_even_with_biases():
    model = tiny_model("bert", "masked_lm")
    quantize_model(model, PreQuantConfig(r=2))
    trainable_parameters(model, biases=True, layer_norms=True)
    assert not any(name.startswith("cls.") for name in trained(model))


def test_next_sentence_head_trains_beside_a_frozen_language_model_head():
    model = from_config(tiny_model("bert").config, BertForPreTraining)
    quantize_model(model, PreQuantConfig(r=2))
    assert {name for name in trained(model) if name.startswith("cls.")} == {
        "cls.seq_relationship.weight",
        "cls.seq_relationship.bias",
    }


def test_scales_train_in_place_of_outlier_weights():
    model = tiny_model("bert")
    report = quantize_model(model, PreQuantConfig(r=0, train_scales=True))
    scales = {name for name in trained(model) if name.endswith("weight_scale")}
    assert len(scales) == 12 and trained(model) - scales == set(head_parameter_names(model))
    assert report.trainable == sum(model.get_parameter(name).numel() for name in scales) == 2 * (5 * 32 + 64 + 32)


def test_nothing_to_train_is_an_error():
    model = tiny_model("distilbert", "base")
    quantize_model(model, PreQuantConfig(r=0))  # of use for inference
    assert not trained(model)
    with pytest.raises(ValueError, match="nothing to train in DistilBertModel"):
        trainable_parameters(model)


def test_a_quantized_head_is_an_error():
    model = Plain()
    # without a family no head is known, and classifier is quantized like the rest
    quantize_model(model, PreQuantConfig(r=1, axis="input"))
    model._prequant_family = PLAIN_FAMILY
    with pytest.raises(ValueError, match=r"classifier.* belongs to the frozen base but also to the task head"):
        trainable_parameters(model)


@pytest.mark.parametrize("function", [trainable_parameters, to_float])
def test_a_float_model_is_an_error(function):
    with pytest.raises(ValueError, match="BertForSequenceClassification is not quantized"):
        function(tiny_model("bert"))


# ---- ticket selection ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])
@pytest.mark.parametrize("as_model", [True, False])
def test_tickets_are_the_dimensions_that_fine_tuning_moved(model_type, as_model):
    model = tiny_model(model_type)
    tuned = copy.deepcopy(model)
    reader = "bert.encoder.layer.0.intermediate.dense" if model_type == "bert" else "transformer.h.0.mlp.c_fc"
    weight = tuned.get_submodule(reader).weight.data
    (weight if model_type == "bert" else weight.T)[:, [3, 7]] += 1.0
    quantize_model(model, PreQuantConfig(r=2, selector="ticket"), tuned=tuned if as_model else tuned.state_dict())
    assert model.get_submodule(reader).outlier_dims.tolist() == [3, 7]


@pytest.mark.parametrize(
    ("selector", "tuned", "message"),
    [
        ("ticket", None, "tuned needs the fine-tuned model or its state dict"),
        ("outlier", {}, 'selector="ticket", which alone reads it'),
        ("ticket", {}, "tuned has no bert.encoder.layer.0.attention.self.query.weight"),
    ],
)
def test_tuned_weights_that_do_not_fit_the_selector_are_refused(selector, tuned, message):
    with pytest.raises(ValueError, match=message):
        quantize_model(tiny_model("bert"), PreQuantConfig(r=1, selector=selector), tuned=tuned)


# ---- to_float --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_a_merged_model_is_the_float_model_with_other_values(model_type):
    model = tiny_model(model_type)
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    settings = model.config.to_dict()
    quantize_model(model, WEIGHT_ONLY)
    dense = {
        name: module.dequantize()
        for name, module in model.named_modules()
        if isinstance(module, PreQuantLinear | PreQuantEmbedding)
    }
    assert to_float(model) is model
    assert {name: type(module) for name, module in model.named_modules()} == kinds
    assert {name: parameter.shape for name, parameter in model.named_parameters()} == shapes
    for name, values in dense.items():
        weight = model.get_submodule(name).weight
        assert torch.equal(weight.T if isinstance(model.get_submodule(name), Conv1D) else weight, values)
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert model.config.to_dict() == settings and not hasattr(model, "hf_quantizer")
    quantize_model(model, WEIGHT_ONLY)  # a float model again in every respect


def test_modes_of_modules_are_kept():
    model = tiny_model("bert").train()
    model.bert.encoder.layer[0].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    quantize_model(model, WEIGHT_ONLY)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: module.training for name, module in to_float(model).named_modules()} == modes
