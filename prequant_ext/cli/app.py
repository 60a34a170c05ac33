"""The command ``prequant``, to which the modules next to this one add their commands."""

import typer

app = typer.Typer(
    help="Quantize a model once, fine-tune its outlier dimensions for a task, evaluate, merge.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
