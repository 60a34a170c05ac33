"""Adapters on disk: what the files hold, what is refused, and the way through transformers' own calls and Trainer."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, Trainer, TrainingArguments

from prequant_ext import PreQuantLinear
from prequant_ext.task_file import fingerprint
from support.tiny_models import assert_unchanged, snapshot

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model

from prequant_ext.peft import PreQuantColumnsConfig
from support.adapters import adapted, logits, quantized, two_adapters


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
@pytest.mark.parametrize(
    ("model_type", "task_type"),
    [("bert", None), ("bert", "SEQ_CLS"), ("roberta", "SEQ_CLS"), ("t5", None), ("modernbert", None), ("gpt2", None)],
)
def test_an_adapter_comes_back_bit_for_bit_on_a_fresh_base(tmp_path, model_type, task_type, low_cpu_mem_usage):
    tuned = adapted(quantized(model_type), task_type=task_type)
    tuned.save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantized(model_type), tmp_path, low_cpu_mem_usage=low_cpu_mem_usage)
    assert torch.equal(logits(model), logits(tuned))
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_low_cpu_mem_usage_keeps_the_values_of_a_bfloat16_base(tmp_path):
    adapted().save_pretrained(tmp_path)
    model = PeftModel.from_pretrained(quantized().to(torch.bfloat16), tmp_path, low_cpu_mem_usage=True)
    stored = load_file(tmp_path / "adapter_model.safetensors")
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    assert torch.equal(
        layer.prequant_columns_weight["default"],
        stored["base_model.model.bert.encoder.layer.0.output.dense.prequant_columns_weight"],
    )


def test_the_file_holds_outlier_weights_in_float32_and_the_head(tmp_path):
    base = quantized()
    layers = [name for name, module in base.named_modules() if isinstance(module, PreQuantLinear)]
    two_adapters(base).save_pretrained(tmp_path)
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    for name in ("mrpc", "sst2"):
        tensors = load_file(tmp_path / name / "adapter_model.safetensors")
        assert set(tensors) == {
            f"base_model.model.{own}" for own in {*head, *(f"{layer}.prequant_columns_weight" for layer in layers)}
        }
        assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


def test_modules_to_save_come_beside_the_head(tmp_path):
    model = adapted(modules_to_save=["LayerNorm"])
    assert model.peft_config["default"].modules_to_save == ["LayerNorm", "bert.pooler.dense", "classifier"]
    model.save_pretrained(tmp_path)
    assert "base_model.model.bert.encoder.layer.1.output.LayerNorm.weight" in load_file(
        tmp_path / "adapter_model.safetensors"
    )
    assert torch.equal(logits(PeftModel.from_pretrained(quantized(), tmp_path)), logits(model))


def test_a_head_that_is_wrapped_whole_is_wrapped_whole_for_the_next_adapter():
    model = adapted(quantized("roberta"), "mrpc", modules_to_save=["classifier"])
    model.add_adapter("sst2", PreQuantColumnsConfig())
    assert model.peft_config["sst2"].modules_to_save == ["classifier"]
    assert set(model.base_model.model.classifier.modules_to_save) == {"mrpc", "sst2"}


def test_a_head_that_is_wrapped_in_parts_is_not_wrapped_whole_as_well():
    model = adapted(quantized("roberta"), "mrpc")
    with pytest.raises(
        ValueError, match=r"modules_to_save has 'classifier', but another adapter has classifier\.dense within it"
    ):
        model.add_adapter("sst2", PreQuantColumnsConfig(modules_to_save=["classifier"]))
    assert list(model.peft_config) == ["mrpc"]


def test_a_wrong_base_is_refused_with_both_hashes(tmp_path):
    tuned, other = adapted(), quantized(bits=3)
    tuned.save_pretrained(tmp_path)
    before = snapshot(other)
    with pytest.raises(
        ValueError,
        match=f"was trained on the base {fingerprint(quantized())} but the model's base is {fingerprint(other)}",
    ):
        PeftModel.from_pretrained(other, tmp_path)
    assert_unchanged(other, before)
    wrapped = adapted(other)
    with pytest.raises(ValueError, match="was trained on the base"):
        wrapped.load_adapter(tmp_path, "second")
    assert list(wrapped.peft_config) == ["default"]
    with pytest.raises(ValueError, match="was trained on the base"):
        quantized(bits=3).load_adapter(tmp_path)


def test_a_wrapped_model_has_the_fingerprint_of_its_base():
    assert fingerprint(two_adapters().base_model.model) == fingerprint(quantized())


def test_a_file_without_some_outlier_weights_is_refused(tmp_path):
    adapted().save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    del tensors["base_model.model.bert.encoder.layer.1.output.dense.prequant_columns_weight"]
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(
        ValueError,
        match=r"no outlier weights for base_model.model.bert.encoder.layer.1.output.dense \(1 of 12 layers\)",
    ):
        PeftModel.from_pretrained(quantized(), tmp_path)


WITHOUT_THE_TUNER = """
import sys, prequant_ext
assert "peft" not in sys.modules
from peft import PeftConfig
PeftConfig.from_pretrained(sys.argv[1])
print("opened")
"""


def test_importing_prequant_ext_imports_no_peft_and_an_adapter_needs_the_tuner_imported(tmp_path):
    adapted().save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_THE_TUNER, tmp_path], capture_output=True, text=True, check=False
    )
    assert run.returncode != 0 and "opened" not in run.stdout
    assert run.stderr.rstrip().endswith("KeyError: 'PREQUANT_COLUMNS'")


# ---- through transformers --------------------------------------------------------------------------------------------


def save_adapter_of(base_dir, directory):
    """An adapter of the model in ``base_dir``; returns its answer."""
    tuned = adapted(AutoModelForSequenceClassification.from_pretrained(base_dir))
    tuned.save_pretrained(directory)
    return logits(tuned)


@pytest.mark.parametrize("where", ["absolute", "relative", "gone"])
def test_no_local_path_reaches_adapter_config(tmp_path, monkeypatch, where):
    quantized().save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    model = adapted(
        AutoModelForSequenceClassification.from_pretrained("base" if where == "relative" else tmp_path / "base")
    )
    if where == "gone":
        (tmp_path / "base").rename(tmp_path / "moved")
    model.save_pretrained(tmp_path / "adapter")
    text = (tmp_path / "adapter" / "adapter_config.json").read_text()
    assert json.loads(text)["base_model_name_or_path"] is None
    assert str(tmp_path) not in text


def test_auto_model_finds_a_base_of_the_hub(tmp_path):
    """By the name in adapter_config.json; here it is in the hub's cache."""
    snapshot_dir = tmp_path / "cache" / "models--tester--tiny" / "snapshots" / ("0" * 40)
    quantized().save_pretrained(snapshot_dir)
    (tmp_path / "cache" / "models--tester--tiny" / "refs").mkdir()
    (tmp_path / "cache" / "models--tester--tiny" / "refs" / "main").write_text("0" * 40)
    base = AutoModelForSequenceClassification.from_pretrained("tester/tiny", cache_dir=tmp_path / "cache")
    tuned = adapted(base)
    tuned.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
    assert (
        json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"]
        == "tester/tiny"
    )
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter", cache_dir=tmp_path / "cache")
    assert torch.equal(logits(loaded), logits(tuned))


