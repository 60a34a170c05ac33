"""What nvcc makes of CUDA sources: one cubin a file and architecture, read back as registers, shared memory and SASS.

The cubins of the built library are taken as they are in it. An architecture that it was not built for, or a library
older than the sources, costs compiling: under build/gate, and again only when the source, a header of ours that it
includes, or the command changes; one process at a time.

    PYTHONPATH=python_tests python -m tools.cubins    get them all, and say where they come from and what it took
"""

import argparse
import fcntl
import hashlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

from support import ROOT

SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
LIBRARY = ROOT / "prequant_ext" / "_C.abi3.so"
FOLDER = ROOT / "build" / "gate"
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
TOOLS = "nvidia-cuda-cuobjdump==13.2.78 nvidia-cuda-nvdisasm==13.2.78"
# As setup.py compiles the library, but for the device alone: the host's half would be the same seven times.
FLAGS = [
    "-std=c++20",
    "-O3",
    "-lineinfo",
    "-cubin",
    "-Xptxas=--warn-on-spills,--warn-on-local-memory-usage",
    "-DPREQUANT_CUDA",
]
# that from sm_90 on are counted with a block's own; occupancy counts them apart, on every architecture since sm_80
SYSTEM_SHARED_BYTES = 1024


class MissingToolError(RuntimeError):
    """A tool of the toolkit is not installed; the message says how to get it."""


@dataclass
class Kernel:
    """One kernel function in one cubin."""

    name: str  # demangled, without namespaces and parameters: dequantize_kernel<float, 4, 8>
    registers: int = 0  # a thread
    shared_bytes: int = 0  # static, a block
    local_bytes: int = 0  # a thread: stack, spills, arrays indexed at run time
    opcodes: dict[str, int] = field(default_factory=dict)  # with their modifiers: LDG.E.128.CONSTANT
    # What a usual turn of it executes: the innermost loop with most tensor-core instructions; without any, the one with
    # most loads. Empty: no loop.
    main_loop: dict[str, int] = field(default_factory=dict)

    @property
    def function(self) -> str:
        return self.name.split("<")[0]

    def count(self, pattern: str, main_loop: bool = False) -> int:
        """How many instructions match a regular expression from their first letter on."""
        return sum(
            number
            for opcode, number in (self.main_loop if main_loop else self.opcodes).items()
            if re.match(pattern, opcode)
        )


@dataclass(frozen=True)
class Cubin:
    source: str
    architecture: int
    warnings: str
    kernels: list[Kernel]


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def find_tool(name: str) -> str:
    """cuobjdump or nvdisasm: of the toolkit on PATH, or of its wheel."""
    found = shutil.which(name)
    if found:
        return found
    try:
        files = importlib.metadata.files(f"nvidia-cuda-{name}") or []
    except importlib.metadata.PackageNotFoundError:
        files = []
    for path in files:
        if path.name == name:
            return str(path.locate())
    raise MissingToolError(f"{name} is not installed: pip install --no-deps {TOOLS}")


def all_cubins(sources: list[Path] = SOURCES, architectures: tuple[int, ...] = ARCHITECTURES) -> list[Cubin]:
    """Of the built library as far as it has them, else compiled for this. Raises what compile_cubins raises."""
    names = {source.name for source in sources}
    found = [cubin for cubin in library_cubins() if cubin.source in names and cubin.architecture in architectures]
    missing = tuple(sorted(set(architectures) - {cubin.architecture for cubin in found}))
    return _in_order(found + (compile_cubins(sources, missing) if missing else []))


def library_cubins(library: Path = LIBRARY, folder: Path = FOLDER / "library") -> list[Cubin]:
    """Every cubin of the library that was made from SOURCES; none where there is no library, or a file of csrc/ that it
    was made from is newer.
    """
    made_from = [
        path for pattern in ("*.h", "cuda/*.cu", "cuda/*.cuh", "cuda/*.h") for path in (ROOT / "csrc").glob(pattern)
    ]
    if not library.exists() or library.stat().st_mtime < max(path.stat().st_mtime for path in made_from):
        return []
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        digest, record_path = hashlib.sha256(library.read_bytes()).hexdigest(), folder / "record.json"
        record = json.loads(record_path.read_text()) if record_path.exists() else {}
        if (record.get("library"), record.get("reader")) != (digest, _reader()):
            for old in folder.glob("*.cubin"):
                old.unlink()
            done = subprocess.run(
                [find_tool("cuobjdump"), "-xelf", "all", str(library)], cwd=folder, capture_output=True, text=True
            )
            # The library's own files alone: CUDA's runtime, which is linked in, has kernels too. cuobjdump fails where
            # there is nothing at all.
            paths = sorted(
                path
                for path in folder.glob("*.sm_*.cubin")
                if f"{path.name.split('.')[0]}.cu" in {source.name for source in SOURCES}
            )
            if done.returncode != 0 and paths:
                raise RuntimeError(f"cuobjdump could not read {library.name}: {done.stderr}")
            with _pool() as pool:
                kernels = [[asdict(kernel) for kernel in found] for found in pool.map(read_cubin, paths)]
            record = {
                "library": digest,
                "reader": _reader(),
                "cubins": dict(zip((path.stem for path in paths), kernels, strict=True)),
            }
            record_path.write_text(json.dumps(record))
    return _in_order(
        [
            Cubin(
                f"{name.split('.')[0]}.cu", int(name.rsplit("sm_", 1)[1]), "", [Kernel(**kernel) for kernel in kernels]
            )
            for name, kernels in record["cubins"].items()
        ]
    )


