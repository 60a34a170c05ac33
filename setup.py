"""Builds prequant_ext._C on libtorch's stable ABI: CPU operators always, CUDA kernels when nvcc is there.

One abi3 wheel serves every Python >= 3.10 and every torch >= 2.11, CPU or CUDA builds of it alike: the library links
neither libtorch_python nor libtorch_cuda, and carries its own CUDA runtime.

    PREQUANT_CUDA=1          nvcc is required        PREQUANT_CUDA=0          no CUDA
    TORCH_CUDA_ARCH_LIST     "8.0 9.0+PTX"           CUDA_HOME                the toolkit, if nvcc is not on PATH
    MAX_JOBS                 compilers at a time
"""

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

from setuptools import setup
from torch.utils import cpp_extension

ROOT = Path(__file__).parent.resolve()
DEFAULT_ARCHITECTURES = "7.5 8.0 8.6 8.9 9.0 10.0 12.0+PTX"
# torch 2.11, Python 3.10
STABLE_ABI = [("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030A0000")]
# No contraction: the method's float32 formulas are exact to the bit, and a fused multiply-add rounds once less.
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden", "-g0"]


@dataclass(frozen=True)
class Toolkit:
    """An nvcc and what belongs to it."""

    home: str
    version: tuple[int, int]
    library_flags: list[str]
    known_architectures: set[str]

    @classmethod
    def find(cls) -> "Toolkit | None":
        home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
        candidates = [f"{home}/bin/nvcc"] if home else ["nvcc", "/usr/local/cuda/bin/nvcc"]
        nvcc = next((found for found in map(shutil.which, candidates) if found), None)
        if nvcc is None:
            return None

        def ask(*arguments: str) -> str:
            answer = subprocess.run([nvcc, *arguments], capture_output=True, text=True, check=True)
            return answer.stdout + answer.stderr

        # The nvcc on PATH may be a wrapper: only its dry run tells where the toolkit lies.
        dry_run = ask("--dryrun", "-x", "cu", os.devnull)
        top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.M)
        libraries = re.search(r"^#\$ LIBRARIES=(.*)$", dry_run, re.M)
        release = re.search(r"release (\d+)\.(\d+)", ask("--version"))
        if not (top and libraries and release):
            raise SystemExit(
                f"{nvcc} does not say where its toolkit is; set CUDA_HOME to the toolkit, or PREQUANT_CUDA=0 to build "
                "without CUDA"
            )
        return cls(
            home=os.path.realpath(top[1].strip()),
            version=(int(release[1]), int(release[2])),
            library_flags=[flag for flag in shlex.split(libraries[1]) if flag.startswith("-L")],
            known_architectures=set(re.findall(r"compute_(\d+[a-z]?)", ask("--list-gpu-arch"))),
        )

    def architectures(self) -> list[str]:
        """The entries of TORCH_CUDA_ARCH_LIST, or of the default list as far as this nvcc knows them; the last of those
        keeps PTX for later chips.
        """
        asked = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
        entries = re.split(r"[\s;,]+", asked.strip()) if asked.strip() else DEFAULT_ARCHITECTURES.split()
        for entry in entries:
            if not re.fullmatch(r"\d+\.\d[a-z]?(\+PTX)?", entry):
                raise SystemExit(
                    f'TORCH_CUDA_ARCH_LIST must list compute capabilities such as "8.0 9.0+PTX", got {entry!r}'
                )
        known = [entry for entry in entries if _number(entry) in self.known_architectures]
        if asked.strip() and known != entries:
            unknown = ", ".join(entry for entry in entries if entry not in known)
            raise SystemExit(
                f"TORCH_CUDA_ARCH_LIST names {unknown}, which nvcc {self.version[0]}.{self.version[1]} does not know"
            )
        if not asked.strip() and not known[-1].endswith("+PTX"):
            known[-1] += "+PTX"
        return known


def _number(architecture: str) -> str:
    """ "8.0+PTX" -> "80"."""
    return architecture.removesuffix("+PTX").replace(".", "")


def _gencode(architecture: str) -> list[str]:
    number = _number(architecture)
    flags = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    return flags + [f"-gencode=arch=compute_{number},code=compute_{number}"] * architecture.endswith("+PTX")


