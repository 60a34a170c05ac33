"""The wheel: one for every Python from 3.10 and every torch from 2.11, and complete without the source tree."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
import torch

from support import ROOT

SOURCES = ("csrc", "prequant_ext", "setup.py", "pyproject.toml", "README.md", "LICENSE")

USE = """
import os, sys, torch
import prequant_ext
from prequant_ext import reference
folder = os.path.dirname(prequant_ext.__file__)
assert folder.startswith(sys.prefix), folder
codes = torch.arange(35, dtype=torch.uint8).view(5, 7) % 16
packed = torch.ops.prequant.pack(codes, 4)
assert torch.equal(packed, reference.pack(codes, 4)) and torch.equal(torch.ops.prequant.unpack(packed, 7, 4), codes)
print("ran", torch.ops.prequant.build_info())
"""


def _run(*command: object, cwd: Path, **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=inherited | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def _copy_sources(folder: Path) -> Path:
    """The tree as a fresh clone has it: no objects and no library of an earlier build."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, folder / name, ignore=shutil.ignore_patterns("__pycache__", "*.so", "_C.py"))
        else:
            shutil.copy(source, folder / name)
    return folder


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of a CPU build, made in a copy of the tree."""
    pytest.importorskip("setuptools")
    pytest.importorskip("ninja")
    source, target = _copy_sources(tmp_path_factory.mktemp("source")), tmp_path_factory.mktemp("wheel")
    _run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        ".",
        "--no-build-isolation",
        "--no-deps",
        "-w",
        target,
        cwd=source,
        PREQUANT_CUDA="0",
    )
    (built,) = target.glob("*.whl")
    return built


@pytest.mark.exhaustive
@pytest.mark.slow
def test_wheel_is_abi3(wheel):
    assert re.fullmatch(r"prequant_ext-0\.1\.0-cp310-abi3-linux_\w+\.whl", wheel.name)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_wheel_holds_the_library_and_no_tests(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert "prequant_ext/_C.abi3.so" in names
    assert not [name for name in names if not name.startswith(("prequant_ext/", "prequant_ext-0.1.0.dist-info/"))]
    assert not [
        name for name in names if "emulat" in name or "test" in Path(name).name or name.endswith((".cpp", ".cu", ".h"))
    ]
    assert any(name.endswith("LICENSE") for name in names)


@pytest.mark.exhaustive
@pytest.mark.slow
def test_library_asks_for_nothing_but_libtorch_and_the_c_library(wheel, tmp_path):
    """No libtorch_python, no libtorch_cuda, no libpython: that is what lets one wheel serve them all."""
    if shutil.which("readelf") is None:
        pytest.skip("readelf (binutils) is not installed")
    zipfile.ZipFile(wheel).extract("prequant_ext/_C.abi3.so", tmp_path)
    needed = set(
        re.findall(r"NEEDED.*\[(.*)\]", _run("readelf", "-d", tmp_path / "prequant_ext/_C.abi3.so", cwd=tmp_path))
    )
    c_library = {
        "libstdc++.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libc.so.6",
        "ld-linux-x86-64.so.2",
        "ld-linux-aarch64.so.1",
    }
    allowed = {"libc10.so", "libtorch.so", "libtorch_cpu.so"} | c_library
    assert needed <= allowed, needed - allowed


@pytest.mark.exhaustive
@pytest.mark.slow
def test_installed_wheel_runs_an_operator_outside_the_tree(wheel, tmp_path):
    """In an empty environment. Its dependencies come from this one through a .pth file, so that torch is neither
    fetched nor copied.
    """
    venv.create(tmp_path / "env", with_pip=False)
    python = tmp_path / "env" / "bin" / "python"
    site = Path(_run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    _run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    (site / "dependencies.pth").write_text(
        sysconfig.get_path("purelib") + "\n" + str(Path(torch.__file__).parent.parent) + "\n"
    )
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    assert "ran isa=" in _run(python, "-c", USE, cwd=elsewhere)


@pytest.mark.parametrize(
    "choice, message",
    [("2", "PREQUANT_CUDA must be 0"), ("1", "PREQUANT_CUDA=1 but there is no nvcc: install the CUDA toolkit")],
)
def test_build_refuses_what_it_cannot_do(choice, message, tmp_path):
    """CUDA asked for but not there is an error that names the remedy, never a CPU build in silence."""
    environment = {**os.environ, "PREQUANT_CUDA": choice, "CUDA_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize("architectures, message", [("8.0 sm_90", "got 'sm_90'"), ("8.0;3.0", "names 3.0, which nvcc")])
def test_build_refuses_unknown_architectures(architectures, message, nvcc):
    environment = {**os.environ, "PREQUANT_CUDA": "1", "TORCH_CUDA_ARCH_LIST": architectures}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode != 0 and message in done.stderr


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"PREQUANT_CUDA": "0"}, "CPU only, as PREQUANT_CUDA=0 asks"),
        ({"PREQUANT_CUDA": "", "TORCH_CUDA_ARCH_LIST": "8.0 9.0+PTX"}, "for 8.0 9.0+PTX"),
    ],
)
def test_build_says_what_it_builds(environment, message, nvcc):
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and message in done.stdout, done.stderr
