"""ONNX: what the file holds, what onnxruntime computes from it, what is refused; the command that writes it."""

import copy
import importlib.util
import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    T5Config,
    T5ForConditionalGeneration,
)

from prequant_ext import (
    PreQuantConfig,
    PreQuantEmbedding,
    PreQuantLinear,
    directory,
    export,
    merge,
    quantize_model,
)
from prequant_ext.export import difference, export_onnx, random_inputs, run_onnx, weight_only_
from prequant_ext.t5_encoder import T5EncoderForSequenceClassification
from prequant_ext.task import save_task
from support.command_line import invoke, run
from support.tiny_models import assert_unchanged, snapshot
from support.toys import make_toy

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

import onnx

from support.onnx_file import File

TOLERANCE = 1e-4  # of an output: what the graph may differ from the weight-only model


def quantized_bert(model_class=BertForSequenceClassification, **settings):
    """One block, wide enough for its weights to outweigh the graph."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 500,
        "hidden_size": 256,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 512,
        "max_position_embeddings": 40,
    }
    model = model_class(BertConfig(**sizes, initializer_range=0.1)).eval()
    quantize_model(model, PreQuantConfig(**({"r": 2} | settings)))
    return model


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """(model with 8-bit activations, its directory)."""
    model, folder = quantized_bert(), tmp_path_factory.mktemp("bert") / "base"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def bert_file(bert):
    """(model, what the command said, the file)."""
    model, folder = bert
    path = folder.parent / "bert.onnx"
    return model, invoke("export", "onnx", folder, "-o", path, "--json"), path


@pytest.fixture(scope="module")
def t5_base(tmp_path_factory):
    """A folder with a quantized T5, its decoder included, and a task on its encoder."""
    folder = tmp_path_factory.mktemp("t5")
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 60,
        "d_model": 32,
        "d_kv": 16,
        "d_ff": 64,
        "num_layers": 1,
        "num_heads": 2,
        "decoder_start_token_id": 0,
    }
    model = T5ForConditionalGeneration(T5Config(**sizes, feed_forward_proj="gated-gelu"))
    quantize_model(model, PreQuantConfig(r=2, activation_bits=None))
    model.save_pretrained(folder / "base")
    trained = T5EncoderForSequenceClassification.from_pretrained(folder / "base", num_labels=3)
    for module in trained.modules():
        if isinstance(module, PreQuantLinear):
            module.outlier_weight.data.mul_(1.5)
    save_task(trained, "three", folder / "three.task", {"num_labels": "3"})
    return folder, trained.eval()


def expected_outputs(model, inputs):
    with torch.no_grad():
        return dict(weight_only_(copy.deepcopy(model).eval())(**inputs))


def quantized_modules(model):
    return [module for module in model.modules() if isinstance(module, PreQuantLinear | PreQuantEmbedding)]


def assert_close(values, expected):
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected.values(), strict=True):
        torch.testing.assert_close(value, wanted, rtol=0, atol=TOLERANCE)


# ---- a model ---------------------------------------------------------------------------------------------------------


def test_a_classifier_with_its_padding_and_segments(bert_file):
    model, result, path = bert_file
    told = json.loads(result.stdout)
    assert (told["inputs"], told["outputs"]) == (["input_ids", "attention_mask", "token_type_ids"], ["logits"])
    inputs = random_inputs(model, 4, 13)
    assert not inputs["attention_mask"].all() and inputs["token_type_ids"].any()
    assert_close(run_onnx(path.read_bytes(), inputs), expected_outputs(model, inputs))


def test_8_bit_activations_are_left_out_and_the_command_says_so(bert_file):
    model, result, _ = bert_file
    told = json.loads(result.stdout)
    assert told["drops_activation_bits"] and 0 < told["difference"] <= TOLERANCE and 0 < told["relative"] <= TOLERANCE
    assert "activations are float in the file" in result.stderr
    with torch.no_grad():
        inputs = random_inputs(model, 4, 13)
        assert (model(**inputs).logits - expected_outputs(model, inputs)["logits"]).abs().max() > 10 * TOLERANCE


def test_both_axes_of_the_inputs_are_free(bert_file):
    graph = File(bert_file[2].read_bytes()).graph
    for value in graph.input:
        assert [size.dim_param for size in value.type.tensor_type.shape.dim] == ["batch", "sequence"]
        assert value.type.tensor_type.elem_type == onnx.TensorProto.INT64


def test_the_file_is_about_as_large_as_the_quantized_weights(bert_file):
    model, result, path = bert_file
    held = sum(
        module.stored_bytes() if isinstance(module, PreQuantLinear) else module.weight_packed.nbytes
        for module in quantized_modules(model)
    )
    held += sum(
        parameter.nbytes for name, parameter in model.named_parameters() if "pooler" in name or "classifier" in name
    )
    content = path.read_bytes()
    file = File(content)
    stored = sum(tensor.nbytes for tensor in file.tensors.values())
    assert json.loads(result.stdout)["bytes"] == len(content)
    assert held <= stored <= held * 1.05 and len(content) - stored < 60_000
    tables = [f"bert.embeddings.{name}_embeddings.weight_packed" for name in ("word", "position", "token_type")]
    assert [file.tensors[name].dtype for name in tables] == [torch.uint8] * 3
    assert torch.equal(file.tensors[tables[0]], model.bert.embeddings.word_embeddings.weight_packed)


def test_the_file_names_no_path_of_this_machine(bert_file):
    assert b".py" not in bert_file[2].read_bytes()


def test_a_task_on_the_encoder_of_a_t5(t5_base, tmp_path):
    """T5's feed-forward looks at its matrix's dtype. The base has float activations,
    of which nothing needs to be said.
    """
    folder, trained = t5_base
    result = run("export", "onnx", folder / "base", "--task-file", folder / "three.task", "-o", tmp_path / "three.onnx")
    assert (
        f"wrote {tmp_path / 'three.onnx'}" in result.stderr
        and "of the weight-only model in onnxruntime" in result.stderr
    )
    assert "activations are float" not in result.stderr and not result.stdout
    inputs = random_inputs(trained, 2, 9)
    (logits,) = run_onnx((tmp_path / "three.onnx").read_bytes(), inputs)
    assert inputs.keys() == {"input_ids", "attention_mask"} and logits.shape == (2, 3)
    assert_close([logits], expected_outputs(trained, inputs))


@pytest.mark.slow
def test_minilm(minilm_dir, tmp_path):
    model = AutoModel.from_pretrained(minilm_dir).eval()
    report = quantize_model(model, PreQuantConfig())
    written = export_onnx(model, tmp_path / "minilm.onnx")
    assert written.outputs == ("last_hidden_state", "pooler_output") and written.difference <= TOLERANCE
    assert report.bytes_after <= written.bytes <= 1.05 * report.bytes_after
    inputs = random_inputs(model, 2, 100)
    assert_close(run_onnx((tmp_path / "minilm.onnx").read_bytes(), inputs), expected_outputs(model, inputs))


# ---- what is refused -------------------------------------------------------------------------------------------------


@pytest.fixture
def without_tracing(monkeypatch):
    """export_onnx up to what it does with a graph: tracing makes a word, running it the right outputs."""
    model = quantized_bert()
    monkeypatch.setattr(export, "onnx_bytes", lambda *_: b"graph")
    monkeypatch.setattr(export, "run_onnx", lambda _, inputs: list(expected_outputs(model, inputs).values()))
    return model


def test_the_check_compares_each_output_with_its_largest_value():
    expected = {"large": torch.tensor([1000.0, -2000.0]), "small": torch.tensor([0.5, 0.0]), "zero": torch.zeros(2)}
    values = [expected["large"] + 0.1, expected["small"] + 2e-5, torch.zeros(2)]
    absolute, relative = difference(values, expected)
    assert absolute == pytest.approx(0.1, rel=1e-2) and relative == pytest.approx(5e-5, rel=1e-2)
    with pytest.raises(
        RuntimeError,
        match=r"graph's small differs from the model's by up to 6e-05 .* largest value is 0\.5; at most 0\.0001 of it",
    ):
        difference([values[0], expected["small"] + 6e-5, values[2]], expected)
    with pytest.raises(RuntimeError, match="graph's large differs from the model's by up to nan"):
        difference([values[0] * float("nan"), *values[1:]], expected)


def test_a_graph_that_computes_something_else_is_not_written(without_tracing, monkeypatch, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"older")
    monkeypatch.setattr(
        export,
        "run_onnx",
        lambda _, inputs: [value + 1 for value in expected_outputs(without_tracing, inputs).values()],
    )
    with pytest.raises(RuntimeError, match="graph's logits differs from the model's by up to 1 on a random batch"):
        export_onnx(without_tracing, tmp_path / "model.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.onnx", b"older")]


def test_a_full_disk_leaves_the_older_file(without_tracing, monkeypatch, tmp_path):
    def full(_):
        raise OSError(28, "No space left on device")

    (tmp_path / "model.onnx").write_bytes(b"older")
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        export_onnx(without_tracing, tmp_path / "model.onnx")
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("model.onnx", b"older")]


def test_without_onnxruntime_nothing_is_checked(without_tracing, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == "onnxruntime" else find_spec(name, *rest)
    )
    monkeypatch.setattr(export, "run_onnx", None)
    written = export_onnx(without_tracing, tmp_path / "model.onnx")
    assert (written.bytes, written.difference, written.relative) == (5, None, None)
    assert (tmp_path / "model.onnx").read_bytes() == b"graph"


def a_decoder():
    model = make_toy("gpt2")
    model.config.output_hidden_states = True
    quantize_model(model, PreQuantConfig(r=1))
    return model


@pytest.mark.parametrize(
    ("make", "outputs"),
    [(a_decoder, ("logits",)), (lambda: quantized_bert(BertModel), ("last_hidden_state", "pooler_output"))],
)
def test_outputs_of_other_models(make, outputs, monkeypatch, tmp_path):
    """No cache and no hidden states of the blocks, whatever the config asks for."""
    monkeypatch.setattr(export, "onnx_bytes", lambda _, inputs, names: b"graph")
    monkeypatch.setattr(export, "run_onnx", lambda content, inputs: [])
    monkeypatch.setattr(export, "difference", lambda values, expected: (0.0, 0.0))
    assert export_onnx(make(), tmp_path / "model.onnx").outputs == outputs


def test_a_directory_of_another_dtype_is_loaded_in_float32(without_tracing, tmp_path):
    copy.deepcopy(without_tracing).to(torch.bfloat16).save_pretrained(tmp_path / "base")
    # from the float32 model's: the weights outside the matrices are rounded
    with pytest.raises(RuntimeError, match="graph's logits differs"):
        directory.export_onnx_directory(str(tmp_path / "base"), None, tmp_path / "model.onnx")


def test_the_model_stays_as_it_is(without_tracing, tmp_path):
    before = snapshot(without_tracing)
    written = export_onnx(without_tracing, tmp_path / "model.onnx")
    assert_unchanged(without_tracing, before)
    assert (
        all(module.activation_bits == 8 for module in without_tracing.modules() if isinstance(module, PreQuantLinear))
        and written.drops_activation_bits
    )


@pytest.mark.parametrize("precision", ["highest", "high"])
def test_the_check_is_made_in_float32(precision, without_tracing, tmp_path):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        written = export_onnx(without_tracing, tmp_path / "model.onnx")
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    # the stand-in for onnxruntime follows the setting; what it is compared with does not
    assert (written.difference > 0) == (precision == "high")


@pytest.mark.parametrize("missing", ["onnx", "onnxscript"])
def test_a_missing_package_is_named(missing, monkeypatch, tmp_path):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name, *rest: None if name == missing else find_spec(name, *rest)
    )
    with pytest.raises(ValueError, match=rf"needs {missing}, not installed here: pip install 'prequant_ext\[onnx\]'"):
        export_onnx(quantized_bert(), tmp_path / "model.onnx")


def a_merged_model():
    return merge(quantized_bert())


def a_plain_module():
    return nn.Sequential(PreQuantLinear.from_linear(nn.Linear(8, 8), PreQuantConfig(r=1)))


def a_bfloat16_model():
    return quantized_bert().to(torch.bfloat16)


def a_whole_t5():
    model = make_toy("t5")
    quantize_model(model, PreQuantConfig(r=1))
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (a_merged_model, "model must be quantized .* got a BertForSequenceClassification without quantized layers"),
        (a_plain_module, "model must be a transformers model to be exported, got a Sequential"),
        (a_bfloat16_model, r"model must be float32 to be exported, got torch.bfloat16: model.float\(\)"),
        (a_whole_t5, "model must be an encoder or a decoder to be exported, but T5ForConditionalGeneration is both"),
    ],
)
def test_models_that_cannot_be_exported(make, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        export_onnx(make(), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", ["", "absent/model.onnx"])
def test_a_path_that_cannot_be_a_file(path, tmp_path):
    with pytest.raises(ValueError, match=f"path must be a file in a folder that exists, got {tmp_path / path}"):
        export_onnx(quantized_bert(), tmp_path / path)


def test_a_model_that_reads_something_else(monkeypatch, tmp_path):
    model = quantized_bert()
    monkeypatch.setattr(model, "forward", lambda pixel_values: None)
    with pytest.raises(
        ValueError,
        match="must read input_ids and attention_mask to be exported, but BertForSequenceClassification has no "
        "input_ids",
    ):
        export_onnx(model, tmp_path / "model.onnx")


def test_a_model_that_no_file_can_hold(monkeypatch, tmp_path):
    monkeypatch.setattr(export, "MAX_BYTES", 100_000)
    with pytest.raises(
        ValueError, match=r"model must fit one ONNX file, at most 0.00 GB, but its tensors take 0.00 GB"
    ):
        export_onnx(quantized_bert(), tmp_path / "model.onnx")


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{float}",), "is a float model: there is nothing to merge or export"),
        (("{base}", "--task-file", "{t5}/three.task"), "was trained on the base"),
        (("{base}", "--task-file", "{t5}/none.task"), "no task file at"),
        (("{t5}/base",), "T5ForConditionalGeneration is both"),
        (("nosuch",), "no model at nosuch"),
    ],
    ids=lambda value: value[-1] if isinstance(value, tuple) else "",
)
def test_what_the_command_refuses(arguments, message, float_dir, bert, t5_base, tmp_path):
    names = {"float": float_dir, "base": bert[1], "t5": t5_base[0]}
    result = run(
        "export", "onnx", *(argument.format(**names) for argument in arguments), "-o", tmp_path / "model.onnx", expect=2
    )
    assert message in result.stderr and not result.stdout
    assert not (tmp_path / "model.onnx").exists()


def test_the_command_overwrites_only_when_told(bert, tmp_path):
    (tmp_path / "model.onnx").write_bytes(b"older")
    result = run("export", "onnx", bert[1], "-o", tmp_path / "model.onnx", expect=2)
    assert "--overwrite replaces it" in result.stderr and (tmp_path / "model.onnx").read_bytes() == b"older"
