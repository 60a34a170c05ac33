"""The CUDA kernels without a GPU: what nvcc makes of them, and their own source run on the CPU against the reference."""

import ctypes
import re
import subprocess
from pathlib import Path

import pytest
import torch
from torch import Tensor

from prequant_ext import reference

ROOT = Path(__file__).parent.parent
CUDA = ROOT / "csrc" / "cuda"
SOURCES = sorted(path.name for path in CUDA.glob("*.cu"))
KERNELS = [name for name in SOURCES if "__global__" in (CUDA / name).read_text()]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of Dtype in kernels.h

WIDE = {  # file, mangled template arguments of the kernels with 128-bit accesses, which access, how many kernels
    "pack": ("pack.cu", "11pack_kernelILi.ELb1E", "ld", 3),
    "unpack": ("pack.cu", "13unpack_kernelILi.ELb1E", "st", 3),
    "dequantize": ("dequantize.cu", "17dequantize_kernelI.*Li[248]ELi[48]E", "st", 9),
}

# ---- what nvcc makes of them ---------------------------------------------------------------------------------------------------------------


def test_there_are_kernels():
    assert {"pack.cu", "dequantize.cu"} <= set(KERNELS)


@pytest.fixture(scope="module")
def compiled(nvcc: str, tmp_path_factory: pytest.TempPathFactory):
    """name -> (ptxas report, PTX), each file compiled once for sm_80."""
    cache: dict[str, tuple[str, str]] = {}

    def compile_(name: str) -> tuple[str, str]:
        if name not in cache:
            folder = tmp_path_factory.mktemp(name.replace(".", "_"))
            command = [nvcc, "-std=c++20", "-O3", "-lineinfo", "-arch=sm_80", "-Xptxas=-v,--warn-on-spills,--warn-on-local-memory-usage"]
            command += ["-Xcompiler=-Wall,-Wextra", "-DPREQUANT_CUDA", '-DPREQUANT_CUDA_ARCHITECTURES="8.0"', "--keep", "--keep-dir", str(folder)]
            done = subprocess.run([*command, "-c", str(CUDA / name), "-o", str(folder / "out.o")], capture_output=True, text=True)
            assert done.returncode == 0, done.stderr
            cache[name] = (done.stderr, (folder / name).with_suffix(".ptx").read_text())
        return cache[name]

    return compile_


@pytest.mark.slow
@pytest.mark.parametrize("name", SOURCES)
def test_compiles_without_warnings_spills_or_local_memory(name, compiled):
    report, _ = compiled(name)
    assert not re.search(r"\bwarning\b", report), report
    frames = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert len(frames) == report.count("Compiling entry function")
    assert (len(frames) > 0) == (name in KERNELS)
    assert all(frame == ("0", "0", "0") for frame in frames), report


@pytest.mark.slow
@pytest.mark.parametrize(("name", "wide", "access", "count"), WIDE.values(), ids=WIDE.keys())
def test_wide_kernels_move_128_bits_at_a_time(name, wide, access, count, compiled):
    _, ptx = compiled(name)
    bodies = [body for body in ptx.split(".entry ")[1:] if re.search(wide, body.split("(")[0])]
    assert len(bodies) == count
    assert all(re.search(rf"{access}\.global(\.nc)?\.v4\.[a-z]32", body) for body in bodies)


@pytest.mark.parametrize("name", KERNELS)
def test_head_comment_says_what_a_reader_needs(name):
    """Formula and the reference that gives it meaning, what the kernel requires, what limits it."""
    head = (CUDA / name).read_text().split("#include")[0]
    for part in ("Meaning: reference.", "Requires", "Limited by"):
        assert part in head, f"{name} has no {part!r} in its head comment"


