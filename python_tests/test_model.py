"""quantize_model, trainable_parameters and merge on small models of every family."""

import copy
import math
import warnings

import pytest
import torch
from tiny_models import HIDDEN, SETTINGS, from_config, outputs, tiny_model
from torch import nn
from transformers import BertForPreTraining, T5Config, T5ForConditionalGeneration
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from prequant_ext import model as model_module
from prequant_ext.config import PreQuantConfig
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.families import FAMILIES, Family
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import head_parameter_names, merge, plan, quantize_model, trainable_parameters
from prequant_ext.report import Report
from prequant_ext.sites import TIED
from prequant_ext.strictness import PreQuantWarning

WEIGHT_ONLY = PreQuantConfig(r=2, activation_bits=None)
every_family = pytest.mark.parametrize("model_type", FAMILIES)


class Plain(nn.Module):
    """A module that knows nothing of transformers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(20, 16)
        self.blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(16, 24), "down": nn.Linear(24, 16)}) for _ in range(2))
        self.classifier = nn.Linear(16, 3)

    def forward(self, ids):
        x = self.table(ids)
        for block in self.blocks:
            x = x + block["down"](block["up"](x).relu())
        return self.classifier(x)


PLAIN_FAMILY = Family({"encoder": "blocks"}, reads=("up",), writes=("down",), heads=("classifier",))


def snapshot(model):
    """Everything that a refusal must leave alone."""
    tensors = {name: (id(parameter), parameter.requires_grad, parameter.detach().clone()) for name, parameter in model.named_parameters()}
    return tensors, {name: id(module) for name, module in model.named_modules()}, sorted(vars(model)), copy.deepcopy(getattr(model, "config", None))


def assert_unchanged(model, before):
    tensors, modules, attributes, config = snapshot(model)
    assert modules == before[1] and attributes == before[2] and tensors.keys() == before[0].keys()
    for new, old in zip(tensors.values(), before[0].values(), strict=True):
        assert new[:2] == old[:2]
        torch.testing.assert_close(new[2], old[2], rtol=0, atol=0, equal_nan=True)
    if config is not None:
        assert config.to_dict() == before[3].to_dict()


# ---- every family ---------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("head", ["base", "classifier"])
def test_a_quantized_model_computes_what_its_merged_twin_does(model_type, head):
    model = tiny_model(model_type, head)
    before = outputs(model)
    quantize_model(model, WEIGHT_ONLY)
    twin = merge(copy.deepcopy(model))
    torch.testing.assert_close(outputs(model), outputs(twin), atol=1e-5, rtol=1e-4)
    assert not torch.allclose(outputs(model), before, atol=1e-5)  # 4 bits do show


@every_family
def test_eight_bit_activations_stay_close_to_float_ones(model_type):
    model = tiny_model(model_type, "base")
    quantize_model(model, PreQuantConfig(r=2))
    exact, got = outputs(merge(copy.deepcopy(model))), outputs(model)
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
    expected = {name for name, _ in model.named_parameters() if name.endswith("outlier_weight")} | set(head_parameter_names(model))
    assert with_gradient == expected
    if model_type == "t5":  # cross-attention and the decoder included
        assert any("EncDecAttention.k" in name for name in with_gradient)


def test_activations_are_not_cast_to_the_type_of_the_codes():
    """T5 casts what enters ``wo`` to ``wo.weight.dtype``: uint8 would be a silent disaster."""
    model = from_config(T5Config(vocab_size=50, **SETTINGS["t5"]), T5ForConditionalGeneration)
    quantize_model(model, WEIGHT_ONLY)
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, PreQuantLinear) and wo.weight.dtype == torch.float32
    torch.testing.assert_close(outputs(model), outputs(merge(copy.deepcopy(model))), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_half_precision_model_stays_one(dtype):
    model = tiny_model("bert").to(dtype)
    quantize_model(model, WEIGHT_ONLY)
    assert outputs(model).dtype == dtype
    assert model.bert.encoder.layer[0].output.dense.outlier_weight.dtype == torch.float32
    assert {parameter.dtype for parameter in merge(model).parameters()} == {dtype}


# ---- what stays float -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["gpt2", "opt", "gemma"])
def test_tied_tables_and_language_model_heads_stay_float_and_tied(model_type):
    model = tiny_model(model_type, "causal_lm")
    table = model.get_input_embeddings().weight
    report = quantize_model(model, WEIGHT_ONLY)
    assert model.get_input_embeddings().weight is table and model.lm_head.weight is table
    assert type(model.lm_head) is nn.Linear and not table.requires_grad
    assert all("embed_tokens" not in row.name and "wte" not in row.name for row in report.rows)


def test_an_untied_table_is_quantized_and_its_head_is_not():
    model = tiny_model("llama", "causal_lm", tie_word_embeddings=False)
    quantize_model(model, WEIGHT_ONLY)
    assert isinstance(model.model.embed_tokens, PreQuantEmbedding) and type(model.lm_head) is nn.Linear


def test_tables_that_are_read_without_a_lookup_stay_float():
    for model_type, table in (("deberta-v2", "encoder.rel_embeddings"), ("mpnet", "encoder.relative_attention_bias")):
        model = tiny_model(model_type, "base")
        quantize_model(model, WEIGHT_ONLY)
        assert type(model.get_submodule(table)) is nn.Embedding


def test_a_module_under_two_names_is_tied():
    model = Plain()
    model.blocks[1]["up"] = model.blocks[0]["up"]
    report = quantize_model(model, PreQuantConfig(r=1), family=PLAIN_FAMILY)
    assert {entry.name: entry.reason for entry in report.uncovered}["blocks.0.up"] == TIED
    assert model.blocks[1]["up"] is model.blocks[0]["up"] and type(model.blocks[0]["up"]) is nn.Linear


def test_float_embeddings_on_request():
    model = tiny_model("bert")
    report = quantize_model(model, PreQuantConfig(r=1, embedding_bits=None))
    assert not any(isinstance(module, PreQuantEmbedding) for module in model.modules())
    assert "bert.embeddings.word_embeddings (50, 32), embedding_bits is None" in str(report)


def test_a_table_renormalized_at_lookup_stays_float():
    model = Plain()
    model.table = nn.Embedding(20, 16, max_norm=1.0)
    assert not any(row.name == "table" for row in quantize_model(model, PreQuantConfig(r=1), family=PLAIN_FAMILY).rows)


@torch.no_grad()
def test_linears_that_pytorch_reads_directly_stay_float():
    """The fast path of nn.TransformerEncoderLayer takes linear1.weight without calling linear1."""
    model = nn.Sequential(nn.TransformerEncoderLayer(16, 2, 24, batch_first=True), nn.Linear(16, 16)).eval()
    with pytest.warns(PreQuantWarning, match="nn.TransformerEncoderLayer reads its weight"):
        report = quantize_model(model, PreQuantConfig(r=1, axis="input"))
    assert [row.name for row in report.rows] == ["1"]
    assert model(torch.randn(1, 3, 16)).isfinite().all()


def experts_model(head="classifier"):
    return tiny_model("qwen2_moe", head, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64, shared_expert_intermediate_size=16, head_dim=8)


def test_fused_experts_are_named_and_warned_about():
    config = PreQuantConfig(r=1, axis="input")
    with pytest.warns(PreQuantWarning, match="quantized .* % of the weights; not covered: .*mlp.experts.gate_up_proj"):
        report = quantize_model(experts_model(), config)
    reasons = {entry.name: entry.reason for entry in report.uncovered}
    assert reasons["model.layers.0.mlp.experts.gate_up_proj"] == "3-D parameter of Qwen2MoeExperts"
    assert reasons["model.layers.1.mlp.experts.down_proj"] == "3-D parameter of Qwen2MoeExperts"
    assert reasons["model.layers.0.mlp.gate"] == "Qwen2MoeTopKRouter, not exactly nn.Linear or nn.Embedding"
    assert "model.layers.*.mlp.experts.gate_up_proj (4, 128, 32) x 2, 3-D parameter of Qwen2MoeExperts" in str(report)
    assert any(row.name.endswith("shared_expert.up_proj") for row in report.rows)


def test_strictness_turns_the_warning_into_a_refusal(monkeypatch):
    monkeypatch.setenv("PREQUANT_STRICT", "1")
    model = experts_model()
    before = snapshot(model)
    with pytest.raises(PreQuantWarning, match="not covered"):
        quantize_model(model, PreQuantConfig(r=1, axis="input"))
    assert_unchanged(model, before)


@every_family
def test_no_warning_for_a_known_family(model_type):
    with warnings.catch_warnings():
        warnings.simplefilter("error", PreQuantWarning)
        quantize_model(tiny_model(model_type), PreQuantConfig(r=1))


# ---- unknown families and plain modules -----------------------------------------------------------------------------


def test_the_error_for_an_unknown_family_holds_one_that_works():
    model = Plain()
    with pytest.raises(ValueError, match='Pass axis="input" or axis="output", which need no family') as caught:
        quantize_model(model, PreQuantConfig(r=1))
    example = "from prequant_ext" + str(caught.value).split("from prequant_ext", 1)[1]
    config = PreQuantConfig(r=1)
    exec(example, {"model": model, "config": config, "quantize_model": quantize_model})
    assert [model.blocks[0][name].axis for name in ("up", "down")] == ["input", "output"]


def test_an_unknown_model_type_is_named():
    with pytest.raises(ValueError, match="model_type 'qwen2_moe' is not among bert, roberta"):
        plan(experts_model(), PreQuantConfig())


def test_a_family_for_a_model_without_a_row():
    row = FAMILIES["qwen2"]
    report = quantize_model(experts_model("base"), PreQuantConfig(r=1, modules_to_not_convert=["experts"]), family=row)
    assert {r.axis for r in report.rows if "shared_expert.down_proj" in r.name} == {"output"}
    assert {entry.reason for entry in report.uncovered if entry.name.endswith("shared_expert_gate")} == {"neither in reads nor in writes of the family"}


def test_a_plain_module_needs_no_family_for_one_axis():
    model = Plain()
    report = quantize_model(model, PreQuantConfig(r=1, axis="output", modules_to_not_convert=["classifier"]))
    assert [row.name for row in report.rows] == ["table", "blocks.0.up", "blocks.0.down", "blocks.1.up", "blocks.1.down"]
    assert model(torch.tensor([[1, 2]])).isfinite().all()


def test_heads_of_a_plain_module_come_from_its_family():
    model = Plain()
    quantize_model(model, PreQuantConfig(r=1), family=PLAIN_FAMILY)
    assert head_parameter_names(copy.deepcopy(model)) == ["classifier.weight", "classifier.bias"]
    assert len(trainable_parameters(model)) == 4 + 2


def test_trained_scales_of_a_plain_module_take_the_hidden_size_from_its_roles():
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 24), "down": nn.Linear(24, 8)})])
    quantize_model(model, PreQuantConfig(r=0, train_scales=True), family=PLAIN_FAMILY)
    assert [tuple(parameter.shape) for parameter in trainable_parameters(model)] == [(24, 1), (8, 3)]


# ---- all or nothing -------------------------------------------------------------------------------------------------


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
    class Interrupted:
        @staticmethod
        def attach(*_):
            raise KeyboardInterrupt

    monkeypatch.setattr(model_module, "_plug_in", Interrupted)
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


# ---- the report -----------------------------------------------------------------------------------------------------


def test_errors_in_the_report_are_those_of_the_weights():
    model = tiny_model("gpt2")
    twin = copy.deepcopy(model)
    report = quantize_model(model, PreQuantConfig(r=2))
    for row in report.rows:
        weight = twin.get_submodule(row.name).weight
        weight = weight.T if isinstance(twin.get_submodule(row.name), Conv1D) else weight
        error = (model.get_submodule(row.name).dequantize().double() - weight.double()).norm().item()
        assert row.l2_error == pytest.approx(error, rel=1e-5)
    matrices = [row.l2_error for row in report.rows if row.kind == "linear"]
    assert report.l2_error == pytest.approx(math.sqrt(sum(error**2 for error in matrices)))


def test_outliers_in_the_report_are_counted_on_the_full_matrix():
    model = tiny_model("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight.double()
    expected = ((weight - weight.mean()).abs() > 2 * weight.std(correction=0)).sum().item()
    row = next(row for row in quantize_model(model, PreQuantConfig(r=1, outlier_threshold=2.0)).rows if row.name == "bert.encoder.layer.0.output.dense")
    assert row.num_outliers == expected > 0


def test_bytes_and_coverage():
    model = tiny_model("bert")
    before, total = sum(parameter.nbytes for parameter in model.parameters()), sum(parameter.numel() for parameter in model.parameters())
    report = quantize_model(model, PreQuantConfig(r=1))
    assert (report.bytes_before, report.total_weights) == (before, total)
    assert report.bytes_after == sum(parameter.nbytes for parameter in model.parameters())
    quantized = 2 * (4 * 32 * 32 + 2 * 32 * 64) + (50 + 40 + 2) * 32
    assert report.coverage == quantized / total
    assert report.coverage_line() == f"quantized {100 * quantized / total:.1f} % of the weights; not covered: " + (
        "bert.pooler.dense (32, 32), task head; classifier (2, 32), task head"
    )


def test_the_report_prints_a_table_and_survives_json():
    report = quantize_model(tiny_model("bert"), PreQuantConfig(r=2))
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "shape", "axis", "bits", "r", "outliers", "L2", "error", "kB", "before", "kB", "after"]
    row = next(line for line in lines if line.startswith("bert.encoder.layer.1.intermediate.dense"))
    assert row.split()[1:7] == ["64", "x", "32", "input", "4", "2"]
    assert Report.from_dict(report.to_dict()) == report


def test_progress_obeys_the_switch_of_transformers(capfd):
    assert transformers_logging.is_progress_bar_enabled()
    quantize_model(tiny_model("bert"), PreQuantConfig(r=1))
    assert "quantizing" in capfd.readouterr().err
    transformers_logging.disable_progress_bar()
    try:
        quantize_model(tiny_model("bert"), PreQuantConfig(r=1))
    finally:
        transformers_logging.enable_progress_bar()
    assert "quantizing" not in capfd.readouterr().err


# ---- what trains ----------------------------------------------------------------------------------------------------


def trained(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_quantize_model_freezes_as_trainable_parameters_does():
    model = tiny_model("bert")
    report = quantize_model(model, PreQuantConfig(r=2))
    names = trained(model)
    model.requires_grad_(False)
    parameters = trainable_parameters(model)
    assert trained(model) == names
    assert [id(parameter) for parameter in parameters] == [id(parameter) for parameter in model.parameters() if parameter.requires_grad]
    assert {name for name in names if not name.endswith("outlier_weight")} == set(head_parameter_names(model))
    assert sum(parameter.numel() for name, parameter in model.named_parameters() if name.endswith("outlier_weight")) == report.trainable


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
    assert {name for name in trained(model) if name.startswith("cls.")} == {"cls.seq_relationship.weight", "cls.seq_relationship.bias"}


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
    quantize_model(model, PreQuantConfig(r=1, axis="input"))  # without a family no head is known, and classifier is quantized like the rest
    model._prequant_family = PLAIN_FAMILY
    with pytest.raises(ValueError, match=r"classifier.* belongs to the frozen base but also to the task head"):
        trainable_parameters(model)


@pytest.mark.parametrize("function", [trainable_parameters, merge])
def test_a_float_model_is_an_error(function):
    with pytest.raises(ValueError, match="BertForSequenceClassification is not quantized"):
        function(tiny_model("bert"))


# ---- ticket selection -----------------------------------------------------------------------------------------------


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


# ---- merge ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "t5"])
def test_a_merged_model_is_the_float_model_with_other_values(model_type):
    model = tiny_model(model_type)
    kinds = {name: type(module) for name, module in model.named_modules()}
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    settings = model.config.to_dict()
    quantize_model(model, WEIGHT_ONLY)
    dense = {name: module.dequantize() for name, module in model.named_modules() if isinstance(module, PreQuantLinear | PreQuantEmbedding)}
    assert merge(model) is model
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
    assert {name: module.training for name, module in merge(model).named_modules()} == modes
