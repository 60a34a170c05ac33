"""What nvcc makes of the CUDA kernels for every architecture: resources within csrc/cuda/budgets.toml, and the
instructions that their speed hangs on.

Read from the built library; what that lacks is compiled, which takes minutes the first time (tools/cubins.py). Needs
nvcc, not a GPU.
"""

import re
import subprocess
from pathlib import Path

import pytest

from prequant_ext import doctor
from support import ROOT
from tools import cubins as gate
from tools.budgets import MULTIPROCESSORS, blocks_per_multiprocessor, find_budget, read_budgets
from tools.cubins import ARCHITECTURES, SOURCES, Cubin, Kernel

# kernels that several sources launch stand in headers
FILES = [*SOURCES, *sorted((ROOT / "csrc" / "cuda").glob("*.cuh"))]
pytestmark = [pytest.mark.gate, pytest.mark.slow, pytest.mark.timeout(2400)]
each_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES, ids="sm_{}".format)


@pytest.fixture(scope="session")
def cubins() -> list[Cubin]:
    """Every kernel for every architecture. No nvcc is a reason to skip; nvcc without the tools that read its output is
    a failure.
    """
    if gate.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    try:
        return gate.all_cubins()
    except gate.MissingToolError as error:
        pytest.fail(str(error))


@pytest.fixture
def kernels(cubins: list[Cubin], architecture: int) -> list[Kernel]:
    return [kernel for cubin in cubins if cubin.architecture == architecture for kernel in cubin.kernels]


def test_the_built_library_is_what_is_read(cubins):
    """Whole, for each architecture that it says it was built for: what is gated is what users run."""
    named = {int(entry.removesuffix("+PTX").replace(".", "")) for entry in doctor.build_info()["architectures"]}
    built = {(cubin.source, cubin.architecture) for cubin in gate.library_cubins()}
    if not built:
        pytest.skip("the library is older than the sources, or was built without CUDA")
    assert built == {(cubin.source, cubin.architecture) for cubin in cubins if cubin.architecture in named}
    assert {cubin.source for cubin in cubins} == {source.name for source in SOURCES}


# ---- resources -------------------------------------------------------------------------------------------------------


def test_every_kernel_of_the_sources_is_compiled(cubins):
    declared = {
        name
        for source in FILES
        for name in re.findall(r"\b(\w+_kernel)\(", _without_comments(source))
        if "__global__" in source.read_text()
    }
    compiled = {kernel.function for cubin in cubins for kernel in cubin.kernels}
    assert compiled and compiled <= declared
    assert not {name for name in declared if _is_defined(name)} - compiled


def _without_comments(source: Path) -> str:
    return re.sub(r"//.*", "", source.read_text())


def _is_defined(kernel: str) -> bool:
    return any(re.search(rf"__global__[^;{{]*?\b{kernel}\(", _without_comments(source)) for source in FILES)


@each_architecture
def test_no_warning_and_no_local_memory(cubins, architecture):
    for cubin in cubins:
        if cubin.architecture != architecture:
            continue
        assert not re.search(r"\bwarning\b", cubin.warnings, re.I), f"{cubin.source}: {cubin.warnings}"
        for kernel in cubin.kernels:
            assert kernel.local_bytes == 0, f"{kernel.name} has {kernel.local_bytes} bytes of stack"
            assert kernel.count(r"LDL|STL") == 0, f"{kernel.name} reads or writes local memory"


@each_architecture
def test_resources_and_occupancy_are_within_the_budgets(kernels, architecture):
    budgets = read_budgets()
    for kernel in kernels:
        budget = find_budget(budgets, kernel)
        assert budget, f"csrc/cuda/budgets.toml has no entry for {kernel.name}: make budgets"
        assert kernel.registers <= budget.registers[architecture], f"{kernel.name} takes {kernel.registers} registers"
        assert kernel.shared_bytes <= budget.shared[architecture], (
            f"{kernel.name} takes {kernel.shared_bytes} bytes of static shared memory"
        )
        blocks = budget.fitting_blocks(architecture, kernel.registers, kernel.shared_bytes)
        assert blocks >= max(1, budget.blocks[architecture]), (
            f"only {blocks} blocks of {kernel.name} fit on a multiprocessor"
        )


