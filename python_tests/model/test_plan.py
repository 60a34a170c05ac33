"""plan: counts and bytes of what quantize_model would make, from shapes alone."""

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel, T5Config, T5EncoderModel

from prequant_ext.config import PreQuantConfig
from prequant_ext.families import FAMILIES, Family
from prequant_ext.model import find_sites, plan, quantize_model
from support.tiny_models import from_config, tiny_model

LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
PAPER = {  # model, r, trainable outlier weights (Table 1 prints 0.55 M, 0.55 M, 1.47 M, 11.80 M)
    "BERT-base": (BertModel, BertConfig(), 5, 552_960),
    "RoBERTa-base": (RobertaModel, RobertaConfig(vocab_size=50265), 5, 552_960),
    "RoBERTa-large": (RobertaModel, RobertaConfig(vocab_size=50265, **LARGE), 5, 1_474_560),
    "T5-3B encoder": (
        T5EncoderModel,
        T5Config(d_model=1024, d_ff=16384, d_kv=128, num_heads=32, num_layers=24),
        10,
        11_796_480,
    ),
}


@pytest.mark.parametrize(("model_class", "settings", "r", "trainable"), PAPER.values(), ids=PAPER.keys())
def test_counts_of_the_paper(model_class, settings, r, trainable):
    rows = plan(from_config(settings, model_class, "meta"), PreQuantConfig(r=r))
    assert sum(row.trainable for row in rows) == trainable


def test_scales_of_prequant_alpha_on_roberta_large():
    model = from_config(RobertaConfig(vocab_size=50265, **LARGE), RobertaModel, "meta")
    rows = plan(model, PreQuantConfig(r=0, train_scales=True))
    assert sum(row.trainable for row in rows) == 294_912  # 24 * 12 * 1024^2 / 1024
    assert {row.outlier_slices for row in rows} == {0}


def test_columns_everywhere_train_less():
    """The count that rules out "input columns everywhere" as a reading of the paper."""
    model = from_config(BertConfig(), BertModel, "meta")
    assert sum(row.trainable for row in plan(model, PreQuantConfig(r=5, axis="input"))) == 414_720


def test_rows_of_a_plan():
    model = tiny_model("bert", device="meta")
    rows = {row.name.removeprefix("bert."): row for row in plan(model, PreQuantConfig(r=3))}
    reader, writer, table = (
        rows[name]
        for name in ("encoder.layer.0.intermediate.dense", "encoder.layer.1.output.dense", "embeddings.word_embeddings")
    )
    assert (reader.kind, reader.shape, reader.axis, reader.bits, reader.outlier_slices, reader.trainable) == (
        "linear",
        (64, 32),
        "input",
        4,
        3,
        3 * 64,
    )
    # codes, scale and zero point, indices, outlier weights, bias
    assert reader.bytes == 64 * 32 // 2 + (4 + 1) + 3 * 8 + 3 * 64 * 4 + 64 * 4
    assert (writer.shape, writer.axis, writer.trainable) == ((32, 64), "output", 3 * 64)
    assert (table.kind, table.shape, table.axis, table.bits, table.outlier_slices, table.trainable) == (
        "embedding",
        (50, 32),
        None,
        8,
        0,
        0,
    )
    assert table.bytes == 50 * 32 + 50 * (4 + 1)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_plan_is_kept(model_type):
    config = PreQuantConfig(r=2)
    planned = plan(tiny_model(model_type, device="meta"), config)
    model = tiny_model(model_type)
    report = quantize_model(model, config)
    for before, after in zip(planned, report.rows, strict=True):
        assert vars(before).items() <= vars(after).items()
        assert before.bytes == sum(tensor.nbytes for tensor in model.get_submodule(before.name).state_dict().values())


def test_a_plan_leaves_the_model_alone():
    model = tiny_model("bert")
    before = {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()}
    plan(model, PreQuantConfig())
    assert {name: (id(parameter), parameter.requires_grad) for name, parameter in model.named_parameters()} == before


def test_shapes_of_conv1d_are_those_of_the_linear():
    rows = {row.name: row for row in plan(tiny_model("gpt2", "base"), PreQuantConfig(r=2))}
    assert rows["h.0.attn.c_attn"].shape == (96, 32)
    assert rows["h.0.mlp.c_proj"].shape == (32, 128)


# ---- bits of single blocks -------------------------------------------------------------------------------------------


def bits_of(model_type, layer_bits):
    """Bits by block, in the order of the list form."""
    bits: dict[str, set[int]] = {}
    for row in plan(tiny_model(model_type, "base", device="meta"), PreQuantConfig(r=1, layer_bits=layer_bits)):
        if row.kind == "linear":
            bits.setdefault(".".join(row.name.split(".")[:3]), set()).add(row.bits)
    assert all(len(values) == 1 for values in bits.values())
    return [values.pop() for values in bits.values()]


