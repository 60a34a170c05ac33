"""quantize, inspect, merge: from one model directory to another."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import exit_codes, quiet_libraries, say, show, show_json
from prequant_ext.cli.options import (
    AsJson,
    Model,
    Out,
    Overwrite,
    budget_of,
    megabytes,
    quantize_command,
    refuse_existing,
    takes_quantization_options,
)
from prequant_ext.config import PreQuantConfig


@app.command(epilog="Example: prequant quantize minilm -o base --r 5")
@takes_quantization_options
def quantize(
    model: Model,
    out: Out,
    config: PreQuantConfig,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Quantize a pre-trained model, once for all tasks, into a directory that transformers loads."""
    with exit_codes():
        refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import directory

        report = directory.quantize_directory(model, config, out)
        if as_json:
            show_json({"out": str(out), "config": config.to_dict(), "report": report.to_dict()})
        else:
            show(report.titles, report.cells(), report.caption())
            say(f"wrote {out}")


@app.command(
    epilog="Example: prequant inspect minilm --bits 2 --dry-run, or: prequant inspect minilm --budget 16.5MB -o "
    "report.html"
)
@takes_quantization_options
def inspect(
    model: Model,
    config: PreQuantConfig,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only the plan: no weight is read")] = False,
    budget: Annotated[
        str | None,
        typer.Option(help="propose bits of blocks within it: 16MB of the whole model, or 3.0 stored bits a weight"),
    ] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="an HTML file, with figures")] = None,
    task_file: Annotated[
        list[Path] | None, typer.Option(help="a task on this base, for the HTML file; may be repeated")
    ] = None,
    runs: Annotated[Path | None, typer.Option(help="a folder of prequant experiment, for the HTML file")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Coverage, error and outliers of each module: of a quantized directory, or of what the options would make of a
    float model.

    Writes nothing, or with -o one HTML page with maps of errors and outlier dimensions, histograms, bits proposed for
    blocks, what tasks changed.
    """
    with exit_codes():
        limits = None if budget is None else budget_of(budget)
        if out is None and (task_file or runs):
            raise ValueError("--task-file and --runs are for the HTML file: name it with -o")
        if dry_run and (out or budget):
            raise ValueError("--dry-run reads no weight: -o and --budget need them")
        if out is not None:
            refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import directory
        from prequant_ext.pages.inspection import inspected, proposed
        from prequant_ext.pages.model_page import write_model_page

        is_quantized = directory.is_quantized_directory(model)
        if is_quantized and (dry_run or config != PreQuantConfig()):
            raise ValueError(
                f"{model} is quantized already: --dry-run and the options of quantize are for float models"
            )
        if dry_run:
            return _show_plan(model, config, as_json)
        proposal = None
        if out is not None or limits is not None:
            inspection = inspected(model, config)
            report, proposal = inspection.report, proposed(inspection, limits)
            if out is not None:
                how_to_quantize = quantize_command(model, proposal.layer_bits) if proposal else ""
                write_model_page(inspection, proposal, task_file or [], runs, how_to_quantize, out)
        else:
            report = directory.stored_report(model) if is_quantized else directory.quantized(model, config)[2]
        if as_json:
            found = {
                "model": model,
                "report": report.to_dict(),
                "coverage": report.coverage,
                "l2_error": report.l2_error,
            }
            show_json(found | ({"proposal": proposal.to_dict()} if proposal else {}))
        else:
            show(report.titles, report.cells(), report.caption())
            if proposal is not None and limits is not None:
                print()
                show(proposal.titles, proposal.cells(), proposal.caption())
        if out is not None:
            say(f"wrote {out}")


def _show_plan(model: str, config: PreQuantConfig, as_json: bool) -> None:
    from prequant_ext import directory
    from prequant_ext.report import plan_table

    rows = directory.plan_of(model, config)
    if as_json:
        show_json({"model": model, "config": config.to_dict(), "plan": [dataclasses.asdict(row) for row in rows]})
    else:
        show(*plan_table(rows))


@app.command(epilog="Example: prequant merge base --task-file tasks/sst2.task -o sst2-float")
def merge(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize")],
    out: Out,
    task_file: Annotated[Path | None, typer.Option(help="the task to merge in; without one, the base alone")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a plain float checkpoint that holds the dequantized weights and the outlier weights."""
    with exit_codes():
        refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import directory

        size = directory.merge_directory(model, task_file, out)
        if as_json:
            show_json({"out": str(out), "bytes": size})
        else:
            say(f"wrote {out}, {megabytes(size)}")