def test_every_budget_is_of_a_kernel_that_exists(cubins):
    budgets = read_budgets()
    used = {found.pattern for cubin in cubins for kernel in cubin.kernels if (found := find_budget(budgets, kernel))}
    assert set(budgets) == used


def test_occupancy_is_that_of_cudas_own_calculator(tmp_path):
    """cuda_occupancy.h is host code of the toolkit; the device's properties are ours to state."""
    include = _cuda_include()
    cases = [
        (architecture, registers, threads, shared)
        for architecture in ARCHITECTURES
        for registers in (24, 40, 128, 168, 210, 255)
        for threads in (32, 96, 128, 256)
        for shared in (0, 1000, 20480, 49152, 65536)
    ]
    lines = []
    for architecture, registers, threads, shared in cases:
        limits = MULTIPROCESSORS[architecture]
        properties = [
            architecture // 10,
            architecture % 10,
            limits.threads,
            limits.shared_bytes,
            limits.block_shared_bytes,
            limits.reserved_shared_bytes,
        ]
        lines.append(f"    blocks({', '.join(map(str, [*properties, registers, threads, shared]))});")
    source = tmp_path / "occupancy.cpp"
    source.write_text(_OCCUPANCY.replace("CASES", "\n".join(lines)))
    subprocess.run(
        ["g++", "-std=c++17", "-isystem", str(include), str(source), "-o", str(tmp_path / "occupancy")], check=True
    )
    answers = subprocess.run([str(tmp_path / "occupancy")], capture_output=True, text=True, check=True).stdout.split()
    for case, answer in zip(cases, answers, strict=True):
        assert blocks_per_multiprocessor(*case) == int(answer), case


_OCCUPANCY = """
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
void blocks(int major, int minor, int threads_limit, size_t shared_limit, size_t block_limit, size_t reserved,
            int registers, int threads, size_t shared) {
    cudaOccDeviceProp device{};
    device.computeMajor = major, device.computeMinor = minor, device.warpSize = 32, device.numSms = 1;
    device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = threads_limit;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = shared_limit;
    device.sharedMemPerBlockOptin = block_limit, device.reservedSharedMemPerBlock = reserved;
    cudaOccFuncAttributes function{};
    function.maxThreadsPerBlock = INT_MAX, function.numRegs = registers;
    function.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    function.maxDynamicSharedSizeBytes = block_limit;
    cudaOccDeviceState state{};
    cudaOccResult result{};
    const cudaOccError error =
        cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, shared);
    std::printf("%d\\n", error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1);
}
int main() {
CASES
}
"""


def _cuda_include() -> Path:
    nvcc = gate.find_nvcc()
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    top = re.search(
        r"^#\$ TOP=(.*)$",
        subprocess.run([nvcc, "--dryrun", "-x", "cu", "/dev/null"], capture_output=True, text=True).stderr,
        re.M,
    )
    assert top
    return Path(top[1].strip()) / "include"


# ---- instructions ----------------------------------------------------------------------------------------------------

