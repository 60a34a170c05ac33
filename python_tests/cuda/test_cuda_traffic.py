"""What the linear kernels do to memory on the shapes that matter, counted on the emulator: the gate of their speed that
needs no GPU.

A shape's K is real, because it is what the main loop runs along; N and the many tokens' sizes are cropped to some
tiles, which the rest repeats.
"""

import math

import pytest
import torch

import gpu_launches
from prequant_ext import ops, reference
from support import emulated
from support.every_operator import LAYERS, calls
from tools.budgets import blocks_per_multiprocessor, read_budgets
from tools.tracing import Trace, aligned, trace

pytestmark = [pytest.mark.gate, pytest.mark.slow]

OUTLIERS = 5
SECTORS = 1.05  # of what the requests' bytes would fill
SHAPES = {"768 x 3072": (768, 3072), "4096 x 1024": (1024, 1024), "4096 x 4096": (512, 4096)}  # N as cropped, K
TOKENS = {1: 1024, 16: 512, 64: 512, 512: 256}  # M, and N at most
DEPTH_OF_MANY = 1024  # K at most, for 512 tokens
# dispatch.h: what the launchers believe to run on
EMULATED = next(gpu for gpu in gpu_launches.GPUS if gpu.name == "A100")
# the emulator begins each static variable, and the dynamic part behind them, on a multiple of 128 bytes or more
ALIGNED_STATICS = 1024
MAIN = {
    "linear_w4a16": ("gemv_kernel", "linear_w4a16_kernel"),
    "linear_dx": ("linear_dx_kernel",),
    "linear_w4a8": ("linear_w4a8_strips_kernel", "linear_w4a8_tiles_kernel"),
}


@pytest.fixture(scope="session")
def traced_library():
    if emulated.cuda_include() is None:
        pytest.skip("emulated: CUDA's headers are not at hand: nvcc is not installed")
    return emulated.load("traced")


