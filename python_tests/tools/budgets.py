"""csrc/cuda/budgets.toml: what each kernel may take of a multiprocessor, and how many of its blocks that leaves room
for.

The entry of a kernel is the longest pattern that its name matches, dequantize_kernel<float, *> before
dequantize_kernel.

    PYTHONPATH=python_tests python -m tools.budgets    or `make budgets`: rewrite the measured lines, and add an entry
                                                       for a kernel that has none; threads and dynamic_shared, which
                                                       only the launcher knows, are kept
"""

import argparse
import fnmatch
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10: pytest brings its forerunner
    import tomli as tomllib

from support import ROOT
from tools.cubins import ARCHITECTURES, Cubin, Kernel, MissingToolError, collect

PATH = ROOT / "csrc" / "cuda" / "budgets.toml"
HEAD = """\
# What a kernel may take at most, over all its instantiations that match the entry's pattern, on each architecture in
# turn.
#
#   registers        a thread: what ptxas gave, rounded up to the 8 that the hardware hands out at a time, so the slack
#                    costs no occupancy
#   shared           static bytes a block, as ptxas gave
#   blocks           that then fit on one multiprocessor, with the launcher's threads and dynamic_shared bytes (one for
#                    all, or one each)
#
# python_tests/cuda/test_cuda_gate.py holds the kernels to it. `make budgets` measures again: read the difference before
# you keep it.
"""


@dataclass(frozen=True)
class Multiprocessor:
    """Limits of one multiprocessor: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability"."""

    threads: int
    blocks: int
    shared_bytes: int
    block_shared_bytes: int  # that one block may have
    reserved_shared_bytes: int  # that each block costs on top
    registers: int = 65536


MULTIPROCESSORS = {
    75: Multiprocessor(1024, 16, 64 << 10, 64 << 10, 0),
    80: Multiprocessor(2048, 32, 164 << 10, 163 << 10, 1 << 10),
    86: Multiprocessor(1536, 16, 100 << 10, 99 << 10, 1 << 10),
    89: Multiprocessor(1536, 24, 100 << 10, 99 << 10, 1 << 10),
    90: Multiprocessor(2048, 32, 228 << 10, 227 << 10, 1 << 10),
    100: Multiprocessor(2048, 32, 228 << 10, 227 << 10, 1 << 10),
    120: Multiprocessor(1536, 24, 100 << 10, 99 << 10, 1 << 10),
}
REGISTER_STEP, SHARED_STEP = 8, 128  # registers a thread; bytes
WARP, SCHEDULERS = 32, 4


def blocks_per_multiprocessor(architecture: int, registers: int, threads: int, shared_bytes: int) -> int:
    """How many blocks run side by side on one multiprocessor."""
    limits = MULTIPROCESSORS[architecture]
    if shared_bytes > limits.block_shared_bytes:
        return 0
    warps = -(-threads // WARP)
    # Each of the four schedulers has a quarter of the registers, and a warp's registers are those of one scheduler.
    warp_registers = -(-registers // REGISTER_STEP) * REGISTER_STEP * WARP
    warps_with_registers = limits.registers // SCHEDULERS // warp_registers * SCHEDULERS
    shared = -(-(shared_bytes + limits.reserved_shared_bytes) // SHARED_STEP) * SHARED_STEP
    by_shared = limits.shared_bytes // shared if shared else limits.blocks
    return min(limits.blocks, limits.threads // (warps * WARP), warps_with_registers // warps, by_shared)


@dataclass(frozen=True)
class Budget:
    """One entry, a value for each architecture."""

    pattern: str
    threads: int
    registers: dict[int, int]
    shared: dict[int, int]
    blocks: dict[int, int]
    dynamic_shared: dict[int, int]

    def fitting_blocks(self, architecture: int, registers: int, static_shared: int) -> int:
        return blocks_per_multiprocessor(
            architecture, registers, self.threads, static_shared + self.dynamic_shared[architecture]
        )


def read_budgets(path: Path = PATH) -> dict[str, Budget]:
    table = tomllib.loads(path.read_text()) if path.exists() else {}

    def each(value) -> dict[int, int]:
        return dict(zip(ARCHITECTURES, value if isinstance(value, list) else [value] * len(ARCHITECTURES), strict=True))

    budgets = {}
    for pattern, entry in table.get("kernel", {}).items():
        numbers = {name: each(entry.get(name, 0)) for name in ("registers", "shared", "blocks", "dynamic_shared")}
        budgets[pattern] = Budget(pattern, entry["threads"], **numbers)
    return budgets


def find_budget(budgets: dict[str, Budget], kernel: Kernel) -> Budget | None:
    matching = [
        pattern for pattern in budgets if fnmatch.fnmatchcase(kernel.name, pattern) or kernel.function == pattern
    ]
    return budgets[max(matching, key=len)] if matching else None


def write_budgets(cubins: list[Cubin], path: Path = PATH) -> None:
    budgets = read_budgets(path)
    measured: dict[str, list[tuple[int, Kernel]]] = defaultdict(list)
    launched = {}
    for cubin in cubins:
        for kernel in cubin.kernels:
            budget = find_budget(budgets, kernel) or Budget(
                kernel.function, 256, {}, {}, {}, dict.fromkeys(ARCHITECTURES, 0)
            )
            measured[budget.pattern].append((cubin.architecture, kernel))
            launched[budget.pattern] = budget

    def compact(values: list[int]) -> str:
        return str(values[0]) if len(set(values)) == 1 else str(values)

    text = [HEAD, f"architectures = {list(ARCHITECTURES)}\n"]
    for pattern, kernels in sorted(measured.items()):
        budget = launched[pattern]
        registers, shared = dict.fromkeys(ARCHITECTURES, 0), dict.fromkeys(ARCHITECTURES, 0)
        for architecture, kernel in kernels:
            rounded = -(-kernel.registers // REGISTER_STEP) * REGISTER_STEP
            registers[architecture] = max(registers[architecture], rounded)
            shared[architecture] = max(shared[architecture], kernel.shared_bytes)
        blocks = [
            budget.fitting_blocks(architecture, registers[architecture], shared[architecture])
            for architecture in ARCHITECTURES
        ]
        text.append(f'[kernel."{pattern}"]')
        text.append(f"threads = {budget.threads}")
        if any(budget.dynamic_shared.values()):
            text.append(f"dynamic_shared = {compact(list(budget.dynamic_shared.values()))}")
        text.append(f"registers = {list(registers.values())}")
        if any(shared.values()):
            text.append(f"shared = {compact(list(shared.values()))}")
        text.append(f"blocks = {blocks}\n")
    path.write_text("\n".join(text))
    print(f"{path.relative_to(ROOT)}: {len(measured)} entries")


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    try:
        write_budgets(collect())
    except (MissingToolError, RuntimeError) as error:
        raise SystemExit(str(error)) from None


if __name__ == "__main__":
    main()