# file, kernels by name, SASS opcode, from which architecture on
HALF, BFLOAT16 = r"_kernel<__half", r"_kernel<__nv_bfloat16"
PROMISED = {
    "pack reads 128 bits": ("pack.cu", r"pack_kernel<\d, true>", r"LDG\.E\..*128", 75),
    "unpack writes 128 bits": ("pack.cu", r"unpack_kernel<\d, true>", r"STG\.E\..*128", 75),
    "prepack reads 128 bits": ("prepack.cu", r"(un)?prepack_kernel<[48], true>", r"LDG\.E\..*128", 75),
    "prepack writes 128 bits": ("prepack.cu", r"(un)?prepack_kernel<[48], true>", r"STG\.E\..*128", 75),
    "dequantize writes 128 bits": ("dequantize.cu", r"dequantize(_chunks)?_kernel<.*, [48]>$", r"STG\.E\..*128", 75),
    "quantize_pack reads 128 bits": ("quantize_pack.cu", r"quantize_pack_kernel<.*, true>", r"LDG\.E\..*128", 75),
    "outlier_counts reads 128 bits": ("outlier_counts.cu", r"outlier_counts_kernel<.*, true>", r"LDG\.E\..*128", 75),
    "weight_stats copies asynchronously": (
        "weight_stats.cu",
        r"weight_stats_kernel<.*, true>",
        r"LDGSTS\.E\..*128",
        80,
    ),
    "gemv reads 128 bits": ("linear_w4a16.cu", rf"gemv{HALF}", r"LDG\.E\..*128", 75),
    "simt reads 128 bits": ("linear_w4a16.cu", r"simt_kernel<[48]", r"LDG\.E\..*128", 75),
    "linear_w4a16 multiplies float16 on tensor cores": ("linear_w4a16.cu", rf"(gemv|linear_w4a16){HALF}", r"HMMA", 75),
    "linear_w4a16 multiplies bfloat16 on tensor cores": (
        "linear_w4a16.cu",
        rf"(gemv|linear_w4a16){BFLOAT16}",
        r"HMMA.*BF16",
        80,
    ),
    "linear_w4a16 copies asynchronously": ("linear_w4a16.cu", r"(gemv|linear_w4a16)_kernel", r"LDGSTS\.E\..*128", 80),
    "linear_w4a16 reads fragments by ldmatrix": ("linear_w4a16.cu", rf"(gemv|linear_w4a16){HALF}", r"LDSM", 75),
    "linear_dx multiplies float16 on tensor cores": ("linear_dx.cu", rf"linear_dx{HALF}", r"HMMA", 75),
    "linear_dx multiplies bfloat16 on tensor cores": ("linear_dx.cu", rf"linear_dx{BFLOAT16}", r"HMMA.*BF16", 80),
    "linear_dx copies asynchronously": ("linear_dx.cu", r"linear_dx_kernel", r"LDGSTS\.E\..*128", 80),
    "linear_dx transposes words": ("linear_dx.cu", rf"linear_dx{HALF}", r"MOVM", 75),
    "linear_w4a8 multiplies integers on tensor cores": (
        "linear_w4a8.cu",
        r"linear_w4a8_(strips|tiles)_kernel",
        r"IMMA.*U8",
        75,
    ),
    "linear_w4a8 copies asynchronously": ("linear_w4a8.cu", r"linear_w4a8_tiles_kernel", r"LDGSTS\.E\..*128", 80),
    "linear_w4a8 reads 128 bits": ("linear_w4a8.cu", r"linear_w4a8_(strips_kernel<[48]|tiles)", r"LDG\.E\..*128", 75),
    "scale_grad reads 128 bits": ("scale_grad.cu", r"scale_grad_kernel", r"LDG\.E\..*128", 75),
}


@pytest.mark.parametrize(("source", "name", "opcode", "since"), PROMISED.values(), ids=PROMISED.keys())
def test_promised_instructions_are_there(source, name, opcode, since, cubins):
    for cubin in cubins:
        if cubin.source != source or cubin.architecture < since:
            continue
        matching = [kernel for kernel in cubin.kernels if re.match(name, kernel.name)]
        assert matching, f"{source} has no kernel {name}"
        for kernel in matching:
            assert kernel.count(opcode), f"{kernel.name} for sm_{cubin.architecture} has no {opcode}"


# Kernel, and the weights of a lane in one turn of its main loop.
MAIN_LOOPS = {
    "linear_w4a16, few tokens": ("linear_w4a16_kernel<{}, 4, Tile<16, 128, 128, 8>>", 64),
    "linear_w4a16, more tokens": ("linear_w4a16_kernel<{}, 4, Tile<64, 256, 64, 8>>", 64),
    "linear_dx, few tokens": ("linear_dx_kernel<{}, 4, Tile<16, 256, 64, 4>, false>", 128),
    "linear_dx, more tokens": ("linear_dx_kernel<{}, 4, Tile<64, 256, 64, 4>, false>", 128),
}


