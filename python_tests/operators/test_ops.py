"""What all operators share: opcheck, errors across devices, threads. Levels of the CPU: test_cpu_levels.py."""

import os
import subprocess
import sys
from functools import partial

import pytest
import torch

from prequant_ext import ops, reference
from support import ROOT
from support.every_operator import assert_same_bits, calls, results
from support.operands import LAYERS, Layer, random_matrix, random_outliers, random_weight

LAYER = LAYERS["groups of 32"]


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


@pytest.mark.parametrize("op", ops.OPERATORS)
def test_opcheck(op, device):
    # the library that the device fixture chose
    torch.library.opcheck(getattr(ops.calls.library, op).default, sample(op, device))


# Large enough that eight threads get work from every kernel.
MANY_TASKS = {
    "blocks": Layer(70, 2064, 600, blocks="group", group_size=48),
    "one block, output axis": Layer(70, 2061, 600, axis=0, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("layer", MANY_TASKS.values(), ids=MANY_TASKS.keys())
@pytest.mark.parametrize("op", ops.OPERATORS)
def test_thread_count_changes_no_bit(op, layer, request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    call, operand = calls(layer, "cpu")[op]
    for count in (1, 2, 3, 8):
        torch.set_num_threads(count)
        actual = results(call, operand)
        if count == 1:
            expected = actual
        assert_same_bits(actual, expected)


@pytest.mark.parametrize(
    "op", [op for op in ops.OPERATORS if op not in ("pack", "unpack", "prepack", "unprepack", "weight_stats")]
)
def test_tensors_on_two_devices_are_refused(op, device):
    """Every tensor but the first on the meta device, as when half of a model was moved."""
    first, *rest = sample(op, device)
    moved = [argument.to("meta") if isinstance(argument, torch.Tensor) else argument for argument in rest]
    with pytest.raises(
        RuntimeError, match=rf"{ops.calls.library.name}::{op}: tensors must be on one device, got {device}.* and meta"
    ):
        getattr(ops, op)(first, *moved)


def test_unknown_level_is_refused():
    script = "import prequant_ext.ops as ops, torch; ops.pack(torch.zeros(1, 2, dtype=torch.uint8), 4)"
    failed = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PREQUANT_ISA": "sse9"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert failed.returncode != 0 and "PREQUANT_ISA" in failed.stderr and "sse9" in failed.stderr