def _wanted_toolkit() -> Toolkit | None:
    """nvcc if it is there, whether or not this machine has a GPU: build machines have none."""
    choice = os.environ.get("PREQUANT_CUDA", "")
    if choice not in ("", "0", "1"):
        raise SystemExit(
            f"PREQUANT_CUDA must be 0 (no CUDA), 1 (CUDA required) or unset (CUDA if nvcc is found), got {choice!r}"
        )
    if choice == "0":
        print("prequant_ext: CPU only, as PREQUANT_CUDA=0 asks")
        return None
    toolkit = Toolkit.find()
    if toolkit is None:
        if choice == "1":
            raise SystemExit(
                "PREQUANT_CUDA=1 but there is no nvcc: install the CUDA toolkit (12.0 or newer) and put nvcc on PATH "
                "or set CUDA_HOME, "
                "or unset PREQUANT_CUDA to build for the CPU alone"
            )
        print("prequant_ext: CPU only: no nvcc on PATH and no CUDA_HOME")
    elif toolkit.version < (12, 0):
        raise SystemExit(
            f"nvcc {toolkit.version[0]}.{toolkit.version[1]} knows no C++20: install CUDA 12.0 or newer, or set "
            "PREQUANT_CUDA=0"
        )
    return toolkit


def _sources(*patterns: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for pattern in patterns for path in ROOT.glob(pattern))


def _extension() -> cpp_extension.CppExtension:
    sources = _sources("csrc/*.cpp", "csrc/cpu/**/*.cpp")
    headers = _sources("csrc/**/*.h", "csrc/**/*.cuh", "csrc/**/*.inl")
    macros, nvcc_flags, link_flags = list(STABLE_ABI), [], []
    toolkit = _wanted_toolkit()
    if toolkit is not None:
        architectures = toolkit.architectures()
        print(
            f"prequant_ext: CPU and CUDA {toolkit.version[0]}.{toolkit.version[1]} for {' '.join(architectures)} "
            f"({toolkit.home})"
        )
        sources += _sources("csrc/cuda/*.cu")
        macros += [("PREQUANT_CUDA", None)]
        nvcc_flags = [
            "-O3",
            "-std=c++20",
            "-lineinfo",
            "-Xcompiler=-fvisibility=hidden",
            f'-DPREQUANT_CUDA_ARCHITECTURES="{" ".join(architectures)}"',
        ]
        nvcc_flags += [flag for architecture in architectures for flag in _gencode(architecture)]
        if toolkit.version[0] >= 13:
            nvcc_flags += ["--compress-mode=size"]
        # Its own CUDA runtime, hidden: torch's, of another version perhaps, must not answer in its place.
        link_flags = [*toolkit.library_flags, "-lcudart_static", "-lrt", "-lpthread", "-ldl", "-Wl,--exclude-libs,ALL"]
        cpp_extension.CUDA_HOME = toolkit.home  # a CPU build of torch leaves it None
        # refuses an nvcc unlike torch's CUDA, which this library does not link
        cpp_extension._check_cuda_version = lambda *_: None
    return cpp_extension.CppExtension(
        "prequant_ext._C",
        sources,
        depends=headers,
        define_macros=macros,
        extra_compile_args={"cxx": CXX_FLAGS, "nvcc": nvcc_flags},
        extra_link_args=link_flags,
        py_limited_api=True,
    )


class BuildExtension(cpp_extension.BuildExtension):
    """Keeps objects between builds, editable ones too; ninja decides what is out of date."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / "objects")
        self.force = True  # setuptools compares dates alone: a changed PREQUANT_CUDA would leave the old library

    def build_extensions(self) -> None:
        # Beside a CPU build of torch, its ninja file does not ask nvcc which headers an object was made from.
        newest = max(
            os.path.getmtime(ROOT / header) for header in _sources("csrc/*.h", "csrc/cuda/*.h", "csrc/cuda/*.cuh")
        )
        for made in (ROOT / "build" / "objects" / "csrc" / "cuda").glob("*.o"):
            if made.stat().st_mtime < newest:
                made.unlink()
        super().build_extensions()


setup(
    ext_modules=[_extension()],
    cmdclass={"build_ext": BuildExtension},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
