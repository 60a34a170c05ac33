"""doctor and the loading of the library: what is broken is named, with the remedy, and the exit code says so."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prequant_ext import _native, doctor, reference
from support import ROOT


def test_healthy_installation_exits_0(capsys):
    assert doctor.main([]) == 0
    text = capsys.readouterr().out
    assert "everything works" in text and torch.__version__ in text and "level " in text


def test_json_holds_what_the_text_shows(capsys):
    assert doctor.main(["--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["problems"] == []
    assert report["versions"]["torch"] == torch.__version__
    assert set(report["smoke_test"]["cpu"].values()) == {"ok"}
    text = doctor.render(report)
    assert all(name in text for name in report["operators"])


def test_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "prequant_ext", "--json"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["problems"] == []


def test_every_operator_has_a_cpu_kernel_and_a_reference():
    report = doctor.examine()
    assert len(report["operators"]) == 17
    assert all(devices["cpu"] for devices in report["operators"].values())
    assert all(hasattr(reference, name) for name in report["operators"])


def test_isa_level_is_the_one_asked_for():
    done = subprocess.run(
        [sys.executable, "-m", "prequant_ext", "--json"],
        cwd=ROOT,
        env=os.environ | {"PREQUANT_ISA": "portable"},
        capture_output=True,
        text=True,
    )
    assert json.loads(done.stdout)["cpu"]["isa"] == "portable"


# ---- what is broken is found -----------------------------------------------------------------------------------------


def _report(**changes):
    report = doctor.examine()
    report["cuda"] = {"built_with": None, "architectures": [], "torch_built_with": None, "gpus": []} | changes
    report["problems"], report["notes"] = doctor._judge(report)
    return report


def test_wrong_numbers_are_a_problem(monkeypatch, capsys):
    monkeypatch.setattr(reference, "unpack", lambda packed, K, bits: torch.full((48, K), 3))
    assert doctor.main([]) == 1
    text = capsys.readouterr().out
    assert "PROBLEM: unpack on cpu: differs from the reference by" in text and f"remedy: {_native.REBUILD}" in text


def test_an_operator_that_fails_is_a_problem(monkeypatch):
    def fail(ops, operands):
        raise RuntimeError("out of memory\nwith a long trace")

    monkeypatch.setitem(doctor.SMOKE, "unpack", (("unpack",), fail))
    assert doctor.smoke_test("cpu", ["unpack"])["unpack"] == "out of memory"


def test_an_operator_without_kernel_is_a_problem():
    report = doctor.examine()
    report["operators"]["pack"]["cpu"] = False
    problems, _ = doctor._judge(report)
    assert problems == [{"problem": "operators without a CPU kernel: pack", "remedy": _native.REBUILD}]


def test_a_gpu_that_the_kernels_were_not_compiled_for_is_a_problem():
    gpu = {"name": "Some GPU", "capability": "9.0"}
    report = _report(built_with="13.0", architectures=["8.0"], gpus=[gpu])
    assert report["problems"] == [
        {
            "problem": "Some GPU has compute capability 9.0, but the kernels are compiled for 8.0",
            "remedy": f"TORCH_CUDA_ARCH_LIST=9.0 {_native.REBUILD}",
        }
    ]
    assert not _report(built_with="13.0", architectures=["8.0+PTX"], gpus=[gpu])["problems"]


def test_a_gpu_without_cuda_kernels_is_a_note():
    report = _report(gpus=[{"name": "Some GPU", "capability": "9.0"}])
    assert not report["problems"] and "PREQUANT_CUDA=1" in report["notes"][0]


@pytest.mark.parametrize(
    "capability, architectures, runs",
    [
        ((8, 0), ["8.0"], True),
        ((8, 9), ["8.0"], True),  # same major, newer minor
        ((8, 0), ["8.6"], False),  # no older minor
        ((9, 0), ["8.0", "8.9"], False),
        ((12, 1), ["8.0", "9.0+PTX"], True),  # compiled from PTX by the driver
        ((8, 9), ["9.0+PTX"], False),
        ((9, 0), ["9.0a"], True),
        ((12, 1), ["12.0a"], False),  # "a" code runs on its own chip alone
    ],
)
def test_runs_on(capability, architectures, runs):
    assert doctor.runs_on(capability, architectures) is runs


def test_old_transformers_is_a_problem():
    report = doctor.examine()
    report["versions"]["transformers"] = "4.57.1"
    problems, _ = doctor._judge(report)
    assert problems == [
        {
            "problem": "the transformers plug-in needs transformers>=5.23,<6, but transformers 4.57.1 is installed",
            "remedy": "pip install 'prequant_ext[hf]'",
        }
    ]


# ---- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["2.11.0", "2.13.0+cpu", "2.14.1+cu130", "3.0.0a0+git1234"])
def test_torch_from_the_minimum_on_is_accepted(version):
    _native.check_torch(version)


@pytest.mark.parametrize("version", ["2.10.2", "2.9.1+cu128", "1.13.1"])
def test_older_torch_is_refused_naming_both_versions(version):
    with pytest.raises(
        ImportError,
        match=re.escape(f"built for torch >= 2.11, but torch {version} is installed: pip install 'torch>=2.11'"),
    ):
        _native.check_torch(version)


def test_minimum_torch_is_the_same_everywhere():
    major, minor = (int(part) for part in _native.MINIMUM_TORCH.split("."))
    assert f"0x{major:02x}{minor:02x}000000000000" in (ROOT / "setup.py").read_text()
    assert (ROOT / "pyproject.toml").read_text().count(f'"torch>={_native.MINIMUM_TORCH}"') == 2


# An editable install would lend the copy its own library.
AS_A_MODULE = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "Editable" not in getattr(finder, "__name__", "")]
runpy.run_module("prequant_ext", run_name="__main__")
"""


def _broken_copy(folder: Path, library: bytes | None) -> subprocess.CompletedProcess:
    shutil.copytree(ROOT / "prequant_ext", folder / "prequant_ext", ignore=shutil.ignore_patterns("__pycache__", "_C*"))
    if library is not None:
        (folder / "prequant_ext" / "_C.abi3.so").write_bytes(library)
    return subprocess.run([sys.executable, "-c", AS_A_MODULE], cwd=folder, capture_output=True, text=True)


def test_a_tree_that_is_not_built_says_so(tmp_path):
    done = _broken_copy(tmp_path, None)
    assert done.returncode == 1
    assert "is not built: it has no _C.abi3.so" in done.stderr and _native.REBUILD in done.stderr


def test_a_library_that_does_not_load_names_torch_and_the_remedy(tmp_path):
    done = _broken_copy(tmp_path, b"not a library")
    assert done.returncode == 1
    assert (
        f"built for torch >= 2.11, does not load with torch {torch.__version__}" in done.stderr
        and _native.REBUILD in done.stderr
    )
