"""experiment, report: the paper's tables and figures."""

import math
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import FAILED, exit_codes, quiet_libraries, say
from prequant_ext.cli.options import Data, DataDir, Overwrite, Source, refuse_existing
from prequant_ext.study.experiments import ERROR_MAP, EXPERIMENTS
from prequant_ext.study.runner import SEARCHES

if TYPE_CHECKING:  # pages and figures take seconds to import
    from prequant_ext.study.page import Study

SEARCH_HELP = (
    "of learning rates: for each row and task; once a method; or quick, none, and only the first task and "
    "seed 0 unless others are named"
)
RATES_HELP = (
    "learning rates that are not searched, such as ft=1e-4,mrpc/prequant=5e-3; rows with a grid of their own "
    "(wide ones of table4) still search it"
)
Named = Enum("Named", {name: name for name in (*EXPERIMENTS, ERROR_MAP)}, type=str)  # type: ignore[misc]
Search = Enum("Search", {name: name for name in SEARCHES}, type=str)  # type: ignore[misc]


@app.command(epilog="Example: prequant experiment table3 --quick -j 2 -o runs")
def experiment(
    name: Annotated[Named, typer.Argument(help="a table or figure of the paper")],
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="folder of runs.jsonl, which all experiments share, and NAME.md, the table"),
    ],
    model: Annotated[str, typer.Option(help="float model: a directory, a name on the hub, or minilm")] = "minilm",
    tasks: Annotated[
        str | None, typer.Option(help="of GLUE, separated by commas (default: those of the experiment)")
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(help="separated by commas; the lowest one searches learning rates (default: 0,1,2)")
    ] = None,
    search: Annotated[Search, typer.Option(help=SEARCH_HELP)] = Search.each,  # type: ignore[attr-defined]
    quick: Annotated[
        bool, typer.Option("--quick", help="the same as --search quick: a look at an experiment in minutes")
    ] = False,
    rates: Annotated[str | None, typer.Option(help=RATES_HELP)] = None,
    epochs: int = 3,
    max_train: Annotated[
        int | None, typer.Option(help="training rows of every task (default: 4000 of sst2 and qnli, all of the others)")
    ] = None,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="runs side by side")] = 1,
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
    processes: Annotated[int, typer.Option(help="of each run, one a GPU, started by torchrun")] = 1,
    only_list: Annotated[bool, typer.Option("--list", help="say which runs are missing, and start none")] = False,
) -> None:
    """Train every row of a table or figure of the paper, and print the table. What OUT/runs.jsonl has is not run again.

    fig4 trains nothing: it is the quantization error of each matrix.
    """
    with exit_codes():
        quiet_libraries()
        from prequant_ext.study.error_map import measure_errors
        from prequant_ext.study.planning import plan_experiment

        how = "quick" if quick else search.value
        if name.value == ERROR_MAP:
            measure_errors(model, out)
            return say(f"wrote {out / 'fig4.json'}; prequant report draws it")
        study, path = plan_experiment(
            name.value,
            model,
            tasks.split(",") if tasks else None,
            seeds_of(seeds) if seeds else None,
            how,
            data.value,
            data_dir,
            epochs,
            max_train,
            rates_of(rates) if rates else {},
        )
        if only_list:
            return list_experiment(study, out, jobs)
        failed = run_experiment(study, path, out, data_dir, threads, jobs, processes)
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again")
            raise typer.Exit(FAILED)


def seeds_of(text: str) -> list[int]:
    """Of "0,1,2". Raises ValueError for anything else."""
    try:
        return [int(seed) for seed in text.split(",")]
    except ValueError:
        raise ValueError(f"seeds must be integers separated by commas, got {text!r}") from None


def rates_of(text: str) -> dict[str, float]:
    """[TASK/]METHOD -> learning rate of [TASK/]METHOD=RATE, separated by commas."""
    from prequant_ext.baselines import METHODS

    pairs = [pair.partition("=")[::2] for pair in text.split(",")]
    try:
        rates: dict[str, float] | None = {name: float(rate) for name, rate in pairs}
    except ValueError:
        rates = None
    if rates is None or not all(
        0 < rate < math.inf and name.rpartition("/")[2] in METHODS for name, rate in rates.items()
    ):
        raise ValueError(
            f"rates must be like ft=1e-4,mrpc/prequant=5e-3, of the methods {', '.join(METHODS)}, got {text!r}"
        )
    return rates


def list_experiment(study: "Study", out: Path, jobs: int) -> None:
    """Print the runs that are missing and can start."""
    from prequant_ext.study.page import RUNS_FILE
    from prequant_ext.study.runner import progress, read_runs, scores_of

    finished = study.own(read_runs(out / RUNS_FILE))
    done, possible = set(scores_of(finished)), {run.identity: run for run in study.plan.possible(finished)}
    for key, run in possible.items():
        if key not in done:
            print(run.describe())
    say(f"{progress(study.plan, finished, jobs)}; the list has those that can start now")


def run_experiment(
    study: "Study", path: str, out: Path, data_dir: str | None, threads: int, jobs: int, processes: int
) -> list[str]:
    """Run what is missing, then print the table and write it to OUT/NAME.md; what failed comes back as messages.
    ``path``: the model's folder.
    """
    from prequant_ext.study.page import RUNS_FILE
    from prequant_ext.study.runner import read_runs, run_all
    from prequant_ext.task_file import write_atomically

    out.mkdir(parents=True, exist_ok=True)
    shown = study.joined(out)
    shown.write(out)
    failed = run_all(study.plan, out / RUNS_FILE, path, data_dir, threads, jobs, say, processes)
    table = shown.table(read_runs(out / RUNS_FILE))
    write_atomically(out / f"{study.name}.md", table.encode())
    print(table, end="")
    return failed


@app.command(epilog="Example: prequant report runs -o report.html")
def report(
    runs: Annotated[Path, typer.Argument(help="the folder that prequant experiment wrote")],
    out: Annotated[Path, typer.Option("-o", "--out", help="an HTML file")],
    overwrite: Overwrite = False,
) -> None:
    """One HTML page of all experiments in RUNS beside the paper's numbers: tables, figures; no network is needed to
    read it.
    """
    with exit_codes():
        refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext.study.page import write_report

        write_report(runs, out)
        say(f"wrote {out}")
