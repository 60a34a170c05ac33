"""Predicted times of the linear operators on GPUs: a model, no GPU was used.

    python bench/gpu_model.py                                          the shape of the targets, every GPU
    python bench/gpu_model.py --gpu A100 --shape 768x3072 --tokens 1 16 --operator linear_w4a16
    python bench/gpu_model.py --json

From the grid that the launcher would choose it counts bytes and tensor-core products; how often the main loop runs follows from these, and what one
turn costs from its SASS (python_tests/cubins.py: needs nvcc, cuobjdump and nvdisasm). Each count is divided by the published rate of the GPU; the
slowest one is the time, on top of a fixed cost a launch. The peer is an ideal cuBLAS: its bytes and its products at the full published rate, one launch.

What it leaves out: latencies inside a turn of the loop, the ring's filling, clocks below boost, cuBLAS's own losses. Reading the weight from L2 where the
last call left it there would help both.
"""

# ruff: noqa: SIM300  M, N and K are sizes, not constants
import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from math import ceil
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "python_tests"))

import cubins
from budgets import blocks_per_multiprocessor

LABEL = "model, no GPU was used"


@dataclass(frozen=True)
class Gpu:
    """Published limits; boost clock, dense products, float16 with float32 sums."""

    name: str
    architecture: int
    multiprocessors: int
    gigahertz: float
    gigabytes_per_second: float
    float16_teraflops: float
    int8_teraops: float
    l2_megabytes: float
    mma_share: float = 1.0  # of those rates that mma.sync, which the kernels use, can reach


GPUS = [
    # NVIDIA T4 datasheet; Turing architecture whitepaper (TU104).
    Gpu("T4", 75, 40, 1.59, 320, 65.1, 130, 4),
    # NVIDIA Ampere GA102 whitepaper, appendix A: GeForce halves the rate with float32 sums, not that of int8.
    Gpu("3090", 86, 82, 1.695, 936, 71.2, 284, 6),
    # NVIDIA A100 datasheet and whitepaper, 40 GB SXM.
    Gpu("A100", 80, 108, 1.41, 1555, 312, 624, 40),
    # NVIDIA L4 datasheet; Ada whitepaper (AD104).
    Gpu("L4", 89, 58, 2.04, 300, 121, 242, 48),
    # NVIDIA Ada whitepaper, appendix A.
    Gpu("4090", 89, 128, 2.52, 1008, 165.2, 660.6, 72),
    # NVIDIA H100 datasheet, SXM5. mma.sync reaches 62.9 % of what wgmma does: "Benchmarking and Dissecting the Nvidia Hopper GPU Architecture",
    # arXiv 2402.13499.
    Gpu("H100", 90, 132, 1.83, 3350, 989.4, 1979, 50, mma_share=0.629),
]

LAUNCH_MICROSECONDS = 2.0  # assumed: start and end of one kernel inside a CUDA graph
LATENCY_NANOSECONDS = 600  # assumed: of DRAM under load; unloaded it is 470 to 540 clocks (arXiv 2402.13499)
L2_BYTES_PER_CLOCK = 64  # assumed: that one multiprocessor takes from L2
SHARED_BYTES_PER_CLOCK = 128  # CUDA C++ Programming Guide: 32 banks of 4 bytes
ISSUED_PER_CLOCK = 4  # one instruction a scheduler and clock

# Results a clock and multiprocessor: CUDA C++ Programming Guide, "Throughput of Native Arithmetic Instructions". Opcodes by their beginning.
INTEGER_OPCODES = ("LOP3", "SHF", "IADD3", "LEA", "PRMT", "ISETP", "SEL", "PLOP3", "VOTE", "LOP", "I2F", "FSETP", "FMNMX")
INTEGER_LANES = 64
FLOAT_OPCODES = ("FFMA", "FADD", "FMUL", "IMAD", "IDP")
FLOAT_LANES = {75: 64, 80: 64, 86: 128, 89: 128, 90: 128}
HALF_OPCODES = ("HFMA2", "HADD2", "HMUL2")
HALF_LANES = {75: 64, 80: 128, 86: 64, 89: 64, 90: 128}  # pairs
CROSSING_OPCODES = ("MOVM", "SHFL")
CROSSING_LANES = 32  # of shuffles; MOVM's rate is not published and taken as theirs
WARP = 32

# The paper targets of the project: parity and stretch, as multiples of cuBLAS float16 at 11008 x 4096. By GPU, in the order of GPUS.
TARGET_SHAPE = (11008, 4096)
TARGETS = {
    ("linear_w4a16", 1): [(2.5, 3.3), (3.4, 3.6), (3.0, 3.4), (3.3, 3.7), (3.2, 3.6), (2.2, 3.0)],
    ("linear_w4a16", 16): [(2.5, 3.2), (3.3, 3.6), (2.2, 3.0), (3.3, 3.7), (3.2, 3.5), (2.1, 2.9)],
    ("linear_w4a16", 64): [(1.5, 2.2), (1.1, None), (1.6, 2.0), (2.8, 3.4), (1.9, 2.3), (1.6, 2.2)],
    ("linear_w4a8", 1024): [(1.6, None), (2.5, None), (1.5, None), (1.6, None), (2.5, None), None],
    ("linear_w4a16", 1024): [(1.0, None), (0.95, None), (0.91, None), (0.95, None), (0.95, None), (0.91, None)],
}


