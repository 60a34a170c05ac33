"""dequantize: packed codes to a dense matrix, or a range of its rows."""

import pytest
import torch

from prequant_ext import ops, reference
from support.emulated_kernels import emulated_kernels
from support.operands import LAYERS, Layer, assert_identical, random_weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_identical_to_reference(layer, dtype, device):
    weight = random_weight(layer, device)
    assert_identical(
        ops.dequantize(*weight, layer.K, layer.bits, dtype), reference.dequantize(*weight, layer.K, layer.bits, dtype)
    )


def test_row_range(device):
    layer = LAYERS["off every tile"]
    weight = random_weight(layer, device)
    whole = ops.dequantize(*weight, layer.K, layer.bits, torch.float32)
    for begin, end in ((0, 0), (0, 5), (4, layer.N), (layer.N, layer.N)):
        assert_identical(ops.dequantize(*weight, layer.K, layer.bits, torch.float32, begin, end), whole[begin:end])


# ---- of a prepacked weight: what operators do before torch's own product ---------------------------------------------

DTYPES = [torch.float32, torch.float16, torch.bfloat16]  # in the order of Dtype in kernels.h
GUARD, FILL = 64, 0xA5  # bytes around the result that no kernel may touch

CHUNKED = {
    "one chunk": Layer(0, 64, 16),
    "nine chunks: more than a block": Layer(0, 9 * 64, 16),
    "ragged rows and chunks": Layer(0, 120, 21, blocks="row"),
    "groups of 32 end inside a chunk": Layer(0, 160, 33, blocks="group"),
    "groups that 128 bits straddle": Layer(0, 60, 18, blocks="group"),
    "odd K": Layer(0, 65, 31, blocks="row"),
    "2 bits": Layer(0, 192, 20, bits=2, blocks="row"),
    "2 bits, groups, odd K": Layer(0, 90, 44, bits=2, blocks="group"),
    "8 bits": Layer(0, 192, 20, bits=8, blocks="row"),
    "8 bits, groups, ragged": Layer(0, 66, 20, bits=8, blocks="group"),
    "3 bits in a 4-bit container": Layer(0, 66, 20, bits=3),
    "minilm query": Layer(0, 384, 384),
    "one code": Layer(0, 1, 1),
}


def dequantize_chunks(layer: Layer, weight, begin: int, end: int, dtype: torch.dtype, offset: int = 0) -> torch.Tensor:
    """Rows begin .. end from the chunks, into a guarded buffer, `offset` bytes off alignment."""
    packed, scale, zero_point = weight
    chunks = reference.tensor_core_chunks(packed, layer.K, layer.bits)
    size = (end - begin) * layer.K * dtype.itemsize
    buffer = torch.full((GUARD + offset + size + GUARD,), FILL, dtype=torch.uint8)
    dense = buffer[GUARD + offset : GUARD + offset + size].view(dtype).view(end - begin, layer.K)
    shape = (layer.N, layer.K, *scale.shape, reference.container_bits(layer.bits))
    addresses = [tensor.data_ptr() for tensor in (chunks, scale, zero_point)]
    emulated_kernels().dequantize_chunks(*addresses, *shape, begin, end - begin, DTYPES.index(dtype), dense.data_ptr())
    assert (buffer[: GUARD + offset] == FILL).all() and (buffer[GUARD + offset + size :] == FILL).all(), (
        "wrote outside its result"
    )
    return dense


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layer", CHUNKED.values(), ids=CHUNKED.keys())
def test_chunks_identical_to_reference(layer, dtype):
    weight = random_weight(layer, "cpu")
    whole = reference.dequantize(*weight, layer.K, layer.bits, dtype)
    for begin, end in {
        (0, layer.N),
        (layer.N // 3, layer.N),
        (0, layer.N - layer.N // 4),
        (layer.N // 2, layer.N // 2),
    }:
        assert_identical(dequantize_chunks(layer, weight, begin, end, dtype), whole[begin:end])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_chunks_into_a_matrix_off_alignment(dtype):
    layer = CHUNKED["ragged rows and chunks"]
    weight = random_weight(layer, "cpu")
    expected = reference.dequantize(*weight, layer.K, layer.bits, dtype)
    assert_identical(dequantize_chunks(layer, weight, 0, layer.N, dtype, dtype.itemsize), expected)


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
