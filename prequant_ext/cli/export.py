"""export: a quantized directory for programs that do not have this package."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import exit_codes, quiet_libraries, say, show_json
from prequant_ext.cli.models import merge
from prequant_ext.cli.options import AsJson, Overwrite, megabytes, refuse_existing

export = typer.Typer(
    help="Write a quantized directory for programs without this package: float weights (hf), from which other "
    "converters go on, or ONNX. "
    "GGUF and compressed-tensors have no place for outlier dimensions.",
    no_args_is_help=True,
)
app.add_typer(export, name="export")

export.command("hf", epilog="Example: prequant export hf base --task-file tasks/sst2.task -o sst2-float")(merge)


@export.command(epilog="Example: prequant export onnx base --task-file tasks/sst2.task -o sst2.onnx")
def onnx(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize")],
    out: Annotated[Path, typer.Option("-o", "--out", help="a file")],
    task_file: Annotated[Path | None, typer.Option(help="the task to put in; without one, the model as it is")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write an ONNX file of 4-bit weights (MatMulNBits) and outlier weights, checked with onnxruntime where that is
    installed.

    It is weight-only: activations are float in it, those of a model with 8-bit activations, too.
    """
    with exit_codes():
        refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import directory

        written = directory.export_onnx_directory(model, task_file, out)
        if written.drops_activation_bits:
            say(
                "activations are float in the file: MatMulNBits has no 8-bit ones, so its results differ from this "
                "model's by what they round"
            )
        if as_json:
            return show_json({"out": str(out), **dataclasses.asdict(written)})
        checked = "not checked: onnxruntime is not installed"
        if written.difference is not None:
            checked = (
                f"within {written.difference:.1e} of the weight-only model in onnxruntime, "
                f"{written.relative:.1e} of the largest value"
            )
        say(f"wrote {out}, {megabytes(written.bytes)}, {checked}")
