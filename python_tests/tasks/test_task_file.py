"""Task files: names, fingerprints, and every refusal."""

import copy
import errno
import math
import os

import pytest
import torch
from safetensors.torch import load_file, save
from transformers import BertConfig, BertForSequenceClassification

from prequant_ext import task, task_file
from prequant_ext.config import FORMAT_VERSION, PreQuantConfig
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import quantize_model, to_float
from support.tiny_models import tiny_model, token_ids


def quantized(**changes):
    model = tiny_model("bert")
    quantize_model(model, PreQuantConfig(**({"r": 3} | changes)))
    return model


def train_a_little(model):
    """Move every task tensor, as training would."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in task_file.task_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


def test_a_task_comes_back_bit_for_bit_on_a_fresh_base(tmp_path):
    tuned = train_a_little(quantized())
    task.save_task(tuned, "sst2", tmp_path / "sst2.task", {"score": "0.5"})
    model = quantized()
    assert not torch.equal(logits(model), logits(tuned))
    metadata = task.load_task(model, tmp_path / "sst2.task", "sst2")
    assert torch.equal(logits(model), logits(tuned))
    assert metadata == {
        "format_version": str(FORMAT_VERSION),
        "base_fingerprint": task_file.fingerprint(model),
        "name": "sst2",
        "score": "0.5",
    }


def test_the_file_holds_outlier_weights_in_float32_and_the_head(tmp_path):
    model = quantized()
    task.save_task(model, "a", tmp_path / "a.task")
    tensors = load_file(tmp_path / "a.task")
    layers = [name for name, module in model.named_modules() if isinstance(module, PreQuantLinear)]
    head = {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
    assert set(tensors) == {f"{name}.outlier_weight" for name in layers} | head
    assert {tensors[f"{name}.outlier_weight"].dtype for name in layers} == {torch.float32}


def test_at_most_20_kB_stand_beside_the_tensors(tmp_path):
    model = quantized()
    task.save_task(model, "a", tmp_path / "a.task")
    tensors = sum(tensor.nbytes for tensor in load_file(tmp_path / "a.task").values())
    assert (tmp_path / "a.task").stat().st_size - tensors <= 20_000


def test_alpha_saves_its_scales(tmp_path):
    settings = {"r": 0, "train_scales": True}
    tuned = train_a_little(quantized(**settings))
    task.save_task(tuned, "a", tmp_path / "a.task")
    model = quantized(**settings)
    task.load_task(model, tmp_path / "a.task")
    assert torch.equal(logits(model), logits(tuned))


# ---- the fingerprint -------------------------------------------------------------------------------------------------


def test_fingerprint_ignores_what_a_task_owns():
    model = quantized()
    before = task_file.fingerprint(model)
    assert task_file.fingerprint(train_a_little(model)) == before
    assert len(before) == 64


def test_a_bare_backbone_and_a_task_model_on_it_agree():
    model = quantized()
    assert task_file.fingerprint(model.base_model) == task_file.fingerprint(model)


@pytest.mark.parametrize("name", ["weight_packed", "weight_scale", "weight_zero_point", "outlier_dims"])
def test_fingerprint_sees_every_tensor_of_the_base(name):
    model = quantized()
    before = task_file.fingerprint(model)
    layer = next(module for module in model.modules() if isinstance(module, PreQuantLinear))
    with torch.no_grad():
        getattr(layer, name).view(-1)[0] += 1
    assert task_file.fingerprint(model) != before


@pytest.fixture
def hashes(monkeypatch):
    """A list that grows by one with each base that is hashed."""
    counted, hash_of = [], task_file._hash_of
    monkeypatch.setattr(task_file, "_hash_of", lambda modules: counted.append(len(modules)) or hash_of(modules))
    return counted


def test_a_base_is_hashed_once(tmp_path, hashes):
    model = train_a_little(quantized())
    task.save_task(model, "a", tmp_path / "a.task")
    task.save_task(model, "b", tmp_path / "b.task")
    assert len(hashes) == 1
    fresh = quantized()
    task.set_task(fresh, None)
    task.add_task(fresh, "c")
    assert len(hashes) == 1  # a yes or no needs no hash
    for name in "ab":
        task.load_task(fresh, tmp_path / f"{name}.task")
    train_a_little(fresh)
    task.set_task(fresh, "a")
    task.save_task(fresh, "b", tmp_path / "again.task")
    assert len(hashes) == 2


def test_the_first_task_on_a_base_costs_one_hash(tmp_path, hashes):
    # BERT-base's twelve layers, narrower
    model = BertForSequenceClassification(BertConfig(hidden_size=48, intermediate_size=96, vocab_size=99))
    quantize_model(model, PreQuantConfig())
    twin = copy.deepcopy(model)
    task.add_task(model, "a")
    assert hashes == []
    task.save_task(model, "a", tmp_path / "a.task")
    assert hashes == [12 * 6 + 3]
    task.load_task(twin, tmp_path / "a.task", "b")
    assert hashes == [12 * 6 + 3] * 2


def test_other_weights_are_hashed_again(hashes):
    model, other = quantized(), quantized(strategy="row_wise")
    before = task_file.fingerprint(model)
    model.load_state_dict(model.state_dict())  # the same values, but written all the same
    assert task_file.fingerprint(model) == before and len(hashes) == 2
    layer = model.bert.encoder.layer[0].output.dense
    with torch.no_grad():
        layer.weight_scale.mul_(2)
    changed = task_file.fingerprint(model)
    assert changed != before and len(hashes) == 3
    layer.unprepack_()  # another layout of the same codes
    assert task_file.fingerprint(model) == changed
    model.bert.encoder.layer[0] = other.bert.encoder.layer[0]
    assert task_file.fingerprint(model) not in (before, changed)
    to_float(model)
    with pytest.raises(ValueError, match="model must be quantized"):
        task_file.fingerprint(model)


def test_a_model_with_a_known_fingerprint_is_copied_and_pickled(tmp_path):
    model = quantized()
    before = task_file.fingerprint(model)
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert task_file.fingerprint(again) == task_file.fingerprint(copy.deepcopy(model)) == before


def test_inference_tensors_are_hashed_every_time(hashes):
    with torch.inference_mode():
        model = quantized()
        assert task_file.fingerprint(model) == task_file.fingerprint(model)
    assert len(hashes) == 2  # torch does not tell whether they have been written to


def test_a_float_model_has_no_fingerprint():
    with pytest.raises(ValueError, match=r"model must be quantized .* got a BertForSequenceClassification"):
        task_file.fingerprint(tiny_model("bert"))


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "sst2.task"
    task.save_task(train_a_little(quantized()), "sst2", path)
    return path


@pytest.mark.parametrize("name", ["", ".hidden", "a/b", "../up", "a b", "a" * 65, "naïve", "a\n"])
def test_names_that_no_file_should_have(tmp_path, name):
    with pytest.raises(ValueError, match="task name must match"):
        task.save_task(quantized(), name, tmp_path / "x.task")


def test_a_wrong_base_is_refused_with_both_fingerprints(saved):
    other = quantized(bits=3)
    with pytest.raises(
        ValueError,
        match=rf"trained on the base {task_file.fingerprint(quantized())} but the model's base is "
        rf"{task_file.fingerprint(other)}",
    ):
        task.load_task(other, saved)


def test_a_refusal_leaves_the_model_as_it_was(saved):
    model = quantized(bits=3)
    before = logits(model)
    with pytest.raises(ValueError, match="trained on the base"):
        task.load_task(model, saved)
    assert torch.equal(logits(model), before)


def test_a_head_of_another_size_is_refused_with_both_shapes(saved):
    model = quantized()
    model.classifier = torch.nn.Linear(model.config.hidden_size, 3)
    with pytest.raises(ValueError, match=r"classifier\.\w+ has shape \(2.*\) in .*sst2\.task but \(3.*\) in the model"):
        task.load_task(model, saved)


def test_a_half_precision_file_is_half_as_large_and_loads(saved, tmp_path):
    model = quantized()
    task.load_task(model, saved)
    task.save_task(model, "sst2", tmp_path / "half.task", dtype=torch.float16)
    stored = load_file(tmp_path / "half.task")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    assert sum(tensor.nbytes for tensor in stored.values()) * 2 == sum(
        tensor.nbytes for tensor in load_file(saved).values()
    )
    other = quantized()
    task.load_task(other, tmp_path / "half.task")
    for key, parameter in task_file.task_tensors(other).items():
        assert torch.equal(parameter, stored[key].float())


def test_a_dtype_that_is_not_float_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"dtype must be a floating type, got torch\.int8"):
        task.save_task(quantized(), "a", tmp_path / "a.task", dtype=torch.int8)


@pytest.mark.parametrize("keep", [0, 4, 100, -1], ids=["empty", "half a length", "half a header", "last byte gone"])
def test_a_truncated_file_is_refused(saved, keep):
    saved.write_bytes(saved.read_bytes()[:keep])
    with pytest.raises(ValueError, match=f"{saved} is damaged or no task file"):
        task.load_task(quantized(), saved)


def rewrite(path, metadata=None, without=None):
    held, tensors = task_file.read_task(path)
    held = {key: value for key, value in (held | (metadata or {})).items() if value is not None}
    path.write_bytes(save({key: tensor for key, tensor in tensors.items() if key != without}, held))


def change_tensor(path, name, change):
    held, tensors = task_file.read_task(path)
    path.write_bytes(save(tensors | {name: change(tensors[name]).contiguous()}, held))


@pytest.mark.parametrize("version", [0, FORMAT_VERSION + 1])
def test_an_unknown_version_is_refused_with_both_versions(saved, version):
    rewrite(saved, {"format_version": str(version)})
    with pytest.raises(
        ValueError, match=rf"has format_version {version} but this prequant_ext reads 1 to {FORMAT_VERSION}"
    ):
        task.load_task(quantized(), saved)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.uint8, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.outlier_weight", "classifier.weight"])
def test_tensors_that_are_not_float_are_refused(saved, name, dtype):
    """A cast would lose their values without a word, or invent others."""
    change_tensor(saved, name, lambda tensor: tensor.to(dtype))
    kind = str(dtype).removeprefix("torch.")
    with pytest.raises(ValueError, match=rf"{name} of .*sst2\.task must be of a floating type, got {kind}"):
        task.load_task(quantized(), saved)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["bert.encoder.layer.0.output.dense.outlier_weight", "classifier.bias"])
def test_tensors_that_are_not_finite_are_refused_unless_wanted(saved, name, value):
    change_tensor(
        saved, name, lambda tensor: tensor.flatten().index_fill(0, torch.tensor([1]), value).view(tensor.shape)
    )
    model = quantized()
    with pytest.raises(ValueError, match=rf"{name} of .*sst2\.task must be finite, but it holds NaN or Inf"):
        task.load_task(model, saved)
    assert task.list_tasks(model) == []
    task.load_task(model, saved, allow_nonfinite=True)
    assert task.active_task(model) == "sst2" and not model.get_parameter(name).isfinite().all()


def test_a_dtype_that_does_not_hold_the_values_is_refused(tmp_path):
    model = quantized()
    with torch.no_grad():
        model.classifier.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"classifier\.weight does not fit torch\.float16"):
        task.save_task(model, "a", tmp_path / "a.task", dtype=torch.float16)
    assert not (tmp_path / "a.task").exists()
    task.save_task(model, "a", tmp_path / "a.task", dtype=torch.bfloat16)


def test_a_file_without_a_fingerprint_is_no_task_file(saved):
    rewrite(saved, {"base_fingerprint": None})
    with pytest.raises(ValueError, match="its metadata lacks base_fingerprint"):
        task.load_task(quantized(), saved)


def test_a_missing_tensor_is_named(saved):
    rewrite(saved, without="classifier.bias")
    with pytest.raises(ValueError, match=r"it lacks \['classifier.bias'\]"):
        task.load_task(quantized(), saved)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"no task file at {tmp_path / 'none.task'}"):
        task.load_task(quantized(), tmp_path / "none.task")


def test_reserved_and_non_text_metadata_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must not hold the key 'base_fingerprint'"):
        task.save_task(quantized(), "a", tmp_path / "a.task", {"base_fingerprint": "0"})
    with pytest.raises(ValueError, match="metadata must map names to text or numbers, got list for 'scores'"):
        task.save_task(quantized(), "a", tmp_path / "a.task", {"scores": [0.5]})


# ---- a full disk -----------------------------------------------------------------------------------------------------


def test_a_full_disk_keeps_the_old_file(saved, monkeypatch):
    old = saved.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        task.save_task(quantized(), "sst2", saved)
    assert saved.read_bytes() == old
    assert os.listdir(saved.parent) == [saved.name]  # and no temporary file is left
