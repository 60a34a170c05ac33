"""The CPU's benchmarks on toy shapes: what they count and write down, never how long it took."""

import json
import os
import runpy
import sys

import pytest
import torch

import reporting
import timing
from support import ROOT

BENCH = ROOT / "bench"
SCRIPTS = ("linear", "train_step", "model", "quantize", "mixed_tasks", "serve", "peers")


@pytest.fixture(autouse=True)
def _settings_of_torch():
    """A script sets them for its own process, and here it runs in this one."""
    threads, precision, engine = (
        torch.get_num_threads(),
        torch.get_float32_matmul_precision(),
        torch.backends.quantized.engine,
    )
    yield
    torch.set_num_threads(threads)
    torch.set_float32_matmul_precision(precision)
    torch.backends.quantized.engine = engine


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Run a script with these options and one thread; its record."""

    def run_script(name, *options):
        record = tmp_path / f"{name}.json"
        monkeypatch.setattr(sys, "argv", [str(BENCH / f"{name}.py"), *options, "--threads", "1", "--json", str(record)])
        runpy.run_path(sys.argv[0], run_name="__main__")
        found = json.loads(record.read_text())
        assert found["header"].keys() == {
            "script",
            "cpu",
            "cores",
            "isa",
            "threads",
            "versions",
            "commit",
            "sees_other_processes",
        }
        assert found["header"]["script"] == f"{name}.py" and found["header"]["threads"] == [1]
        assert {"python", "torch", "prequant_ext"} <= found["header"]["versions"].keys()
        assert found["peaks"].keys() == {"1"}
        assert found["rows"] and all(row["threads"] == 1 and row["milliseconds"] > 0 for row in found["rows"])
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []  # the partial file is gone
        return found

    return run_script


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_has_an_example(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(BENCH / f"{name}.py"), "--help"])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(sys.argv[0], run_name="__main__")
    said = capsys.readouterr().out
    assert stop.value.code == 0
    assert f"    python bench/{name}.py" in said and "--json FILE" in said and "--threads T" in said


def test_linear_has_a_row_for_each_operator_shape_and_token_count(run, capsys):
    options = [
        "--granularity",
        "tensor",
        "group32",
        "--r",
        "0",
        "5",
        "--axis",
        "input",
        "output",
        "--dtype",
        "float32",
        "bfloat16",
    ]
    rows = run(
        "linear",
        "--shapes",
        "64x128",
        "33x64",
        "--tokens",
        "1",
        "3",
        "--odd",
        "7x33x40:8x32x64",
        "--rounds",
        "1",
        "--budget",
        "0",
        *options,
    )
    # 8 (granularity, r, axis): w4a8 in two types, w4a16 and dx in float32 at two precisions and in bfloat16;
    # outlier_grad has r = 5, two axes, two types
    names = {row["name"] for row in rows["rows"]}
    ours = {name for name in names if not name.startswith("torch")}
    assert len(ours) == 8 * (2 + 3 + 3) + 4 and names - ours == {
        "torch linear",
        "torch dx",
        "torch outlier_grad r=5 input",
        "torch outlier_grad r=5 output",
    }
    assert len(rows["rows"]) == len(names) * 2 * 2
    for row in rows["rows"]:
        assert row["error"] < (1e-6 if "torch" in row["name"] else 3e-2), row["name"]
        assert row["error_with_float_weights"] < 0.3 and row["rounds"] == 1 and row["roofline_share"] > 0
    assert {row["neighbour"][0] for row in rows["odd"]} == {8} and all(row["of_neighbour"] > 0 for row in rows["odd"])
    assert not any("group32" in row["name"] for row in rows["odd"])  # 32 does not divide 40
    printed = capsys.readouterr().out
    assert (
        "| 1 thread(s) | M = 1 | M = 3 | error | error with float weights |" in printed
        and "own measured peaks" in printed
    )


def test_train_step_compares_in_processes_and_lists_what_is_not_installed(run, capsys):
    found = run(
        "train_step",
        "--layers",
        "1",
        "--hidden",
        "64",
        "--seq",
        "8",
        "--batch",
        "2",
        "--steps",
        "1",
        "--only",
        "w4a16",
        "qlora",
    )
    rows = {row["name"]: row for row in found["rows"]}
    assert rows.keys() | found["missing"].keys() == {
        "full fp32",
        "prequant w4a16 hidden r=5, high",
        "qlora nf4, r=8 (all linears) fp32",
    }
    full, ours = rows["full fp32"], rows["prequant w4a16 hidden r=5, high"]
    assert full["speedup"] == 1 and full["error_with_float_weights"] == 0 < ours["error_with_float_weights"] < 0.3
    assert ours["trainable"] < full["trainable"] and ours["peak_mb_above_imports"] > 0 and ours["precision"] == "high"
    assert {"forward_milliseconds", "backward_milliseconds", "optimizer_milliseconds", "loss"} <= ours.keys()
    printed = capsys.readouterr().out
    assert all(f"not measured: {name}: {reason}" in printed for name, reason in found["missing"].items())


def test_model_has_a_row_for_each_model_and_batch(run):
    found = run(
        "model", "--layers", "1", "--hidden", "64", "--batch", "1", "2", "--seq", "8", "--rounds", "1", "--budget", "0"
    )
    ours = {"prequant w4a8", "prequant w4a16, high", "prequant w4a16, highest"}
    names = {row["name"] for row in found["rows"]}
    assert ours | {"torch fp32", "torch bf16"} <= names and len(names | found["missing"].keys()) == 7
    assert len(found["rows"]) == 2 * len(names) and {(row["batch"], row["seq"]) for row in found["rows"]} == {
        (1, 8),
        (2, 8),
    }
    weights = {row["name"]: row["weights_mb"] for row in found["rows"]}
    assert all(weights[name] < weights["torch fp32"] / 2 for name in ours)
    assert all(row["error_with_float_weights"] < 0.3 for row in found["rows"])


def test_quantize_has_a_row_for_each_operator_and_one_for_the_model(run, capsys):
    found = run("quantize", "--layers", "1", "--hidden", "64", "--matrix", "256x128", "--rounds", "1", "--budget", "0")
    parts = {
        part: {row["name"]: row for row in found["rows"] if row["part"] == part}
        for part in ("operators", "model", "interpreter")
    }
    operators = {"weight_stats", "outlier_counts", "select_outlier_dims", "quantize_pack"}
    assert operators <= parts["interpreter"].keys() <= operators | {"prepack"}
    assert parts["operators"].keys() == parts["interpreter"].keys() | {"torch: copy of the weights", "all operators"}
    everything, model = parts["operators"]["all operators"], parts["model"]["quantize_model"]
    assert everything["weights"] == 12 * 64 * 64 and everything["matrices"] == model["matrices"] == 6
    assert everything["largest_matrix_mb"] == model["largest_matrix_mb"] == 4 * 64 * 64 * 4 / 1e6
    assert (
        0 < everything["error_with_float_weights"] < 0.3
        and 0 < model["error_with_float_weights"] < 0.3
        and "peak_extra_mb" in everything
    )
    assert all(
        row["is_released"] in (True, False, None) and row["counted"] >= 0 for row in parts["interpreter"].values()
    )
    assert "counted meanwhile" in capsys.readouterr().out


def test_mixed_tasks_compares_ways_that_agree(run):
    found = run(
        "mixed_tasks",
        "--layers",
        "1",
        "--hidden",
        "64",
        "--rows",
        "4",
        "--seq",
        "8",
        "--tasks",
        "1",
        "2",
        "--rounds",
        "1",
        "--budget",
        "0",
    )
    names = {row["name"] for row in found["rows"]}
    ours = {"float32, no tasks", "prequant, one task", "prequant, mixed", "prequant, one after another"}
    assert ours <= names and len(found["rows"]) == 2 * len(names) and len(names) + 2 * len(found["missing"]) == 6
    assert all(row["error"] < 1e-5 for row in found["rows"] if "mixed" in row["name"])


def test_serve_has_a_row_for_each_number_of_tasks_and_size_of_batch(run, capsys):
    found = run(
        "serve",
        "--layers",
        "1",
        "--hidden",
        "64",
        "--words",
        "4",
        "--requests",
        "20",
        "--clients",
        "4",
        "--rounds",
        "1",
        "--max-batch",
        "4",
    )
    assert {(row["tasks"], row["max_batch"]) for row in found["rows"]} == {
        (tasks, batch) for tasks in (1, 4, 16) for batch in (4, 1)
    }
    for row in found["rows"]:
        assert row["requests"] == 20 and row["rounds"] == 1 and row["p99_milliseconds"] >= row["milliseconds"]
        assert row["requests_per_second"] > 0 and row["roofline_share"] > 0
    assert "| threads | server | p50 ms | p99 ms | requests/s | % |" in capsys.readouterr().out


def test_a_missing_peer_is_listed_and_the_others_are_measured(run, monkeypatch, tmp_path, capsys):
    (tmp_path / "stand_in").mkdir()
    (tmp_path / "stand_in" / "openvino.py").write_text("raise ImportError('not on this machine')")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "stand_in"), *sys.path]))
    found = run(
        "peers",
        "--shapes",
        "64x64",
        "--tokens",
        "1",
        "3",
        "--rounds",
        "1",
        "--budget",
        "0",
        "--only",
        "openvino",
        "prequant",
    )
    assert {row["name"] for row in found["rows"]} == {
        "torch fp32",
        "prequant w4a8 per tensor r=5",
        "prequant w4a8 per group 32 r=5",
        "prequant w4a16 per tensor r=5, high",
    }
    assert len(found["rows"]) == 4 * 2 and len(found["missing"]) == 3
    assert set(found["missing"].values()) == {"ImportError: not on this machine"}
    assert "not measured: openvino int4 int8: ImportError: not on this machine" in capsys.readouterr().out


# ---- what they share -------------------------------------------------------------------------------------------------


def test_every_round_calls_every_contender_and_turns_their_order():
    order = []
    contenders = [timing.Contender(name, lambda name=name: order.append(name), "a") for name in "abc"]
    samples = timing.interleaved(contenders, rounds=3, budget=10, threads=1)
    assert {name: len(taken.seconds) for name, taken in samples.items()} == {"a": 3, "b": 3, "c": 3}
    # a sample is many calls
    turns = [name for name, before in zip(order, [None, *order], strict=False) if name != before]
    # the end of a round may be the start of the next
    assert "".join(turns).endswith("abcbcacab") or "".join(turns).endswith("abcbcab")


def test_a_disturbed_sample_is_taken_again(monkeypatch):
    waits = iter([0.0, 5.0, 5.0, 5.0])  # five seconds without a core, then none
    monkeypatch.setattr(timing, "waited_seconds", lambda: next(waits))
    calls = []
    _, is_clean = timing.undisturbed(lambda: calls.append(1), 4, threads=1)
    assert is_clean and len(calls) == 8


def test_ratios_are_taken_within_undisturbed_rounds():
    base = timing.Samples([1.0, 2.0, 90.0], [True, True, False])
    ours = timing.Samples([0.5, 0.5, 1.0], [True, True, True])
    assert timing.speedup(base, ours) == 3.0 and timing.median(base) == 1.5
    noisy = timing.Samples([1.0, 2.0, 3.0], [False] * 3)
    assert timing.speedup(noisy, ours) == 3.0 and timing.median(noisy) == 2.0


def test_a_share_is_that_of_the_tighter_peak():
    peaks = timing.Peaks(gigaflops=100, gigabytes_per_second=10)
    assert peaks.share(50e9, 1e9, 1.0) == 0.5 and peaks.share(1e9, 9e9, 1.0) == 0.9


def test_a_record_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "record.json"
    reporting.write_json(path, {"rows": [1]})
    with pytest.raises(TypeError):
        reporting.write_json(path, {"rows": [object()]})
    assert json.loads(path.read_text()) == {"rows": [1]} and list(tmp_path.iterdir()) == [path]
    reporting.write_json(None, {})  # no file was asked for


def test_a_mean_over_fewer_shapes_says_so():
    def row(name, N, M, speedup, noisy=0):
        return {
            "name": name,
            "threads": 2,
            "N": N,
            "K": 8,
            "M": M,
            "speedup": speedup,
            "roofline_share": 0.5,
            "rounds": 3,
            "noisy": noisy,
        } | {"error": None, "error_with_float_weights": 0.01}

    rows = [row("a", 1, 1, 1.0), row("a", 2, 1, 1.0), row("b", 1, 1, 2.0, noisy=3), row("a", 1, 16, 1.0)]
    *_, first, second = reporting.means_table(rows, 2).splitlines()
    assert first == "| a | 1.00× 50 % | 1.00× 50 % (1 of 2) | 1.0e-02 |"
    assert second == "| b | 2.00× 50 %* (1 of 2) | – | 1.0e-02 |"
