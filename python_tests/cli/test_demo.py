"""The demo on a tiny model: every step runs, the table is printed,
and a score that changes on reloading is an error.
"""

import json
import os
import runpy
import sys

import pytest
import typer
from typer.testing import CliRunner

from prequant_ext.cli import demo
from prequant_ext.cli.commands import app
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, TASKS, load_rows
from support.tiny_checkpoint import save_float_model


@pytest.fixture
def data(tmp_path):
    """Generated rows in the files of SST-2."""
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    for split in ("train", "validation"):
        rows = load_rows(TASKS["sst2"], split, source="synthetic")
        (tmp_path / "data" / "sst2" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "data"


def prequant_here(*arguments, as_json=True):
    """What the process that demo.prequant starts does, in this one."""
    done = CliRunner().invoke(app, [*arguments, *(["--json"] if as_json else [])], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    if as_json:
        return json.loads(done.stdout)
    print(done.stdout)
    return {}


def test_the_demo_runs_from_the_float_model_to_the_reloaded_score(tmp_path, data, monkeypatch):
    monkeypatch.setattr(demo, "prequant", prequant_here)
    options = ["--data-dir", str(data), "-o", str(tmp_path / "out"), "--max-train", "64", "--epochs", "1"]
    done = CliRunner().invoke(
        demo.app, ["--model", save_float_model(tmp_path / "model"), *options], catch_exceptions=False
    )
    assert done.exit_code == 0, done.output
    assert "PreQuant" in done.stdout and "full fine-tuning" in done.stdout and "64 training rows" in done.stdout
    assert "score the same, to the last digit" in done.stderr
    assert "has no MRPC: GENERATED rows for the second task" in done.stderr
    assert "8 rows of 2 tasks in 1 batch" in done.stdout
    assert sorted(os.listdir(tmp_path / "out")) == ["base", "full", "mixed.jsonl", "tasks"]
    assert sorted(path.name for path in (tmp_path / "out" / "tasks").glob("*.task")) == ["mrpc.task", "sst2.task"]


def test_a_step_of_the_demo_is_a_process_that_answers_in_json():
    assert demo.prequant("doctor")["problems"] == []


def test_it_starts_as_a_module(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["demo", "--help"])
    monkeypatch.delitem(sys.modules, "prequant_ext.cli.demo")
    with pytest.raises(SystemExit) as stop:
        runpy.run_module("prequant_ext.cli.demo", run_name="__main__")
    assert stop.value.code == 0 and "--max-train" in capsys.readouterr().out


RUN = {
    "task": "sst2",
    "data": "glue",
    "score": 0.75,
    "scores": {"accuracy": 0.75},
    "seconds": 1.0,
    "peak_memory_mb": 1.0,
    "model_bytes": 1,
    "task_bytes": 1,
}
RUN |= {"trainable_parameters": 1, "n_train": 64, "n_validation": 8, "epochs": 1, "seed": 0}


def test_a_score_that_changes_on_reloading_is_an_error(tmp_path, data, monkeypatch, capsys):
    def answer(command, *arguments, **kwargs):
        changed = {"score": 0.7500000000000001, "scores": {"accuracy": 0.7500000000000001}}  # in the last digit
        return RUN | (changed if command == "eval" else {})

    monkeypatch.setattr(demo, "prequant", answer)
    with pytest.raises(typer.Exit) as stop:
        demo.demo(data_dir=str(data), model="m", out=tmp_path / "out", max_train=64, epochs=1)
    assert stop.value.exit_code == 1
    assert "0.75} in training but {'accuracy': 0.7500000000000001} after reloading" in capsys.readouterr().err


def test_without_data_it_says_that_rows_are_generated(monkeypatch, capsys):
    def nothing(*arguments, **kwargs):
        raise FileNotFoundError("looked for it")

    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)
    monkeypatch.setattr(demo, "load_rows", nothing)
    monkeypatch.setattr(demo, "quiet_libraries", lambda: None)
    assert demo.choose_data(None) == ["--data", "synthetic"]
    assert "looked for it" in (said := capsys.readouterr().err) and "GENERATED" in said


def test_a_named_folder_without_sst2_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=f"looked for {tmp_path}/sst2/train.jsonl"):
        demo.choose_data(str(tmp_path))
