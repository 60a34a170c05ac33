"""Predicted times of the linear operators on GPUs: a model, no GPU was used.

    python bench/gpu_model.py                                          the shape of the targets, every GPU
    python bench/gpu_model.py --gpu A100 --shape 768x3072 --tokens 1 16 --operator linear_w4a16
    python bench/gpu_model.py --json

From the grid that the launcher would choose it counts bytes and tensor-core products; how often the main loop runs
follows from these, and what one turn costs from its SASS (python_tests/tools/cubins.py: needs nvcc, cuobjdump and
nvdisasm). Each count is divided by the published rate of the GPU; the slowest one is the time, on top of a fixed cost a
launch. The peer is an ideal cuBLAS: its bytes and its products at the full published rate, one launch.

What it leaves out: latencies inside a turn of the loop, the ring's filling, clocks below boost, cuBLAS's own losses.
Reading the weight from L2 where the last call left it there would help both.
"""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))

from gpu_launches import GPUS, WARP, Gpu, Launch, cublas, launches
from tools import cubins
from tools.budgets import blocks_per_multiprocessor

LABEL = "model, no GPU was used"

LAUNCH_MICROSECONDS = 2.0  # assumed: start and end of one kernel inside a CUDA graph
LATENCY_NANOSECONDS = 600  # assumed: of DRAM under load; unloaded it is 470 to 540 clocks (arXiv 2402.13499)
L2_BYTES_PER_CLOCK = 64  # assumed: that one multiprocessor takes from L2
SHARED_BYTES_PER_CLOCK = 128  # CUDA C++ Programming Guide: 32 banks of 4 bytes
ISSUED_PER_CLOCK = 4  # one instruction a scheduler and clock

# Results a clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions".
# Opcodes by their beginning.
INTEGER_OPCODES = (
    "LOP3",
    "SHF",
    "IADD3",
    "LEA",
    "PRMT",
    "ISETP",
    "SEL",
    "PLOP3",
    "VOTE",
    "LOP",
    "I2F",
    "FSETP",
    "FMNMX",
)
INTEGER_LANES = 64
FLOAT_OPCODES = ("FFMA", "FADD", "FMUL", "IMAD", "IDP")
FLOAT_LANES = {75: 64, 80: 64, 86: 128, 89: 128, 90: 128}
HALF_OPCODES = ("HFMA2", "HADD2", "HMUL2")
HALF_LANES = {75: 64, 80: 128, 86: 64, 89: 64, 90: 128}  # pairs
CROSSING_OPCODES = ("MOVM", "SHFL")
CROSSING_LANES = 32  # of shuffles; MOVM's rate is not published and taken as theirs

# The paper targets of the project: parity and stretch, as multiples of cuBLAS float16 at 11008 x 4096. By GPU, in the
# order of GPUS.
TARGET_SHAPE = (11008, 4096)
TARGETS = {
    ("linear_w4a16", 1): [(2.5, 3.3), (3.4, 3.6), (3.0, 3.4), (3.3, 3.7), (3.2, 3.6), (2.2, 3.0)],
    ("linear_w4a16", 16): [(2.5, 3.2), (3.3, 3.6), (2.2, 3.0), (3.3, 3.7), (3.2, 3.5), (2.1, 2.9)],
    ("linear_w4a16", 64): [(1.5, 2.2), (1.1, None), (1.6, 2.0), (2.8, 3.4), (1.9, 2.3), (1.6, 2.2)],
    ("linear_w4a8", 1024): [(1.6, None), (2.5, None), (1.5, None), (1.6, None), (2.5, None), None],
    ("linear_w4a16", 1024): [(1.0, None), (0.95, None), (0.91, None), (0.95, None), (0.95, None), (0.91, None)],
}


# ---- what it takes ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Prediction:
    """Of one call on one GPU."""

    gpu: str
    operator: str
    M: int
    N: int
    K: int
    microseconds: float
    bound_by: str
    cublas_microseconds: float
    speedup: float
    parity: float | None = None
    stretch: float | None = None
    kernels: list[str] = field(default_factory=list)
    label: str = LABEL


