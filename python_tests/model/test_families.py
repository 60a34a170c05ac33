"""The rows of FAMILIES against the real modules of transformers."""

import pytest
import torch
from torch import nn
from transformers import (
    AutoConfig,
    BertConfig,
    BertLMHeadModel,
    GPT2Config,
    GPT2LMHeadModel,
    T5Config,
    T5EncoderModel,
    T5ForQuestionAnswering,
)

from prequant_ext.blocks import blocks_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.families import FAMILIES, Family
from prequant_ext.linear import is_conv1d
from prequant_ext.model import head_parameter_names
from prequant_ext.sites import HEAD, LM_HEAD, OUTSIDE, TIED, find_sites, survey
from support.tiny_models import HIDDEN, SETTINGS, from_config, tiny_model, token_ids

LLAMAS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text")
MATRICES = {"deberta-v2": 8, "modernbert": 4, "gpt2": 4} | dict.fromkeys(LLAMAS, 7)  # of a block; the other families: 6
CONFIG = PreQuantConfig(r=2)
every_family = pytest.mark.parametrize("model_type", FAMILIES)


def linear_sites(model, config=CONFIG):
    return [site for site in find_sites(model, config) if site.kind == "linear"]


def test_every_family_has_a_tiny_model():
    assert set(SETTINGS) == set(FAMILIES)


@every_family
def test_every_matrix_of_a_block_has_a_role(model_type):
    model = tiny_model(model_type)
    sites = linear_sites(model)
    in_blocks = [
        f"{block.name}.{name}"
        for block in blocks_of(model, FAMILIES[model_type])
        for name, module in model.get_submodule(block.name).named_modules()
        if type(module) is nn.Linear or is_conv1d(module)
    ]
    assert sorted(site.name for site in sites) == sorted(in_blocks)
    expected = 2 * 6 + 2 * 10 if model_type == "t5" else 2 * MATRICES.get(model_type, 6)
    assert len(sites) == expected


@every_family
def test_readers_take_the_hidden_size_and_writers_give_it(model_type):
    model = tiny_model(model_type)
    sites = linear_sites(model)
    assert model.config.hidden_size == HIDDEN
    for site in sites:
        N, K = site.shape
        assert (K if site.axis == "input" else N) == HIDDEN
        assert site.hidden_size == HIDDEN
    # attention output and feed-forward output; a decoder of T5 has a cross-attention output as well
    assert sum(site.axis == "output" for site in sites) == (2 * 2 + 2 * 3 if model_type == "t5" else 2 * 2)


@every_family
@torch.no_grad()
def test_blocks_without_their_writers_pass_the_residual_stream_on(model_type):
    """Square matrices hide their role from a look at shapes: writers are those whose silence makes every block the
    identity.
    """
    # else a projection follows the embeddings' LayerNorm, and the first block's changes the stream
    changes = {"electra": {"embedding_size": HIDDEN}}
    model = tiny_model(model_type, "base", **changes.get(model_type, {}))

    def streams():
        inputs = {"input_ids": token_ids(), "output_hidden_states": True}
        if model_type != "t5":
            return [model(**inputs).hidden_states]
        result = model(**inputs, decoder_input_ids=token_ids())
        return [result.encoder_hidden_states, result.decoder_hidden_states]

    assert all((states[0] - states[1]).abs().max() > 1e-2 for states in streams())
    for site in linear_sites(model):
        if site.axis == "output":
            module = model.get_submodule(site.name)
            module.weight.zero_()
            if module.bias is not None:
                module.bias.zero_()
    for states in streams():
        torch.testing.assert_close(states[1], states[0], atol=1e-3, rtol=1e-3)


def test_cross_attention_reads_with_its_keys_and_values():
    bert = BertLMHeadModel(BertConfig(vocab_size=50, is_decoder=True, add_cross_attention=True, **SETTINGS["bert"]))
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=50, add_cross_attention=True, **SETTINGS["gpt2"]))
    for model, readers, writer in (
        (bert, ("self.query", "self.key", "self.value"), "output.dense"),
        (gpt2, ("q_attn", "c_attn"), "c_proj"),
    ):
        axes = {site.name: site.axis for site in linear_sites(model)}
        prefix = (
            next(name for name in axes if ".0.crossattention" in name).split("crossattention")[0] + "crossattention."
        )
        assert {axes[prefix + reader] for reader in readers} == {"input"}
        assert axes[prefix + writer] == "output"


def test_position_projections_of_deberta_are_readers():
    sites = linear_sites(tiny_model("deberta-v2"))
    assert sum("pos_" in site.name and site.axis == "input" for site in sites) == 4


