"""``prequant``: parses, calls, prints. A module for the commands of a kind; commands.py puts them together.

This file is the entry point, so it imports nothing that a plain ``pip install`` of this package does not bring.
"""

import os
import sys

from prequant_ext import neighbours
from prequant_ext.cli.console import OK, REFUSED, say


def main() -> None:
    """The command ``prequant``."""
    try:
        neighbours.require("typer", "the command prequant")
    except ImportError as error:
        say(f"error: {error}")
        sys.exit(REFUSED)
    from prequant_ext.cli.commands import app

    try:
        app(prog_name="prequant")
    except BrokenPipeError:  # `prequant inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)
