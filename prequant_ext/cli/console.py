"""What the command line shows: tables for people or JSON for programs on standard output, everything else on standard
error, and the exit codes.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from prequant_ext import neighbours

WRONG_PATHS = (FileNotFoundError, FileExistsError, NotADirectoryError)
OK, FAILED, REFUSED = 0, 1, 2  # 2: the command or what it was given cannot be used; 1: something broke on the way


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def show(titles: Sequence[str], rows: Sequence[Sequence[str]], caption: str = "") -> None:
    """A table: by rich on a terminal, plain aligned columns elsewhere."""
    if sys.stdout.isatty():
        from rich.console import Console
        from rich.table import Table

        rendered = Table(caption=caption or None, caption_justify="left", header_style="bold")
        for position, title in enumerate(titles):
            rendered.add_column(title, justify="right" if position else "left", overflow="fold")
        for row in rows:
            rendered.add_row(*row)
        Console().print(rendered)
    else:
        from prequant_ext.report import table

        print(table(titles, rows) + (f"\n\n{caption}" if caption else ""))


def show_json(value: Any) -> None:
    print(json.dumps(value), flush=True)  # a program may wait for it while this one goes on


@contextmanager
def exit_codes() -> Iterator[None]:
    """Known failures as one line and an exit code; anything else is a fault of the program and keeps its traceback
    (exit code 1).
    """
    import typer  # here, since main() must be able to say in this module's words that it is missing

    try:
        yield
    except KeyboardInterrupt:
        say("interrupted")
        raise typer.Exit(FAILED) from None
    except ModuleNotFoundError as error:
        module = (error.name or "").split(".")[0]
        if module not in neighbours.NEIGHBOURS:
            raise
        say(f"error: {neighbours.need(module, 'this command', str(neighbours.misfit(module, None)))}")
        raise typer.Exit(REFUSED) from error
    except (neighbours.NeighbourError, ValueError, TypeError, *WRONG_PATHS) as error:
        say(f"error: {error}")
        raise typer.Exit(REFUSED) from error
    except OSError as error:  # a full disk, no permission
        say(f"error: {error}")
        raise typer.Exit(FAILED) from error


def quiet_libraries() -> None:
    """No progress bars where standard error is no terminal, and no reports of what transformers finds normal but
    strange (a head that starts fresh).
    """
    neighbours.require("transformers", "this command")
    from transformers.utils import logging

    logging.set_verbosity_error()
    if not sys.stderr.isatty():
        logging.disable_progress_bar()