def turn_clocks(mix: dict[str, int], gpu: Gpu) -> dict[str, float]:
    """Clocks of a multiprocessor that one warp's turn of a loop takes on each unit but the tensor cores."""

    def lanes(opcodes: tuple[str, ...]) -> int:
        return WARP * sum(count for opcode, count in mix.items() if opcode.split(".")[0] in opcodes)

    shared = 0
    for opcode, count in mix.items():
        head, *modifiers = opcode.split(".")
        if head in ("LDS", "STS", "LDGSTS"):
            width = next((int(modifier) for modifier in modifiers if modifier in ("64", "128")), 32)
            shared += count * WARP * width // 8
        elif head == "LDSM":
            shared += count * 128 * int(modifiers[-1] if modifiers[-1].isdigit() else 1)
    return {
        "instructions issued": sum(mix.values()) / ISSUED_PER_CLOCK,
        "integer units": lanes(INTEGER_OPCODES) / INTEGER_LANES,
        "float units": lanes(FLOAT_OPCODES) / FLOAT_LANES[gpu.architecture],
        "half units": lanes(HALF_OPCODES) / HALF_LANES[gpu.architecture],
        "lane crossings": lanes(CROSSING_OPCODES) / CROSSING_LANES,
        "shared memory": shared / SHARED_BYTES_PER_CLOCK,
    }


def microseconds(launch: Launch, gpu: Gpu, kernels: dict[str, cubins.Kernel]) -> dict[str, float]:
    """What each unit needs for it, launch apart."""
    clock = gpu.gigahertz * 1e3  # a microsecond
    rate = (gpu.int8_teraops if launch.is_integer else gpu.float16_teraflops) * 1e6 / 2  # multiplications a microsecond
    is_ours = bool(launch.name)
    if is_ours:
        rate *= gpu.mma_share
    # The busiest multiprocessor has a whole number of blocks.
    imbalance = ceil(launch.blocks / gpu.multiprocessors) / (launch.blocks / gpu.multiprocessors) if is_ours else 1.0
    needs = {
        "DRAM": launch.dram_bytes / gpu.gigabytes_per_second / 1e3,
        "L2": launch.l2_bytes / (gpu.multiprocessors * L2_BYTES_PER_CLOCK * clock) * imbalance,
        "tensor cores": launch.products / rate * imbalance,
    }
    if is_ours:
        kernel = kernels[launch.name]
        blocks = blocks_per_multiprocessor(
            gpu.architecture, kernel.registers, launch.threads, kernel.shared_bytes + launch.dynamic_shared
        )
        resident = min(launch.blocks, blocks * gpu.multiprocessors)
        if launch.bytes_in_flight:
            reachable = resident * launch.bytes_in_flight / LATENCY_NANOSECONDS * 1e3  # bytes a microsecond
            needs["bytes in flight"] = launch.dram_bytes / reachable
        turns = launch.products / products_of_a_turn(kernel)
        for unit, clocks in turn_clocks(kernel.main_loop, gpu).items():
            needs[unit] = turns * clocks / gpu.multiprocessors / clock * imbalance
    return needs


def products_of_a_turn(kernel: cubins.Kernel) -> int:
    """Multiplications of a warp in one turn of its main loop."""
    shapes = {"HMMA.16816": 16 * 8 * 16, "HMMA.1688": 16 * 8 * 8, "IMMA.16832": 16 * 8 * 32, "IMMA.8816": 8 * 8 * 16}
    found = sum(
        count * size
        for opcode, count in kernel.main_loop.items()
        for shape, size in shapes.items()
        if opcode.startswith(f"{shape}.")
    )
    assert found, f"{kernel.name} has no tensor-core instruction in its main loop"
    return found