def run(operator: str, M: int, N: int, K: int, r: int = OUTLIERS, dtype: torch.dtype = torch.float16) -> Trace:
    """One call with one scale, r outlier columns and a bias."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 16, (N, K), generator=generator, dtype=torch.uint8)
    weight = aligned(torch.ops.prequant_traced.prepack(reference.pack(codes, 4), K, 4))
    scale, zero_point = aligned(torch.tensor([[0.01]])), aligned(torch.tensor([[8]], dtype=torch.uint8))
    dims, values = (
        aligned(torch.randperm(K, generator=generator)[:r].sort().values),
        aligned(torch.randn(N, r, generator=generator)),
    )
    layer = {"weight": weight, "scale": scale, "zero_point": zero_point, "dims": dims, "values": values}
    if operator == "linear_dx":
        grad_y = aligned(torch.randn(M, N, generator=generator).to(dtype))
        with trace(grad_y=grad_y, **layer) as traced:
            traced.ops.linear_dx(grad_y, *layer.values(), K, 4, 1)
        return traced
    x, bias = aligned(torch.randn(M, K, generator=generator).to(dtype)), aligned(torch.randn(N, generator=generator))
    if operator == "linear_w4a16":
        with trace(x=x, **layer, bias=bias) as traced:
            traced.ops.linear_w4a16(x, *layer.values(), bias, 4, 1, N)
        return traced
    names = ("codes", "x_scale", "x_zero_point", "sums")
    activations = dict(zip(names, map(aligned, reference.quantize_activations(x, True, 0)), strict=True))
    with trace(x=x, **activations, **layer, bias=bias) as traced:
        traced.ops.linear_w4a8(x, *activations.values(), *layer.values(), bias, 4, 1, False, N)
    return traced


def cropped(shape: str, M: int) -> tuple[int, int]:
    N, K = SHAPES[shape]
    return min(N, TOKENS[M]), min(K, DEPTH_OF_MANY) if max(TOKENS) == M else K


@pytest.mark.parametrize("M", TOKENS, ids="M = {}".format)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("operator", MAIN)
def test_traffic_is_ideal(operator, shape, M, traced_library):
    N, K = cropped(shape, M)
    traced = run(operator, M, N, K)
    assert not traced.findings, traced.table()

    predicted = next(
        launch for launch in gpu_launches.launches(operator, M, N, K, EMULATED) if launch.kernel in MAIN[operator]
    )
    # Of all the operator's kernels together: a small one may waste what does not matter. A gathered column of x is a
    # sector a row, however few its bytes.
    sectors = sum(kernel.sectors_read + kernel.sectors_written for kernel in traced.kernels.values())
    ideal = sum(kernel.ideal_sectors_read + kernel.ideal_sectors_written for kernel in traced.kernels.values())
    gathered = 0 if operator == "linear_dx" else M * OUTLIERS * predicted.blocks // predicted.row_tiles
    assert sectors <= SECTORS * ideal + gathered, f"{sectors} sectors, {ideal} needed\n{traced.table()}"
    for kernel in traced.kernels.values():
        assert kernel.bank_conflicts == 0, f"{kernel.name}: {kernel.bank_conflicts} bank conflicts\n{traced.table()}"

    # The weight: all of it, and as often as there are tiles of rows; what the model counts is what runs.
    weight = traced.buffers["weight"]
    assert weight.read_sectors * 32 == weight.bytes
    main = next(traced.kernels[name] for name in MAIN[operator] if name in traced.kernels)
    assert (main.name, main.blocks) == (predicted.kernel, predicted.blocks)
    # Besides weight and x: scales and zero points, the outliers' columns and the bias, which do not grow with K.
    bytes_read, besides = main.ideal_sectors_read * 32, main.blocks * 32768 + gathered * 32
    assert predicted.bytes_read <= bytes_read <= predicted.bytes_read * 1.02 + besides, (
        f"{bytes_read} bytes read, not {predicted.bytes_read}"
    )


@pytest.mark.parametrize("M", [1, 3], ids="M = {}".format)
@pytest.mark.parametrize("shape", SHAPES)
def test_traffic_without_tensor_cores_is_ideal(shape, M, traced_library):
    traced = run("linear_w4a16", M, *cropped(shape, 1), dtype=torch.float32)
    assert list(traced.kernels) == ["simt_kernel", "finish_kernel"] and not traced.findings, traced.table()
    sectors = sum(kernel.sectors_read + kernel.sectors_written for kernel in traced.kernels.values())
    ideal = sum(kernel.ideal_sectors_read + kernel.ideal_sectors_written for kernel in traced.kernels.values())
    gathered = M * OUTLIERS * traced.kernels["finish_kernel"].blocks
    assert sectors <= SECTORS * ideal + gathered, f"{sectors} sectors, {ideal} needed\n{traced.table()}"
    assert [kernel.bank_conflicts for kernel in traced.kernels.values()] == [0, 0], traced.table()
    weight = traced.buffers["weight"]
    assert weight.read_sectors * 32 == weight.bytes


@pytest.mark.parametrize("architecture", [75, 80, 86, 90])
@pytest.mark.parametrize("M", [1, 5, 16, 17, 64, 65, 300])
@pytest.mark.parametrize("operator", MAIN)
def test_model_predicts_the_launches(operator, M, architecture, traced_library, monkeypatch):
    """The regimes, grids and blocks' sizes that bench/gpu_launches.py computes are those of the launchers."""
    gpu = next(gpu for gpu in gpu_launches.GPUS if gpu.architecture == architecture)
    monkeypatch.setenv("PREQUANT_EMULATED_SM", str(gpu.architecture))
    monkeypatch.setenv("PREQUANT_EMULATED_MULTIPROCESSORS", str(gpu.multiprocessors))
    N, K = 320, 320
    predicted = [
        launch
        for launch in gpu_launches.launches(operator, M, N, K, gpu)
        if launch.kernel not in ("quantize_activations_kernel", "cublas")
    ]
    if any(launch.kernel == "dequantize_kernel" for launch in predicted):
        assert gpu_launches.regime(M, N * K, architecture) == "dense"
        return
    traced = run(operator, M, N, K, r=0)
    assert set(traced.kernels) == {launch.kernel for launch in predicted}
    for launch in predicted:
        kernel = traced.kernels[launch.kernel]
        if launch.name:
            assert kernel.blocks == launch.blocks
            # Of shared memory the model needs to know no more than how many blocks it leaves room for.
            rooms = {
                blocks_per_multiprocessor(architecture, 32, launch.threads, size)
                for size in (launch.dynamic_shared, kernel.shared_bytes)
            }
            assert launch.dynamic_shared == 0 or len(rooms) == 1, (
                f"{kernel.shared_bytes} bytes of shared memory, not {launch.dynamic_shared}"
            )


def test_budgets_state_what_is_launched(traced_library, monkeypatch):
    """threads and dynamic_shared of csrc/cuda/budgets.toml, on which its occupancy rests, hold every launch of every
    operator.
    """
    monkeypatch.setattr(ops.calls, "library", torch.ops.prequant_traced)
    budgets = read_budgets()
    launched = set()
    for layer in LAYERS.values():
        if layer.M > 100:
            continue
        for call, operand in calls(layer, "cpu").values():
            traced_library.trace_start()
            call(operand)
            traced_library.trace_stop()
            for launch in traced_library.trace_launches():
                of_kernel = [budget for budget in budgets.values() if budget.pattern.split("<")[0] == launch["kernel"]]
                assert of_kernel, f"csrc/cuda/budgets.toml has no entry for {launch['kernel']}: make budgets"
                assert math.prod(launch["block"]) <= max(budget.threads for budget in of_kernel), launch
                # Of the emulator: A100.
                assert (
                    launch["shared_bytes"]
                    <= max(budget.dynamic_shared[80] + budget.shared[80] for budget in of_kernel) + ALIGNED_STATICS
                ), launch
                launched.add(launch["kernel"])
    assert {
        "gemv_kernel",
        "simt_kernel",
        "linear_w4a16_kernel",
        "linear_dx_kernel",
        "linear_w4a8_tiles_kernel",
    } <= launched
