"""quantize, inspect, merge: from one model directory to another."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.options import (
    ActivationBits,
    ActivationGranularity,
    AsJson,
    AxisOption,
    Bits,
    Dimensions,
    Exclude,
    FloatEmbeddings,
    GroupSize,
    InitOption,
    LayerBits,
    Model,
    Out,
    Overwrite,
    Paper,
    SelectorOption,
    SelectorSeed,
    StrategyOption,
    Threshold,
    TrainScales,
    WeightOnly,
    config_of,
    megabytes,
    refuse_existing,
)
from prequant_ext.config import PreQuantConfig
from prequant_ext.console import exit_codes, quiet_libraries, say, show, show_json


@app.command(epilog="Example: prequant quantize minilm -o base --r 5")
def quantize(
    model: Model, out: Out, bits: Bits = None, layer_bits: LayerBits = None, strategy: StrategyOption = None, group_size: GroupSize = None,
    r: Dimensions = None, axis: AxisOption = None, selector: SelectorOption = None, outlier_threshold: Threshold = None,
    activation_bits: ActivationBits = None, weight_only: WeightOnly = False, activation_granularity: ActivationGranularity = None,
    float_embeddings: FloatEmbeddings = False, init: InitOption = None, train_scales: TrainScales = False, exclude: Exclude = None,
    seed: SelectorSeed = None, paper: Paper = False, overwrite: Overwrite = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Quantize a pre-trained model, once for all tasks, into a directory that transformers loads."""
    with exit_codes():
        config = config_of(
            bits, layer_bits, strategy, group_size, r, axis, selector, outlier_threshold, activation_bits, weight_only, activation_granularity,
            float_embeddings, init, train_scales, exclude, seed, paper,
        )  # fmt: skip
        refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import pipeline

        report = pipeline.quantize_directory(model, config, out)
        if as_json:
            show_json({"out": str(out), "config": config.to_dict(), "report": report.to_dict()})
        else:
            show(report.titles, report.cells(), report.caption())
            say(f"wrote {out}")


@app.command(epilog="Example: prequant inspect minilm --dry-run --bits 2")
def inspect(
    model: Model, bits: Bits = None, layer_bits: LayerBits = None, strategy: StrategyOption = None, group_size: GroupSize = None,
    r: Dimensions = None, axis: AxisOption = None, selector: SelectorOption = None, outlier_threshold: Threshold = None,
    activation_bits: ActivationBits = None, weight_only: WeightOnly = False, activation_granularity: ActivationGranularity = None,
    float_embeddings: FloatEmbeddings = False, init: InitOption = None, train_scales: TrainScales = False, exclude: Exclude = None,
    seed: SelectorSeed = None, paper: Paper = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only the plan: no weight is read")] = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Coverage, error and outliers of each module: of a quantized directory, or of what the options would make of a float model. Writes nothing."""
    with exit_codes():
        config = config_of(
            bits, layer_bits, strategy, group_size, r, axis, selector, outlier_threshold, activation_bits, weight_only, activation_granularity,
            float_embeddings, init, train_scales, exclude, seed, paper,
        )  # fmt: skip
        quiet_libraries()
        from prequant_ext import pipeline

        if pipeline.is_quantized_directory(model):
            if dry_run or config != PreQuantConfig():
                raise ValueError(f"{model} is quantized already: --dry-run and the options of quantize are for float models")
            report = pipeline.stored_report(model)
        elif dry_run:
            rows = pipeline.plan_of(model, config)
            if as_json:
                show_json({"model": model, "config": config.to_dict(), "plan": [dataclasses.asdict(row) for row in rows]})
            else:
                show(*pipeline.plan_table(rows))
            return
        else:
            report = pipeline.quantized(model, config)[2]
        if as_json:
            show_json({"model": model, "report": report.to_dict(), "coverage": report.coverage, "l2_error": report.l2_error})
        else:
            show(report.titles, report.cells(), report.caption())


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
        from prequant_ext import pipeline

        size = pipeline.merge_directory(model, task_file, out)
        if as_json:
            show_json({"out": str(out), "bytes": size})
        else:
            say(f"wrote {out}, {megabytes(size)}")
