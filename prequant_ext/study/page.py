"""One HTML page of everything that a folder of runs holds: tables, figures and the paper's numbers. It stands alone: no
script, no network.
"""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from prequant_ext.glue.run import FinishedRun
from prequant_ext.html_page import Section, as_html, details, render
from prequant_ext.study.error_map import read_error_map
from prequant_ext.study.experiments import EXPERIMENTS
from prequant_ext.study.figures import figure, heat_map
from prequant_ext.study.paper import PAPER
from prequant_ext.study.runner import Plan, read_runs
from prequant_ext.study.tables import markdown
from prequant_ext.task_file import write_atomically

RUNS_FILE, PLAN_SUFFIX = "runs.jsonl", ".plan.json"
COMPLETE_TASKS = ("sst2", "mrpc", "cola", "stsb", "rte")  # of which a usual download has every row


@dataclasses.dataclass(frozen=True)
class Study:
    """An experiment on a model: what a folder of runs records of it. blocks: how many the model has."""

    name: str
    blocks: int
    plan: Plan

    @property
    def model(self) -> str:
        return self.plan.model

    def joined(self, folder: Path) -> "Study":
        """With the tasks, seeds and rates of the study of that name in FOLDER, if alike in all else: a table has what
        ran, not what was asked for last.
        """
        path = folder / f"{self.name}{PLAN_SUFFIX}"
        earlier = Study.read(path) if path.exists() else self
        tasks, seeds = (
            tuple(dict.fromkeys((*earlier.plan.tasks, *self.plan.tasks))),
            tuple(sorted({*earlier.plan.seeds, *self.plan.seeds})),
        )
        rates = {**earlier.plan.rates, **self.plan.rates}
        both, other = (
            dataclasses.replace(study, plan=dataclasses.replace(study.plan, tasks=tasks, seeds=seeds, rates=rates))
            for study in (self, earlier)
        )
        same_rates = all(
            study.plan.given(arm, task) == both.plan.given(arm, task)
            for study in (self, earlier)
            for arm, task in study.plan.cells()
        )
        return both if other == both and same_rates else self

    def write(self, folder: Path) -> None:
        """FOLDER/NAME.plan.json, from which a report knows the rows, columns and seeds of a table."""
        settings = {
            field.name: getattr(self.plan, field.name)
            for field in dataclasses.fields(self.plan)
            if field.name != "experiment"
        }
        record = {"experiment": self.name, "blocks": self.blocks, **settings}
        write_atomically(folder / f"{self.name}{PLAN_SUFFIX}", json.dumps(record).encode())

    def own(self, finished: Sequence[FinishedRun]) -> list[FinishedRun]:
        """Those of its model: a folder may hold runs of several."""
        return [run for run in finished if run.settings.model == self.model]

    def table(self, finished: Sequence[FinishedRun]) -> str:
        """Markdown, title first."""
        return "\n".join(markdown(self.plan, self.own(finished))) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Study":
        record: dict[str, Any] = json.loads(path.read_text())
        name, blocks = record.pop("experiment"), record.pop("blocks")
        return cls(name, blocks, Plan(EXPERIMENTS[name](blocks), **record))


def read_studies(folder: Path) -> list[Study]:
    """In the order of EXPERIMENTS. Raises FileNotFoundError where the folder has none, nor an error map."""
    found = {study.name: study for study in map(Study.read, folder.glob(f"*{PLAN_SUFFIX}"))}
    if not found and read_error_map(folder) is None:
        raise FileNotFoundError(
            f"{folder} holds no experiment: it must be a folder that prequant experiment wrote, with "
            f"NAME{PLAN_SUFFIX} in it"
        )
    return [found[name] for name in EXPERIMENTS if name in found]


def page(folder: Path) -> str:
    """The page of the experiments in ``folder``. Raises FileNotFoundError where there are none."""
    finished = read_runs(folder / RUNS_FILE)
    studies, found = read_studies(folder), read_error_map(folder)
    models = sorted({study.model for study in studies} | ({found[0]} if found else set()))
    intro = (
        f"{len(finished)} runs of {', '.join(models)}. Scores are the best epoch's on the validation rows, means ± "
        "standard deviations over seeds (how many)."
    )
    return render("PreQuant: experiments", intro, sections(folder))


def write_report(folder: Path, out: Path) -> None:
    """The page of the experiments in ``folder``. Raises FileNotFoundError where there are none."""
    write_atomically(out, page(folder).encode())


def sections(folder: Path) -> list[Section]:
    """A section an experiment in ``folder``. Raises FileNotFoundError where there are none."""
    finished = read_runs(folder / RUNS_FILE)
    made = [_section(study, study.own(finished)) for study in read_studies(folder)]
    found = read_error_map(folder)
    if found is not None:
        model, errors = found
        made.append(Section("fig4", f"Quantization error of each matrix (Figure 4), {model}", [heat_map(errors)]))
    return made


def _section(study: Study, own: list[FinishedRun]) -> Section:
    title, _, *rest = markdown(study.plan, own)
    drawn, printed = figure(study.name, study.plan, own), as_html(PAPER.get(study.name, ""))
    parts = [as_html("\n".join([*rest, *_partial(study.plan, own)]))]
    parts += [drawn] if drawn else []
    parts += [details("the paper's numbers, for larger models", printed, is_open=True)] if printed else []
    return Section(study.name, f"{title.strip('*')}, {study.model}", parts)


def _partial(plan: Plan, finished: list[FinishedRun]) -> list[str]:
    """A note on the tasks of whose training rows only a part was used, or is there."""
    cut = {run.settings.task for run in finished if run.settings.max_train}
    partial = [task for task in plan.tasks if task not in COMPLETE_TASKS or task in cut]
    return [f"- a part of the training rows, not the whole task: {', '.join(partial)}."] if partial else []
