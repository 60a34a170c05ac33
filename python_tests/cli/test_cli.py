"""The command line: what it writes, what it says, its exit codes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification

from prequant_ext import directory
from prequant_ext.glue import train
from prequant_ext.glue.tasks import TASKS, load_rows
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import plan
from prequant_ext.report import Report
from prequant_ext.task_file import read_task
from support.command_line import run

COMMANDS = ("quantize", "inspect", "finetune", "eval", "merge", "export hf", "export onnx", "doctor")
TRAIN = ("--data", "synthetic", "--epochs", "2", "--max-train", "128", "--max-length", "32", "--lr", "1e-2")


@pytest.fixture(scope="module")
def tasks(base, tmp_path_factory):
    """A folder with the task file of a short training on ``base``."""
    folder = tmp_path_factory.mktemp("tasks") / "tasks"
    run("finetune", base, "--task", "sst2", *TRAIN, "-o", folder)
    return folder


# ---- help and exit codes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_an_example(command):
    assert f"Example: prequant {command} " in " ".join(run(*command.split(), "--help").stdout.split())


def test_help_keeps_what_is_in_brackets():
    text = " ".join(run("finetune", "--help").stdout.replace("│", "").split())
    assert "5e-5 for ft" in text and "jsonl[.g" in text


@pytest.mark.parametrize(
    "arguments",
    [
        ("quantize", "nosuch", "-o", "{out}"),
        ("quantize", "{float}", "-o", "{out}", "--bits", "9"),
        ("quantize", "{float}", "-o", "{out}", "--r", "33"),
        ("quantize", "{float}", "-o", "{out}", "--group-size", "64"),
        ("quantize", "{float}", "-o", "{out}", "--strategy", "best"),
        ("quantize", "{float}", "-o", "{out}", "--weight-only", "--activation-bits", "8"),
        ("quantize", "{float}", "-o", "{out}", "--layer-bits", "layers.0"),
        ("quantize", "{float}", "-o", "{out}", "--selector", "ticket"),
        ("quantize", "{base}", "-o", "{out}"),
        ("inspect", "nosuch"),
        ("inspect", "{base}", "--bits", "2"),
        ("finetune", "{float}", "--task", "sst2", "--data", "synthetic", "-o", "{out}"),
        ("finetune", "{base}", "--task", "sst2", "--data", "synthetic", "--method", "ft", "-o", "{out}"),
        ("finetune", "{base}", "--task", "sst3", "-o", "{out}"),
        ("finetune", "{base}", "--task", "rte", "--data-dir", "{empty}", "-o", "{out}"),
        ("eval", "{base}", "--task", "sst2", "--data", "synthetic"),
        ("eval", "{base}", "--task", "mrpc", "--data", "synthetic", "--task-file", "{tasks}/sst2.task"),
        ("eval", "{base}", "--task", "sst2", "--task-file", "{empty}/none.task"),
        ("merge", "{float}", "-o", "{out}"),
    ],
    ids=lambda arguments: " ".join(arguments),
)
def test_what_cannot_be_used_exits_2_and_writes_nothing(arguments, float_model, base, tasks, tmp_path):
    (tmp_path / "empty").mkdir()
    names = {"float": float_model, "base": base, "tasks": tasks, "out": tmp_path / "out", "empty": tmp_path / "empty"}
    result = run(*(argument.format(**names) for argument in arguments), expect=2)
    assert result.stderr.strip() and not result.stdout
    assert not (tmp_path / "out").exists()


def test_a_missing_data_file_is_named(base, tmp_path):
    result = run("finetune", base, "--task", "rte", "--data-dir", tmp_path, "-o", tmp_path / "out", expect=2)
    assert f"looked for {tmp_path}/rte/train.jsonl and" in result.stderr


def test_a_label_outside_the_range_names_file_and_line(base, tmp_path):
    (tmp_path / "rte").mkdir()
    for split, label in (("train", 1), ("validation", 7)):
        (tmp_path / "rte" / f"{split}.jsonl").write_text(
            json.dumps({"sentence1": "a", "sentence2": "b", "label": label}) + "\n"
        )
    result = run("finetune", base, "--task", "rte", "--data-dir", tmp_path, "-o", tmp_path / "out", expect=2)
    assert f"{tmp_path}/rte/validation.jsonl:1: label of rte must be an integer from 0 to 1, got 7" in result.stderr


def test_a_model_without_a_tokenizer_is_quantized_but_not_trained(float_model, tasks, tmp_path):
    """transformers would make one of its own, to which every word is unknown."""
    shutil.copytree(
        float_model,
        tmp_path / "mute",
        ignore=lambda _, names: [name for name in names if "token" in name or "vocab" in name],
    )
    run("quantize", tmp_path / "mute", "-o", tmp_path / "base", "--r", "3")
    assert not list((tmp_path / "base").glob("token*"))
    refused = run("finetune", tmp_path / "base", *TRAIN, "--task", "sst2", "-o", tmp_path / "out", expect=2)
    assert "base has no tokenizer: looked for" in refused.stderr and not (tmp_path / "out").exists()
    refused = run(
        "eval", tmp_path / "base", "--task", "sst2", "--data", "synthetic", "--task-file", tasks / "sst2.task", expect=2
    )
    assert "base has no tokenizer: looked for" in refused.stderr


def test_a_full_disk_exits_1(float_model, tmp_path, monkeypatch):
    def full(self, folder, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", full)
    result = run("quantize", float_model, "-o", tmp_path / "out", "--r", "3", expect=1)
    assert "No space left on device" in result.stderr
    assert os.listdir(tmp_path) == []


# ---- quantize and inspect --------------------------------------------------------------------------------------------


def test_quantize_writes_a_directory_that_transformers_loads(base):
    model = AutoModel.from_pretrained(base)
    assert sum(isinstance(module, PreQuantLinear) for module in model.modules()) == 12
    assert (base / "tokenizer.json").exists()


def test_options_reach_the_config(float_model, tmp_path):
    options = (
        "--bits",
        "3",
        "--strategy",
        "group_wise",
        "--group-size",
        "16",
        "--r",
        "2",
        "--axis",
        "input",
        "--selector",
        "random",
        "--seed",
        "7",
    )
    rest = (
        "--outlier-threshold",
        "2.5",
        "--weight-only",
        "--float-embeddings",
        "--init",
        "dequantized",
        "--exclude",
        "pooler",
        "--layer-bits",
        "layers.0=2",
    )
    config = run("quantize", float_model, "-o", tmp_path / "q", *options, *rest, "--json")["config"]
    wanted = {
        "bits": 3,
        "strategy": "group_wise",
        "group_size": 16,
        "r": 2,
        "axis": "input",
        "selector": "random",
        "seed": 7,
        "outlier_threshold": 2.5,
    }
    wanted |= {
        "activation_bits": None,
        "embedding_bits": None,
        "init": "dequantized",
        "modules_to_not_convert": ["pooler"],
        "layer_bits": {"layers.0": 2},
    }
    assert {name: config[name] for name in wanted} == wanted


def test_an_existing_output_is_refused_unless_overwritten(base, float_model, tmp_path):
    out = tmp_path / "q"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    assert "is there already; --overwrite replaces it" in run("quantize", float_model, "-o", out, expect=2).stderr
    assert os.listdir(out) == ["notes.txt"]
    run("quantize", float_model, "-o", out, "--r", "3", "--overwrite")
    assert (out / "config.json").exists()


def test_dry_run_is_the_plan_and_reads_no_weight(float_model, tmp_path):
    found = run("inspect", float_model, "--dry-run", "--r", "3", "--json")
    rows = plan(AutoModel.from_pretrained(float_model), directory.PreQuantConfig(r=3))
    assert [(row["name"], row["trainable"], row["bytes"]) for row in found["plan"]] == [
        (row.name, row.trainable, row.bytes) for row in rows
    ]
    (tmp_path / "config.json").write_text(Path(float_model, "config.json").read_text())
    assert run("inspect", tmp_path, "--dry-run", "--r", "3", "--json")["plan"] == found["plan"]


def test_inspect_tells_the_same_of_a_directory_and_of_the_float_model(float_model, base):
    stored, fresh = run("inspect", base, "--json"), run("inspect", float_model, "--r", "3", "--json")
    assert stored["report"] == fresh["report"]
    report = Report.from_dict(stored["report"])
    assert report.l2_error > 0 and report.num_outliers > 0 and 0.8 < report.coverage < 1
    assert stored["l2_error"] == report.l2_error


def test_tables_are_plain_without_a_terminal(base):
    text = run("inspect", base).stdout
    assert text.startswith("module ") and "not covered:" in text
    assert not set("│┃\x1b") & set(text)


INTERRUPTED = """
import signal, sys, time
from prequant_ext import hf
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are started with it ignored
real = hf.save_model_dir
class Slow:
    def __init__(self, inner): self.inner = inner
    def save_pretrained(self, folder):
        self.inner.save_pretrained(folder)
        print("writing", flush=True)
        time.sleep(60)