@pytest.mark.parametrize(
    ("model_type", "layer_bits", "expected"),
    [
        ("bert", [2, 8], [2, 8]),
        ("bert", {"layers.1": 2}, [4, 2]),
        ("bert", {"encoder.0-1": 2}, [2, 2]),
        ("bert", {"layers.0-1": 2, "layers.1": 8}, [2, 8]),
        ("t5", [2, 3, 5, 8], [2, 3, 5, 8]),
        ("t5", {"decoder.0": 2}, [4, 4, 2, 4]),
        ("t5", {"encoder.0-1": 3, "decoder.1": 2}, [3, 3, 4, 2]),
        ("t5", {"layers.1-2": 2}, [4, 2, 2, 4]),
    ],
)
def test_layer_bits(model_type, layer_bits, expected):
    assert bits_of(model_type, layer_bits) == expected


@pytest.mark.parametrize(
    ("layer_bits", "message"),
    [
        ([2], r"one entry for each of the 2 blocks \(encoder 2\), got 1"),
        ([2, 2, 2], "got 3"),
        ({"layers.2": 2}, r"'layers.2' must lie within blocks 0-1 of layers"),
        ({"layers.1-0": 2}, "the smaller number first"),
        ({"decoder.0": 2}, "'decoder.0' names no stack of this model; it has encoder 2, or layers for all of them"),
        ({"encoder": 2}, "a rule is a stack and a block or a range"),
    ],
)
def test_layer_bits_that_fit_no_block_are_refused(layer_bits, message):
    with pytest.raises(ValueError, match=message):
        bits_of("bert", layer_bits)


def test_layer_bits_without_blocks_are_refused():
    with pytest.raises(ValueError, match="layer_bits needs to know the blocks of the model"):
        plan(nn.Sequential(nn.Linear(8, 8)), PreQuantConfig(r=1, axis="input", layer_bits=[2]))


# ---- what is refused, before any work --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"r": 33},
            r"bert.encoder.layer.0.attention.self.query: r = 33 must be at most 32, the number of input columns of "
            r"its \(32, 32\) weight",
        ),
        (
            {"group_size": 24, "strategy": "group_wise"},
            "bert.encoder.layer.0.attention.self.query: group_size must divide K, got group_size = 24 and K = 32",
        ),
        (
            {"modules_to_not_convert": ["layer.0", "layer.7"]},
            "modules_to_not_convert: 'layer.7' matches no module of BertForSequenceClassification",
        ),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        plan(tiny_model("bert"), PreQuantConfig(**settings))


def test_r_equal_to_the_axis_is_legal():
    assert {row.outlier_slices for row in plan(tiny_model("bert"), PreQuantConfig(r=32)) if row.kind == "linear"} == {
        32
    }


@pytest.mark.parametrize(
    ("entry", "left"),
    [
        ("bert.encoder.layer.0", 6),
        ("encoder.layer.0", 6),
        ("intermediate", 10),
        ("attention.self", 6),
        ("bert.encoder.layer.1.output.dense", 11),
        ("classifier", 12),
    ],
)
def test_exclusions_by_whole_components(entry, left):
    rows = plan(tiny_model("bert"), PreQuantConfig(r=1, modules_to_not_convert=[entry]))
    assert sum(row.kind == "linear" for row in rows) == left


def test_part_of_a_component_excludes_nothing():
    with pytest.raises(ValueError, match="'intermed' matches no module"):
        plan(tiny_model("bert"), PreQuantConfig(modules_to_not_convert=["intermed"]))


def test_a_loader_may_know_names_that_this_class_lacks():
    config = PreQuantConfig(r=1, modules_to_not_convert=["classifier"])
    assert find_sites(tiny_model("bert", "base"), config, allow_unmatched=True)
    with pytest.raises(ValueError, match="'classifier' matches no module of BertModel"):
        find_sites(tiny_model("bert", "base"), config)


def test_a_family_whose_roles_contradict_each_other_is_refused():
    wrong = Family(
        {"encoder": "encoder.layer"},
        reads=("self.query", "self.key", "self.value", "output.dense"),
        writes=("intermediate.dense",),
    )
    with pytest.raises(
        ValueError,
        match=r"intermediate.dense \(64, 32\) writes a residual stream of 64 by the family's row, but .*query \(32, "
        r"32\) says 32",
    ):
        plan(tiny_model("bert"), PreQuantConfig(r=1), wrong)


def test_a_family_of_another_model_is_refused():
    with pytest.raises(
        ValueError,
        match=r"BertForSequenceClassification has no block list encoder.block, decoder.block; .* are "
        r"bert.encoder.layer",
    ):
        plan(tiny_model("bert"), PreQuantConfig(r=1), FAMILIES["t5"])


@pytest.mark.parametrize(
    ("model", "config", "message"),
    [
        ("bert", PreQuantConfig(), "model must be an nn.Module, got str"),
        (nn.Sequential(nn.Linear(8, 8)), {"bits": 4}, "config must be a PreQuantConfig, got dict"),
    ],
)
def test_wrong_types_are_refused(model, config, message):
    with pytest.raises(TypeError, match=message):
        plan(model, config)


def test_a_single_layer_points_to_from_linear():
    with pytest.raises(ValueError, match=r"PreQuantLinear\.from_linear"):
        plan(nn.Linear(8, 8), PreQuantConfig())


def test_nothing_to_quantize():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Embedding(5, 8, device=torch.device("cpu")))
    with pytest.raises(ValueError, match=r"nothing to quantize in Sequential.*1 x 4-D parameter of Conv2d"):
        plan(model, PreQuantConfig(axis="input"))