# ---- what a launcher would do: csrc/cuda/dispatch.h and the launchers; test_gpu_model.py compares with their launches on the emulator ----------


@dataclass(frozen=True)
class Launch:
    """One kernel's work."""

    kernel: str
    blocks: int
    threads: int
    dynamic_shared: int = 0
    dram_bytes: float = 0
    l2_bytes: float = 0
    products: float = 0  # multiplications on tensor cores, padding included
    is_integer: bool = False
    bytes_in_flight: float = 0  # that a block has asked for and not yet got; 0: enough
    row_tiles: int = 0  # how often the weight is read
    bytes_read: float = 0  # of the weight and of x, by all blocks
    name: str = ""  # the kernel's, with template arguments, where its SASS counts


@dataclass(frozen=True)
class Tile:
    """Rows of x, columns of the result and depth of a step; warps; blocks that share a multiprocessor."""

    rows: int
    columns: int
    depth: int
    warps: int
    blocks: int

    @property
    def name(self) -> str:
        return f"Tile<{self.rows}, {self.columns}, {self.depth}, {self.warps}>"

    @property
    def slot_bytes(self) -> int:
        return self.rows * self.depth * 2 + self.columns * self.depth // 2

    def shared_bytes(self, slots: int) -> int:
        return max(slots * self.slot_bytes, self.rows * 48 + self.columns * 4, self.rows * (self.columns + 8) * 2)


TILES = {
    ("linear_w4a16", "slim"): Tile(16, 128, 128, 8, 2),
    ("linear_w4a16", "wide"): Tile(64, 256, 64, 8, 1),
    ("linear_dx", "slim"): Tile(16, 256, 64, 4, 4),
    ("linear_dx", "wide"): Tile(64, 256, 64, 4, 2),
}


def regime(M: int, weights: int, architecture: int) -> str:
    """The rules of dispatch.h."""
    if M <= 8:
        return "vector"
    if M <= 16 or (M <= 64 and weights <= 1 << 20):
        return "slim"
    most = 256 if 90 <= architecture <= 109 else 512
    return "dense" if M > most else "wide"


