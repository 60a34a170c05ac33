"""Instructions of the CPU kernels: figures of the code that need no quiet machine, nor one that has the instructions.

    python bench/counts.py                                        every level, into bench/results/counts.json
    python bench/counts.py --levels portable --shape 256x256 --json -

Levels that valgrind can run (portable, avx2): what one call executes, by callgrind, on one thread, for each weight
(quantize_activations: for each activation). VNNI levels (avx512, avxvnni), which valgrind cannot run: the instructions
of each function's hottest inner loop, from objdump, for 32 weights. Neither is a time: no cache, no latency. Needs g++,
valgrind, objdump (Debian: apt install g++ valgrind binutils).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "bench" / "results" / "counts.json"
CXX_FLAGS = ["-O3", "-std=c++20", "-ffp-contract=off", "-fvisibility=hidden"]  # as in setup.py
EXECUTED, DISASSEMBLED = ("portable", "avx2"), ("avx512", "avxvnni")
LEVELS = [level for level in (*EXECUTED, *DISASSEMBLED) if (ROOT / "csrc" / "cpu" / "isa" / f"{level}.cpp").exists()]
CALLS = [  # operator, M
    *(("linear_w4a8", M) for M in (1, 16, 64)),
    *(("linear_w4a16", M) for M in (1, 16, 64)),
    *(("linear_dx", M) for M in (1, 16, 64)),
    ("quantize_activations", 64),
]


def run(*command: str | Path) -> str:
    """Its output. A tool that is missing or fails ends the program with a message."""
    name = str(command[0])
    if shutil.which(name) is None:
        sys.exit(f"{name} is not installed, and counts need it (Debian: apt install g++ valgrind binutils)")
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(str(part) for part in command)} failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    return done.stdout


# ---- what a call executes --------------------------------------------------------------------------------------------


def build_driver(level: str, folder: Path) -> Path:
    program = folder / f"counts_{level}"
    sources = [ROOT / "bench" / "counts.cpp", ROOT / "csrc" / "cpu" / "isa" / f"{level}.cpp"]
    run("g++", *CXX_FLAGS, f"-DCOUNTS_LEVEL={level}", *sources, "-o", program)
    return program


def total_instructions(callgrind_output: str) -> int:
    """The total of a callgrind.out file that counts instructions alone."""
    total = re.search(r"^(?:summary|totals): (\d+)$", callgrind_output, re.M)
    if total is None or "events: Ir" not in callgrind_output:
        raise ValueError("callgrind's output has no total of instructions")
    return int(total[1])


def count_call(program: Path, operator: str, M: int, N: int, K: int) -> int:
    """Instructions of one call."""
    output = program.parent / "callgrind.out"
    run(
        "valgrind",
        "--tool=callgrind",
        "--toggle-collect=measured",
        f"--callgrind-out-file={output}",
        program,
        operator,
        str(M),
        str(N),
        str(K),
    )
    return total_instructions(output.read_text())


# ---- inner loops -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    address: int
    mnemonic: str
    operands: str

    @property
    def target(self) -> int | None:
        """Of a jump."""
        found = re.match(r"([0-9a-f]+)(?: <|$)", self.operands)
        return int(found[1], 16) if self.mnemonic.startswith("j") and found else None

    @property
    def kind(self) -> str:
        reads, writes = "(" in self.operands.rpartition(",%")[0], self.operands.endswith(")")
        if self.mnemonic in ("vpdpbusd", "vpdpwssd"):
            return self.mnemonic
        if "broadcast" in self.mnemonic or "{1to" in self.operands:
            return "broadcasts"
        if "mov" in self.mnemonic and (reads or writes):
            return "stores" if writes else "loads"
        return "others"


def functions(disassembly: str) -> dict[str, list[Instruction]]:
    """By demangled name, from `objdump -d -C --no-show-raw-insn`."""
    found: dict[str, list[Instruction]] = {}
    body: list[Instruction] = []
    for line in disassembly.splitlines():
        if heading := re.fullmatch(r"[0-9a-f]+ <(.*)>:", line):
            body = found.setdefault(heading[1], [])
        elif instruction := re.match(r"\s*([0-9a-f]+):\t(?:\{vex\} )?(\S+)\s*(.*)", line):
            body.append(Instruction(int(instruction[1], 16), instruction[2], instruction[3].partition("#")[0].strip()))
    return found


def inner_loops(body: list[Instruction]) -> list[list[Instruction]]:
    """Loops without a loop inside: from a backward jump's target to the jump."""
    ends = sorted(
        {(i.target, i.address) for i in body if i.target is not None and body[0].address <= i.target <= i.address}
    )
    innermost = [
        (begin, end)
        for begin, end in ends
        if not any((b, e) != (begin, end) and begin <= b and e <= end for b, e in ends)
    ]
    return [[i for i in body if begin <= i.address <= end] for begin, end in innermost]


