"""The paper's experiments: their arms, the order of their runs, what a restart skips."""

import json
from dataclasses import replace

import pytest

from prequant_ext.baselines import METHODS
from prequant_ext.config import PreQuantConfig
from prequant_ext.glue import metrics, train
from prequant_ext.glue.run import LEARNING_RATES, RunResult, RunSettings
from prequant_ext.study import runner, tables
from prequant_ext.study.experiments import EXPERIMENTS, GRIDS, Arm, Experiment
from prequant_ext.study.runner import Plan
from support import ROOT
from support.command_line import invoke
from support.runs import SMALL, finished, plan, result
from support.tiny_checkpoint import save_float_model


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_every_arm_is_a_run_that_train_accepts(name):
    experiment = EXPERIMENTS[name](6)
    assert len({arm.title for arm in experiment.arms}) == len(experiment.arms) >= 3
    for arm in experiment.arms:
        settings = Plan(experiment, "m", experiment.tasks, (0,), "quick").settings(arm, "sst2", 1e-3, 0)
        PreQuantConfig.from_dict(settings.quantization or {})
        assert RunSettings("m", **json.loads(json.dumps(settings.wanted))).identity == settings.identity


COMMITTED = sorted((ROOT / "bench" / "results").glob("*/runs.jsonl"))


@pytest.mark.parametrize("path", COMMITTED, ids=[path.parent.name for path in COMMITTED])
def test_committed_runs_are_known_as_finished(path):
    """By the identity that their lines were written with, and every number of them comes back."""
    lines = path.read_text().splitlines(keepends=True)
    assert lines
    for line, run in zip(lines, runner.read_runs(path), strict=True):
        stored = json.loads(line)
        assert run.settings.identity == json.dumps(stored["wanted"], sort_keys=True)
        again = json.loads(run.to_line())
        assert again == {"quantization_error": None, "overlap": None} | stored


@pytest.mark.parametrize("line", ['{"wanted": {}}', "[]", '{"wanted": {"task": "sst2"}, "model": "m"}'])
def test_a_line_that_is_no_run_is_named(line, tmp_path):
    run = next(plan().possible([]))
    (tmp_path / "runs.jsonl").write_text(finished(run).to_line() + line + "\n")
    with pytest.raises(ValueError, match=r"runs\.jsonl, line 2 is no finished run"):
        runner.read_runs(tmp_path / "runs.jsonl")


def test_every_method_has_learning_rates():
    assert set(GRIDS) == set(METHODS) == set(LEARNING_RATES)
    assert {len(grid) for grid in GRIDS.values()} == {3}  # searches of one size for all


def test_thirds_of_the_blocks():
    rules = [arm.quantization["layer_bits"] for arm in EXPERIMENTS["table5"](12).arms[1:5]]
    assert rules == [{"layers.0-3": 2}, {"layers.0-7": 2}, {"layers.8-11": 2}, {"layers.4-11": 2}]
    # of the same size
    assert [arm.options["bits_per_weight"] for arm in EXPERIMENTS["table5"](12).arms[5:]] == pytest.approx(
        [10 / 3, 8 / 3]
    )
    with pytest.raises(ValueError, match=r"table5 .* must have at least 3 blocks, got 2"):
        EXPERIMENTS["table5"](2)


def test_experiments_share_their_runs():
    def runs(name: str) -> set[str]:
        return {run.identity for run in Plan(EXPERIMENTS[name](6), "m", ("sst2",), (0, 1), "quick").possible([])}

    assert len(runs("table1") & runs("table2")) == 4  # full fine-tuning and PreQuant, two seeds each
    assert len(runs("table3") & runs("table4")) == 2
    assert {json.loads(key)["max_train"] for key in runs("table6") & runs("table1")} == {4000}


def test_quick_runs_everything_at_one_rate():
    wanted = list(plan().possible([]))
    assert len(wanted) == len(plan().every([])) == 8
    assert {(run.method, run.lr) for run in wanted} == {
        ("ft", LEARNING_RATES["ft"]),
        ("prequant", LEARNING_RATES["prequant"]),
    }


