"""dequantize: packed codes to a dense matrix, or a range of its rows."""

import pytest
import torch
from operands import LAYERS, assert_identical, random_weight

from prequant_ext import ops, reference


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_identical_to_reference(layer, dtype, device):
    weight = random_weight(layer, device)
    assert_identical(ops.dequantize(*weight, layer.K, layer.bits, dtype), reference.dequantize(*weight, layer.K, layer.bits, dtype))


def test_row_range(device):
    layer = LAYERS["off every tile"]
    weight = random_weight(layer, device)
    whole = ops.dequantize(*weight, layer.K, layer.bits, torch.float32)
    for begin, end in ((0, 0), (0, 5), (4, layer.N), (layer.N, layer.N)):
        assert_identical(ops.dequantize(*weight, layer.K, layer.bits, torch.float32, begin, end), whole[begin:end])


def test_rejects(device):
    layer = LAYERS["one token"]
    weight_packed, scale, zero_point = random_weight(layer, device)
    with pytest.raises(RuntimeError, match="rows must be a range inside 0 to 32, got row_begin = 5 and row_end = 33"):
        ops.dequantize(weight_packed, scale, zero_point, layer.K, 4, torch.float32, 5, 33)
    with pytest.raises(RuntimeError, match="dtype must be float32, float16 or bfloat16, got float64"):
        ops.dequantize(weight_packed, scale, zero_point, layer.K, 4, torch.float64)
    with pytest.raises(RuntimeError, match=r"scale must have shape \(1, 1\), \(N, 1\) or \(N, G\) with G dividing K"):
        ops.dequantize(weight_packed, scale.expand(32, 3), zero_point, layer.K, 4, torch.float32)
    with pytest.raises(RuntimeError, match=r"zero_point must have shape \(1, 1\), got \(32, 1\)"):
        ops.dequantize(weight_packed, scale, zero_point.expand(32, 1), layer.K, 4, torch.float32)