def split_reduction(tiles: int, steps: int, blocks: int) -> int:
    """Parts of the reduction."""
    wanted = min(max(min(blocks // max(tiles, 1), steps // 4), 1), 16)
    return ceil(steps / ceil(steps / wanted))


def weight_bytes(N: int, K: int) -> int:
    """Of the prepacked weight."""
    return ceil(N / 16) * ceil(K / 64) * 512


def launches(operator: str, M: int, N: int, K: int, gpu: Gpu) -> list[Launch]:
    """Of one call: 4 bits, float16, one scale a tensor, no outliers."""
    if operator == "linear_w4a8":
        return integer_launches(M, N, K, gpu)
    depth, columns = (K, N) if operator == "linear_w4a16" else (N, K)
    chosen = regime(M, N * K, gpu.architecture)
    if chosen == "dense":
        dense = Launch("dequantize_kernel", 1 << 20, 256, dram_bytes=N * K / 2 + N * K * 2)
        # The dense weight comes back from L2 where it fits, in whole or in part.
        left = max(0.0, N * K * 2 - gpu.l2_megabytes * 1e6 / 2)
        return [dense, cublas(M, N, K, weight_bytes=left)]
    if chosen == "vector" and operator == "linear_w4a16":
        return [vector_launch(M, N, K, gpu)]
    tile = TILES[operator, "slim" if chosen == "vector" else chosen]
    row_tiles, column_tiles = ceil(M / tile.rows), ceil(columns / tile.columns)
    parts = split_reduction(row_tiles * column_tiles, ceil(depth / tile.depth), gpu.multiprocessors * tile.blocks)
    slots = 2 if gpu.architecture < 80 else 4
    steps_of_all = row_tiles * column_tiles * ceil(depth / tile.depth)
    partial = parts * M * columns * 4 if parts > 1 else 0
    bytes_read = row_tiles * weight_bytes(N, K) + column_tiles * M * depth * 2
    suffix = ", false" if operator == "linear_dx" else ""
    main = Launch(
        f"{operator}_kernel",
        row_tiles * column_tiles * parts,
        tile.warps * WARP,
        tile.shared_bytes(slots),
        dram_bytes=N * K / 2 + M * depth * 2 + (M * columns * 2 if parts == 1 else 0),
        l2_bytes=bytes_read + partial,
        products=steps_of_all * tile.rows * tile.columns * tile.depth,
        bytes_in_flight=(slots - 1) * tile.slot_bytes,
        row_tiles=row_tiles,
        bytes_read=bytes_read,
        name=f"{operator}_kernel<__half, 4, {tile.name}{suffix}>",
    )
    if parts == 1:
        return [main]
    return [main, Launch("finish_kernel", max(1, M * columns // 512), 128, dram_bytes=M * columns * 2, l2_bytes=partial)]


def vector_launch(M: int, N: int, K: int, gpu: Gpu) -> Launch:
    is_double = M > 3 and N // 64 >= gpu.multiprocessors
    rows, chunks = (32 if is_double else 16), ceil(K / 64)
    slab = min(32768 // (M * 128) // 32 * 32, chunks)
    bytes_read = weight_bytes(N, K) + ceil(N / rows) * M * K * 2
    return Launch(
        "gemv_kernel",
        ceil(N / rows),
        256,
        max(slab * 128 * M, (8 * (8 * rows + 32) + rows * 17 + 128) * 4),
        dram_bytes=N * K / 2 + M * K * 2 + M * N * 2,
        l2_bytes=bytes_read,
        products=ceil(N / rows) * rows * chunks * 64 * 8,
        bytes_in_flight=8 * 4 * 512 * rows / 16,
        row_tiles=1,
        bytes_read=bytes_read,
        name=f"gemv_kernel<__half, {rows // 16}>",
    )


def integer_launches(M: int, N: int, K: int, gpu: Gpu) -> list[Launch]:
    """linear_w4a8 of one range a token, with the quantization of x before it."""
    quantize = Launch("quantize_activations_kernel", 1 << 20, 256, dram_bytes=M * K * 3)
    is_tile = M > 31
    if is_tile:
        rows, columns, slices, name = (64 if M <= 64 else 128), 128, 1, "linear_w4a8_tiles_kernel<{}, false>"
        padded_rows, step, shared = rows, 128, {64: 40960, 128: 57344}[rows]
        name, in_flight = name.format(rows), 2 * 8192 + rows * step
    else:
        token_tiles, strips, slices = (1, 1, 8) if M <= 7 else (2, 2, 4) if M <= 15 else (4, 4, 2)
        rows, columns, padded_rows, step, shared = 8 * token_tiles - 1, 16 * strips, 8 * token_tiles, 256 * slices, 0
        name, in_flight = f"linear_w4a8_strips_kernel<4, {token_tiles}, {strips}, {slices}>", 8 * 4 * 512 + padded_rows * step
    tiles = ceil(M / rows) * ceil(N / columns)
    pieces = max(1, min(gpu.multiprocessors // tiles, K // 1024))
    columns_of_piece = K if pieces == 1 else ceil(ceil(K / pieces) / 128) * 128
    pieces = ceil(K / columns_of_piece)
    steps = pieces * ceil(columns_of_piece / step)
    products = 0 if pieces == 1 else pieces * M * N * 4
    bytes_read = ceil(M / rows) * weight_bytes(N, K) + ceil(N / columns) * M * K
    main = Launch(
        name.split("<")[0],
        tiles * pieces,
        256,
        shared,
        dram_bytes=N * K / 2 + M * K + (M * N * 2 if pieces == 1 else 0),
        l2_bytes=bytes_read + products,
        products=tiles * steps * step * columns * padded_rows,
        is_integer=True,
        bytes_in_flight=in_flight,
        row_tiles=ceil(M / rows),
        bytes_read=bytes_read,
        name=name,
    )
    if pieces == 1:
        return [quantize, main]
    return [quantize, main, Launch("linear_w4a8_pieces_kernel", ceil(M / 8) * ceil(N / 128), 256, dram_bytes=M * N * 2, l2_bytes=products)]


def cublas(M: int, N: int, K: int, weight_bytes: float | None = None) -> Launch:
    """The ideal float16 product: every byte once, every multiplication at the full rate."""
    moved = (N * K * 2 if weight_bytes is None else weight_bytes) + (M * K + M * N) * 2
    return Launch("cublas", 1 << 20, 256, dram_bytes=moved, products=M * N * K)


# ---- what it takes -------------------------------------------------------------------------------------------------------------------------


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
        blocks = blocks_per_multiprocessor(gpu.architecture, kernel.registers, launch.threads, kernel.shared_bytes + launch.dynamic_shared)
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
    found = sum(count * size for opcode, count in kernel.main_loop.items() for shape, size in shapes.items() if opcode.startswith(f"{shape}."))
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


# ---- what is printed -----------------------------------------------------------------------------------------------------------------------


def rows(predictions: list[Prediction]) -> Iterator[str]:
    yield f"{LABEL}. speedup: over an ideal cuBLAS float16 of the same model"
    yield f"{'GPU':5} {'operator':13} {'M':>5} {'N x K':>12} {'us':>8} {'cuBLAS':>8} {'speedup':>8}  {'target':11} bound by"
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
    parser.add_argument("--operator", nargs="+", choices=["linear_w4a16", "linear_w4a8", "linear_dx"], default=["linear_w4a16", "linear_w4a8", "linear_dx"])
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