def test_a_search_comes_first_and_its_best_rate_runs_the_other_seeds():
    searching = plan("each")
    first = list(searching.possible([]))
    assert len(first) == 2 * 2 * 3 and {run.seed for run in first} == {0} and {run.epochs for run in first} == {3}
    scores = {GRIDS["prequant"][0]: 0.7, GRIDS["prequant"][1]: 0.9, GRIDS["prequant"][2]: 0.9}
    runs = [finished(run, scores[run.lr]) for run in first if (run.method, run.task) == ("prequant", "mrpc")]
    after = [run for run in searching.possible(runs) if run.seed == 1]
    # the smaller of two equals
    assert [(run.method, run.task, run.lr) for run in after] == [("prequant", "mrpc", GRIDS["prequant"][1])]
    assert len(searching.every([])) == 12 + 4  # seed 0 at the best rate has run in the search


def test_the_estimate_goes_by_task_and_method_and_training_rows():
    lines = [
        finished(wanted, n_train=wanted.max_train or 200, seconds=30.0 if wanted.method == "ft" else 12.0)
        for wanted in plan(seeds=(0,)).possible([])
    ]
    missing = [wanted for wanted in plan(seeds=(1,)).possible([])]
    assert runner.estimate(missing, lines) == pytest.approx(2 * (30 + 12))
    longer = [replace(wanted, epochs=6, max_train=400) for wanted in missing if wanted.task == "mrpc"]
    assert runner.estimate(longer, lines) == pytest.approx(4 * (30 + 12))
    unseen = [replace(missing[0], method="lora", quantization=None, max_train=None)]
    assert runner.estimate(unseen, [run for run in lines if run.settings.task == "sst2"]) == pytest.approx(
        (30 + 12) / 2
    )
    assert runner.estimate(missing, []) is None


def test_progress_counts_runs_whose_rate_is_not_known_yet():
    searching = plan("each", seeds=(0, 1))
    first = next(searching.possible([]))
    assert runner.progress(searching, [], 2) == "0 of 16 runs done"
    assert (
        runner.progress(searching, [finished(first, n_train=4000, seconds=480.0)], 2)
        == "1 of 16 runs done, about 60 minutes left"
    )


def test_a_rate_searched_once_serves_every_arm_of_its_method():
    arms = (
        Arm("ours", "prequant", {}),
        Arm("wider", "prequant", {"r": 20}),
        Arm("drawn", "prequant_random", {}, seeds_selector=True),
    )
    searching = plan("once", experiment=Experiment("", arms))
    first = {run.identity: run for run in searching.possible([])}
    assert len(first) == 6 and {(run.task, run.epochs) for run in first.values()} == {("sst2", 1)}
    lines = [finished(run, run.lr) for run in first.values()]
    runs = {run.identity: run for run in searching.possible(lines)}
    fixed = [run for key, run in runs.items() if key not in first]
    assert len(fixed) == 3 * 2 * 2 and {run.lr for run in fixed} == {1e-2}
    assert set(searching.every(lines)) == set(runs) and len(runs) == len(searching.every([])) == 18
    assert {run.quantization["seed"] for run in fixed if run.method == "prequant_random"} == {0, 1}


