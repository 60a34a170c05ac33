"""The commands of ``prequant``, assembled: importing this module gives ``app`` all of them, in the order of --help."""

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.options import AsJson

# isort: off
from prequant_ext.cli import models, export, training, perplexity, serving, experiments  # noqa: F401  each adds its commands
# isort: on

__all__ = ["app"]


@app.command(epilog="Example: prequant doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Tell what this installation is made of, and whether it works."""
    from prequant_ext.doctor import main as examine

    raise typer.Exit(examine(["--json"] if as_json else []))
