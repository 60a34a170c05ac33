"""T5's encoder as a classifier: its mean, its head, plain T5 checkpoints, quantized and back."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertTokenizerFast,
    T5Config,
    T5EncoderModel,
    T5ForConditionalGeneration,
)

from prequant_ext import directory
from prequant_ext.config import PreQuantConfig
from prequant_ext.glue import train
from prequant_ext.glue.run import RunSettings
from prequant_ext.model import head_parameter_names, plan, quantize_model, to_float, trainable_parameters
from prequant_ext.t5_encoder import T5EncoderConfig, T5EncoderForSequenceClassification
from prequant_ext.task import save_task
from support.tiny_checkpoint import save_float_model

SIZES = {"d_model": 32, "num_layers": 2, "d_ff": 64, "d_kv": 8, "num_heads": 4, "vocab_size": 50}


def model(**changes) -> T5EncoderForSequenceClassification:
    torch.manual_seed(0)
    return T5EncoderForSequenceClassification(T5EncoderConfig(**(SIZES | changes))).eval()


def test_the_mean_leaves_padding_out():
    classifier = model(num_labels=3)
    ids, mask = torch.randint(3, 50, (2, 6)), torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    hidden = classifier.transformer(input_ids=ids, attention_mask=mask).last_hidden_state
    expected = classifier.classifier(torch.stack([hidden[0].mean(0), hidden[1, :3].mean(0)]))
    torch.testing.assert_close(classifier(input_ids=ids, attention_mask=mask).logits, expected)
    other = ids.clone()
    other[1, 3:] = 7
    torch.testing.assert_close(classifier(input_ids=other, attention_mask=mask).logits, expected)
    torch.testing.assert_close(classifier(input_ids=ids).logits[0], expected[0])


def test_losses():
    ids = torch.randint(3, 50, (4, 6))
    classes, number = model(num_labels=3), model(num_labels=1)
    labels = torch.tensor([0, 2, 1, 1])
    torch.testing.assert_close(
        classes(input_ids=ids, labels=labels).loss,
        torch.nn.functional.cross_entropy(classes(input_ids=ids).logits, labels),
    )
    scores = torch.tensor([0.5, 3.0, 2.0, 5.0])
    torch.testing.assert_close(
        number(input_ids=ids, labels=scores).loss, (number(input_ids=ids).logits[:, 0] - scores).square().mean()
    )


def test_a_plain_t5_checkpoint_gives_its_encoder(tmp_path):
    torch.manual_seed(1)
    whole = T5ForConditionalGeneration(T5Config(**SIZES, decoder_start_token_id=0))
    whole.save_pretrained(tmp_path / "t5")
    classifier, loading = T5EncoderForSequenceClassification.from_pretrained(
        tmp_path / "t5", num_labels=2, output_loading_info=True
    )
    assert set(loading["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    ids = torch.randint(3, 50, (2, 5))
    torch.testing.assert_close(
        classifier.eval().transformer(input_ids=ids).last_hidden_state,
        whole.eval().encoder(input_ids=ids).last_hidden_state,
    )
    classifier.save_pretrained(tmp_path / "saved")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    assert (
        type(again) is T5EncoderForSequenceClassification
        and AutoConfig.from_pretrained(tmp_path / "saved").model_type == "t5_encoder"
    )
    torch.testing.assert_close(again.eval()(input_ids=ids).logits, classifier(input_ids=ids).logits)


def test_quantized_saved_and_merged(tmp_path):
    classifier = model(num_labels=2)
    assert head_parameter_names(classifier) == ["classifier.weight", "classifier.bias"]
    quantize_model(classifier, PreQuantConfig(r=2))
    trained = trainable_parameters(classifier)
    assert len(trained) == 2 * 6 + 2
    ids = torch.randint(3, 50, (2, 5))
    expected = classifier.eval()(input_ids=ids).logits
    classifier.save_pretrained(tmp_path / "base")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base").eval()
    assert torch.equal(again(input_ids=ids).logits, expected)
    to_float(again)
    assert torch.isfinite(again(input_ids=ids).logits).all()


def test_count_of_the_papers_t5():
    """Table 1 prints 11.80 M for the encoder of T5-3B."""
    config = T5EncoderConfig(d_model=1024, d_ff=16384, d_kv=128, num_heads=32, num_layers=24)
    with torch.device("meta"):
        rows = plan(T5EncoderForSequenceClassification(config), PreQuantConfig(r=10))
    assert sum(row.trainable for row in rows) == 11_796_480


@pytest.mark.parametrize("method", ["ft", "prequant"])
def test_glue_trains_the_encoder_of_a_t5(method, tmp_path):
    tokens = BertTokenizerFast.from_pretrained(save_float_model(tmp_path / "words"))
    torch.manual_seed(0)
    T5ForConditionalGeneration(
        T5Config(**(SIZES | {"vocab_size": len(tokens)}), decoder_start_token_id=0)
    ).save_pretrained(tmp_path / "t5")
    tokens.save_pretrained(tmp_path / "t5")
    quantization = {"r": 3} if method == "prequant" else None
    settings = RunSettings(
        str(tmp_path / "t5"),
        "sst2",
        method,
        "synthetic",
        epochs=1,
        max_train=64,
        max_length=32,
        lr=1e-2,
        quantization=quantization,
    )
    trained, _, result = train.fine_tune(settings)
    assert type(trained) is T5EncoderForSequenceClassification and 0 <= result.score <= 1


@pytest.mark.parametrize("saved_as", [T5ForConditionalGeneration, T5EncoderModel, T5EncoderForSequenceClassification])
def test_the_steps_of_the_command_line_take_it_for_what_it_is(saved_as, tmp_path):
    """Else a checkpoint of the encoder alone gets a decoder of random weights, and a task of the encoder is refused for
    the decoder that it does not know.
    """
    torch.manual_seed(0)
    config = (
        T5EncoderConfig(**SIZES)
        if saved_as is T5EncoderForSequenceClassification
        else T5Config(**SIZES, decoder_start_token_id=0)
    )
    saved_as(config).save_pretrained(tmp_path / "float")
    settings = PreQuantConfig(r=2)
    report = directory.quantize_directory(str(tmp_path / "float"), settings, tmp_path / "base")
    assert [row.name for row in report.rows] == [
        row.name for row in directory.plan_of(str(tmp_path / "float"), settings)
    ]
    assert any("decoder" in row.name for row in report.rows) == (saved_as is T5ForConditionalGeneration)
    assert AutoConfig.from_pretrained(tmp_path / "base").architectures == [saved_as.__name__]

    trained = T5EncoderForSequenceClassification.from_pretrained(
        tmp_path / "base", num_labels=3, ignore_mismatched_sizes=True
    ).eval()
    save_task(trained, "three", tmp_path / "three.task")
    # a directory may have a head for two labels
    again, metadata = directory.load_with_task(str(tmp_path / "base"), tmp_path / "three.task", 3)
    ids = torch.randint(3, 50, (2, 5))
    assert metadata["name"] == "three" and torch.equal(
        again.eval()(input_ids=ids).logits, trained(input_ids=ids).logits
    )
    directory.merge_directory(str(tmp_path / "base"), None, tmp_path / "merged")
    assert AutoConfig.from_pretrained(tmp_path / "merged").architectures == [saved_as.__name__]
