"""The emulator finds what is wrong with a kernel: csrc/emulator/defects.cu has a right one, and copies with one defect
each. No operator is at stake.
"""

import ctypes
import json
import re
import subprocess
import sys

import pytest
import torch

from support import ROOT, emulated
from tools.tracing import aligned, trace

DEFECTS = (ROOT / "csrc" / "emulator" / "defects.cu").read_text().splitlines()


@pytest.fixture(scope="module")
def fast(emulated_library) -> ctypes.CDLL:
    return emulated.c_functions(emulated.build(emulated_library.variant))


@pytest.fixture
def options(emulated_library):
    """options(...) of the emulator for one test."""
    module = emulated.load(emulated_library.variant)
    yield module.options
    module.options()


ROWS = 70  # two tiles and a part
RUNS = [{}, {"cp_async": "eager"}, *({"seed": seed, "cp_async": "random"} for seed in range(1, 5))]


def input_rows(rows: int = ROWS) -> torch.Tensor:
    return aligned(torch.randn(rows, 32, generator=torch.Generator().manual_seed(0)))


def unit_by_unit(x: torch.Tensor) -> torch.Tensor:
    padded = torch.zeros(-(-x.shape[0] // 32) * 32, 32)
    padded[: x.shape[0]] = x
    return padded.view(-1, 32, 8, 4).transpose(1, 2).contiguous()


def run_defect(kernels: ctypes.CDLL, name: str, x: torch.Tensor, out: torch.Tensor) -> str | None:
    error = kernels.prequant_defect(
        name.encode(), ctypes.c_void_p(x.data_ptr()), ctypes.c_int64(x.shape[0]), ctypes.c_void_p(out.data_ptr())
    )
    return error.decode() if error else None


def results_of(name: str, fast: ctypes.CDLL, options) -> list[torch.Tensor]:
    x, results = input_rows(), []
    for run in RUNS:
        options(**run)
        out = aligned(torch.full((3, 8, 32, 4), torch.nan))
        assert run_defect(fast, name, x, out) is None
        results.append(out)
    return results


@pytest.mark.parametrize("name", ["none", "missing_swizzle"])
def test_a_right_kernel_is_right_in_every_order(name, fast, options):
    for result in results_of(name, fast, options):
        assert torch.equal(result, unit_by_unit(input_rows()))


@pytest.mark.parametrize(
    "name", ["missing_barrier", "missing_wait", "missing_zeros", "missing_warp_barrier", "blocks_overlap"]
)
def test_a_defect_shows_in_the_results_of_some_order(name, fast, options):
    assert not all(torch.equal(result, unit_by_unit(input_rows())) for result in results_of(name, fast, options))


STOPPED = {
    "copies_past_shared_memory": r"thread \(248,0,0\): cp.async: shared address \d+ \+ 16 is past the end",
    "stores_past_shared_memory": "block 0 wrote past the end of its dynamic part in shared memory, 0 bytes",
    "misaligned_load": "misaligned address 0x[0-9a-f]*4 for an access of 16 bytes",
    "divergent_barrier": "divergent __syncthreads: two places of the source",
    "barrier_after_exit": r"block \(0,0,0\) thread \(200,0,0\): thread exits while \d+ threads wait at __syncthreads",
    "shuffle_after_exit": "exits while other lanes wait for it in __shfl_sync|mask ffffffff names lanes that exited",
    "wrong_mask": "is not in mask 0000ffff",
    "different_collectives": "divergent warp collectives: __(ballot|shfl)_sync mask ffffffff, but "
    "__(ballot|shfl)_sync mask ffffffff is waiting",
    "deadlock": r"deadlock: warp 0: live ffffffff at __syncthreads ffff0000, in __syncwarp mask ffffffff arrived "
    r"0000ffff",
}


@pytest.mark.parametrize("name", STOPPED)
def test_a_defect_stops_the_kernel_with_its_place(name, fast, options):
    out = aligned(torch.zeros(3, 8, 32, 4))
    error = run_defect(fast, name, input_rows(), out)
    assert (
        error and error.startswith(f"{name}: the emulated kernel failed: block ") and re.search(STOPPED[name], error)
    ), error


@pytest.fixture(scope="module")
def traced(emulated_library) -> ctypes.CDLL:
    if emulated_library.variant != "fast":
        pytest.skip("emulated: the sanitized library runs alone")
    emulated.load("traced")
    return emulated.c_functions(emulated.build("traced"))


TRACED = {  # what is found, and a part of the line where it is
    "missing_barrier": ("race in shared memory: read after write", "unit = load<Unit>(tile + place(r, c))"),
    "missing_wait": ("data of a cp.async used before its wait", "unit = load<Unit>(tile + place(r, c))"),
    "missing_zeros": ("read of shared memory that was never written", "unit = load<Unit>(tile + place(r, c))"),
    "missing_warp_barrier": ("race in shared memory: read after write", "unit = load<Unit>(tile + (t ^ 1))"),
    "reads_past_the_input": ("access outside of every buffer", "cp_async_16(to, from, exists ? 16 : 0)"),
    "writes_past_the_output": ("access outside of every buffer", "store(out + (int64_t(blockIdx.x) * kThreads + to"),
    "writes_to_the_input": ("write to an input", "store(const_cast<float*>(in), in[0])"),
    "stores_past_shared_memory": ("access outside of every buffer", "store(tile + t + 1, Unit{})"),
    "blocks_overlap": ("race in global memory: write after write", "store(out, unit.at[0])"),
    "last_block_without_fence": ("race in global memory: read after write", "sum += out[1 + i]"),
}


@pytest.mark.parametrize("name", TRACED)
def test_the_tracer_names_a_defect_and_its_line(name, traced):
    x, out = input_rows(), aligned(torch.zeros(4, 8, 32, 4))[:3]
    with trace(x=x, out_=out) as found:
        run_defect(traced, name, x, out)
    kind, text = TRACED[name]
    lines = [finding.line for finding in found.findings if finding.kind == kind and finding.kernel == name]
    assert any(line.startswith("defects.cu:") and text in DEFECTS[int(line.split(":")[1]) - 1] for line in lines), (
        found.findings
    )


@pytest.mark.parametrize("name", ["none", "missing_swizzle", "strided_stores", "last_block", "tickets"])
def test_the_tracer_finds_nothing_where_nothing_is_wrong(name, traced):
    x, out = input_rows(), aligned(torch.zeros(3 * 32 * 32))
    with trace(x=x, out_=out) as found:
        assert run_defect(traced, name, x, out) is None
    assert not found.findings


def test_the_tracer_counts_sectors_and_bank_conflicts(traced):
    """Two tiles of 4 KiB, 16 requests of 512 bytes each way; shared memory takes four passes a request."""

    def counts(name: str):
        x, out = input_rows(64), aligned(torch.zeros(2, 8, 32, 4))
        with trace(x=x, out_=out) as found:
            run_defect(traced, name, x, out)
        assert found.buffers["x"].read_sectors == found.buffers["out_"].written_sectors == 256
        return found.kernels[name]

    right = counts("none")
    assert (right.launches, right.blocks, right.shared_bytes) == (1, 2, 4096)
    assert (right.bytes_read, right.sectors_read, right.ideal_sectors_read) == (8192, 256, 256)
    assert (right.bytes_written, right.sectors_written, right.ideal_sectors_written) == (8192, 256, 256)
    assert (right.wavefronts, right.ideal_wavefronts, right.bank_conflicts) == (128, 128, 0)
    assert [(site.kind, site.is_shared, site.requests, site.lanes) for site in right.sites] == [
        ("load", False, 16, 512),
        ("cp_async", True, 16, 512),
        ("load", True, 16, 512),
        ("store", False, 16, 512),
    ]
    # Eight rows of one unit column lie in the same four banks: a load's pass over eight lanes takes eight wavefronts.
    unswizzled = counts("missing_swizzle")
    assert (unswizzled.wavefronts, unswizzled.ideal_wavefronts) == (16 * 4 + 16 * 4 * 8, 128)
    # Neighbouring lanes store 16 bytes each, 128 bytes apart: half of every sector.
    strided = counts("strided_stores")
    assert (strided.sectors_written, strided.ideal_sectors_written, strided.bytes_written) == (512, 256, 8192)


def tickets(fast: ctypes.CDLL, options, seed: int) -> torch.Tensor:
    """(3 blocks, 8 warps, 32 lanes): how many threads ran before each."""
    options(seed=seed)
    out = aligned(torch.zeros(1 + 3 * 256))
    assert run_defect(fast, "tickets", input_rows(), out) is None
    return out.view(torch.int32)[1:].view(3, 8, 32)


def test_a_seed_permutes_lanes_warps_and_blocks(fast, options):
    plain, *seeded = (tickets(fast, options, seed) for seed in range(5))
    assert torch.equal(plain.view(-1), torch.arange(768, dtype=torch.int32))
    for order in seeded:
        assert torch.equal(order.view(-1).sort().values.int(), plain.view(-1))
        assert (order.diff(dim=2) < 0).any() and (order[:, :, 0].diff(dim=1) < 0).any()
    assert any((order[:, 0, 0].diff() < 0).any() for order in seeded)
    assert not torch.equal(seeded[0], seeded[1])
    assert torch.equal(seeded[0], tickets(fast, options, 1)), "the same seed, the same order"


def test_several_workers_share_the_blocks(fast, options):
    options(workers=2)
    out = aligned(torch.full((3, 8, 32, 4), torch.nan))
    assert run_defect(fast, "none", input_rows(), out) is None and torch.equal(out, unit_by_unit(input_rows()))


def test_what_cuda_refuses_is_refused(fast, options):
    options(shared_limit=1024)
    error = run_defect(fast, "none", input_rows(), aligned(torch.zeros(3, 8, 32, 4)))
    assert error == "none: CUDA would not launch the kernel: 4096 bytes of shared memory, a block has 1024"
    options()
    error = run_defect(fast, "none", input_rows(0), aligned(torch.zeros(1)))
    assert error == "none: CUDA would not launch the kernel: a grid of 0 x 1 x 1 blocks"


SANITIZED = """
import json, os, sys, tempfile
sys.path[:0] = ["python_tests", "python_tests/cuda"]
import torch
import test_emulator
from support import emulated
emulated.load("sanitized")
kernels = emulated.c_functions(emulated.build("sanitized"))
x, out = torch.randn(96, 32), torch.empty(3, 8, 32, 4)
assert test_emulator.run_defect(kernels, "none", x, out) is None and torch.equal(out, test_emulator.unit_by_unit(x))
reports = {}
for name in ("none", "reads_past_the_input", "writes_past_the_output", "stores_past_shared_memory"):
    with tempfile.TemporaryFile("w+") as report:
        child = os.fork()
        if child == 0:
            os.dup2(report.fileno(), 2)
            test_emulator.run_defect(kernels, name, x[:70].clone() if name.startswith("reads") else x, out)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        report.seek(0)
        reports[name] = [status, report.read()]
print(json.dumps(reports))
"""


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_sanitizers_see_stray_accesses(emulated_library):
    """In a process of their own, because they must be loaded before Python; a stray access ends a child of it."""
    if emulated_library.variant != "fast":
        pytest.skip("emulated: the sanitized library runs alone")
    emulated.build("sanitized")
    done = subprocess.run(
        [sys.executable, "-c", SANITIZED],
        capture_output=True,
        text=True,
        env=emulated.sanitizer_environment(),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    reports = json.loads(done.stdout)
    assert reports.pop("none") == [0, ""]
    for name, (status, report) in reports.items():
        assert status != 0 and "ERROR: AddressSanitizer: heap-buffer-overflow" in report and "defects.cu" in report, (
            f"{name}\n{report}"
        )