def _in_order(cubins: list[Cubin]) -> list[Cubin]:
    return sorted(cubins, key=lambda cubin: (cubin.source, cubin.architecture))


def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(int(os.environ.get("MAX_JOBS", 0)) or os.cpu_count())


def compile_cubins(
    sources: list[Path] = SOURCES, architectures: tuple[int, ...] = ARCHITECTURES, folder: Path = FOLDER
) -> list[Cubin]:
    """Every source for every architecture. Raises RuntimeError with nvcc's words where one does not compile."""
    nvcc = find_nvcc()
    if nvcc is None:
        raise MissingToolError("nvcc is not installed")
    for tool in ("cuobjdump", "nvdisasm", "c++filt"):
        if tool != "c++filt":
            find_tool(tool)
        elif shutil.which(tool) is None:
            raise MissingToolError("c++filt is not installed: it comes with g++'s binutils")
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder / "lock"):
        version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
        jobs = [(source, architecture) for source in sources for architecture in architectures]
        # The longest first, so that no processor waits for one long file at the end.
        jobs.sort(key=lambda job: -_last_seconds(folder, *job))
        with _pool() as pool:
            done = list(pool.map(lambda job: _cubin(nvcc, version, folder, *job), jobs))
    return _in_order(done)


@contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _last_seconds(folder: Path, source: Path, architecture: int) -> float:
    """What compiling it took last time; without a last time, its length stands in."""
    record = _record(folder, source, architecture)
    return record["seconds"] if record else source.stat().st_size / 1e3


def _record(folder: Path, source: Path, architecture: int) -> dict | None:
    path = folder / f"{source.stem}.sm_{architecture}.json"
    return json.loads(path.read_text()) if path.exists() else None


def _digest(nvcc_version: str, architecture: int, files: list[str]) -> str | None:
    """Of all that a cubin depends on; None where a file is gone."""
    digest = hashlib.sha256(f"{nvcc_version} {FLAGS} {architecture}".encode())
    for file in files:
        path = ROOT / file
        if not path.exists():
            return None
        digest.update(file.encode() + path.read_bytes())
    return digest.hexdigest()


def _cubin(nvcc: str, version: str, folder: Path, source: Path, architecture: int) -> Cubin:
    record = _record(folder, source, architecture)
    is_current = (
        record is not None
        and record["digest"] is not None
        and record["digest"] == _digest(version, architecture, record["files"])
    )
    if not is_current:
        record = _compile(nvcc, version, folder, source, architecture)
    if not is_current or record["reader"] != _reader():
        record["kernels"] = [asdict(kernel) for kernel in read_cubin(folder / f"{source.stem}.sm_{architecture}.cubin")]
        record["reader"] = _reader()
        (folder / f"{source.stem}.sm_{architecture}.json").write_text(json.dumps(record))
    return Cubin(source.name, architecture, record["warnings"], [Kernel(**kernel) for kernel in record["kernels"]])


def _compile(nvcc: str, version: str, folder: Path, source: Path, architecture: int) -> dict:
    start, began = time.monotonic(), time.time()
    base = folder / f"{source.stem}.sm_{architecture}"
    cubin, depfile = Path(f"{base}.cubin"), Path(f"{base}.d")
    command = [
        nvcc,
        *FLAGS,
        f"-arch=sm_{architecture}",
        f'-DPREQUANT_CUDA_ARCHITECTURES="{architecture}"',
        "-MMD",
        "-MF",
        str(depfile),
    ]
    done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{source.name} does not compile for sm_{architecture}:\n{done.stdout}{done.stderr}")
    named = [Path(name).resolve() for name in depfile.read_text().replace("\\\n", " ").split(" : ", 1)[1].split()]
    files = sorted({str(path.relative_to(ROOT)) for path in named if path.is_relative_to(ROOT)})
    seconds = time.monotonic() - start
    # meanwhile: the cubin is of neither version for certain
    is_edited = any((ROOT / file).stat().st_mtime > began for file in files)
    return {
        "digest": None if is_edited else _digest(version, architecture, files),
        "files": files,
        "seconds": seconds,
        "warnings": done.stdout + done.stderr,
    }


