"""A transformers model that holds quantized layers saves a checkpoint that loads to the same outputs, or refuses by
name, however the layers got there.
"""

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    CLIPConfig,
    CLIPModel,
    EncoderDecoderConfig,
    EncoderDecoderModel,
)

from prequant_ext import PreQuantConfig, PreQuantLinear, merge, quantize_model
from prequant_ext.linear import quantized_linears

SIZE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
IDS = torch.arange(3, 27).view(2, 12)


def bert_config(**changes) -> BertConfig:
    return BertConfig(vocab_size=99, **SIZE | changes)


class Wrapper(nn.Module):
    """As a user's own classifier, or a SentenceTransformer, holds an encoder."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(32, 3)

    def forward(self, ids):
        return self.head(self.encoder(input_ids=ids).last_hidden_state[:, 0])


@torch.no_grad()
def hidden(model, **inputs):
    return model.eval()(**inputs or {"input_ids": IDS}).last_hidden_state


def clip() -> CLIPModel:
    text = SIZE | {"vocab_size": 99, "max_position_embeddings": 64, "eos_token_id": 2, "bos_token_id": 1}
    vision = SIZE | {"image_size": 32, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text | {"pad_token_id": 0}, vision_config=vision, projection_dim=16))


@pytest.mark.parametrize("axis", ["input", "output"])
def test_an_encoder_quantized_through_its_wrapper(axis, tmp_path):
    model = Wrapper(BertModel(bert_config()))
    quantize_model(model, PreQuantConfig(axis=axis, r=3))
    before = hidden(model.encoder)
    model.encoder.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path)
    assert torch.equal(hidden(loaded), before) and any(quantized_linears(loaded))
    assert not hasattr(model.encoder, "hf_quantizer")  # it is what it was
    merge(model)
    model.encoder.save_pretrained(tmp_path / "float")
    assert not any(quantized_linears(BertModel.from_pretrained(tmp_path / "float")))


def test_the_backbone_of_a_quantized_task_model(tmp_path):
    model = BertForSequenceClassification(bert_config())
    quantize_model(model, PreQuantConfig(r=3))
    model.bert.save_pretrained(tmp_path)
    assert torch.equal(hidden(BertModel.from_pretrained(tmp_path)), hidden(model.bert))


def test_a_wrapper_that_leaves_a_part_of_the_encoder_float(tmp_path):
    model = Wrapper(BertModel(bert_config()))
    left = ("encoder.encoder.layer.1", "encoder.pooler")
    quantize_model(model, PreQuantConfig(axis="input", r=3, modules_to_not_convert=left))
    model.encoder.save_pretrained(tmp_path)
    loaded = BertModel.from_pretrained(tmp_path)
    assert torch.equal(hidden(loaded), hidden(model.encoder))
    assert {name.split(".")[2] for name, _ in quantized_linears(loaded)} == {"0"}


@pytest.mark.parametrize("tower", ["vision_model", "text_model"])
def test_one_tower_of_a_composite_model(tower, tmp_path):
    model = clip()
    quantize_model(getattr(model, tower), PreQuantConfig(axis="input", r=3))
    inputs = {"pixel_values": torch.randn(2, 3, 32, 32)} if tower == "vision_model" else {"input_ids": IDS}
    before = hidden(getattr(model, tower), **inputs)
    model.save_pretrained(tmp_path)
    loaded = CLIPModel.from_pretrained(tmp_path)
    assert torch.equal(hidden(getattr(loaded, tower), **inputs), before)
    assert {name.split(".")[0] for name, _ in quantized_linears(loaded)} == {tower}
    other = {"text_model": "vision_model", "vision_model": "text_model"}[tower]
    for name, parameter in getattr(model, other).named_parameters():
        assert torch.equal(getattr(loaded, other).get_parameter(name), parameter)
    getattr(model, tower).save_pretrained(tmp_path / "tower")  # alone it is saved as ever
    assert torch.equal(hidden(type(getattr(model, tower)).from_pretrained(tmp_path / "tower"), **inputs), before)


def pair() -> EncoderDecoderModel:
    decoder = bert_config(is_decoder=True, add_cross_attention=True)
    return EncoderDecoderModel(EncoderDecoderConfig.from_encoder_decoder_configs(bert_config(), decoder))


def test_an_encoder_of_a_pair_is_saved_or_refused_with_the_remedy(tmp_path):
    model = pair()
    quantize_model(model.encoder, PreQuantConfig(r=3))
    message = r"(?s)EncoderDecoderModel holds quantized layers.*model\.encoder\.save_pretrained"
    with pytest.raises(ValueError, match=message):
        model.save_pretrained(tmp_path / "pair")
    model.encoder.save_pretrained(tmp_path / "encoder")
    assert torch.equal(hidden(BertModel.from_pretrained(tmp_path / "encoder")), hidden(model.encoder))


def test_two_parts_with_other_settings_are_refused(tmp_path):
    model = clip()
    quantize_model(model.vision_model, PreQuantConfig(axis="input", r=3))
    quantize_model(model.text_model, PreQuantConfig(axis="input", r=2))
    with pytest.raises(ValueError, match=r"its layers were quantized with 2 different settings.*model\.text_model"):
        model.save_pretrained(tmp_path)


def test_a_layer_put_in_by_hand_is_refused(tmp_path):
    model = BertModel(bert_config())
    dense = model.encoder.layer[1].output.dense
    model.encoder.layer[1].output.dense = PreQuantLinear.from_linear(dense, PreQuantConfig())
    with pytest.raises(ValueError, match=r"encoder\.layer\.1\.output\.dense was quantized by itself"):
        model.save_pretrained(tmp_path)


def test_models_of_one_config_do_not_share_what_one_of_them_is(tmp_path):
    config = bert_config()
    quantized, sibling = BertForSequenceClassification(config), BertForSequenceClassification(config)
    quantize_model(quantized, PreQuantConfig(r=3))
    assert quantized.config is quantized.bert.config is not config
    sibling.save_pretrained(tmp_path / "float")
    assert not any(quantized_linears(BertForSequenceClassification.from_pretrained(tmp_path / "float")))
    quantize_model(sibling, PreQuantConfig(r=3))
    merge(quantized)
    sibling.save_pretrained(tmp_path / "quantized")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "quantized")
    assert torch.equal(hidden(again.bert), hidden(sibling.bert))
