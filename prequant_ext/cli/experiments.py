"""experiment, report: the paper's tables and figures."""

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import FAILED, exit_codes, quiet_libraries, say
from prequant_ext.cli.options import Data, DataDir, Overwrite, Source, refuse_existing
from prequant_ext.study.experiments import ERROR_MAP, EXPERIMENTS
from prequant_ext.study.runner import SEARCHES

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
        from prequant_ext import directory

        how = "quick" if quick else search.value
        if name.value == ERROR_MAP:
            directory.measure_errors(model, out)
            return say(f"wrote {out / 'fig4.json'}; prequant report draws it")
        study, path = directory.plan_experiment(
            name.value, model, tasks, seeds, how, data.value, data_dir, epochs, max_train, rates
        )
        if only_list:
            return directory.list_experiment(study, out, jobs)
        failed = directory.run_experiment(study, path, out, data_dir, threads, jobs, processes)
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again")
            raise typer.Exit(FAILED)


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
        from prequant_ext import directory

        directory.write_report(runs, out)
        say(f"wrote {out}")
