"""One HTML page of everything that a folder of runs holds: tables, figures and the paper's numbers. It stands alone: no script, no network."""

import dataclasses
import html
import json
import re
from pathlib import Path
from typing import Any

from prequant_ext.glue.error_map import read_error_map
from prequant_ext.glue.experiments import EXPERIMENTS
from prequant_ext.glue.figures import figure, heat_map
from prequant_ext.glue.paper import PAPER
from prequant_ext.glue.runner import Line, Plan, read_lines
from prequant_ext.glue.tables import markdown
from prequant_ext.task_file import write_atomically

RUNS_FILE, PLAN_SUFFIX = "runs.jsonl", ".plan.json"
COMPLETE_TASKS = ("sst2", "mrpc", "cola", "stsb", "rte")  # of which a usual download has every row

TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>PreQuant: experiments</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2.5rem; border-top: 1px solid #ddd; padding-top: 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; display: block; overflow-x: auto; margin: .7rem 0; }
th, td { padding: .25rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #eee; }
th { border-bottom: 1px solid #999; font-weight: 600; } th:first-child, td:first-child { text-align: left; }
ul { color: #555; font-size: .9rem; padding-left: 1.2rem; } .paper { color: #444; } .paper summary { cursor: pointer; color: #0072b2; }
svg { max-width: 100%; height: auto; display: block; margin: 1rem 0; } nav a { margin-right: 1rem; color: #0072b2; }
</style>
</head>
<body>
<h1>PreQuant: experiments</h1>
<p>{{ runs }} runs of {{ models | join(", ") }}. Scores are the best epoch's on the validation rows, means ± standard deviations over seeds (how many).</p>
<nav>{% for section in sections %}<a href="#{{ section.name }}">{{ section.name }}</a>{% endfor %}</nav>
{% for section in sections %}
<h2 id="{{ section.name }}">{{ section.title }}, {{ section.model }}</h2>
{% if section.table %}{{ section.table | safe }}{% endif %}
{% if section.figure %}{{ section.figure | safe }}{% endif %}
{% if section.paper %}<details class="paper" open><summary>the paper's numbers, for larger models</summary>{{ section.paper | safe }}</details>{% endif %}
{% endfor %}
</body>
</html>
"""


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment on a model: what a folder of runs records of it. blocks: how many the model has."""

    name: str
    model: str
    blocks: int
    plan: Plan

    def joined(self, folder: Path) -> "Study":
        """With the tasks and seeds of the study of that name in FOLDER, if it is alike in all else: a table has what ran, not what was asked for last."""
        path = folder / f"{self.name}{PLAN_SUFFIX}"
        earlier = Study.read(path) if path.exists() else self
        tasks, seeds = tuple(dict.fromkeys((*earlier.plan.tasks, *self.plan.tasks))), tuple(sorted({*earlier.plan.seeds, *self.plan.seeds}))
        both = dataclasses.replace(self, plan=dataclasses.replace(self.plan, tasks=tasks, seeds=seeds))
        alike = dataclasses.replace(earlier, plan=dataclasses.replace(earlier.plan, tasks=tasks, seeds=seeds))
        return both if alike == both else self

    def write(self, folder: Path) -> None:
        """FOLDER/NAME.plan.json, from which a report knows the rows, columns and seeds of a table."""
        settings = {field.name: getattr(self.plan, field.name) for field in dataclasses.fields(self.plan) if field.name != "experiment"}
        record = {"experiment": self.name, "model": self.model, "blocks": self.blocks, **settings}
        write_atomically(folder / f"{self.name}{PLAN_SUFFIX}", json.dumps(record).encode())

    @classmethod
    def read(cls, path: Path) -> "Study":
        record: dict[str, Any] = json.loads(path.read_text())
        name, model, blocks = (record.pop(key) for key in ("experiment", "model", "blocks"))
        return cls(name, model, blocks, Plan(EXPERIMENTS[name](blocks), **record))


def read_studies(folder: Path) -> list[Study]:
    """In the order of EXPERIMENTS. Raises FileNotFoundError where the folder has none, nor an error map."""
    found = {study.name: study for study in map(Study.read, folder.glob(f"*{PLAN_SUFFIX}"))}
    if not found and read_error_map(folder) is None:
        raise FileNotFoundError(f"{folder} holds no experiment: prequant experiment NAME -o {folder} makes one")
    return [found[name] for name in EXPERIMENTS if name in found]


def page(folder: Path) -> str:
    """The page of the experiments in ``folder``. Raises FileNotFoundError where there are none."""
    from jinja2 import Environment

    lines, sections = read_lines(folder / RUNS_FILE), []
    studies = read_studies(folder)
    for each in studies:
        own = [line for line in lines if line["model"] == each.model]
        title, _, *rest = markdown(each.plan, own)
        sections.append(
            {
                "name": each.name,
                "title": title.strip("*"),
                "model": each.model,
                "table": as_html("\n".join([*rest, *_partial(each.plan, own)])),
                "figure": figure(each.name, each.plan, own),
                "paper": as_html(PAPER.get(each.name, "")),
            }
        )
    found = read_error_map(folder)
    if found is not None:
        model, errors = found
        sections.append({"name": "fig4", "title": "Quantization error of each matrix (Figure 4)", "model": model, "figure": heat_map(errors)})
    models = sorted({str(section["model"]) for section in sections})
    return Environment(autoescape=True).from_string(TEMPLATE).render(sections=sections, runs=len(lines), models=models)


def _partial(plan: Plan, lines: list[Line]) -> list[str]:
    """A note on the tasks of whose training rows only a part was used, or is there."""
    cut = {line["wanted"]["task"] for line in lines if line["wanted"]["max_train"]}
    partial = [task for task in plan.tasks if task not in COMPLETE_TASKS or task in cut]
    return [f"- a part of the training rows, not the whole task: {', '.join(partial)}."] if partial else []


def as_html(markdown_text: str) -> str:
    """The tables and lists of our own markdown, which has nothing else."""
    out, kind = [], ""
    for line in markdown_text.strip().splitlines():
        is_row, is_item = line.startswith("|"), line.startswith("- ")
        wanted = "table" if is_row else "ul" if is_item else ""
        if wanted != kind:
            out += [f"</{kind}>"] * bool(kind) + [f"<{wanted}>"] * bool(wanted)
        if is_row and not re.fullmatch(r"[|\-]+", line):
            cell = "th" if kind != "table" else "td"
            out.append("<tr>" + "".join(f"<{cell}>{html.escape(text.strip())}</{cell}>" for text in line.strip("|").split("|")) + "</tr>")
        elif is_item:
            out.append(f"<li>{html.escape(line[2:])}</li>")
        kind = wanted
    return "\n".join(out + [f"</{kind}>"] * bool(kind))
