"""Tables, figures and the page of experiments, from finished runs alone."""

import re
import xml.etree.ElementTree
from dataclasses import replace

import pytest

from prequant_ext import html_page
from prequant_ext.config import PreQuantConfig
from prequant_ext.linear import PreQuantLinear
from prequant_ext.study import error_map, page, tables
from prequant_ext.study.experiments import EXPERIMENTS, Arm, Experiment
from prequant_ext.study.runner import Plan
from support.command_line import invoke
from support.runs import finished, plan
from support.tiny_checkpoint import save_float_model
from support.tiny_models import Plain, tiny_model


def test_a_table_grows_with_the_tasks_and_seeds_of_later_commands(tmp_path):
    first = page.Study("table3", 2, Plan(EXPERIMENTS["table3"](2), "tiny", ("sst2",), (0, 1), "quick"))
    later = replace(first, plan=replace(first.plan, tasks=("mrpc",), seeds=(0,)))
    first.write(tmp_path)
    joined = later.joined(tmp_path)
    assert (joined.plan.tasks, joined.plan.seeds) == (("sst2", "mrpc"), (0, 1))
    joined.write(tmp_path)
    assert first.joined(tmp_path) == joined == page.Study.read(tmp_path / "table3.plan.json").joined(tmp_path)
    other = replace(later, plan=replace(later.plan, epochs=1))
    assert other.joined(tmp_path) == other
    given = replace(later, plan=replace(later.plan, tasks=("rte",), rates={"rte/prequant": 0.5}))
    assert (given.joined(tmp_path).plan.tasks, given.joined(tmp_path).plan.rates) == (
        ("sst2", "mrpc", "rte"),
        {"rte/prequant": 0.5},
    )
    # would show other runs of mrpc than those that the folder's study is of
    changed = replace(later, plan=replace(later.plan, rates={"mrpc/prequant": 0.5}))
    assert changed.joined(tmp_path) == changed


def test_a_table_has_means_spreads_and_an_average_of_complete_tasks():
    whole = plan(tasks=("sst2", "mrpc", "rte"))
    lines = []
    for run in whole.possible([]):
        if run.method == "prequant" and run.task == "mrpc":
            continue
        error = 31.04 if run.method == "prequant" else None
        lines.append(finished(run, (0.7 if run.task == "rte" else 0.8) + 0.02 * run.seed, quantization_error=error))
    text = "\n".join(tables.markdown(whole, lines))
    assert "| full | 81.00 ± 1.41 (2) | 81.00 ± 1.41 (2) | 71.00 ± 1.41 (2) | 76.00 | 10 | 2.0 MB |  |" in text
    assert "| ours | 81.00 ± 1.41 (2) |  | 71.00 ± 1.41 (2) | 76.00 | 10 | 2.0 MB | 31.0 |" in text
    two = "\n".join(tables.markdown(plan(), lines))
    assert "| ours | 81.00 ± 1.41 (2) |  | 10 | 2.0 MB | 31.0 |" in two and "average" not in two  # one task is complete
    assert "100 training rows" in text and "learning rates, fixed: ft at 5e-05, prequant at 0.005." in text
    assert "overlap" not in text and "minus" not in text
    assert tables.mean_and_spread([0.5]) == "50.00"


def test_a_table_compares_with_one_arm_on_the_same_rows():
    arms = (Arm("ours", "prequant", {}), Arm("drawn", "prequant_random", {}), Arm("full", "ft"))
    compared = plan(
        experiment=Experiment("", arms, against="ours"),
        rates={"prequant": 1e-3, "prequant_random": 1e-3},
        seeds=(0, 1, 2),
    )
    runs = [run for run in compared.possible([]) if run.method != "ft" and run.task == "sst2"]
    scores = {"prequant": 0.8, "prequant_random": 0.7}
    lines = [
        finished(run, scores[run.method], overlap=0.25 if run.method == "prequant_random" else None) for run in runs
    ]
    text = "\n".join(tables.markdown(compared, lines[:-1]))  # of one arm only two seeds: those are compared
    assert (
        "| method | sst2 (accuracy) | minus ours | mrpc (accuracy) | minus ours | trained | model | overlap |" in text
    )
    assert "| ours | 80.00 ± 0.00 (3) |  |  |  | 10 | 2.0 MB |  |" in text
    (row,) = [row for row in text.splitlines() if row.startswith("| drawn")]
    _, low, high = map(
        float,
        re.fullmatch(
            r"\| drawn \| 70\.00 ± 0\.00 \(2\) \| (-10\.00) \[(\S+), (\S+)\] \|  \|  \| 10 \| 2\.0 MB \| 0\.25 \|", row
        ).groups(),
    )
    assert -20 <= low <= -16 and -4 <= high < 0  # 10 points and 1.96 times sqrt(0.1 * 0.9 / 50), in steps of one row
    assert (
        "- not run: full." in text
        and "- learning rates, given: prequant at 0.001, prequant_random at 0.001." in text
        and "| full |" not in text
    )
    assert tables.difference([], lines) == tables.difference(lines[:1], lines[1:2]) == ""  # no seed is shared
    assert "- overlap: the Jaccard overlap" in text
    regression = [finished(replace(run, task="stsb")) for run in runs[:1]]
    assert tables.difference(regression, regression) == ""


