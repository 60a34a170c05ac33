"""bench/gpu_model.py: the counts and rates behind a prediction. Whether its launches are the launchers' is in
test_cuda_traffic.py.
"""

import json

import pytest

import gpu_launches
import gpu_model
from support import ROOT
from support.scripts import run_script
from tools.cubins import Kernel

BENCH = ROOT / "bench"
MISSED = {("3090", 16): "86 tiles on 82 multiprocessors: four of them have two"}

A100 = next(gpu for gpu in gpu_launches.GPUS if gpu.name == "A100")
T4 = gpu_launches.GPUS[0]


def loop_of(**opcodes: int) -> dict[str, int]:
    return {opcode.replace("_", "."): count for opcode, count in opcodes.items()}


def test_an_ideal_cublas_is_bound_by_its_bytes_and_then_by_its_products():
    few, many = (gpu_model.microseconds(gpu_launches.cublas(M, 11008, 4096), A100, {}) for M in (1, 8192))
    assert few["DRAM"] == pytest.approx((11008 * 4096 + 4096 + 11008) * 2 / 1555e3)
    assert few["DRAM"] > 50 * few["tensor cores"]
    assert many["tensor cores"] == pytest.approx(2 * 8192 * 11008 * 4096 / 312e6)
    assert many["tensor cores"] > many["DRAM"]


def test_a_turn_costs_what_its_slowest_unit_needs():
    """64 integer lanes against 128 of half pairs on an A100, 64 on a T4; a 128-bit load of a warp is 4 passes over the
    banks.
    """
    mix = loop_of(LOP3_LUT=64, HFMA2=64, LDS_128=2, LDSM_16_M88_4=3, HMMA_16816_F32=8)
    clocks = gpu_model.turn_clocks(mix, A100)
    assert clocks["integer units"] == 32 and clocks["half units"] == 16
    assert gpu_model.turn_clocks(mix, T4)["half units"] == 32
    assert clocks["shared memory"] == 2 * 4 + 3 * 4
    assert clocks["instructions issued"] == sum(mix.values()) / 4


def test_products_of_a_turn_know_the_shapes():
    assert gpu_model.products_of_a_turn(Kernel("k", main_loop=loop_of(HMMA_16816_F32=2, LOP3_LUT=9))) == 2 * 16 * 8 * 16
    assert (
        gpu_model.products_of_a_turn(Kernel("k", main_loop={"IMMA.16832.U8.S8": 1, "IMMA.8816.U8.S8": 1}))
        == 16 * 8 * 32 + 8 * 8 * 16
    )


@pytest.mark.parametrize("operator", ["linear_w4a16", "linear_w4a8", "linear_dx"])
@pytest.mark.parametrize("M", [1, 16, 64, 512])
def test_counts_are_at_least_what_the_product_needs(operator, M):
    """No regime reads less than the codes and x, or multiplies less than M N K; padding and re-reading cost at most
    what a tile can waste.
    """
    N, K = 11008, 4096
    for gpu in gpu_launches.GPUS:
        launches = gpu_launches.launches(operator, M, N, K, gpu)
        products = sum(launch.products for launch in launches)
        assert M * N * K <= products <= 2.1 * max(16, M) * N * K
        assert sum(launch.dram_bytes for launch in launches) >= N * K / 2 + M * K


@pytest.mark.parametrize("gpu", gpu_launches.GPUS, ids=lambda gpu: gpu.name)
def test_targets_have_a_figure_for_every_gpu(gpu):
    for figures in gpu_model.TARGETS.values():
        assert len(figures) == len(gpu_launches.GPUS)
        target = figures[gpu_launches.GPUS.index(gpu)]
        assert target is None or target[1] is None or target[0] <= target[1]


def run(*arguments: str) -> str:
    done = run_script(BENCH / "gpu_model.py", *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_help_shows_an_example_and_says_what_it_is():
    text = run("--help")
    assert "python bench/gpu_model.py --gpu A100" in text
    assert gpu_model.LABEL in text


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.timeout(2400)
def test_everything_it_prints_is_labelled_a_model(nvcc):
    arguments = ("--gpu", "A100", "4090", "--tokens", "1", "512", "--operator", "linear_w4a16", "linear_dx")
    predictions = [json.loads(line) for line in run(*arguments, "--json").splitlines()]
    assert len(predictions) == 2 * 2 * 2
    assert all(prediction["label"] == gpu_model.LABEL and prediction["microseconds"] > 0 for prediction in predictions)
    head, _, *rows = run(*arguments).splitlines()
    assert gpu_model.LABEL in head and len(rows) == len(predictions)


@pytest.mark.gate
@pytest.mark.slow
@pytest.mark.timeout(2400)
@pytest.mark.parametrize("gpu", gpu_launches.GPUS, ids=lambda gpu: gpu.name)
def test_few_tokens_reach_the_targets(gpu, nvcc):
    """What the main loop's instructions and the grid allow is not below what is asked for, but where MISSED says so: an
    entry that is reached goes.
    """
    kernels = gpu_model.sass()[gpu.architecture]
    for M in (1, 16):
        prediction = gpu_model.predict("linear_w4a16", M, *gpu_model.TARGET_SHAPE, gpu, kernels)
        assert prediction.parity is not None
        assert (prediction.speedup < prediction.parity) == ((gpu.name, M) in MISSED), prediction
