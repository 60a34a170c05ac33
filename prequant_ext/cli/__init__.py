"""``prequant``: parses, calls, prints. One module for the commands of a kind; options.py has what they share."""

import os
import sys

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.console import OK
from prequant_ext.cli.options import AsJson

# isort: off
from prequant_ext.cli import models, export, training, perplexity, serving, experiments  # noqa: F401  each adds its commands, in the order of --help
# isort: on


@app.command(epilog="Example: prequant doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Tell what this installation is made of, and whether it works."""
    from prequant_ext.doctor import main as examine

    raise typer.Exit(examine(["--json"] if as_json else []))


def main() -> None:
    """The command ``prequant``."""
    try:
        app(prog_name="prequant")
    except BrokenPipeError:  # `prequant inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)
