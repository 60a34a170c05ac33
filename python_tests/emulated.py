"""The emulated library: the CUDA kernels' own source, compiled by g++ and run on the CPU (csrc/emulator), as torch.ops.prequant_emulated.

    fast       for the tests of every operator
    traced     counts memory traffic and finds races (python_tests/tracing.py); its operators are torch.ops.prequant_traced
    sanitized  AddressSanitizer and UndefinedBehaviorSanitizer; it loads only where LD_PRELOAD names their libraries: sanitizer_environment()

One build.ninja in build/emulated/ makes all three; ninja decides what is out of date.
"""

import ctypes
import fcntl
import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from types import ModuleType

import torch

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "build" / "emulated"
LIBRARIES = {"fast": "prequant_emulated", "traced": "prequant_traced", "sanitized": "prequant_emulated"}  # torch.ops.<name>

_STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020b000000000000", "-DPy_LIMITED_API=0x030A0000"]  # as in setup.py
_CXX_FLAGS = ["-std=c++20", "-fPIC", "-march=native", "-ffp-contract=off", "-fvisibility=hidden", "-Wall", "-Wextra", "-Wno-unknown-pragmas"]
_SANITIZE = "-O1 -g1 -fsanitize=address,undefined -fno-omit-frame-pointer"
# -O1 compiles in half the time of -O2 and emulates as fast. As under nvcc, memory may be read as another type than it was written.
_KERNEL_FLAGS = {"fast": "-O1", "traced": "-O1 -g -DPREQUANT_TRACED -fsanitize=thread", "sanitized": _SANITIZE}
_EMULATOR_FLAGS = {"fast": "-O2", "traced": "-O2 -DPREQUANT_TRACED", "sanitized": _SANITIZE}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


@functools.cache
def cuda_include() -> Path | None:
    """The folder of CUDA's headers; None where there is no nvcc. The nvcc on PATH may be a wrapper: its dry run tells where the toolkit lies."""
    if nvcc() is None:
        return None
    dry_run = subprocess.run([nvcc(), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.M)
    include = Path(top[1].strip()).resolve() / "include" if top else None
    return include if include and (include / "cuda_fp16.h").exists() else None


def _build_file() -> str:
    """build.ninja: host functions once, kernels and emulator for each variant."""
    torch_folder = Path(torch.__file__).parent
    includes = [torch_folder / "include", Path(sysconfig.get_path("include")), cuda_include()]
    flags = [*_CXX_FLAGS, "-DPREQUANT_EMULATED", *(f"-isystem {include}" for include in includes)]
    lines = [
        "rule compile",
        f"  command = g++ {' '.join(flags)} $flags -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = g++ -shared $flags -Wl,--wrap=torch_call_dispatcher $in -o $out -L{torch_folder / 'lib'} -ltorch_cpu -lc10 -lpthread -ldl",
    ]

    def compile_(source: Path, folder: str, flags: str) -> str:
        target = f"{folder}/{source.name}.o"
        lines.extend([f"build {target}: compile {source}", f"  flags = {flags}"])
        return target

    stable_abi = " ".join(["-O1", *_STABLE_ABI])
    sources = [path for path in sorted((ROOT / "csrc").glob("*.cpp")) if path.name != "ops.cpp"]
    host = [compile_(source, "host", stable_abi) for source in sources]
    registered = {name: compile_(ROOT / "csrc" / "ops.cpp", name, f"{stable_abi} -DPREQUANT_LIBRARY={name}") for name in sorted(set(LIBRARIES.values()))}
    for variant, library in LIBRARIES.items():
        # In this order: of an inline function the linker takes the first copy. The emulator's must not be an instrumented one, the kernels' must.
        objects = []
        for source in sorted((ROOT / "csrc" / "emulator").glob("**/*.cpp" if variant == "traced" else "*.cpp")):
            objects.append(compile_(source, variant, f"{_EMULATOR_FLAGS[variant]} -DPREQUANT_LIBRARY={library}"))
        for source in sorted((ROOT / "csrc" / "cuda").glob("*.cu")) + sorted((ROOT / "csrc" / "emulator").glob("*.cu")):
            objects.append(compile_(source, variant, f"{_KERNEL_FLAGS[variant]} -fno-strict-aliasing -x c++"))
        objects += [*host, registered[library]]
        link_flags = "-fsanitize=address,undefined" if variant == "sanitized" else ""
        lines.extend([f"build {variant}/{library}.so: link {' '.join(objects)}", f"  flags = {link_flags}"])
        lines.append(f"build {variant}.library: phony {variant}/{library}.so")
    return "\n".join(lines) + "\n"


def build(variant: str = "fast") -> Path:
    """The up-to-date library of this variant. Raises RuntimeError with the compiler's output."""
    if cuda_include() is None:
        raise RuntimeError("the emulated library needs CUDA's headers, and nvcc is not installed")
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        build_file, text = FOLDER / "build.ninja", _build_file()
        if not build_file.exists() or build_file.read_text() != text:
            build_file.write_text(text)
        ninja = shutil.which("ninja", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}") or "ninja"
        environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
        done = subprocess.run([ninja, "-j", str(os.cpu_count()), f"{variant}.library"], cwd=FOLDER, capture_output=True, text=True, env=environment)
        if done.returncode != 0:
            raise RuntimeError(f"the emulated library does not build:\n{done.stdout}{done.stderr}")
    return FOLDER / variant / f"{LIBRARIES[variant]}.so"


def load(variant: str = "fast") -> ModuleType:
    """Build and load it: registers torch.ops.<LIBRARIES[variant]> with fakes and gradients, and returns the module of csrc/emulator/bind.cpp."""
    return _load(variant)  # the cache takes load() and load("fast") for two calls


@functools.cache
def _load(variant: str) -> ModuleType:
    from prequant_ext import ops

    name, path = LIBRARIES[variant], build(variant)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    module.debug_information = open(path, "rb")  # of the file that is loaded: a later build replaces it  # noqa: SIM115
    loader.exec_module(module)
    ops.register(name)
    return module


def c_functions(path: Path) -> ctypes.CDLL:
    """The library's kernels for tests of the emulator itself: csrc/emulator/conformance.cu and defects.cu. Each returns None or an error."""
    library = ctypes.CDLL(str(path))
    for name in ("prequant_conformance", "prequant_defect"):
        if hasattr(library, name):  # nvcc compiles one of the two
            getattr(library, name).restype = ctypes.c_char_p
    return library


def sanitizer_environment() -> dict[str, str]:
    """The environment in which a Python loads the sanitized library; fixtures then take it for the fast one."""

    def library(name: str) -> str:
        return subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()

    return {
        **os.environ,
        "LD_PRELOAD": f"{library('libasan.so')} {library('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",  # Python leaks; fibers have stacks of their own
        "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
        "PYTHONMALLOC": "malloc",
        "PREQUANT_EMULATED_VARIANT": "sanitized",
    }
