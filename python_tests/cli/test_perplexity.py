"""Perplexity against its definition, every token predicted once by a forward pass of its own; and its command."""

import functools
import math

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel, AutoModelForMaskedLM, AutoModelForSeq2SeqLM, PreTrainedTokenizerFast

from prequant_ext import PreQuantConfig, quantize_model
from prequant_ext.perplexity import perplexity, token_losses, window_sizes, windows
from prequant_ext.task import save_task
from support import command_line
from support.toys import make_toy

TOKENS = torch.randint(3, 99, (23,), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def loss_of(model, context, token):
    """-log p(token | context) in float64."""
    logits = model(input_ids=torch.tensor([context])).logits[0, -1].double()
    return (logits.logsumexp(-1) - logits[token]).item()


def brute_force(model, tokens, max_length, stride):
    """By predicted token: the first window that holds it behind another one, a pass over just the tokens before it in
    that window.
    """
    losses = []
    for position in range(len(tokens)):
        begins = [begin for begin in range(0, len(tokens), stride) if begin < position < begin + max_length]
        if begins:
            losses.append(loss_of(model, tokens[begins[0] : position], tokens[position]))
    return losses


WINDOWS = {  # max_length, stride
    "longer than the text": (40, 20),
    "the text exactly": (23, 23),
    "half a window": (8, 4),
    "an odd stride": (8, 3),
    "every token from a full window": (8, 1),
    "disjoint": (8, 8),
    "disjoint, one token left over": (11, 11),
    "the smallest": (2, 1),
    "no token has a context of more than one": (2, 2),
}


@pytest.mark.parametrize(("max_length", "stride"), WINDOWS.values(), ids=WINDOWS.keys())
@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_equals_a_pass_for_each_token(name, max_length, stride):
    model = make_toy(name)
    quantize_model(model, PreQuantConfig(r=2, activation_bits=None))
    expected = brute_force(model, TOKENS.tolist(), max_length, stride)
    losses = token_losses(model, TOKENS, max_length=max_length, stride=stride)
    assert losses.dtype == torch.float32
    torch.testing.assert_close(losses.double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-4, atol=1e-4)
    mean = sum(expected) / len(expected)
    assert perplexity(model, TOKENS, max_length=max_length, stride=stride) == pytest.approx(math.exp(mean), rel=1e-4)


@pytest.mark.parametrize("num_tokens", [2, 7, 8, 9, 23])
@pytest.mark.parametrize("stride", range(1, 9))
def test_no_token_is_predicted_twice_and_none_is_left_out(num_tokens, stride):
    found = list(windows(num_tokens, 8, stride))
    predicted = [position for _, first, end in found for position in range(first, end)]
    without_context = set(range(0, num_tokens, 8)) if stride == 8 else {0}
    assert predicted == [position for position in range(num_tokens) if position not in without_context]
    assert all(end - begin <= 8 for begin, _, end in found)
    assert all(first - begin >= max(8 - stride, 1) for begin, first, _ in found if begin > 0)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_its_perplexity():
    model = make_toy("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    assert perplexity(model, TOKENS, max_length=8) == pytest.approx(99, rel=1e-5)


def test_bfloat16_and_8_bits_stay_near_the_float_model():
    model = make_toy("llama")
    exact = perplexity(model, TOKENS, max_length=8)
    assert perplexity(make_toy("llama", torch.bfloat16), TOKENS, max_length=8) == pytest.approx(exact, rel=0.05)
    quantize_model(model, PreQuantConfig(r=2, bits=8, strategy="min_max"))
    assert perplexity(model, TOKENS, max_length=8) == pytest.approx(exact, rel=0.2)


@pytest.mark.parametrize("tokens", [TOKENS, TOKENS.int(), TOKENS.tolist()], ids=["int64", "int32", "list"])
def test_takes_ids_as_tokenizers_give_them(tokens):
    model = make_toy("gpt2")
    assert perplexity(model, tokens, max_length=8) == perplexity(model, TOKENS, max_length=8)


def test_dropout_is_off_and_the_mode_comes_back():
    model = make_toy("gpt2")
    expected = perplexity(model, TOKENS)
    assert model.config.resid_pdrop > 0
    assert perplexity(model.train(), TOKENS) == expected and model.training
    with pytest.raises(ValueError, match="not finite"):
        torch.nn.init.constant_(model.lm_head.weight, float("nan"))
        perplexity(model, TOKENS)
    assert model.training


def test_default_windows():
    model = make_toy("llama")
    assert window_sizes(model) == (40, 20)
    assert window_sizes(model, 9) == (9, 4) and window_sizes(model, 2) == (2, 1) and window_sizes(model, 9, 9) == (9, 9)
    model.config.max_position_embeddings = 131072
    assert window_sizes(model) == (2048, 1024)


@pytest.mark.parametrize(
    ("tokens", "settings", "message"),
    [
        (TOKENS[:1], {}, "tokens must be at least 2, the second of which is predicted, got 1"),
        ([], {}, "tokens must be at least 2, the second of which is predicted, got 0"),
        (TOKENS[None], {}, r"tokens must be a row of integers, got torch.int64 of shape \(1, 23\)"),
        (TOKENS.float(), {}, "tokens must be a row of integers, got torch.float32"),
        ([5, 99], {}, "ids from 0 to 98, got 99: are they of another tokenizer"),
        ([5, -100], {}, "ids from 0 to 98, got -100"),
        (TOKENS, {"max_length": 1}, "max_length must be an integer of at least 2, got 1"),
        (TOKENS, {"max_length": 8.0}, "max_length must be an integer of at least 2, got 8.0"),
        (TOKENS, {"max_length": 41}, "max_length = 41 exceeds the 40 positions of LlamaForCausalLM"),
        (TOKENS, {"max_length": 8, "stride": 9}, "stride must be an integer from 1 to max_length = 8, got 9"),
        (TOKENS, {"stride": 0}, "stride must be an integer from 1 to max_length = 40, got 0"),
    ],
)
def test_refuses(tokens, settings, message):
    with pytest.raises(ValueError, match=message):
        perplexity(make_toy("llama"), tokens, **settings)


def test_a_model_that_sees_what_it_predicts_or_predicts_nothing_is_refused():
    masked, encoder_decoder = (
        AutoModelForMaskedLM.from_config(make_toy("bert").config),
        AutoModelForSeq2SeqLM.from_config(make_toy("t5").config),
    )
    for model in (
        masked,
        encoder_decoder,
        make_toy("bert"),
        AutoModel.from_config(make_toy("llama").config),
        torch.nn.Linear(3, 3),
    ):
        with pytest.raises(
            ValueError, match=f"model must be a causal language model of transformers, got {type(model).__name__}"
        ):
            perplexity(model, TOKENS)


# ---- the command -----------------------------------------------------------------------------------------------------


run = functools.partial(command_line.run, "perplexity")


def save(model, folder, first=0):
    """Write the model with a tokenizer of which the words are the numbers from ``first``, with the ids 0, 1, 2, ..."""
    tokenizer = Tokenizer(models.WordLevel({str(first + i): i for i in range(99)}, unk_token=str(first)))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model.save_pretrained(folder)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path):
    """A float and a quantized Llama, a task on the latter, and a text."""
    save(make_toy("llama"), tmp_path / "float")
    model = make_toy("llama")
    quantize_model(model, PreQuantConfig(r=2))
    save(model, tmp_path / "base")
    for name, parameter in model.named_parameters():
        if name.endswith("outlier_weight"):
            parameter.data.neg_()
    save_task(model, "negated", tmp_path / "negated.task")
    (tmp_path / "text").write_text(" ".join(str(token) for token in TOKENS.tolist()))
    return tmp_path


def test_the_command_measures_float_quantized_and_fine_tuned(folder):
    model = make_toy("llama")
    expected = {"float": perplexity(model, TOKENS, max_length=8, stride=3)}
    quantize_model(model, PreQuantConfig(r=2))
    expected["base"] = perplexity(model, TOKENS, max_length=8, stride=3)
    for parameter in (p for name, p in model.named_parameters() if name.endswith("outlier_weight")):
        parameter.data.neg_()
    expected["task"] = perplexity(model, TOKENS, max_length=8, stride=3)
    assert len(set(expected.values())) == 3

    window = ("--text", folder / "text", "--max-length", 8, "--stride", 3)
    before = run(folder / "base", *window, "--compare", folder / "float", "--json")
    assert before["perplexity"] == pytest.approx(expected["base"], rel=1e-2)
    assert before["compared"] == {
        "model": str(folder / "float"),
        "perplexity": pytest.approx(expected["float"], rel=1e-4),
    }
    assert (before["predicted_tokens"], before["max_length"], before["stride"], before["task_file"]) == (22, 8, 3, None)
    after = run(folder / "base", *window, "--task-file", folder / "negated.task", "--json")
    assert after["perplexity"] == pytest.approx(expected["task"], rel=1e-2)
    assert "compared" not in after

    lines = run(folder / "base", *window, "--compare", folder / "float").stdout.splitlines()
    assert [float(line.split()[-1]) for line in lines[2:4]] == pytest.approx(
        [before["perplexity"], before["compared"]["perplexity"]], abs=1e-3
    )
    assert lines[-1] == f"22 predicted tokens of {folder / 'text'}, windows of 8, one every 3"


def test_the_first_tokens_in_the_default_window(folder):
    found = run(folder / "float", "--text", folder / "text", "--max-tokens", 9, "--json")
    assert found["perplexity"] == pytest.approx(perplexity(make_toy("llama"), TOKENS[:9]), rel=1e-4)
    assert (found["predicted_tokens"], found["max_length"], found["stride"]) == (8, 40, 20)


def test_what_the_command_refuses(folder):
    save(make_toy("llama"), folder / "shifted", first=1)
    save(make_toy("bert"), folder / "bert")
    make_toy("llama").save_pretrained(folder / "mute")
    (folder / "binary").write_bytes(b"\xff\xfe")
    (folder / "empty").write_text("")
    text = ("--text", folder / "text")
    for arguments, message in (
        ((folder / "none", *text), "no model at"),
        (
            (folder / "bert", *text),
            "must be a causal language model, but its config.json names the architecture BertForSequenceClassification",
        ),
        ((folder / "mute", *text), "mute has no tokenizer"),
        ((folder / "base", "--text", folder / "none"), "none"),
        ((folder / "base", "--text", folder / "binary"), "binary must be a text in UTF-8"),
        ((folder / "base", "--text", folder / "empty"), "tokens must be at least 2"),
        ((folder / "base", *text, "--stride", 41), "stride must be an integer from 1 to max_length = 40, got 41"),
        (
            (folder / "base", *text, "--compare", folder / "shifted"),
            "must have the same tokenizer, but make different tokens",
        ),
        ((folder / "float", *text, "--task-file", folder / "negated.task"), "must be quantized"),
    ):
        result = run(*arguments, expect=2)
        assert message in result.stderr and not result.stdout


def test_help_has_an_example():
    assert "Example: prequant perplexity base --text" in " ".join(run("--help").stdout.split())
