"""The instructions of csrc/cuda/ptx.cuh and CUDA's intrinsics against the PTX manual, element by element: in the
emulator, and on a GPU where there is one.

Each wrapper has a small kernel in csrc/emulator/conformance.cu. What it must give is computed here, from the manual's
fragment layouts.
"""

import ctypes
import subprocess
from fractions import Fraction

import numpy as np
import pytest
import torch

from support import ROOT, emulated
from tools.tracing import aligned

LANES = np.arange(32)
G, Q = LANES // 4, LANES % 4  # the manual's groupID and threadID_in_group


@pytest.fixture(scope="module")
def on_gpu(tmp_path_factory) -> ctypes.CDLL:
    """The conformance kernels compiled by nvcc for the GPU at hand."""
    nvcc = emulated.nvcc()
    if not torch.cuda.is_available() or nvcc is None:
        pytest.skip("nvcc is not installed" if torch.cuda.is_available() else "cuda: no GPU")
    path = tmp_path_factory.mktemp("conformance") / "conformance.so"
    source = ROOT / "csrc" / "emulator" / "conformance.cu"
    subprocess.run(
        [nvcc, "-std=c++20", "-arch=native", "-shared", "-Xcompiler=-fPIC", str(source), "-o", str(path)],
        check=True,
        capture_output=True,
    )
    return emulated.c_functions(path)


@pytest.fixture(params=["emulated", pytest.param("cuda", marks=pytest.mark.cuda)])
def conform(request):
    """run(name, words (n, 32) uint32, rows of results) -> (rows, 32) uint32: word i of a row is lane i's. Emulated in
    several orders.
    """
    on_device = request.param == "cuda"
    if on_device:
        kernels, runs = request.getfixturevalue("on_gpu"), [None]
    else:
        library = request.getfixturevalue("emulated_library")
        kernels = emulated.c_functions(emulated.build(library.variant))
        options = emulated.load(library.variant).options
        request.addfinalizer(options)
        runs = [{"cp_async": "lazy"}, {"seed": 1, "cp_async": "eager"}, {"seed": 2, "cp_async": "random"}]

    def run(name: str, words: np.ndarray, rows: int) -> np.ndarray:
        results = []
        for choice in runs:
            if choice is not None:
                options(**choice)
            buffer = aligned(torch.from_numpy(np.ascontiguousarray(words, dtype=np.uint32).view(np.int32)))
            result = aligned(torch.full((rows, 32), -1, dtype=torch.int32))
            if on_device:
                buffer, result = buffer.cuda(), result.cuda()
            error = kernels.prequant_conformance(
                name.encode(), ctypes.c_void_p(buffer.data_ptr()), ctypes.c_void_p(result.data_ptr())
            )
            assert error is None, error
            results.append(result.cpu().numpy().view(np.uint32))
        assert all(np.array_equal(result, results[0]) for result in results[1:])
        return results[0]

    return run


def random_words(seed: int, rows: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**32, (rows, 32), dtype=np.uint32)