def predict(operator: str, M: int, N: int, K: int, gpu: Gpu, kernels: dict[str, cubins.Kernel]) -> Prediction:
    total, needs_of_slowest, slowest = 0.0, "launch", 0.0
    ours = launches(operator, M, N, K, gpu)
    for launch in ours:
        needs = microseconds(launch, gpu, kernels)
        unit = max(needs, key=lambda name: needs[name])
        total += LAUNCH_MICROSECONDS + needs[unit]
        if needs[unit] > slowest:
            slowest, needs_of_slowest = needs[unit], f"{unit} ({launch.kernel})" if len(ours) > 1 else unit
    if slowest < LAUNCH_MICROSECONDS * len(ours):
        needs_of_slowest = "launch"
    peer = LAUNCH_MICROSECONDS + max(microseconds(cublas(M, N, K), gpu, kernels).values())
    targets = TARGETS.get((operator, M)) if (N, K) == TARGET_SHAPE else None
    parity, stretch = (targets[GPUS.index(gpu)] if targets else None) or (None, None)
    names = [launch.name or launch.kernel for launch in ours]
    return Prediction(gpu.name, operator, M, N, K, total, needs_of_slowest, peer, peer / total, parity, stretch, names)


def sass() -> dict[int, dict[str, cubins.Kernel]]:
    """Kernels by architecture and name."""
    sources = [source for source in cubins.SOURCES if source.stem.startswith("linear_")]
    found: dict[int, dict[str, cubins.Kernel]] = {}
    for cubin in cubins.all_cubins(sources, tuple(sorted({gpu.architecture for gpu in GPUS}))):
        found.setdefault(cubin.architecture, {}).update({kernel.name: kernel for kernel in cubin.kernels})
    return found


# ---- what is printed -------------------------------------------------------------------------------------------------


def rows(predictions: list[Prediction]) -> Iterator[str]:
    yield f"{LABEL}. speedup: over an ideal cuBLAS float16 of the same model"
    yield (
        f"{'GPU':5} {'operator':13} {'M':>5} {'N x K':>12} {'us':>8} {'cuBLAS':>8} {'speedup':>8}  {'target':11} "
        "bound by"
    )
    for p in predictions:
        target = "" if p.parity is None else f"{p.parity:g}" + (f" / {p.stretch:g}" if p.stretch else "")
        mark = "" if p.parity is None else ", target reached" if p.speedup >= p.parity else ", target MISSED"
        figures = f"{p.microseconds:8.1f} {p.cublas_microseconds:8.1f} {p.speedup:7.2f}x  {target:11}"
        yield f"{p.gpu:5} {p.operator:13} {p.M:5} {f'{p.N} x {p.K}':>12} {figures} {p.bound_by}{mark}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpu", nargs="+", choices=[gpu.name for gpu in GPUS], default=[gpu.name for gpu in GPUS])
    parser.add_argument("--shape", nargs="+", default=["{}x{}".format(*TARGET_SHAPE)], metavar="NxK")
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 64, 1024], metavar="M")
    parser.add_argument(
        "--operator",
        nargs="+",
        choices=["linear_w4a16", "linear_w4a8", "linear_dx"],
        default=["linear_w4a16", "linear_w4a8", "linear_dx"],
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    arguments = parser.parse_args()
    try:
        kernels = sass()
    except (cubins.MissingToolError, RuntimeError) as error:
        sys.exit(f"gpu_model: {error}")
    shapes = [tuple(int(size) for size in shape.split("x")) for shape in arguments.shape]
    chosen = [gpu for gpu in GPUS if gpu.name in arguments.gpu]
    predictions = [
        predict(operator, M, N, K, gpu, kernels[gpu.architecture])
        for operator in arguments.operator for N, K in shapes for M in arguments.tokens for gpu in chosen
    ]  # fmt: skip
    if arguments.json:
        for prediction in predictions:
            print(json.dumps(asdict(prediction)))
    else:
        print("\n".join(rows(predictions)))


if __name__ == "__main__":
    main()