def test_an_arm_with_a_grid_of_its_own_searches_it():
    arms = (Arm("ours", "prequant", {}), Arm("wide", "prequant", {"r": 20}, grid=(0.1, 0.2)))
    searching = plan("once", experiment=Experiment("", arms), tasks=("sst2",), seeds=(0,))
    first = list(searching.possible([]))
    assert [(run.quantization, run.lr, run.epochs) for run in first[3:]] == [
        ({"r": 20}, 0.1, 1),
        ({"r": 20}, 0.2, 1),
    ] and len(first) == 5
    lines = [finished(run, run.lr) for run in first]
    assert [(run.quantization, run.lr) for run in searching.possible(lines) if run.epochs == 3] == [
        ({}, 1e-2),
        ({"r": 20}, 0.2),
    ]
    assert [run.lr for run in plan("each", experiment=Experiment("", arms), tasks=("sst2",)).possible([])][3:] == [
        0.1,
        0.2,
    ]
    assert {run.lr for run in plan("quick", experiment=Experiment("", arms)).possible([])} == {
        LEARNING_RATES["prequant"],
        0.2,
    }
    done = [*lines, *(finished(run) for run in searching.possible(lines) if run.epochs == 3)]
    assert "one for each method: prequant at 0.01, wide at 0.2." in "\n".join(tables.markdown(searching, done))


def test_a_restart_runs_what_is_missing(tmp_path, monkeypatch):
    calls = []

    def perform(settings, threads, processes):
        calls.append(settings)
        if settings.seed == 1 and settings.method == "ft" and len(calls) < 20:
            raise RuntimeError("exit code -9")
        return result(settings)

    monkeypatch.setattr(runner, "perform", perform)
    out, said = tmp_path / "runs" / "runs.jsonl", []
    failed = runner.run_all(plan(), out, "/models/tiny", "/glue", 1, 2, said.append)
    assert (
        len(failed) == 2
        and len(calls) == 8
        and all("ft, lr 5e-05, seed 1, 3 epochs" in message and "exit code -9" in message for message in failed)
    )
    assert (
        {settings.model for settings in calls} == {"/models/tiny"}
        and "/models" not in out.read_text()
        and "/glue" not in out.read_text()
    )
    assert any("about" in message and "minutes left" in message for message in said)
    with out.open("a") as file:
        file.write('{"wanted": {"task": "ss')  # a kill in the middle of a line
    calls += [None] * 20
    assert runner.run_all(plan(), out, "/models/tiny", "/glue", 1, 1, said.append) == []
    assert len(calls) == 8 + 20 + 2 and len(runner.read_runs(out)) == 8
    assert (
        runner.run_all(plan(model="other"), out, "/models/other", "/glue", 1, 4, said.append) == []
        and len(runner.read_runs(out)) == 16
    )


def test_given_rates_are_not_searched():
    given = plan("each", rates={"prequant": 0.25})
    runs = list(given.possible([]))
    assert {run.lr for run in runs if run.method == "prequant"} == {0.25} and {
        run.lr for run in runs if run.method == "ft"
    } == set(GRIDS["ft"])
    assert len(given.every([])) == 2 * (3 + 1) + 2 * 2


def test_a_rate_given_for_a_task_is_of_that_task_and_of_arms_without_a_grid():
    arms = (Arm("ours", "prequant", {}), Arm("wide", "prequant", {"r": 10}, grid=(1e-4, 2e-4, 3e-4)))
    given = plan("once", experiment=Experiment("", arms), rates={"mrpc/prequant": 0.25, "prequant": 0.5})
    assert [given.given(arm, task) for arm in arms for task in ("sst2", "mrpc")] == [0.5, 0.25, None, None]
    searches = list(given.possible([]))[:3]
    assert [run.lr for run in searches] == [1e-4, 2e-4, 3e-4]
    lines = [finished(run, score) for run, score in zip(searches, (0.7, 0.9, 0.8), strict=True)]
    rates = {
        (run.task, (run.quantization or {}).get("r")): run.lr
        for run in given.possible(lines)
        if run.epochs == given.epochs
    }
    assert rates == {("sst2", None): 0.5, ("mrpc", None): 0.25, ("sst2", 10): 2e-4, ("mrpc", 10): 2e-4}
    of_one = plan("once", experiment=Experiment("", arms[:1]), rates={"mrpc/prequant": 0.25})
    searched = [finished(run, score) for run, score in zip(list(of_one.possible([]))[:3], (0.7, 0.9, 0.8), strict=True)]
    text = "\n".join(
        tables.markdown(
            of_one, searched + [finished(run) for run in of_one.possible(searched) if run.epochs == of_one.epochs]
        )
    )
    assert (
        f"one for each method: prequant at {GRIDS['prequant'][1]:g}." in text
        and "- learning rates, given: mrpc/prequant at 0.25." in text
    )