# ---- the same source on the CPU ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def kernels(nvcc: str, tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    """The kernels compiled by g++, one thread after another; misaligned accesses and overflows abort."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.*)$", dry_run, re.M)
    assert top
    library = tmp_path_factory.mktemp("cuda_on_cpu") / "kernels.so"
    here = Path(__file__).parent / "cuda_on_cpu"
    sanitize = ["-fsanitize=undefined", "-fno-sanitize-recover=all", "-static-libubsan"]
    command = ["g++", "-std=c++20", "-O1", "-fPIC", "-shared", *sanitize, "-Wno-unknown-pragmas", f"-I{here}", "-isystem", f"{top[1].strip()}/include"]
    done = subprocess.run([*command, str(here / "kernels_on_cpu.cpp"), "-o", str(library)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(library))


GUARD = 64  # bytes around a result that no kernel may touch
FILL = 0xA5


def _result(rows: int, cols: int, dtype: torch.dtype, offset: int = 0) -> tuple[Tensor, Tensor]:
    """A (rows, cols) result inside a guarded buffer, `offset` bytes off alignment."""
    size = rows * cols * dtype.itemsize
    buffer = torch.full((GUARD + offset + size + GUARD,), FILL, dtype=torch.uint8)
    return buffer, buffer[GUARD + offset : GUARD + offset + size].view(dtype).view(rows, cols)


def _assert_guarded(buffer: Tensor, size: int, offset: int = 0) -> None:
    assert (buffer[: GUARD + offset] == FILL).all() and (buffer[GUARD + offset + size :] == FILL).all(), "wrote outside its result"


def _at(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


def _int64(*values: int) -> list[ctypes.c_int64]:
    return [ctypes.c_int64(value) for value in values]


SHAPES = {
    "one code": (1, 1),
    "ragged bytes": (5, 7),
    "ragged, more than a block": (3, 1037),
    "wide, several rows a block": (19, 48),
    "wide, bert": (9, 768),
    "wide, more chunks than a block": (2, 16 * 300),
    "even but not wide": (7, 130),
    "no rows": (0, 16),
    "no columns": (4, 0),
}


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_pack_and_unpack_match_the_reference(shape, offset, bits, kernels):
    N, K = shape
    codes = torch.randint(0, 2**bits, shape, generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    expected = reference.pack(codes, bits)
    buffer, packed = _result(*expected.shape, torch.uint8, offset)
    kernels.run_pack(_at(codes), *_int64(N, K), bits, _at(packed))
    assert torch.equal(packed, expected)
    _assert_guarded(buffer, packed.numel(), offset)

    buffer, unpacked = _result(N, K, torch.uint8, offset)
    kernels.run_unpack(_at(packed), *_int64(N, K), bits, _at(unpacked))
    assert torch.equal(unpacked, codes)
    _assert_guarded(buffer, N * K, offset)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("groups", ["tensor", "row", 2, 6], ids=lambda groups: f"{groups} groups" if isinstance(groups, int) else f"per {groups}")
@pytest.mark.parametrize("shape", [(1, 6), (5, 66), (17, 96), (9, 768), (2, 3072), (3, 1038)], ids=str)
def test_dequantize_matches_the_reference(shape, groups, bits, dtype, kernels):
    """Chunks of 128 bits and single values, groups that a chunk divides and groups that it does not, all rows and a range of them."""
    N, K = shape
    generator = torch.Generator().manual_seed(1)
    blocks = {"tensor": (1, 1), "row": (N, 1)}.get(groups, (N, groups))
    codes = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    scale = torch.rand(blocks, generator=generator) + 0.01
    zero_point = torch.randint(0, 2**bits, blocks, generator=generator, dtype=torch.uint8)
    packed = reference.pack(codes, bits)
    for row_begin, row_end in {(0, N), (N // 2, N), (N // 3, N // 2), (0, 0)}:
        expected = reference.dequantize(packed, scale, zero_point, K, bits, dtype, row_begin, row_end)
        buffer, dense = _result(row_end - row_begin, K, dtype)
        sizes = _int64(N, K, *blocks)
        kernels.run_dequantize(_at(packed), _at(scale), _at(zero_point), *sizes, bits, *_int64(row_begin, row_end - row_begin), DTYPES.index(dtype), _at(dense))
        assert torch.equal(dense, expected)
        _assert_guarded(buffer, dense.numel() * dtype.itemsize)


def test_dequantize_rounds_to_half_as_torch_does(kernels):
    """float16 overflows to infinity and reaches its subnormals; ties go to even."""
    codes = torch.arange(256, dtype=torch.uint8).repeat(4, 1)
    scale = torch.tensor([[1e4], [1e-7], [2.0**-9 + 2.0**-20], [1 / 3]])
    zero_point = torch.full((4, 1), 128, dtype=torch.uint8)
    for dtype in DTYPES:
        _, dense = _result(4, 256, dtype)
        sizes = _int64(4, 256, 4, 1)
        kernels.run_dequantize(_at(codes), _at(scale), _at(zero_point), *sizes, 8, *_int64(0, 4), DTYPES.index(dtype), _at(dense))
        assert torch.equal(dense, reference.dequantize(codes, scale, zero_point, 256, 8, dtype))
