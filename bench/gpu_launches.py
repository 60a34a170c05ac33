"""GPUs, and the kernels that an operator's call would launch on them: csrc/cuda/dispatch.h and the launchers, told in
Python.

test_cuda_traffic.py compares with the launches on the emulator.
"""

# ruff: noqa: SIM300  M, N and K are sizes, not constants
from dataclasses import dataclass
from math import ceil

WARP = 32


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
    # NVIDIA H100 datasheet, SXM5. mma.sync reaches 62.9 % of what wgmma does: "Benchmarking and Dissecting the Nvidia
    # Hopper GPU Architecture", arXiv 2402.13499.
    Gpu("H100", 90, 132, 1.83, 3350, 989.4, 1979, 50, mma_share=0.629),
]


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
    return [
        main,
        Launch("finish_kernel", max(1, M * columns // 512), 128, dram_bytes=M * columns * 2, l2_bytes=partial),
    ]


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
        name, in_flight = (
            f"linear_w4a8_strips_kernel<4, {token_tiles}, {strips}, {slices}>",
            8 * 4 * 512 + padded_rows * step,
        )
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
    return [
        quantize,
        main,
        Launch("linear_w4a8_pieces_kernel", ceil(M / 8) * ceil(N / 128), 256, dram_bytes=M * N * 2, l2_bytes=products),
    ]


def cublas(M: int, N: int, K: int, weight_bytes: float | None = None) -> Launch:
    """The ideal float16 product: every byte once, every multiplication at the full rate."""
    moved = (N * K * 2 if weight_bytes is None else weight_bytes) + (M * K + M * N) * 2
    return Launch("cublas", 1 << 20, 256, dram_bytes=moved, products=M * N * K)
