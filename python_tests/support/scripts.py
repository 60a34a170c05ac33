"""Scripts of bench/ and examples/, run in the process of the tests: one of its own would load torch and transformers
again, which takes seconds.
"""

import contextlib
import io
import runpy
import sys
from dataclasses import dataclass
from pathlib import Path
from unittest import mock


@dataclass(frozen=True)
class Finished:
    """What is left of a run."""

    returncode: int
    stdout: str
    stderr: str


def run_script(path: Path, *arguments: object) -> Finished:
    """As ``python path arguments``: modules next to the script can be imported, and sys.exit ends it alone."""
    stdout, stderr, returncode = io.StringIO(), io.StringIO(), 0
    command = [str(path), *(str(argument) for argument in arguments)]
    with (
        mock.patch.object(sys, "argv", command),
        mock.patch.object(sys, "path", [str(path.parent), *sys.path]),
        contextlib.redirect_stdout(stdout),
        contextlib.redirect_stderr(stderr),
    ):
        try:
            runpy.run_path(str(path), run_name="__main__")
        except SystemExit as stop:
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)
            returncode = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return Finished(returncode, stdout.getvalue(), stderr.getvalue())