def _reader() -> str:
    """Of what makes a summary of a cubin: this file."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()


# ---- reading a cubin -------------------------------------------------------------------------------------------------


def read_cubin(path: Path) -> list[Kernel]:
    usage = subprocess.run(
        [find_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if not found:
        return []  # host code alone
    names = demangle([mangled for mangled, *_ in found])
    reserved = SYSTEM_SHARED_BYTES if int(re.findall(r"sm_(\d+)", path.stem)[-1]) >= 90 else 0
    sass = read_sass(
        subprocess.run([find_tool("nvdisasm"), "-c", str(path)], capture_output=True, text=True, check=True).stdout
    )
    kernels = []
    for (mangled, registers, stack, shared, local), name in zip(found, names, strict=True):
        code = sass[mangled]
        kernel = Kernel(
            name,
            int(registers),
            max(0, int(shared) - reserved),
            int(stack) + int(local),
            dict(Counter(opcode for opcode, _ in code.instructions)),
        )
        kernel.main_loop = dict(Counter(opcode for opcode, _ in code.main_loop()))
        kernels.append(kernel)
    return sorted(kernels, key=lambda kernel: kernel.name)


def demangle(names: list[str]) -> list[str]:
    """Without what all kernels share, and without the parameters."""
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    return [_short_name(line) for line in text.splitlines()]


def _short_name(demangled: str) -> str:
    """ "void prequant::cuda::(anonymous namespace)::pack_kernel<4, true>(long)" -> "pack_kernel<4, true>"."""
    name = (
        demangled.removeprefix("void ")
        .replace("(anonymous namespace)::", "")
        .replace("prequant::cuda::", "")
        .replace("prequant::", "")
    )
    # The parameters begin at the first parenthesis outside the template arguments; a cast within those has parentheses
    # of its own.
    depth = 0
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            return re.sub(r"\((?:bool|int|unsigned int)\)", "", name[:i]).replace("> >", ">>")
    return name


@dataclass
class Code:
    """The instructions of one kernel in order, and where its labels stand."""

    instructions: list[tuple[str, str]] = field(default_factory=list)  # opcode, operands
    labels: dict[str, int] = field(default_factory=dict)

    def loops(self) -> list[tuple[int, int]]:
        """First instruction and the one behind the branch back."""
        found = []
        for i, (opcode, operands) in enumerate(self.instructions):
            target = re.search(r"`\((\.L\w+)\)", operands)
            if opcode.startswith("BRA") and target and self.labels.get(target[1], i + 1) < i:
                found.append((self.labels[target[1]], i + 1))
        return found

    def main_loop(self) -> list[tuple[str, str]]:
        def worth(loop: tuple[int, int]) -> tuple[int, int, int]:
            body = [opcode for opcode, _ in self.instructions[slice(*loop)]]
            products, loads = (
                sum(bool(re.match(r"[HIQ]MMA", opcode)) for opcode in body),
                sum(opcode.startswith("LD") for opcode in body),
            )
            return products, loads, -len(body)

        loops = self.loops()
        return self.usual_path(*max(loops, key=worth)) if loops else []

    def usual_path(self, begin: int, end: int) -> list[tuple[str, str]]:
        """Without what a branch jumps over, unless that has the loop's own work in it: a new group of scales, a ragged
        edge are rare.
        """
        path, i = [], begin
        while i < end:
            opcode, operands = self.instructions[i]
            path.append((opcode, operands))
            target = re.search(r"`\((\.L\w+)\)", operands)
            to = self.labels.get(target[1], i) if opcode.startswith("BRA") and target else i
            is_rare = i < to <= end and not any(
                re.match(r"[HIQ]MMA|LDSM|LDGSTS|LDG\.E\.128", skipped) for skipped, _ in self.instructions[i:to]
            )
            i = to if is_rare else i + 1
        return path


def read_sass(text: str) -> dict[str, Code]:
    """nvdisasm's listing by mangled kernel name."""
    kernels: dict[str, Code] = {}
    code = Code()
    for line in text.splitlines():
        label = re.match(r"(\.?[\w.$]+):$", line)
        if label and label[1].startswith(".text."):
            code = kernels.setdefault(label[1].removeprefix(".text."), Code())
        elif label:
            code.labels[label[1]] = len(code.instructions)
        else:
            found = re.match(r"\s+/\*[0-9a-f]+\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*);", line)
            if found and found[1] != "NOP":
                code.instructions.append((found[1], found[2]))
    return kernels


def collect() -> list[Cubin]:
    """All of them; prints where they come from and what it took."""
    start = time.monotonic()
    of_library, cubins = library_cubins(), all_cubins()
    kernels = sum(len(cubin.kernels) for cubin in cubins)
    print(
        f"{len(SOURCES)} files for {len(ARCHITECTURES)} architectures: {len(cubins)} cubins with {kernels} kernels in "
        f"{time.monotonic() - start:.0f} s, "
        f"{len(of_library)} of them of the built library"
    )
    return cubins


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        collect()
    except (MissingToolError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
