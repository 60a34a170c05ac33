"""What a checkpoint holds is checked before a kernel sees it; a model directory is written whole or not at all."""

import errno
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, BertForSequenceClassification

from prequant_ext import PreQuantConfig, checkpoint, hf
from support.toys import assert_same

CONFIG = PreQuantConfig(r=2)


# ---- reading ---------------------------------------------------------------------------------------------------------

LAYER = "bert.encoder.layer.0.output.dense"
DAMAGE = {  # tensor, how it is damaged, what the error says
    "scale dtype": (
        "weight_scale",
        lambda t: t.half(),
        r"output\.dense\.weight_scale of the checkpoint must be float32 \(1, 1\), got float16 \(1, 1\)",
    ),
    "scale shape": (
        "weight_scale",
        lambda t: t.expand(2, 1).contiguous(),
        r"weight_scale of the checkpoint must be float32 \(1, 1\), got float32 \(2, 1\)",
    ),
    "zero scale": (
        "weight_scale",
        torch.zeros_like,
        r"output\.dense\.weight_scale must be positive and finite, got values from 0\.0 to 0\.0",
    ),
    "nan scale": ("weight_scale", lambda t: t * math.nan, r"weight_scale must be positive and finite"),
    "zero point": (
        "weight_zero_point",
        lambda t: t + 16,
        r"output\.dense\.weight_zero_point must be a 4-bit code, 0 to 15",
    ),
    "zero point dtype": (
        "weight_zero_point",
        lambda t: t.int(),
        r"weight_zero_point of the checkpoint must be uint8 \(1, 1\), got int32",
    ),
    "duplicate dims": (
        "outlier_dims",
        lambda t: t * 0 + 3,
        r"output\.dense\.outlier_dims must be ascending and distinct, got \[3, 3\]",
    ),
    "unsorted dims": ("outlier_dims", lambda t: t.flip(0), r"outlier_dims must be ascending and distinct"),
    "dims too large": ("outlier_dims", lambda t: t + 32, r"outlier_dims must lie in 0 to 31"),
    "negative dims": ("outlier_dims", lambda t: t - 32, r"outlier_dims must lie in 0 to 31"),
    "dims dtype": (
        "outlier_dims",
        lambda t: t.int(),
        r"outlier_dims of the checkpoint must be int64 \(2,\), got int32 \(2,\)",
    ),
    "more outliers": (
        "outlier_dims",
        lambda t: torch.arange(3),
        r"outlier_dims of the checkpoint must be int64 \(2,\), got int64 \(3,\)",
    ),
    "outlier shape": (
        "outlier_weight",
        lambda t: t.T.contiguous(),
        r"outlier_weight of the checkpoint must be float32 \(2, 64\), got float32 \(64, 2\)",
    ),
    "outlier dtype": (
        "outlier_weight",
        lambda t: t.bfloat16(),
        r"outlier_weight of the checkpoint must be float32 \(2, 64\), got bfloat16",
    ),
    "packed shape": (
        "weight",
        lambda t: t[:, :-1].contiguous(),
        r"output\.dense\.weight of the checkpoint must be uint8 \(32, 32\), got uint8 \(32, 31\)",
    ),
    "float weight": (
        "weight",
        lambda t: t.float(),
        r"output\.dense\.weight of the checkpoint must be uint8 \(32, 32\), got float32",
    ),
    "bias": (
        "bias",
        lambda t: t[:3].contiguous(),
        r"output\.dense\.bias of the checkpoint must be float32 \(32,\), got float32 \(3,\)",
    ),
    "no bias": ("bias", None, r"the quantized checkpoint has no bert\.encoder\.layer\.0\.output\.dense\.bias"),
    "no weight": ("weight", None, r"the quantized checkpoint has no bert\.encoder\.layer\.0\.output\.dense\.weight"),
}


@pytest.mark.parametrize(("name", "change", "message"), DAMAGE.values(), ids=DAMAGE.keys())
def test_a_damaged_tensor_is_refused_by_name(name, change, message, quantized_dir):
    file = quantized_dir / "model.safetensors"
    tensors = load_file(file)
    damaged = tensors.pop(f"{LAYER}.{name}")
    save_file(
        tensors if change is None else tensors | {f"{LAYER}.{name}": change(damaged)}, file, metadata={"format": "pt"}
    )
    with pytest.raises(ValueError, match=message):
        BertForSequenceClassification.from_pretrained(quantized_dir)


def test_tensors_given_as_a_state_dict_are_checked_too(quantized_dir):
    tensors = load_file(quantized_dir / "model.safetensors")
    config = AutoConfig.from_pretrained(quantized_dir)
    assert_same(
        BertForSequenceClassification.from_pretrained(None, config=config, state_dict=dict(tensors)),
        BertForSequenceClassification.from_pretrained(quantized_dir),
    )
    tensors[f"{LAYER}.outlier_dims"] += 40
    with pytest.raises(ValueError, match="outlier_dims must lie in 0 to 31"):
        BertForSequenceClassification.from_pretrained(
            None, config=AutoConfig.from_pretrained(quantized_dir), state_dict=tensors
        )


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-100], lambda data: data[:20], lambda data: b"x" * 64 + data, lambda data: b""]
)
def test_a_truncated_or_corrupted_file_is_refused_by_name(damage, quantized_dir, float_dir):
    for directory, config in ((quantized_dir, None), (float_dir, CONFIG)):
        file = directory / "model.safetensors"
        file.write_bytes(damage(file.read_bytes()))
        with pytest.raises(ValueError, match=r"model\.safetensors is truncated or corrupted"):
            BertForSequenceClassification.from_pretrained(directory, quantization_config=config)