hf.save_model_dir = lambda model, tokenizer, folder: real(model, Slow(tokenizer), folder)
from prequant_ext.cli import main
sys.argv = ["prequant", "quantize", sys.argv[1], "-o", sys.argv[2], "--r", "3"]
main()
"""


@pytest.mark.slow
def test_ctrl_c_during_quantize_leaves_no_half_written_output(float_model, tmp_path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", INTERRUPTED, float_model, str(tmp_path / "out")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    assert process.stdout.readline() == "writing\n", process.communicate()[1]
    assert os.listdir(tmp_path)  # the temporary directory, with everything but its final name
    process.send_signal(signal.SIGINT)
    begin = time.monotonic()
    _, error = process.communicate(timeout=60)
    assert time.monotonic() - begin < 50
    assert (process.returncode, error.strip().splitlines()[-1]) == (1, "interrupted")
    assert os.listdir(tmp_path) == []


def test_ctrl_c_keeps_the_old_output(float_model, base, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run("quantize", float_model, "-o", out, "--r", "3")
    before = (out / "model.safetensors").read_bytes()

    def interrupt(*arguments, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedModel.save_pretrained", interrupt)
    run("quantize", float_model, "-o", out, "--bits", "2", "--r", "3", "--overwrite", expect=1)
    assert (out / "model.safetensors").read_bytes() == before
    assert os.listdir(tmp_path) == ["out"]


# ---- finetune, eval, merge -------------------------------------------------------------------------------------------


def test_finetune_writes_a_task_file_and_results_and_nothing_else(tasks):
    assert sorted(os.listdir(tasks)) == ["results.json", "sst2.task"]
    assert sorted(os.listdir(tasks.parent)) == ["tasks"]
    result = json.loads((tasks / "results.json").read_text())["sst2"]
    assert (result["method"], result["data"], result["n_train"]) == ("prequant", "synthetic", 128)
    assert (tasks / "sst2.task").stat().st_size - result["task_bytes"] <= 20_000


@pytest.mark.parametrize("task", ["sst2", "stsb"])
def test_the_task_file_names_the_labels_that_glue_names(task, base, tasks, tmp_path):
    (tmp_path / "data" / task).mkdir(parents=True)
    for split in ("train", "validation"):
        rows = load_rows(TASKS[task], split, source="synthetic", max_rows=32)
        (tmp_path / "data" / task / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run("finetune", base, "--task", task, "--data-dir", tmp_path / "data", "--epochs", "1", "-o", tmp_path / "out")
    metadata, _ = read_task(tmp_path / "out" / f"{task}.task")
    assert json.loads(metadata["labels"]) == {"sst2": ["negative", "positive"], "stsb": []}[task]
    assert "labels" not in read_task(tasks / "sst2.task")[0]  # of generated rows


def test_eval_repeats_the_score_to_the_last_digit(base, tasks):
    found = run("eval", base, "--task", "sst2", "--data", "synthetic", "--task-file", tasks / "sst2.task", "--json")
    assert found["scores"] == json.loads((tasks / "results.json").read_text())["sst2"]["scores"]
    assert found["max_length"] == 32  # that of training


def test_several_tasks_share_a_folder_and_a_base(base, tasks):
    result = run("finetune", base, "--task", "stsb", *TRAIN, "-o", tasks, "--json")
    found = run("eval", base, "--task", "stsb", "--data", "synthetic", "--task-file", tasks / "stsb.task", "--json")
    assert found["scores"] == result["scores"] and list(found["scores"]) == ["spearman", "pearson"]
    assert set(json.loads((tasks / "results.json").read_text())) >= {"sst2", "stsb"}
    (tasks / "stsb.task").unlink()


def test_an_existing_task_file_is_refused_unless_overwritten(base, tasks):
    before = (tasks / "sst2.task").read_bytes()
    run("finetune", base, "--task", "sst2", *TRAIN, "--seed", "1", "-o", tasks, expect=2)
    assert (tasks / "sst2.task").read_bytes() == before


def test_full_fine_tuning_writes_a_model_that_evaluates_the_same(float_model, tmp_path):
    result = run("finetune", float_model, "--task", "stsb", "--method", "ft", *TRAIN, "-o", tmp_path / "full", "--json")
    found = run("eval", tmp_path / "full", "--task", "stsb", "--data", "synthetic", "--json")
    assert found["scores"] == result["scores"] and found["max_length"] == 32
    assert sorted(os.listdir(tmp_path)) == ["full"]
    assert AutoModelForSequenceClassification.from_pretrained(tmp_path / "full").config.num_labels == 1


def test_an_interrupted_finetune_goes_on_where_it_was(base, tmp_path, monkeypatch):
    out = tmp_path / "tasks"
    record = train.Recorder.on_score

    def interrupt(self, epoch, value):
        record(self, epoch, value)
        if epoch == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(train.Recorder, "on_score", interrupt)
    run("finetune", base, "--task", "sst2", *TRAIN, "-o", out, expect=1)
    assert not out.exists() and (tmp_path / "tasks.sst2-unfinished").is_dir()
    monkeypatch.undo()
    resumed = []
    load = train.GlueTrainer._load_from_checkpoint
    monkeypatch.setattr(
        train.GlueTrainer,
        "_load_from_checkpoint",
        lambda self, path, model=None: (resumed.append(path), load(self, path, model)),
    )
    run("finetune", base, "--task", "sst2", *TRAIN, "-o", out)
    assert len(resumed) == 1 and sorted(os.listdir(tmp_path)) == ["tasks"]


def test_merge_writes_a_float_model_with_the_same_answers(base, tasks, tmp_path):
    size = run("merge", base, "--task-file", tasks / "sst2.task", "-o", tmp_path / "merged", "--json")["bytes"]
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged")
    assert not any(isinstance(module, PreQuantLinear) for module in model.modules())
    assert size == sum(parameter.nbytes for parameter in model.parameters())
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    tuned, _ = directory.load_with_task(str(base), tasks / "sst2.task", 2)
    weight = tuned.bert.encoder.layer[0].attention.self.query
    assert torch.equal(model.bert.encoder.layer[0].attention.self.query.weight, weight.dequantize())


def test_merge_without_a_task_is_the_base(base, tmp_path):
    run("merge", base, "-o", tmp_path / "merged")
    float_base = AutoModel.from_pretrained(tmp_path / "merged")
    quantized = AutoModel.from_pretrained(base)
    assert torch.equal(
        float_base.encoder.layer[1].output.dense.weight, quantized.encoder.layer[1].output.dense.dequantize()
    )


def test_export_hf_is_merge(base, tmp_path):
    run("merge", base, "-o", tmp_path / "merged")
    run("export", "hf", base, "-o", tmp_path / "exported")
    assert [path.name for path in sorted((tmp_path / "exported").iterdir())] == [
        path.name for path in sorted((tmp_path / "merged").iterdir())
    ]
    assert (tmp_path / "exported" / "model.safetensors").read_bytes() == (
        tmp_path / "merged" / "model.safetensors"
    ).read_bytes()


def test_doctor_passes_its_exit_code_on(monkeypatch):
    monkeypatch.setattr("prequant_ext.doctor.main", lambda arguments: {(): 0, ("--json",): 1}[tuple(arguments)])
    run("doctor")
    run("doctor", "--json", expect=1)
