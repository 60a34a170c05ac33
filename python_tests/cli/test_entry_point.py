"""The script ``prequant`` where only what a plain ``pip install`` brings is there."""

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import prequant_ext
from prequant_ext import neighbours
from prequant_ext.cli.commands import app
from prequant_ext.study import page
from prequant_ext.study.experiments import EXPERIMENTS
from prequant_ext.study.runner import Plan

EXTRAS = ("typer", "rich", "transformers")  # by the begin of their names in site-packages


@pytest.fixture
def plain_packages(tmp_path):
    """A folder with every installed package but those of EXTRAS."""
    for folder in {Path(sysconfig.get_path("purelib")), Path(torch.__file__).parent.parent}:
        for entry in folder.iterdir():
            if not entry.name.startswith(EXTRAS):
                (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("arguments", [(), ("--help",), ("quantize", "minilm", "-o", "base")], ids=" ".join)
def test_without_typer_one_line_says_what_to_install(arguments, plain_packages):
    path = os.pathsep.join([str(Path(prequant_ext.__file__).parent.parent), str(plain_packages)])
    script = "import sys; from prequant_ext.cli import main; sys.argv[0] = 'prequant'; main()"
    done = subprocess.run(
        [sys.executable, "-S", "-c", script, *arguments],  # -S: without the packages of this interpreter
        env=os.environ | {"PYTHONPATH": path},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (2, "")
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: the command prequant needs typer") and "pip install" in line


@pytest.mark.parametrize(
    "missing, arguments",
    [
        ("transformers", ("quantize", "minilm", "-o", "base")),
        ("jinja2", ("report", "{runs}", "-o", "report.html")),
    ],
)
def test_a_command_says_which_package_it_misses(missing, arguments, tmp_path, monkeypatch):
    page.Study("table3", 6, Plan(EXPERIMENTS["table3"](6), "tiny", ("sst2",), (0,), "quick")).write(tmp_path)
    monkeypatch.setitem(sys.modules, missing, None)
    done = CliRunner().invoke(app, [argument.format(runs=tmp_path) for argument in arguments])
    extra = neighbours.NEIGHBOURS[missing].extra
    said = (
        f"error: this command needs {missing}{neighbours.NEIGHBOURS[missing].versions}, but {missing} is not installed"
    )
    assert done.exit_code == 2 and done.stderr.splitlines() == [f"{said}: pip install 'prequant_ext[{extra}]'"]
