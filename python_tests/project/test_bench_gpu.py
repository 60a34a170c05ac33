"""bench/gpu.py as far as it goes without a GPU: its operands, its table, and what it says where there is none."""

import pytest
import torch

import gpu
from support import ROOT
from support.scripts import run_script

BENCH = ROOT / "bench"


def test_contenders_compute_the_layer():
    """Each is as close to its exact product as its arithmetic allows: a wrong operand would show as an error near 1."""
    found = {
        contender.name: gpu.relative_error(contender) for contender in gpu.contenders(5, 96, 128, torch.float16, "cpu")
    }
    assert list(found) == [gpu.BASELINE, "linear_w4a16", "linear_w4a8", "linear_dx"]
    assert found.pop("linear_w4a8") < 2e-2  # 8-bit activations
    assert max(found.values()) < 2e-3


def test_missing_peers_are_named_with_the_reason():
    found, missing = gpu.peers(1, 64, 64, torch.float16, "cpu")
    assert {contender.name for contender in found} | set(missing) == {"bitsandbytes", "torchao", "marlin"}
    assert all(missing.values())


def test_table_has_a_row_a_shape_and_marks_what_is_no_graph():
    lines = [
        gpu.Line(gpu.BASELINE, 64, 32, 1, 10.0, 5.0, 1.0, 0.0, True),
        gpu.Line("linear_w4a16", 64, 32, 1, 4.0, 3.0, 2.5, 0.0, True),
    ]
    lines += [
        gpu.Line(gpu.BASELINE, 64, 32, 8, 12.0, 5.0, 1.0, 0.0, True),
        gpu.Line("peer", 64, 32, 8, 24.0, 1.0, 0.5, None, False),
    ]
    *_, first, second = gpu.table(lines, "heading").strip().splitlines()
    assert first == "| 64 x 32 | 1 | 10.0 µs, 5 GB/s | **2.50×** 4.0 µs, 3 GB/s | – |"
    assert second == "| 64 x 32 | 8 | 12.0 µs, 5 GB/s | – | **0.50×** 24.0 µs, 1 GB/s, eager |"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ["gpu.py", "gpu_at_hand.py"])
def test_without_a_gpu_it_fails_and_names_the_remedy(script):
    done = run_script(BENCH / script)
    assert done.returncode == 1
    assert "no NVIDIA GPU" in done.stderr and "Remedy" in done.stderr
