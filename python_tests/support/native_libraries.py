"""How tests compile libraries of their own from csrc/: a build.ninja in build/<folder>, and ninja decides what is out
of date.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Sequence
from pathlib import Path

import torch

from support import ROOT

CSRC = ROOT / "csrc"
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020b000000000000 -DPy_LIMITED_API=0x030A0000"  # as in setup.py
CXX_FLAGS = "-std=c++20 -fPIC -ffp-contract=off -fvisibility=hidden -Wall -Wextra"
# such a library loads in sanitizer_environment() alone
SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer"
SANITIZE_LINK = "-fsanitize=address,undefined"
_TORCH = Path(torch.__file__).parent


class BuildFile:
    """The text of a build.ninja, statement by statement. `flags` are those of every compilation, `includes` folders
    whose headers give no warnings.
    """

    def __init__(self, flags: str = "", includes: Sequence[Path] = ()) -> None:
        system = " ".join(
            f"-isystem {include}" for include in (_TORCH / "include", Path(sysconfig.get_path("include")), *includes)
        )
        self._lines = [
            "rule compile",
            f"  command = g++ {CXX_FLAGS} {flags} {system} $flags -MMD -MF $out.d -c $in -o $out",
            "  depfile = $out.d",
            "  deps = gcc",
            "rule link",
            f"  command = g++ -shared $flags $in -o $out -L{_TORCH / 'lib'} -ltorch_cpu -lc10 -lpthread -ldl",
        ]

    def compile(self, source: Path, folder: str, flags: str) -> str:
        """The object's name."""
        target = f"{folder}/{source.name}.o"
        self._lines += [f"build {target}: compile {source}", f"  flags = {flags}"]
        return target

    def link(self, target: str, objects: Sequence[str], flags: str = "") -> None:
        self._lines += [f"build {target}: link {' '.join(objects)}", f"  flags = {flags}"]

    def text(self) -> str:
        return "\n".join(self._lines) + "\n"


def build(folder: Path, build_file: str, target: str, subject: str) -> Path:
    """folder/target, up to date; two processes at once take turns. Raises RuntimeError with the compiler's output and
    what `subject` was being built.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        path = folder / "build.ninja"
        if not path.exists() or path.read_text() != build_file:
            path.write_text(build_file)
        ninja = (
            shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
            or "ninja"
        )
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run(
            [ninja, "-j", str(os.cpu_count()), target], cwd=folder, capture_output=True, text=True, env=environment
        )
        if done.returncode != 0:
            raise RuntimeError(f"{subject} does not build:\n{done.stdout}{done.stderr}")
    return folder / target


def sanitizer_environment(**variables: str) -> dict[str, str]:
    """The environment in which a Python loads a library with SANITIZE, with `variables` besides."""

    def library(name: str) -> str:
        return subprocess.run(
            ["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True
        ).stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        # Python leaks; the emulator's fibers have stacks of their own
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
        **variables,
    }
