"""The walk: what is quantized, what stays float and why, and what an unknown model is told."""

import copy
import warnings

import pytest
import torch
from torch import nn

from prequant_ext.config import PreQuantConfig
from prequant_ext.embedding import PreQuantEmbedding
from prequant_ext.families import FAMILIES
from prequant_ext.model import head_parameter_names, plan, quantize_model, trainable_parameters
from prequant_ext.sites import TIED
from prequant_ext.strictness import PreQuantWarning
from support.tiny_models import PLAIN_FAMILY, Plain, assert_unchanged, snapshot, tiny_model

WEIGHT_ONLY = PreQuantConfig(r=2, activation_bits=None)
every_family = pytest.mark.parametrize("model_type", FAMILIES)


# ---- what stays float ------------------------------------------------------------------------------------------------


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
    return tiny_model(
        "qwen2_moe",
        head,
        num_experts=4,
        num_experts_per_tok=2,
        moe_intermediate_size=64,
        shared_expert_intermediate_size=16,
        head_dim=8,
    )


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


# ---- unknown families and plain modules ------------------------------------------------------------------------------


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
    assert {entry.reason for entry in report.uncovered if entry.name.endswith("shared_expert_gate")} == {
        "neither in reads nor in writes of the family"
    }


def test_a_plain_module_needs_no_family_for_one_axis():
    model = Plain()
    report = quantize_model(model, PreQuantConfig(r=1, axis="output", modules_to_not_convert=["classifier"]))
    assert [row.name for row in report.rows] == [
        "table",
        "blocks.0.up",
        "blocks.0.down",
        "blocks.1.up",
        "blocks.1.down",
    ]
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