@each_architecture
@pytest.mark.parametrize(("name", "weights"), MAIN_LOOPS.values(), ids=MAIN_LOOPS.keys())
@pytest.mark.parametrize("dtype", ["__half", "__nv_bfloat16"])
def test_main_loop_is_the_dequantization_and_little_else(dtype, name, weights, kernels, architecture):
    """Logic and half-precision instructions: those that the weights of a turn take, and an eighth more."""
    if dtype == "__nv_bfloat16" and architecture < 80:
        return
    kernel = next(kernel for kernel in kernels if kernel.name == name.format(dtype))
    is_transposed, is_bfloat16 = "dx" in name, dtype != "__half"
    limit = (44 if is_bfloat16 else 36) + (4 if is_transposed else 0)
    taken = kernel.count(r"LOP3|SHF|HFMA2|HADD2|HMUL2|PRMT|MOVM", main_loop=True)
    assert taken <= 1.125 * limit * weights / 32, kernel.main_loop


PROBES = Path(__file__).with_name("probes")
# Kernel of a probe file, how many instructions 32 weights may take, from which architecture on.
DEQUANTIZATION = {
    "float16": ("words_kernel<__half, 4, false, {}>", 36, 75),
    "float16, transposed": ("words_kernel<__half, 4, true, {}>", 40, 75),
    "bfloat16": ("words_kernel<__nv_bfloat16, 4, false, {}>", 44, 80),
    "bfloat16, transposed": ("words_kernel<__nv_bfloat16, 4, true, {}>", 48, 80),
    "8-bit operands": ("integer_operands_kernel<4, {}>", 12, 75),
}


@pytest.fixture(scope="session")
def probes() -> list[Cubin]:
    if gate.find_nvcc() is None:
        pytest.skip("nvcc is not installed")
    try:
        return gate.compile_cubins(sorted(PROBES.glob("*.cu")), folder=gate.FOLDER / "probes")
    except gate.MissingToolError as error:
        pytest.fail(str(error))


@each_architecture
@pytest.mark.parametrize(("name", "limit", "since"), DEQUANTIZATION.values(), ids=DEQUANTIZATION.keys())
def test_instructions_that_32_weights_take(name, limit, since, architecture, probes):
    """Of a kernel that does nothing else, 8 times less 4 times; loads and stores are not the dequantization's."""
    if architecture < since:
        return
    kernels = {
        kernel.name: kernel for cubin in probes if cubin.architecture == architecture for kernel in cubin.kernels
    }

    def instructions(times: int) -> int:
        return kernels[name.format(times)].count(r"(?!LD|ST)")

    # Half an instruction and a bit for a constant that is computed again.
    assert (instructions(8) - instructions(4)) / 4 <= limit + 1, kernels[name.format(8)].opcodes


# ---- what a reader needs ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "source", [source for source in SOURCES if "__global__" in source.read_text()], ids=lambda source: source.name
)
def test_head_comment_says_what_a_reader_needs(source):
    """Formula and the reference that gives it meaning, what the kernel requires,
    how it sums or rounds, what limits it.
    """
    head = source.read_text().split("#include")[0]
    for part in ("Meaning:", "reference.", "Requires", "Limited by"):
        assert part in head, f"{source.relative_to(ROOT)} has no {part!r} in its head comment"


def test_the_guide_names_what_exists():
    folder = ROOT / "csrc" / "cuda"
    guide = (ROOT / "docs" / "kernels.md").read_text()
    named = re.findall(r"`([\w./]+\.(?:cu|cuh|h|cpp|py|toml)|[\w/]+/)`", guide)
    assert len(named) > 15
    assert not [name for name in named if not ((ROOT / name).exists() or (folder / name).exists())]
