"""What all operators share: opcheck, errors across devices, levels of the CPU, threads."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from operands import LAYERS, assert_identical, random_matrix, random_outliers, random_weight

from prequant_ext import ops, reference

LAYER = LAYERS["groups of 32"]
TESTS = Path(__file__).parent


def sample(op: str, device: str):
    """Arguments for one call of ``op``."""
    weight, (dims, values) = random_weight(LAYER, device), random_outliers(LAYER, device)
    packed, scale, zero_point = weight
    M, K, N, bits = LAYER.M, LAYER.K, LAYER.N, LAYER.bits
    dense, x, grad_y = (random_matrix(*shape, torch.float32, device) for shape in ((N, K), (M, K), (M, N)))
    mean, std, *_ = reference.weight_stats(dense, N * K)
    group_size = K // scale.shape[1]
    activations = reference.quantize_activations(x, True, group_size)
    counts = torch.arange(K, device=device) % 7
    trained = [tensor.clone().requires_grad_() for tensor in (x, values, torch.zeros(N, device=device))]
    return {
        "weight_stats": (dense, group_size),
        "outlier_counts": (dense, mean, std, 2.0),
        "select_outlier_dims": (counts, counts, 5),
        "quantize_pack": (dense, scale, zero_point, bits, dims, 1),
        "pack": (reference.unpack(packed, K, bits), bits),
        "unpack": (packed, K, bits),
        "prepack": (packed, K, bits),
        "unprepack": (ops.prepack(packed, K, bits), N, K, bits),
        "dequantize": (packed, scale, zero_point, K, bits, torch.bfloat16, 3, 9),
        "scatter_outlier_": (dense, dims, values, 1, True),
        "quantize_activations": (x, True, group_size, dims),
        "embedding": (torch.tensor([0, 5, 5], device=device), *activations[:3], torch.float32),
        "linear_w4a16": (trained[0], *weight, dims, *trained[1:], bits, 1),
        "linear_w4a8": (trained[0], *activations, *weight, dims, *trained[1:], bits, 1, False),
        "linear_dx": (grad_y, *weight, dims, values, K, bits, 1),
        "outlier_grad": (grad_y, activations[0][:, dims], *activations[1:3], dims, 1),
        "scale_grad": (grad_y, *activations[:3], packed, zero_point, bits),
    }[op]


@pytest.mark.parametrize("op", ops.FAKES)
def test_opcheck(op, device):
    torch.library.opcheck(getattr(ops._prequant, op).default, sample(op, device))  # the library that the device fixture chose


@pytest.mark.parametrize("op", ["quantize_activations", "linear_w4a16", "linear_w4a8", "linear_dx", "weight_stats", "outlier_counts", "scale_grad"])
def test_thread_count_changes_no_bit(op):
    threads, results = torch.get_num_threads(), []
    arguments = [a.detach() if isinstance(a, torch.Tensor) else a for a in sample(op, "cpu")]
    try:
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            result = getattr(ops, op)(*arguments)
            results.append(result if isinstance(result, tuple) else (result,))
    finally:
        torch.set_num_threads(threads)
    for other in results[1:]:
        for actual, expected in zip(other, results[0], strict=True):
            assert_identical(actual, expected)


@pytest.mark.parametrize("op", [op for op in ops.FAKES if op not in ("pack", "unpack", "prepack", "unprepack", "weight_stats")])
def test_tensors_on_two_devices_are_refused(op, device):
    """Every tensor but the first on the meta device, as when half of a model was moved."""
    first, *rest = sample(op, device)
    moved = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in rest]
    with pytest.raises(RuntimeError, match=rf"{ops._prequant.name}::{op}: tensors must be on one device, got {device}.* and meta"):
        getattr(ops, op)(first, *moved)


LEVEL_SCRIPT = """
import hashlib, json, sys
sys.path.insert(0, "python_tests")
import torch
from operands import LAYERS, Layer
from test_linear_w4a8 import operands
from test_ops import sample
from prequant_ext import ops
digest = lambda *tensors: hashlib.sha256(b"".join(t.contiguous().numpy().tobytes() for t in tensors)).hexdigest()
result = {op: digest(*(r if isinstance(r := getattr(ops, op)(*sample(op, "cpu")), tuple) else (r,)))
          for op in ("weight_stats", "outlier_counts", "select_outlier_dims", "quantize_pack", "quantize_activations", "embedding")}
for name, layer in LAYERS.items():
    x, activations, rest = operands(Layer(**{**layer.__dict__, "r": 0}), "cpu")
    y = ops.linear_w4a8(x, *activations, *rest[:5], None, *rest[6:])
    result["linear_w4a8 " + name] = digest(y.float())
result["level"] = torch.ops.prequant.build_info()
print(json.dumps(result))
"""


def at_level(level: str, script: str = LEVEL_SCRIPT) -> subprocess.CompletedProcess:
    environment = os.environ | {"PREQUANT_ISA": level}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, cwd=TESTS.parent, check=False)


def test_levels_of_the_cpu_agree_on_every_integer():
    portable, best = at_level("portable"), at_level("")
    assert portable.returncode == 0, portable.stderr
    assert best.returncode == 0, best.stderr
    portable, best = json.loads(portable.stdout), json.loads(best.stdout)
    assert "isa=portable" in portable.pop("level")
    if "isa=portable" in best.pop("level"):
        pytest.skip("this CPU has the portable level only")
    assert portable == best


def test_unknown_level_is_refused():
    failed = at_level("sse9", "import prequant_ext.ops as ops, torch; ops.pack(torch.zeros(1, 2, dtype=torch.uint8), 4)")
    assert failed.returncode != 0 and "PREQUANT_ISA" in failed.stderr and "sse9" in failed.stderr


@pytest.mark.slow
def test_the_portable_level_passes_the_operator_tests():
    """This process has run them at the best level of this CPU; portable is what any other CPU runs."""
    if "isa=portable" in torch.ops.prequant.build_info():
        pytest.skip("this process runs the portable level itself")
    tests = [str(path) for op in ops.FAKES if (path := TESTS / f"test_{op}.py").exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "cpu", *tests]
    done = subprocess.run(command, env=os.environ | {"PREQUANT_ISA": "portable"}, capture_output=True, text=True, cwd=TESTS.parent, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