def test_auto_model_finds_a_base_in_the_adapters_own_directory(tmp_path):
    quantized().save_pretrained(tmp_path)
    answer = save_adapter_of(tmp_path, tmp_path)
    assert torch.equal(logits(AutoModelForSequenceClassification.from_pretrained(tmp_path)), answer)


def test_auto_model_cannot_guess_a_local_base_but_load_adapter_is_told_it(tmp_path):
    quantized().save_pretrained(tmp_path / "base")
    answer = save_adapter_of(tmp_path / "base", tmp_path / "adapter")
    with pytest.raises(OSError):
        AutoModelForSequenceClassification.from_pretrained(tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base")
    model.load_adapter(tmp_path / "adapter")
    assert torch.equal(logits(model), answer)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        return {
            "input_ids": torch.randint(3, 50, (7,), generator=torch.Generator().manual_seed(index)),
            "labels": index % 2,
        }


def train(folder, steps, resume=None):
    """What is trained, afterwards."""
    model = get_peft_model(quantized(), PreQuantColumnsConfig())
    settings = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "save_steps": 2,
        "report_to": [],
    }
    arguments = TrainingArguments(folder, max_steps=steps, use_cpu=True, seed=1, disable_tqdm=True, **settings)
    Trainer(model, arguments, train_dataset=Rows()).train(resume_from_checkpoint=resume)
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_trainer_saves_adapters_only_and_resumes_from_one(tmp_path):
    whole = train(tmp_path / "whole", 4)
    checkpoint = tmp_path / "whole" / "checkpoint-2"
    assert (checkpoint / "adapter_model.safetensors").exists() and not (checkpoint / "model.safetensors").exists()
    resumed = train(tmp_path / "resumed", 4, resume=checkpoint)
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
    start = {
        name: parameter
        for name, parameter in get_peft_model(quantized(), PreQuantColumnsConfig()).named_parameters()
        if parameter.requires_grad
    }
    assert not [name for name in whole if torch.equal(whole[name], start[name])]
