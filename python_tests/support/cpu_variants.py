"""Libraries of the CPU kernels that only tests use, each as torch.ops.<name>: levels that this CPU lacks, and
instrumented ones.

    avx512, avxvnni    that level alone, its instructions emulated by those of AVX2 (csrc/emulator/isa): an x86-64 CPU
                       with AVX2 runs them
    sanitized          the levels that this CPU has, under AddressSanitizer and UndefinedBehaviorSanitizer

A level that csrc/cpu/isa does not have yet is left out. PREQUANT_CPU_VARIANT=<variant> makes the tests take that
library for the CPU's (conftest.py); the sanitized one loads only in environment(variant). One build.ninja in
build/cpu_variants/ makes all of them; ninja decides what is out of date.
"""

import functools
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from support import ROOT, emulated, native_libraries
from support.native_libraries import CSRC

FOLDER = ROOT / "build" / "cpu_variants"
LEVELS = sorted(path.stem for path in (CSRC / "cpu" / "isa").glob("*.cpp") if path.stem != "level")


@dataclass(frozen=True)
class Variant:
    emulated_level: str | None  # None: the levels of this CPU
    is_sanitized: bool = False


VARIANTS = {
    name: variant
    for name, variant in {
        "avx512": Variant("avx512"),
        "avxvnni": Variant("avxvnni"),
        "sanitized": Variant(None, is_sanitized=True),
    }.items()
    if variant.emulated_level in (None, *LEVELS)
}

# g++ 12 fails on vectors of 64 bytes without AVX-512 at -O2 (internal error), and such vectors are passed in no other
# way than here. An access through a pointer off its type's alignment traps, as an aligned instruction of the level
# itself would.
_EMULATED = "-O1 -mavx2 -mfma -mf16c -Wno-psabi -fsanitize=alignment -fsanitize-undefined-trap-on-error -I" + str(
    CSRC / "emulator" / "isa"
)


# The flag of /proc/cpuinfo that a level's instructions go by.
_CPU_FLAG = {"avx512": "avx512_vnni", "avxvnni": "avx_vnni", "avx2": "avx2"}


def library(variant: str) -> str:
    """Its name in torch.ops."""
    return f"prequant_{variant}"


@functools.cache
def _cpu_flags() -> set[str]:
    path = Path("/proc/cpuinfo")
    return set(path.read_text().split()) if path.exists() else set()


def runs_here(level: str) -> bool:
    """Whether this CPU has the instructions of a level of csrc/cpu/isa."""
    return _CPU_FLAG.get(level) in (None, *_cpu_flags())


@functools.cache
def gap(variant: str) -> str | None:
    """Why this machine cannot run it, or None."""
    if VARIANTS[variant].emulated_level is None:
        return None
    if platform.machine() != "x86_64":
        return f"the {variant} variant is emulated on x86-64 only"
    lacking = {"avx2", "fma", "f16c"} - _cpu_flags()
    return f"the {variant} variant needs a CPU with {', '.join(sorted(lacking))}" if lacking else None


@functools.cache
def real_levels() -> list[str]:
    """The levels of the installed library that this CPU has, best first."""
    script = "import prequant_ext.ops, torch; torch.ops.prequant.build_info()"
    environment = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"} | {"PREQUANT_ISA": "?"}
    asked = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=ROOT)
    found = re.search(r"PREQUANT_ISA must be one of (.*), got \?", asked.stderr)
    if found is None:
        raise RuntimeError(f"the library does not name its levels:\n{asked.stderr}")
    return found[1].split(", ")


def _build_file() -> str:
    """build.ninja: host functions once, and for each variant its registration and its kernels."""
    file = native_libraries.BuildFile()
    host_flags = f"-O1 {native_libraries.STABLE_ABI}"
    host_sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "ops.cpp"] + [
        CSRC / "cpu" / "parallel.cpp"
    ]
    host = [file.compile(source, "host", host_flags) for source in host_sources]
    for name, variant in VARIANTS.items():
        sanitize = native_libraries.SANITIZE if variant.is_sanitized else "-O1"
        objects = [file.compile(CSRC / "ops.cpp", name, f"{host_flags} -DPREQUANT_LIBRARY={library(name)}")]
        if variant.is_sanitized:
            objects += [
                file.compile(source, name, f"{native_libraries.STABLE_ABI} {sanitize}") for source in host_sources
            ]
        else:
            objects += host
        if variant.emulated_level is None:
            for source in sorted((CSRC / "cpu" / "isa").glob("*.cpp")):
                # instrumented code takes minutes to compile
                objects.append(file.compile(source, name, sanitize if runs_here(source.stem) else "-O1"))
        else:
            level = f"-DPREQUANT_EMULATED_ISA={variant.emulated_level}"
            objects.append(
                file.compile(CSRC / "cpu" / "isa" / f"{variant.emulated_level}.cpp", name, f"{level} {_EMULATED}")
            )
            objects.append(file.compile(CSRC / "emulator" / "isa" / "only_level.cpp", name, f"-O1 {level}"))
        file.link(f"{library(name)}.so", objects, native_libraries.SANITIZE_LINK if variant.is_sanitized else "")
    return file.text()


def build(variant: str) -> Path:
    """The up-to-date library of this variant. Raises RuntimeError with the compiler's output."""
    return native_libraries.build(
        FOLDER, _build_file(), f"{library(variant)}.so", f"the {variant} variant of the CPU kernels"
    )


@functools.cache
def load(variant: str) -> None:
    """Build and load it: registers torch.ops.<library(variant)> with fakes and gradients."""
    from prequant_ext import ops

    torch.ops.load_library(str(build(variant)))
    ops.register(library(variant))


def use(variant: str) -> None:
    """Make it the CPU's operators of this process, in place of the installed library; "emulated": the CUDA kernels."""
    from prequant_ext import ops

    if variant == "emulated":
        emulated.load()
        name = emulated.LIBRARIES["fast"]
    else:
        load(variant)
        name = library(variant)
    ops.calls.library = getattr(torch.ops, name)


def environment(variant: str) -> dict[str, str]:
    """The environment in which tests run on this variant."""
    if VARIANTS[variant].is_sanitized:
        return native_libraries.sanitizer_environment(PREQUANT_CPU_VARIANT=variant)
    return os.environ | {"PREQUANT_CPU_VARIANT": variant}