def test_gated_feed_forward_of_t5():
    axes = {
        site.name.rpartition(".")[2]: site.axis
        for site in linear_sites(tiny_model("t5", "base", feed_forward_proj="gated-gelu"))
    }
    assert axes == {
        "q": "input",
        "k": "input",
        "v": "input",
        "o": "output",
        "wi_0": "input",
        "wi_1": "input",
        "wo": "output",
    }


def test_an_encoder_alone_has_one_stack():
    model = from_config(AutoConfig.for_model("t5", vocab_size=50, **SETTINGS["t5"]), T5EncoderModel)
    assert {block.stack for block in blocks_of(model, FAMILIES["t5"])} == {"encoder"}
    assert len(linear_sites(model)) == 12


@pytest.mark.parametrize(
    ("model_type", "module"),
    [
        ("electra", "electra.embeddings_project"),
        ("opt", "model.decoder.project_in"),
        ("opt", "model.decoder.project_out"),
        ("modernbert", "head.dense"),
    ],
)
def test_linears_outside_the_blocks_stay_float_and_frozen(model_type, module):
    model = tiny_model(model_type)
    _, uncovered = survey(model, CONFIG)
    assert {entry.name: entry.reason for entry in uncovered}[module] == OUTSIDE
    assert not any(name.startswith(module) for name in head_parameter_names(model))


HEADS = {
    "bert": {"bert.pooler", "classifier"},
    "roberta": {"classifier"},
    "xlm-roberta": {"classifier"},
    "distilbert": {"pre_classifier", "classifier"},
    "electra": {"classifier"},
    "mpnet": {"classifier"},
    "deberta-v2": {"pooler", "classifier"},
    "modernbert": {"classifier"},
    "t5": {"classification_head"},
}


@every_family
def test_heads_of_classifiers(model_type):
    expected = HEADS.get(model_type, {"score"})
    names = head_parameter_names(tiny_model(model_type))
    assert {next((head for head in expected if name.startswith(f"{head}.")), name) for name in names} == expected


@every_family
def test_a_bare_model_has_its_pooler_or_no_head(model_type):
    names = head_parameter_names(tiny_model(model_type, "base"))
    assert names == (
        ["pooler.dense.weight", "pooler.dense.bias"]
        if model_type in ("bert", "roberta", "xlm-roberta", "mpnet")
        else []
    )


def test_a_question_answering_head_within_the_base_model():
    model = T5ForQuestionAnswering(T5Config(vocab_size=50, **SETTINGS["t5"]))
    assert head_parameter_names(model) == ["qa_outputs.weight", "qa_outputs.bias"]


@pytest.mark.parametrize(
    "model_type", ["bert", "roberta", "distilbert", "electra", "mpnet", "deberta-v2", "modernbert"]
)
def test_masked_language_model_heads_are_neither_quantized_nor_trained(model_type):
    model = tiny_model(model_type, "masked_lm")
    assert head_parameter_names(model) in ([], ["bert.pooler.dense.weight", "bert.pooler.dense.bias"])
    sites, uncovered = survey(model, CONFIG)
    reasons = {entry.name: entry.reason for entry in uncovered}
    decoder = next(name for name, module in model.named_modules() if module is model.get_output_embeddings())
    assert reasons[decoder] == LM_HEAD
    table = next(name for name, module in model.named_modules() if module is model.get_input_embeddings())
    assert reasons[table] == TIED
    assert not any(site.name in (decoder, table) for site in sites)


@pytest.mark.parametrize(
    "model_type", ["gpt2", "opt", "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
)
def test_causal_language_model_heads_are_neither_quantized_nor_trained(model_type):
    model = tiny_model(model_type, "causal_lm")
    assert head_parameter_names(model) == []
    reasons = {entry.name: entry.reason for entry in survey(model, CONFIG)[1]}
    assert reasons["lm_head"] == LM_HEAD


def test_pooler_and_classifier_are_reported_as_heads():
    reasons = {entry.name: entry.reason for entry in survey(tiny_model("bert"), CONFIG)[1]}
    assert reasons == {"bert.pooler.dense": HEAD, "classifier": HEAD}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stacks": "encoder.layer"}, "stacks must map stack names to block lists"),
        ({"stacks": {"encoder": 3}}, "stacks must map stack names to block lists"),
        ({"stacks": {}, "reads": "query"}, "reads must be a list of module names, got 'query'"),
        ({"stacks": {}, "heads": (1,)}, "heads must be a list of module names"),
        ({"stacks": {}, "reads": ("q", "o"), "writes": ("o",)}, "o stands in reads and in writes"),
    ],
)
def test_a_family_refuses(fields, message):
    with pytest.raises(ValueError, match=message):
        Family(**fields)