def test_a_float_weight_of_another_shape_is_refused_by_name(float_dir):
    file = float_dir / "model.safetensors"
    tensors = load_file(file)
    tensors[f"{LAYER}.weight"] = torch.zeros(32, 65)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError,
        match=r"output\.dense\.weight of the checkpoint must be float \(32, 64\) to be quantized, got float32 \(32, "
        r"65\)",
    ):
        BertForSequenceClassification.from_pretrained(
            float_dir, quantization_config=CONFIG, ignore_mismatched_sizes=True
        )


def test_a_weight_that_a_conversion_makes_while_loading_is_refused_not_left_out(float_dir):
    """It would come under a name that no module has, and the layer would start from random weights."""
    model = BertForSequenceClassification.from_pretrained(float_dir, quantization_config=CONFIG)
    headers = {f"{LAYER}.weight": checkpoint.Header("bert.encoder.layer.0.fused", torch.float32, (96, 32))}
    with pytest.raises(
        ValueError,
        match=rf"layer\.0\.fused of the checkpoint is split or merged into {LAYER}\.weight while it loads.*call "
        r"quantize_model",
    ):
        checkpoint.check_float_headers(model, headers)


# ---- writing a directory ---------------------------------------------------------------------------------------------


class _Tokenizer:
    """Writes half a file, then fails, if told to."""

    def __init__(self, error: BaseException | None = None):
        self.error = error

    def save_pretrained(self, directory) -> None:
        (Path(directory) / "tokenizer.json").write_text("{}")
        if self.error is not None:
            raise self.error


def test_save_model_dir_writes_what_save_pretrained_writes(quantized_dir, tmp_path):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    written = hf.save_model_dir(model, _Tokenizer(), tmp_path / "a" / "b")
    assert sorted(path.name for path in written.iterdir()) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert_same(model, BertForSequenceClassification.from_pretrained(written))


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()], ids=["full disk", "ctrl-c"]
)
@pytest.mark.parametrize("stage", ["weights", "tokenizer"])
def test_a_save_that_fails_midway_leaves_the_old_directory(stage, error, quantized_dir, monkeypatch):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    before = {path.name: path.read_bytes() for path in quantized_dir.iterdir()}
    siblings = sorted(quantized_dir.parent.iterdir())
    if stage == "weights":

        def half_a_file(tensors, filename, metadata=None):
            Path(filename).write_bytes(b"half")
            raise error

        monkeypatch.setattr(transformers.modeling_utils, "safe_save_file", half_a_file)
    with torch.no_grad():
        model.classifier.weight += 1
    with pytest.raises(type(error)):
        hf.save_model_dir(model, _Tokenizer(error), quantized_dir)
    assert {path.name: path.read_bytes() for path in quantized_dir.iterdir()} == before
    assert sorted(quantized_dir.parent.iterdir()) == siblings


def test_a_rename_that_fails_puts_the_old_directory_back(quantized_dir, monkeypatch):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    before = {path.name: path.read_bytes() for path in quantized_dir.iterdir()}
    rename = Path.rename

    def failing(self, target):
        if self.name == "new":
            raise OSError(errno.EIO, "input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="input/output error"):
        hf.save_model_dir(model, None, quantized_dir)
    assert {path.name: path.read_bytes() for path in quantized_dir.iterdir()} == before


def test_saving_over_a_model_replaces_its_weights_and_keeps_other_files(quantized_dir):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    (quantized_dir / "model-00001-of-00002.safetensors").write_bytes(b"of a sharded save")
    (quantized_dir / "model.safetensors.index.json").write_text("{}")
    (quantized_dir / "notes.md").write_text("mine")
    (quantized_dir / "tasks").mkdir()
    (quantized_dir / "tasks" / "sst2.safetensors").write_bytes(b"task")
    with torch.no_grad():
        model.classifier.weight += 1
    hf.save_model_dir(model, None, quantized_dir)
    assert sorted(path.name for path in quantized_dir.iterdir()) == [
        "config.json",
        "model.safetensors",
        "notes.md",
        "tasks",
    ]
    assert (quantized_dir / "tasks" / "sst2.safetensors").read_bytes() == b"task"
    assert_same(model, BertForSequenceClassification.from_pretrained(quantized_dir))


def test_a_file_in_the_way_is_refused(quantized_dir):
    model = BertForSequenceClassification.from_pretrained(quantized_dir)
    with pytest.raises(NotADirectoryError, match="is a file"):
        hf.save_model_dir(model, None, quantized_dir / "config.json")