def short_name(symbol: str) -> str:
    """Without namespaces, parameters and template arguments."""
    name = re.sub(r" \[clone .*\]$", "", symbol).replace("(anonymous namespace)::", "").removeprefix("void ")
    while (shorter := re.sub(r"\([^()]*\)( const)?|<[^<>]*>", "", name)) != name:
        name = shorter
    return re.sub(r"prequant::(\w+::)?", "", name).split(" ")[-1]


def mix(loop: list[Instruction]) -> dict:
    """Its instructions for 32 weights. Each token's activations are broadcast: their number follows from that of the
    accumulators; where nothing is broadcast, a product counts as a weight.
    """
    kinds = Counter(instruction.kind for instruction in loop)
    dots = [instruction for instruction in loop if instruction.mnemonic in ("vpdpbusd", "vpdpwssd")]
    products = sum((64 if "%zmm" in dot.operands else 32) // (1 if dot.mnemonic == "vpdpbusd" else 2) for dot in dots)
    accumulators = len({dot.operands.rpartition(",")[2] for dot in dots})
    tokens = Fraction(kinds["broadcasts"] * accumulators, len(dots))
    weights = products / tokens if tokens else Fraction(products)
    per_32 = {kind: round(float(count * 32 / weights), 3) for kind, count in sorted(kinds.items())}
    stack = sum("(%rsp" in instruction.operands or "(%rbp" in instruction.operands for instruction in loop)
    return {
        "tokens": round(float(tokens), 2),
        "weights": round(float(weights), 2),
        "instructions": len(loop),
        "stack": stack,
        "per_32_weights": per_32,
    }


def hottest_loops(disassembly: str) -> dict[str, dict]:
    """Function -> the mix of that inner loop with the most integer products, of all its instances."""
    best: dict[str, tuple[int, list[Instruction]]] = {}
    for symbol, body in functions(disassembly).items():
        for loop in inner_loops(body):
            products = sum(instruction.mnemonic in ("vpdpbusd", "vpdpwssd") for instruction in loop)
            name = short_name(symbol)
            if products > best.get(name, (0, []))[0]:
                best[name] = (products, loop)
    return {name: mix(loop) for name, (_, loop) in sorted(best.items())}


def disassemble(level: str, folder: Path) -> str:
    compiled = folder / f"{level}.o"
    run("g++", *CXX_FLAGS, "-c", ROOT / "csrc" / "cpu" / "isa" / f"{level}.cpp", "-o", compiled)
    return run("objdump", "-d", "-C", "--no-show-raw-insn", compiled)


def count_level(level: str, N: int, K: int, calls: list[tuple[str, int]]) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        if level in DISASSEMBLED:
            return {"inner_loops": hottest_loops(disassemble(level, Path(folder)))}
        program = build_driver(level, Path(folder))
        found = {}
        for operator, M in calls:
            units = M * K if operator == "quantize_activations" else N * K
            found[f"{operator} M={M}"] = round(count_call(program, operator, M, N, K) / units, 3)
            print(f"  {operator:22} M = {M:<4} {found[f'{operator} M={M}']:9.3f}", file=sys.stderr)
        return {"instructions_per_weight": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=LEVELS)
    parser.add_argument(
        "--shape",
        default="384x384",
        metavar="NxK",
        help="of the weight, 4 bits, one scale, 5 outlier columns (default: %(default)s)",
    )
    parser.add_argument(
        "--json",
        default=str(RESULTS),
        metavar="FILE",
        help="where the counts go, - for the terminal (default: bench/results/counts.json)",
    )
    arguments = parser.parse_args()
    shape = re.fullmatch(r"(\d+)x(\d+)", arguments.shape)
    if shape is None:
        parser.error(f"--shape must be NxK, got {arguments.shape}")
    N, K = int(shape[1]), int(shape[2])
    for tool in (
        "g++",
        *(["valgrind"] if set(arguments.levels) & set(EXECUTED) else []),
        *(["objdump"] if set(arguments.levels) & set(DISASSEMBLED) else []),
    ):
        run(tool, "--version")
    counts: dict = {
        "compiler": run("g++", "--version").splitlines()[0],
        "flags": " ".join(CXX_FLAGS),
        "shape": arguments.shape,
        "levels": {},
    }
    for level in arguments.levels:
        print(level, file=sys.stderr)
        counts["levels"][level] = count_level(level, N, K, CALLS)
    text = json.dumps(counts, indent=1) + "\n"
    if arguments.json == "-":
        print(text, end="")
    else:
        Path(arguments.json).write_text(text)


if __name__ == "__main__":
    main()