def pack_16(low: np.ndarray, high: np.ndarray) -> np.ndarray:
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def bits_16(values: np.ndarray, dtype: str) -> np.ndarray:
    return (
        values.astype(np.float16).view(np.uint16)
        if dtype == "half"
        else (values.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    )


def fragment_16(matrix: np.ndarray, row_halves: int) -> np.ndarray:
    """Registers of A (rows, k) of 16-bit elements, manual: a0,a1 row g, column 2q + i; a2,a3 row g + 8; a4.. column +
    8.
    """
    registers = []
    for k in range(0, matrix.shape[1], 8):
        for half in range(row_halves):
            registers.append(pack_16(matrix[G + 8 * half, k + 2 * Q], matrix[G + 8 * half, k + 2 * Q + 1]))
    return np.stack(registers)


def fragment_8(matrix: np.ndarray, row_halves: int) -> np.ndarray:
    """Registers of A (rows, k) of bytes, manual: a0..a3 row g, column 4q + i; a4..a7 row g + 8; a8.. column + 16."""
    registers = []
    for k in range(0, matrix.shape[1], 16):
        for half in range(row_halves):
            columns = [
                matrix[G + 8 * half, k + 4 * Q + i].astype(np.uint8).astype(np.uint32) << (8 * i) for i in range(4)
            ]
            registers.append(columns[0] | columns[1] | columns[2] | columns[3])
    return np.stack(registers)


def fragment_d(matrix: np.ndarray) -> np.ndarray:
    """Registers of C and D (rows, 8), manual: c0,c1 row g, column 2q + i; c2,c3 row g + 8."""
    return np.stack(
        [matrix[G + 8 * half, 2 * Q + i].view(np.uint32) for half in range(matrix.shape[0] // 8) for i in range(2)]
    )


@pytest.mark.parametrize(
    ("name", "dtype", "k"),
    [("mma_m16n8k16_half", "half", 16), ("mma_m16n8k16_bfloat16", "bfloat16", 16), ("mma_m16n8k8", "half", 8)],
)
def test_mma_of_floats(name, dtype, k, conform):
    """Small integers over powers of two: every order of the sums gives the same bits."""
    random = np.random.default_rng(k)
    a, b = random.integers(-31, 32, (16, k)) / 8, random.integers(-31, 32, (k, 8)) / 4
    c = (random.integers(-999, 1000, (16, 8)) / 32).astype(np.float32)
    words = np.concatenate([fragment_d(c), fragment_16(bits_16(a, dtype), 2), fragment_16(bits_16(b.T, dtype), 1)])
    assert np.array_equal(conform(name, words, 4), fragment_d((a @ b + c).astype(np.float32)))


@pytest.mark.parametrize(("rows", "k"), [(16, 32), (8, 16)])
@pytest.mark.parametrize("signs", ["s8u8", "u8s8"])
def test_mma_of_bytes(signs, rows, k, conform):
    """All bytes, and sums that leave int32 and come back."""
    random = np.random.default_rng(rows)
    low = {"s": -128, "u": 0}
    a, b = (
        random.integers(low[sign], low[sign] + 256, shape)
        for sign, shape in ((signs[0], (rows, k)), (signs[2], (k, 8)))
    )
    c = random.integers(-(2**31), 2**31, (rows, 8)).astype(np.int32)
    expected = (a @ b + c).astype(np.int64).astype(np.uint32)
    words = np.concatenate([fragment_d(c), fragment_8(a, rows // 8), fragment_8(b.T, 1)])
    assert np.array_equal(conform(f"mma_m{rows}n8k{k}_{signs}", words, rows // 4), fragment_d(expected))


@pytest.mark.parametrize("matrices", [2, 4])
@pytest.mark.parametrize("is_transposed", [False, True], ids=["", "trans"])
def test_ldmatrix(is_transposed, matrices, conform):
    words = random_words(matrices, 4)
    rows = words.reshape(-1).view(np.uint16).reshape(4, 8, 8)  # row r of matrix m: 16 bytes
    expected = []
    for matrix in rows[:matrices]:
        stored = matrix.T if is_transposed else matrix
        expected.append(pack_16(stored[G, 2 * Q], stored[G, 2 * Q + 1]))
    name = f"ldmatrix_x{matrices}" + "_trans" * is_transposed
    assert np.array_equal(conform(name, words, matrices), np.stack(expected))


def test_movmatrix_transposes_what_lies_in_registers(conform):
    matrix = np.random.default_rng(1).integers(0, 2**16, (8, 8), dtype=np.uint16)
    words = pack_16(matrix[G, 2 * Q], matrix[G, 2 * Q + 1])
    assert np.array_equal(
        conform("movmatrix_trans", words[None], 1)[0], pack_16(matrix.T[G, 2 * Q], matrix.T[G, 2 * Q + 1])
    )


@pytest.mark.parametrize("name", ["cp_async_16", "cp_async_16_evict_first"])
def test_cp_async_fills_the_rest_with_zeros(name, conform):
    words = random_words(3, 4)
    expected = words.reshape(-1).view(np.uint8).reshape(32, 16).copy()
    for lane in range(32):
        expected[lane, lane // 2 :] = 0
    assert np.array_equal(conform(name, words, 4), expected.view(np.uint32).T)


def test_shared_address_counts_bytes(conform):
    assert np.array_equal(conform("shared_address", random_words(4, 1), 1)[0], 16 * LANES)


def test_lop3(conform):
    a, b, c = words = random_words(5, 3)
    of_0x1b = (~a & ~b) | (~a & b & c) | (a & ~b & ~c)  # abc = 000, 001, 011, 100
    assert np.array_equal(conform("lop3", words, 4), np.stack([(a & b) | c, a ^ b ^ c, (a & b) | (~a & c), of_0x1b]))


def test_prmt(conform):
    a, b, selector = words = random_words(6, 3)
    expected = np.zeros(32, np.uint32)
    for lane in range(32):
        source = [int(a[lane]) >> (8 * i) & 255 for i in range(4)] + [int(b[lane]) >> (8 * i) & 255 for i in range(4)]
        for i in range(4):
            nibble = int(selector[lane]) >> (4 * i) & 15
            byte = source[nibble & 7]
            expected[lane] |= np.uint32(((byte >> 7) * 255 if nibble & 8 else byte) << (8 * i))
    assert np.array_equal(conform("prmt", words, 1)[0], expected)


def test_integer_intrinsics(conform):
    words = random_words(7, 3)
    words[:, 0] = 0
    a, b, c = (word.astype(np.int64) for word in words)
    sa, sb = (word.view(np.int32).astype(np.int64) for word in words[:2])
    bytes_of = [
        (word.view(np.uint8).reshape(32, 4).astype(np.int64), word.view(np.int8).reshape(32, 4).astype(np.int64))
        for word in words[:2]
    ]
    low = np.array([(x & -x).bit_length() for x in a.tolist()])
    funnel = [(int(y) << 32) + int(x) for x, y in zip(a, b, strict=True)]
    shift = (c & 31).tolist()
    expected = [
        np.array([bin(x).count("1") for x in a.tolist()]),
        low,
        np.array([32 - x.bit_length() for x in a.tolist()]),
        (bytes_of[0][1] * bytes_of[1][1]).sum(1) + c,
        (bytes_of[0][0] * bytes_of[1][0]).sum(1) + c,
        np.array([x * y >> 32 for x, y in zip(a.tolist(), b.tolist(), strict=True)]),
        np.array([x * y >> 32 for x, y in zip(sa.tolist(), sb.tolist(), strict=True)]),
        np.array([x >> s & 0xFFFFFFFF for x, s in zip(funnel, shift, strict=True)]),
        np.array([x << s >> 32 & 0xFFFFFFFF for x, s in zip(funnel, shift, strict=True)]),
        np.minimum(sa, sb),
        np.maximum(a, b),
        a[b % 32],
        a[LANES ^ 5],
        a[np.where(LANES + 3 < 32, LANES + 3, LANES)],
        a[np.where(LANES >= 7, LANES - 7, LANES)],
        a[LANES ^ 1],
        a[np.where(LANES % 8 + 3 < 8, LANES + 3, LANES)],
        np.full(32, ((a & 1) << LANES).sum()),
        np.full(32, 1),
        np.full(32, 0),
        np.full(32, a.sum()),
        np.full(32, a.max()),
        np.full(32, a.min()),
    ]
    actual = conform("integer_intrinsics", words, len(expected))
    for row, values in enumerate(expected):
        assert np.array_equal(actual[row], (values & 0xFFFFFFFF).astype(np.uint32)), row


def test_atomics(conform):
    words = random_words(8, 1)
    total = int(words.astype(np.int64).sum()) & 0xFFFFFFFF
    assert conform("atomics", words, 1)[0, :4].tolist() == [32, total, words.max(), words.min()]


def rounded(value: Fraction, bits: int, smallest: int) -> Fraction:
    """value to the nearest number of `bits` significant bits that is a multiple of 2^smallest; ties to even."""
    if value == 0:
        return value
    exponent = max(value.numerator.bit_length() - value.denominator.bit_length() - bits - 1, smallest)
    while abs(value) / Fraction(2) ** exponent >= 2**bits:
        exponent += 1
    return Fraction(round(value / Fraction(2) ** exponent)) * Fraction(2) ** exponent  # round() takes ties to even


def test_float_intrinsics_round_once(conform):
    random = np.random.default_rng(9)
    x, y, z = (random.standard_normal((3, 32)) * 2.0 ** random.integers(-20, 20, (3, 32))).astype(np.float32)
    z[:16] = (-x * y)[:16] * np.float32(1.0000001)  # the sum cancels: a product rounded by itself would show
    # ties; numbers below the normal range
    x[16:20], y[16:20] = [0.5, 1.5, -2.5, 2**-140], [2**-130, -(2**-126), 3e-45, 2.0]
    x[20:22] = [3e9, -3e9]

    def fused(a: np.ndarray, b: np.ndarray, c: np.ndarray, bits: int, smallest: int) -> list[float]:
        return [
            float(rounded(Fraction(float(i)) * Fraction(float(j)) + Fraction(float(k)), bits, smallest))
            for i, j, k in zip(a, b, c, strict=True)
        ]

    u, v, w = x.astype(np.float64) * 1.000000059604644775390625, y.astype(np.float64), z.astype(np.float64) / 3
    with np.errstate(over="ignore"):
        quotient, reciprocal = x / y, 1 / x
    singles = [
        x + y,
        x - y,
        x * y,
        quotient,
        reciprocal,
        np.sqrt(np.abs(x)),
        np.array(fused(x, y, z, 24, -149), np.float32),
        np.rint(x),
        np.fmin(x, y),
        np.fmax(x, y),
    ]
    whole = np.clip(np.rint(x.astype(np.float64)), -(2**31), 2**31 - 1).astype(np.int32)
    doubles = [u + v, u - v, u * w, u / v, np.sqrt(np.abs(u)), np.array(fused(u, v, w, 53, -1074)), np.rint(u)]
    expected = [np.asarray(values, np.float32).view(np.uint32) for values in singles] + [whole.view(np.uint32)]
    for values in doubles:
        pairs = values.view(np.uint32).reshape(32, 2)
        expected += [pairs[:, 0], pairs[:, 1]]
    expected.append((np.rint(u).astype(np.int64) >> 16).astype(np.uint32))
    actual = conform("float_intrinsics", np.stack([x, y, z]).view(np.uint32), len(expected))
    for row, values in enumerate(expected):
        assert np.array_equal(actual[row], values), row


@pytest.mark.parametrize(("name", "bits", "smallest"), [("half2", 11, -24), ("bfloat162", 8, -133)])
def test_pairs_of_16_bit_floats_round_once(name, bits, smallest, conform):
    random = np.random.default_rng(bits)
    dtype = "half" if name == "half2" else "bfloat16"

    def values_of(words: np.ndarray) -> np.ndarray:
        halves = words.view(np.uint16)
        return (
            halves.view(np.float16) if dtype == "half" else (halves.astype(np.uint32) << 16).view(np.float32)
        ).astype(np.float64)

    numbers = random.standard_normal((3, 64)) * 2.0 ** random.integers(-6, 6, (3, 64))
    numbers[2, :32] = -(numbers[0] * numbers[1])[:32]  # the sum cancels
    numbers[2, 32:48] *= 2.0**-12  # and is a little more or less than a tie
    words = bits_16(numbers, dtype).reshape(3, 32, 2)
    words = pack_16(words[..., 0], words[..., 1])
    x, y, z = (values_of(row).tolist() for row in words)
    exact = [
        [Fraction(i) + Fraction(j) for i, j in zip(x, y, strict=True)],
        [Fraction(i) - Fraction(j) for i, j in zip(x, y, strict=True)],
    ]
    exact += [
        [Fraction(i) * Fraction(j) for i, j in zip(x, y, strict=True)],
        [Fraction(i) * Fraction(j) + Fraction(k) for i, j, k in zip(x, y, z, strict=True)],
    ]
    actual = conform(f"{name}_intrinsics", words, 4)
    for row, values in zip(actual, exact, strict=True):
        assert values_of(row).tolist() == [float(rounded(value, bits, smallest)) for value in values]
