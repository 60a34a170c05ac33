"""The command ``prequant`` as tests call it, in this process."""

import json

from typer.testing import CliRunner

from prequant_ext.cli.commands import app


def invoke(*arguments, text=None):
    """The result of ``prequant ARGUMENTS``, with ``text`` on its standard input."""
    return CliRunner().invoke(app, [str(argument) for argument in arguments], input=text, catch_exceptions=False)


def run(*arguments, expect=0):
    """The result of ``prequant ARGUMENTS``, which must exit with ``expect``; its standard output, parsed, where --json
    is among them.
    """
    result = invoke(*arguments)
    assert result.exit_code == expect, result.output
    return json.loads(result.stdout) if "--json" in arguments and expect == 0 else result