@pytest.mark.slow
def test_two_processes_train_one_run(tmp_path):
    """By torchrun on gloo: one line, of the whole validation set in its order; the batch is that of both together."""
    float_model = save_float_model(tmp_path / "float")
    wanted = plan(data="synthetic", epochs=2, max_train=256).settings(SMALL.arms[1], "sst2", 1e-2, 0)
    found = runner.perform(replace(wanted, model=float_model), 1, processes=2)
    predictions, labels = (metrics.unpack(text, is_regression=False) for text in (found.predictions, found.labels))
    assert len(labels) == 128 and (predictions == labels).mean() == found.score and found.n_train == 256


def test_a_batch_that_the_processes_do_not_divide_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as torchrun sets it
    chosen = RunSettings(save_float_model(tmp_path / "float"), "sst2", data="synthetic", batch_size=31, quantization={})
    with pytest.raises(ValueError, match="batch_size must be a multiple of the 2 processes, got 31"):
        train.fine_tune(chosen)


@pytest.mark.slow
def test_what_a_process_dies_of_is_told():
    with pytest.raises(RuntimeError, match=r"^exit code 1:\n(?s:.*)no/such/model"):
        runner.perform(RunSettings("no/such/model", "sst2", data="synthetic"), 1)


def perform_here(settings, threads, processes=1):
    """What the worker's process does, in this one."""
    return RunResult.from_json(train.fine_tune(settings)[2].to_json())


@pytest.mark.slow
def test_the_command_trains_and_prints_its_table(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "perform", perform_here)
    float_model = save_float_model(tmp_path / "float")
    arguments = ["experiment", "table3", "--quick", "--model", float_model, "--data", "synthetic", "--epochs", "1"]
    arguments += ["--max-train", "64", "-j", "1", "-o", str(tmp_path / "runs")]
    listed = invoke(*arguments, "--list")
    assert listed.exit_code == 0, listed.output
    assert listed.stdout.count("sst2 prequant") == 4 and not (tmp_path / "runs").exists()
    done = invoke(*arguments)
    assert done.exit_code == 0, done.output
    assert "| min_max |" in done.stdout and (tmp_path / "runs" / "table3.md").read_text() == done.stdout
    errors = {
        run.settings.quantization.get("strategy"): run.result.quantization_error
        for run in runner.read_runs(tmp_path / "runs" / "runs.jsonl")
    }
    assert len(errors) == 4 and errors["mse"] <= errors["min_max"] and errors["row_wise"] < errors[None]
    monkeypatch.setattr(runner, "perform", None)  # nothing is run again
    assert invoke(*arguments).stdout == done.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--tasks", "sst3"], "task must be one of"),
        (["--seeds", "a"], "seeds must be integers separated by commas, got 'a'"),
        (["--data-dir", "nowhere"], "nowhere"),
        (["--rates", "ft=fast"], "rates must be like ft=1e-4,mrpc/prequant=5e-3"),
        (["--rates", "sst3/ft=1e-4"], "task must be one of"),
        (["--rates", "sst2/mrpc/ft=1e-4"], "task must be one of"),
        (["--rates", "sgd=0.1"], "got 'sgd=0.1'"),
        (["--rates", "ft=-1"], "got 'ft=-1'"),
    ],
)
def test_wrong_experiments_are_refused_before_they_begin(changes, message, tmp_path):
    float_model = save_float_model(tmp_path / "float")
    done = invoke("experiment", "table3", "--model", float_model, "-o", tmp_path / "runs", *changes)
    assert done.exit_code == 2 and message in done.output