def test_few_rows_are_compared_with_as_few():
    few = plan(experiment=EXPERIMENTS["table6"](6), tasks=("sst2",), rates={"ft": 1e-4, "prequant": 5e-3}, seeds=(0,))
    scores = {("ft", 500): 0.7, ("ft", 1000): 0.9, ("prequant", 500): 0.6, ("prequant", 1000): 0.6}
    runs = {(run.method, run.max_train): run for run in few.possible([])}
    text = "\n".join(tables.markdown(few, [finished(runs[cell], score) for cell, score in scores.items()]))
    assert "| method | sst2 (accuracy) | minus full fine-tuning |" in text
    assert "| full fine-tuning, 500 rows | 70.00 |  |" in text and "| full fine-tuning, 1,000 rows | 90.00 |  |" in text
    assert "| PreQuant, 500 rows | 60.00 | -10.00 [" in text and "| PreQuant, 1,000 rows | 60.00 | -30.00 [" in text


def recorded(folder, names):
    """Studies of three seeds whose every run has an arbitrary score."""
    lines = {}
    for name in names:
        made = EXPERIMENTS[name](6)
        whole = Plan(made, "tiny", made.tasks, (0, 1, 2), "quick")
        page.Study(name, 6, whole).write(folder)
        lines |= {
            run.identity: finished(run, 0.7 + (len(run.identity) % 7 + run.seed) / 50) for run in whole.possible([])
        }
    (folder / "runs.jsonl").write_text("".join(entry.to_line() for entry in lines.values()))
    return lines


def test_the_page_stands_alone(tmp_path):
    lines = recorded(tmp_path, EXPERIMENTS)
    report = tmp_path / "report.html"
    assert invoke("report", tmp_path, "-o", report).exit_code == 0
    text = report.read_text()
    assert (
        text.count("<svg") == len(EXPERIMENTS)
        and text.count("<h2 id=") == len(EXPERIMENTS)
        and f"{len(lines)} runs of tiny" in text
    )
    parsed = xml.etree.ElementTree.fromstring(text[text.index("<svg") : text.index("</svg>") + 6])
    assert parsed.tag.endswith("svg")
    assert (
        not re.search(r'(?:src|href)="(?!#)(?!http://www\.w3\.org)', re.sub(r"<svg.*?</svg>", "", text, flags=re.S))
        and "<script" not in text
    )
    assert "163.1" in text and "T5-3B encoder" in text  # the paper's numbers stand beside ours
    assert "a part of the training rows, not the whole task: sst2, qnli" in text
    # not overwritten unasked
    assert invoke("report", tmp_path, "-o", report).exit_code == 2


def test_a_page_of_what_has_run_so_far(tmp_path):
    recorded(tmp_path, ["table3"])
    first, *_ = (tmp_path / "runs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "runs.jsonl").write_text(first)
    assert "1 runs of tiny" in page.page(tmp_path) and page.page(tmp_path).count("<svg") == 1
    (tmp_path / "runs.jsonl").write_text("")
    assert "<svg" not in page.page(tmp_path)
    with pytest.raises(
        FileNotFoundError, match="holds no experiment: it must be a folder that prequant experiment wrote"
    ):
        page.page(tmp_path / "nowhere")


def test_the_error_map_has_every_matrix_and_strategy(tmp_path):
    model = tiny_model("bert")
    errors = error_map.error_map(model)
    assert (
        len(errors) == 4 * 12
        and {error.block for error in errors} == {0, 1}
        and "attention.self.query" in {error.matrix for error in errors}
    )
    one = next(
        error for error in errors if (error.strategy, error.block, error.matrix) == ("outlier_aware", 1, "output.dense")
    )
    linear = model.bert.encoder.layer[1].output.dense
    dense = PreQuantLinear.from_linear(linear, PreQuantConfig(r=0), axis="output").dequantize()
    assert one.error == pytest.approx(((dense - linear.weight).norm() / linear.weight.norm()).item(), rel=1e-5)
    assert sum(error.error for error in errors if error.strategy == "mse") <= sum(
        error.error for error in errors if error.strategy == "min_max"
    )
    with pytest.raises(ValueError, match="the blocks of Plain are not known"):
        error_map.error_map(Plain())

    float_model = save_float_model(tmp_path / "float")
    done = invoke("experiment", "fig4", "--model", float_model, "-o", tmp_path / "runs")
    assert done.exit_code == 0, done.output
    assert page.page(tmp_path / "runs").count("<svg") == 1


def test_markdown_becomes_html():
    text = html_page.as_html("| a | b |\n|---|---|\n| 1 < 2 | 3 |\n\n- a note\n- another")
    assert (
        text == "<table>\n<tr><th>a</th><th>b</th></tr>\n<tr><td>1 &lt; 2</td><td>3</td></tr>\n</table>\n<ul>\n<li>a "
        "note</li>\n<li>another</li>\n</ul>"
    )


def test_a_study_is_read_as_it_was_written(tmp_path):
    written = page.Study(
        "table5", 9, Plan(EXPERIMENTS["table5"](9), "tiny", ("sst2",), (0, 3), "once", "synthetic", 2, 100)
    )
    written.write(tmp_path)
    (read,) = page.read_studies(tmp_path)
    assert read.plan.experiment == written.plan.experiment and [*read.plan.possible([])] == [*written.plan.possible([])]
