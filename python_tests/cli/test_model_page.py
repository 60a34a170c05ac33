"""The page of a model: its numbers are the model's, it stands alone, and names stay text."""

import copy
import functools
import html
import math
import re
from html.parser import HTMLParser

import pytest
import torch

from prequant_ext import task
from prequant_ext.bit_allocation import propose_layer_bits
from prequant_ext.cli.options import quantize_command
from prequant_ext.config import PreQuantConfig
from prequant_ext.pages.inspection import (
    clip_range,
    histogram,
    inspect_float,
    proposed,
    recurrences,
    task_changes,
    telling,
)
from prequant_ext.pages.model_page import model_page
from prequant_ext.study.error_map import MatrixError, write_error_map
from support.command_line import run
from support.tiny_models import Plain, tiny_model

CONFIG = PreQuantConfig(r=2)
SECTIONS = ["coverage", "error", "dimensions", "histograms", "sensitivity"]
VOID = {"meta", "path", "use", "rect", "image"}  # of what the pages have: what never holds anything


class Page(HTMLParser):
    """Headings, paragraphs and tables by section. Fails where tags are not closed in their order."""

    def __init__(self, text):
        super().__init__()
        self.open, self.section, self.rows, self.texts = [], "", {}, {}
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            is_link = name in ("src", "href", "xlink:href", "action", "data")
            assert not is_link or value.startswith(("#", "data:image/png;base64,")), (tag, name, value)
        assert tag not in ("script", "link", "iframe", "object")
        if tag == "h2":
            self.section = dict(attributes)["id"]
        if tag == "tr":
            self.rows.setdefault(self.section, []).append([])
        if tag in ("td", "th"):
            self.rows[self.section][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[self.section][-1][-1] += data
        elif data.strip() and "svg" not in self.open:
            self.texts[self.section] = self.texts.get(self.section, "") + data


def figures(text):
    """What the figures say: matplotlib draws text as outlines, with the text as a comment before them."""
    return [html.unescape(comment) for comment in re.findall(r"<!-- (.*?) -->", text)]


@pytest.fixture(scope="module")
def inspection():
    return inspect_float("tiny", tiny_model("bert"), CONFIG)


@pytest.fixture(scope="module")
def proposal(inspection):
    return propose_layer_bits(inspection.measured, bits_per_weight=3)


@pytest.fixture(scope="module")
def task_files(inspection, tmp_path_factory):
    """Two tasks, the second of which changes four times as much."""
    folder, paths = tmp_path_factory.mktemp("tasks"), []
    for name, change in (("sst2", 0.1), ("mrpc", 0.4)):
        tuned = copy.deepcopy(inspection.model)
        with torch.no_grad():
            for i, matrix in enumerate(inspection.matrices):
                tuned.get_submodule(matrix.row.name).outlier_weight.add_(change * (1 + i / 100))
        paths.append(folder / f"{name}.task")
        task.save_task(tuned, name, paths[-1], {"score": "0.8372093023255814"})
    return paths


@pytest.fixture(scope="module")
def page(inspection, proposal, task_files):
    return model_page(inspection, proposal, task_files, how_to_quantize=quantize_command("tiny", proposal.layer_bits))


# ---- values ----------------------------------------------------------------------------------------------------------


def test_sections_and_figures(page):
    assert list(Page(page).rows) == [*SECTIONS, "tasks"] and page.count("<svg") == 5
    assert re.findall(r'<a href="#(.*?)">', page) == re.findall(r'<h2 id="(.*?)">', page) == [*SECTIONS, "tasks"]


def test_coverage_adds_up(inspection, page):
    report, rows = inspection.report, Page(page).rows["coverage"]
    kinds = ["", "matrices, quantized (12)", "embedding tables, quantized (3)", "float"]
    missing = ["left float, besides norms and biases", "bert.pooler.dense (32, 32)", "classifier (2, 32)"]
    assert [row[0] for row in rows] == [*kinds, *missing]
    assert sum(int(row[1].replace(",", "")) for row in rows[1:4]) == report.total_weights
    for column, wanted in ((3, report.bytes_before), (4, report.bytes_after)):
        assert sum(float(row[column]) for row in rows[1:4]) == pytest.approx(wanted / 1e6, abs=0.015)
    assert f"{100 * report.coverage:.1f} % of {report.total_weights:,} weights" in Page(page).texts["coverage"]


def test_every_error_is_in_the_map_and_in_the_table(inspection, page):
    assert Page(page).rows["error"] == [[*inspection.report.titles], *([*row] for row in inspection.report.cells())]
    drawn = figures(page)
    assert {f"{100 * matrix.relative_error:.1f}" for matrix in inspection.matrices} <= set(drawn)
    assert {matrix.part for matrix in inspection.matrices} <= set(drawn)
    worst = max(inspection.matrices, key=lambda matrix: matrix.relative_error)
    assert f"Most lose: {worst.row.name} {100 * worst.relative_error:.1f} %" in Page(page).texts["error"]


def test_dimensions_are_ranked_by_how_often_they_recur(inspection, page):
    (recurrence,) = recurrences(inspection)
    titles, *rows = Page(page).rows["dimensions"]
    assert titles[:2] == ["dimension", "matrices"] and len(rows) == min(15, len(recurrence.counts))
    for row in rows:
        holding = recurrence.holding(int(row[0]))
        assert row[1:4] == [
            f"{len(holding)} of 12",
            *(str(sum(matrix.layer.axis == axis for matrix in holding)) for axis in ("input", "output")),
        ]
        assert (
            row[4] == {(0,): "0", (1,): "1", (0, 1): "0-1"}[tuple(sorted({matrix.block.index for matrix in holding}))]
        )
    assert [int(row[0]) for row in rows] == list(recurrence.counts)[:15]
    recurring = {str(dim) for dim, count in recurrence.counts.items() if count > 1}
    assert recurring and recurring <= set(figures(page))
    assert (
        f"{len(recurrence.counts)} different ones; {len(recurring)} recur. Drawn at random, each would be in 0.75 "
        "matrices." in Page(page).texts["dimensions"]
    )


def test_histograms_have_the_true_clip_range(inspection, page):
    _, *rows = Page(page).rows["histograms"]
    for (title, matrix), row in zip(telling(inspection.matrices), rows, strict=True):
        low, high, _ = clip_range(matrix.layer)
        assert row == [
            matrix.row.name,
            title,
            "4",
            f"{low:.4g}",
            f"{high:.4g}",
            f"{100 * histogram(matrix).clipped:.2f} %",
        ]
        sigma = matrix.weight.double().std(correction=0)
        assert f"codes reach {low:.3g} to {high:.3g}, {low / sigma:.2f} σ to {high / sigma:.2f} σ".replace(
            "-", "−"
        ) in figures(page)
    assert "−3.00 σ to 2.6" in "".join(figures(page)) and "3.00 σ to 3.00 σ" not in "".join(figures(page))


def test_the_proposal_stands_with_its_command_and_its_limits(proposal, inspection, page):
    found = Page(page)
    assert found.rows["sensitivity"][:3] == [[*proposal.titles], *([*row] for row in proposal.cells())]
    matrices = found.rows["sensitivity"][4:]
    assert [row[0] for row in matrices] == [matrix.name for matrix in inspection.measured.matrices]
    first = inspection.measured.matrices[0]
    assert matrices[0][1:] == [f"{100 * first.relative_error(bits):.1f} %" for bits in (2, 3, 4, 8)]
    rules = " ".join(f"--layer-bits {rule}={bits}" for rule, bits in proposal.layer_bits.items())
    text = found.texts["sensitivity"]
    assert f"prequant quantize tiny -o DIR {rules}" in text
    assert "3 bits take the place of 4" in text and "What this cannot see is how far an error travels" in text
    assert (
        f"a model of {proposal.model_bytes / 1e6:,.2f} MB, L2 error of the matrices "
        f"{math.sqrt(proposal.squared_error):.4g}" in text
    )


def test_tasks_have_the_norms_of_their_changes(inspection, task_files, page):
    changes = task_changes(inspection, task_files)
    _, *rows = Page(page).rows["tasks"]
    assert [row[:3] for row in rows] == [["sst2", "sst2.task", "0.8372"], ["mrpc", "mrpc.task", "0.8372"]]
    assert [row[3:5] for row in rows] == [
        [f"{change.norm:.4g}", f"{100 * change.norm / change.base_norm:.1f} %"] for change in changes
    ]
    assert (
        float(rows[1][3]) == pytest.approx(4 * float(rows[0][3]), rel=1e-3)
        and rows[0][5] == inspection.matrices[-1].row.name
    )
    assert {f"{norm:.2f}" for change in changes for own in change.norms for norm in own} <= set(figures(page))


def test_runs_join_the_page(inspection, tmp_path):
    write_error_map(tmp_path, "another", [MatrixError("mse", block, "query", 0.25) for block in (0, 1)])
    text = model_page(inspection, runs=tmp_path)
    assert list(Page(text).texts)[-1] == "fig4" and "(Figure 4), another" in Page(text).texts["fig4"]
    with pytest.raises(FileNotFoundError, match="holds no experiment"):
        model_page(inspection, runs=tmp_path / "none")


def test_without_a_command_the_proposal_names_its_setting(inspection, proposal):
    assert f"layer_bits = {proposal.layer_bits}" in Page(model_page(inspection, proposal)).texts["sensitivity"]


# ---- what models lack ------------------------------------------------------------------------------------------------


def test_a_page_of_unknown_blocks():
    text = model_page(inspect_float("plain", Plain(), PreQuantConfig(r=1, axis="input")))
    texts = Page(text).texts
    assert (
        "its errors have no place in a map" in texts["error"] and "none of its matrices is known" in texts["dimensions"]
    )
    assert "layer_bits could not name them" in texts["sensitivity"] and text.count("<svg") == 1


def test_unknown_blocks_have_no_proposal_and_refuse_a_budget():
    plain = inspect_float("plain", Plain(), PreQuantConfig(r=1, axis="input"))
    assert proposed(plain, None) is None
    with pytest.raises(ValueError, match=r"blocks\.0\.up is in no block that layer_bits could name"):
        proposed(plain, {"bits_per_weight": 3.0})


def test_a_page_without_outlier_dimensions(tmp_path):
    alpha = inspect_float("alpha", tiny_model("bert"), PreQuantConfig(r=0, train_scales=True))
    task.save_task(alpha.model, "sst2", tmp_path / "a.task")
    text = model_page(alpha, task_files=[tmp_path / "a.task"])
    assert (
        "outlier dimensions: it has none" in Page(text).texts["dimensions"]
        and "its tasks changed none" in Page(text).texts["tasks"]
    )
    assert "train_scales = True" in text


def test_a_page_of_two_stacks(tmp_path):
    text = model_page(inspect_float("t5", tiny_model("t5", "base"), PreQuantConfig(r=1)))
    assert "encoder: 12 matrices" in text and "decoder: 20 matrices" in text and "Cross-attention keys" in text
    drawn = figures(text)
    assert {"encoder.0", "decoder.1"} <= {*drawn} and any(text.startswith("largest error: encoder.") for text in drawn)
    assert not any("nan" in text for text in drawn)


def test_names_stay_text(inspection, proposal, task_files, tmp_path):
    odd = tmp_path / 'a<b>&"$x$.task'
    odd.write_bytes(task_files[0].read_bytes())
    name = "<script>&"
    command = quantize_command(name, proposal.layer_bits)
    text = model_page(type(inspection)(**(vars(inspection) | {"name": name})), proposal, [odd], None, command)
    found = Page(text)  # which refuses a script
    assert found.rows["tasks"][1][1] == odd.name and "<title>PreQuant: &lt;script&gt;&amp;</title>" in text
    assert "prequant quantize '<script>&' -o" in found.texts["sensitivity"]


# ---- the command -----------------------------------------------------------------------------------------------------


inspect = functools.partial(run, "inspect")


def test_pages_of_a_float_model_and_of_its_directory_agree(float_model, base, tmp_path):
    inspect(float_model, "--r", "3", "-o", tmp_path / "float.html", "--budget", "3")
    inspect(base, "-o", tmp_path / "base.html")
    fresh, stored = (Page((tmp_path / name).read_text()) for name in ("float.html", "base.html"))
    for section in ("coverage", "error"):
        assert fresh.rows[section] == stored.rows[section]
    # sizes are over another norm
    assert [row[:-1] for row in fresh.rows["dimensions"]] == [row[:-1] for row in stored.rows["dimensions"]]
    assert "The float weights are gone" in stored.texts["histograms"] and {
        row[-1] for row in stored.rows["histograms"][1:]
    } == {"not known"}
    assert "need the float weights" in stored.texts["sensitivity"] and fresh.rows["sensitivity"]
    assert f"prequant quantize {float_model} -o DIR --layer-bits " in fresh.texts["sensitivity"]


def test_a_budget_without_a_page_prints_the_proposal(float_model):
    text = inspect(float_model, "--r", "2", "--budget", "3.0").stdout
    assert "proposed bits" in text and re.search(r"^proposed: encoder\.0=\d, encoder\.1=\d$", text, re.M)
    found = inspect(float_model, "--r", "2", "--budget", "3.0", "--json")["proposal"]
    assert sorted(found["layer_bits"].values()) == [2, 4] and found["bits_per_weight"] == 3
    megabytes = inspect(float_model, "--r", "2", "--budget", f"{found['model_bytes'] / 1e6}MB", "--json")
    assert megabytes["proposal"] == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("{float}", "--budget", "much"),
            "budget must be megabytes such as 16MB, or bits a weight such as 3.0, got 'much'",
        ),
        (("{float}", "--budget", "1.5", "-o", "{out}"), "bits_per_weight must be at least 2,"),
        (("{float}", "--budget", "0.001MB", "-o", "{out}"), "budget_bytes must be at least"),
        (("{base}", "--budget", "3", "-o", "{out}"), "budget needs float weights"),
        (("{float}", "--dry-run", "-o", "{out}"), "--dry-run reads no weight"),
        (("{base}", "--task-file", "{none}"), "are for the HTML file: name it with -o"),
        (("{base}", "--task-file", "{none}", "-o", "{out}"), "no task file at"),
        (("{base}", "--runs", "{none}", "-o", "{out}"), "holds no experiment"),
        (("{base}", "-o", "{there}"), "is there already; --overwrite replaces it"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_refusals_write_nothing(arguments, message, float_model, base, tmp_path):
    (tmp_path / "there").write_text("mine")
    names = {
        "float": float_model,
        "base": base,
        "out": tmp_path / "out",
        "none": tmp_path / "none",
        "there": tmp_path / "there",
    }
    result = inspect(*(argument.format(**names) for argument in arguments), expect=2)
    assert message in result.stderr and not result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["there"] and (tmp_path / "there").read_text() == "mine"
