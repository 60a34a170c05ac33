"""The emulated library: the CUDA kernels' own source, compiled by g++ and run on the CPU (csrc/emulator), as
torch.ops.prequant_emulated.

    fast       for the tests of every operator
    traced     counts memory traffic and finds races (python_tests/tools/tracing.py); its operators are
               torch.ops.prequant_traced
    sanitized  AddressSanitizer and UndefinedBehaviorSanitizer; it loads only where LD_PRELOAD names their libraries:
               sanitizer_environment()

One build.ninja in build/emulated/ makes all three; ninja decides what is out of date.
"""

import ctypes
import functools
import importlib.machinery
import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

from support import ROOT, native_libraries
from support.native_libraries import CSRC

FOLDER = ROOT / "build" / "emulated"
# torch.ops.<name>
LIBRARIES = {"fast": "prequant_emulated", "traced": "prequant_traced", "sanitized": "prequant_emulated"}

# -O1 compiles in half the time of -O2 and emulates as fast. As under nvcc, memory may be read as another type than it
# was written.
_KERNEL_FLAGS = {
    "fast": "-O1",
    "traced": "-O1 -g -DPREQUANT_TRACED -fsanitize=thread",
    "sanitized": native_libraries.SANITIZE,
}
_EMULATOR_FLAGS = {"fast": "-O2", "traced": "-O2 -DPREQUANT_TRACED", "sanitized": native_libraries.SANITIZE}


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


@functools.cache
def cuda_include() -> Path | None:
    """The folder of CUDA's headers; None where there is no nvcc. The nvcc on PATH may be a wrapper: its dry run tells
    where the toolkit lies.
    """
    if nvcc() is None:
        return None
    dry_run = subprocess.run([nvcc(), "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.M)
    include = Path(top[1].strip()).resolve() / "include" if top else None
    return include if include and (include / "cuda_fp16.h").exists() else None


def _build_file(cuda_headers: Path) -> str:
    """build.ninja: host functions once, kernels and emulator for each variant."""
    file = native_libraries.BuildFile("-march=native -Wno-unknown-pragmas -DPREQUANT_EMULATED", [cuda_headers])
    stable_abi = f"-O1 {native_libraries.STABLE_ABI}"
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "ops.cpp"]
    host = [file.compile(source, "host", stable_abi) for source in sources]
    registered = {
        name: file.compile(CSRC / "ops.cpp", name, f"{stable_abi} -DPREQUANT_LIBRARY={name}")
        for name in sorted(set(LIBRARIES.values()))
    }
    for variant, library in LIBRARIES.items():
        # In this order: of an inline function the linker takes the first copy. The emulator's must not be an
        # instrumented one, the kernels' must.
        objects = []
        tracer = sorted((CSRC / "emulator" / "tracer").glob("*.cpp")) if variant == "traced" else []
        for source in sorted((CSRC / "emulator").glob("*.cpp")) + tracer:
            objects.append(file.compile(source, variant, f"{_EMULATOR_FLAGS[variant]} -DPREQUANT_LIBRARY={library}"))
        for source in sorted((CSRC / "cuda").glob("*.cu")) + sorted((CSRC / "emulator").glob("*.cu")):
            objects.append(file.compile(source, variant, f"{_KERNEL_FLAGS[variant]} -fno-strict-aliasing -x c++"))
        link_flags = (
            f"-Wl,--wrap=torch_call_dispatcher {native_libraries.SANITIZE_LINK if variant == 'sanitized' else ''}"
        )
        file.link(f"{variant}/{library}.so", [*objects, *host, registered[library]], link_flags)
    return file.text()


def build(variant: str = "fast") -> Path:
    """The up-to-date library of this variant. Raises RuntimeError with the compiler's output."""
    cuda_headers = cuda_include()
    if cuda_headers is None:
        raise RuntimeError("the emulated library needs CUDA's headers, and nvcc is not installed")
    return native_libraries.build(
        FOLDER, _build_file(cuda_headers), f"{variant}/{LIBRARIES[variant]}.so", "the emulated library"
    )


def load(variant: str = "fast") -> ModuleType:
    """Build and load it: registers torch.ops.<LIBRARIES[variant]> with fakes and gradients, and returns the module of
    csrc/emulator/bind.cpp.
    """
    return _load(variant)  # the cache takes load() and load("fast") for two calls


@functools.cache
def _load(variant: str) -> ModuleType:
    from prequant_ext import ops

    name, path = LIBRARIES[variant], build(variant)
    loader = importlib.machinery.ExtensionFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))  # type: ignore[arg-type]
    module.debug_information = open(path, "rb")  # of the file that is loaded: a later build replaces it  # noqa: SIM115
    loader.exec_module(module)
    ops.register(name, has_chunks=True)
    return module


def c_functions(path: Path) -> ctypes.CDLL:
    """The library's kernels for tests of the emulator itself: csrc/emulator/conformance.cu and defects.cu. Each returns
    None or an error.
    """
    library = ctypes.CDLL(str(path))
    for name in ("prequant_conformance", "prequant_defect"):
        if hasattr(library, name):  # nvcc compiles one of the two
            getattr(library, name).restype = ctypes.c_char_p
    return library


def sanitizer_environment() -> dict[str, str]:
    """The environment in which a Python loads the sanitized library; fixtures then take it for the fast one."""
    return native_libraries.sanitizer_environment(PREQUANT_EMULATED_VARIANT="sanitized")
