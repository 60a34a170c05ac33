"""One call of every operator on a layer."""

from collections.abc import Callable

import torch
from torch import Tensor

from prequant_ext import doctor, ops, reference
from support.operands import BF16, F16, F32, Layer, assert_identical, random_matrix, random_outliers, random_weight

# Each is here for a regime of the dispatch: few tokens, SIMT, one tensor-core tile, several, dense; ragged M, N and K;
# each granularity and axis.
LAYERS = {
    "one token": Layer(1, 192, 96, dtype=F16),
    "few tokens of float32": Layer(3, 200, 72, blocks="row"),
    "few tokens, output axis": Layer(5, 256, 128, axis=0, blocks="row", dtype=F16),
    "a tile, groups": Layer(33, 256, 144, blocks="group", dtype=F16),
    "ragged": Layer(65, 1037, 131, r=17, dtype=F16),
    "many tokens": Layer(600, 320, 257, blocks="row", dtype=F16),
    "8 bits": Layer(17, 96, 80, bits=8, dtype=F16),
    "bfloat16": Layer(40, 200, 136, axis=0, dtype=BF16),
}


def calls(layer: Layer, device: str) -> dict[str, tuple[Callable[..., Tensor | tuple[Tensor, ...]], Tensor]]:
    """Operator -> (call, the float operand that it takes). Every operator once."""
    M, K, N, bits, axis, dtype = layer.M, layer.K, layer.N, layer.bits, layer.axis, layer.dtype
    weight = random_weight(layer, device)
    packed, scale, zero_point = weight
    dims, values = random_outliers(layer, device)
    dense = random_matrix(N, K, F32, device, seed=5)
    x, grad_y = random_matrix(M, K, dtype, device), random_matrix(M, N, dtype, device, seed=4)
    bias = random_matrix(1, N, F32, device, seed=3)[0]
    group = K // scale.shape[1] if scale.shape[1] > 1 else 0
    x_codes, x_scale, x_zero_point, x_sums = (
        part.to(device) for part in reference.quantize_activations(x.cpu(), True, group)
    )
    # Input columns: their gradient wants the r columns alone; output rows: all codes.
    saved = x_codes[:, dims].contiguous() if axis == 1 else x_codes
    codes = ops.unpack(packed, K, bits)
    prepacked = ops.prepack(packed, K, bits)
    mean, std = dense.double().mean().reshape(1, 1), dense.double().std().reshape(1, 1)
    counts, energy = torch.arange(K, device=device) % 7, torch.arange(K, device=device) % 5
    ids = torch.arange(0, 4 * M, 4, device=device) % N
    layer_operands = (*weight, dims, values)
    return {
        "weight_stats": (lambda w: ops.weight_stats(w, w.numel()), dense),
        "outlier_counts": (lambda w: ops.outlier_counts(w, mean, std, 2.0), dense),
        "select_outlier_dims": (lambda e: ops.select_outlier_dims(counts, e, layer.r), energy),
        "quantize_pack": (lambda w: ops.quantize_pack(w, scale, zero_point, bits, dims, axis), dense),
        "pack": (lambda c: ops.pack(c, bits), codes),
        "unpack": (lambda p: ops.unpack(p, K, bits), packed),
        "prepack": (lambda p: ops.prepack(p, K, bits), packed),
        "unprepack": (lambda p: ops.unprepack(p, N, K, bits), prepacked),
        "dequantize": (lambda s: ops.dequantize(packed, s, zero_point, K, bits, dtype), scale),
        "scatter_outlier_": (lambda w: ops.scatter_outlier_(w.clone(), dims, values, axis, True), dense),
        "quantize_activations": (lambda a: ops.quantize_activations(a, True, group), x),
        "embedding": (
            lambda s: ops.embedding(ids, codes, s, zero_point[:, :1].expand_as(s).contiguous(), dtype),
            scale[:, :1].contiguous(),
        ),
        "linear_w4a16": (lambda a: ops.linear_w4a16(a, *layer_operands, bias, bits, axis), x),
        "linear_w4a8": (
            lambda a: ops.linear_w4a8(
                a, x_codes, x_scale, x_zero_point, x_sums, *layer_operands, bias, bits, axis, False
            ),
            x,
        ),
        "linear_dx": (lambda g: ops.linear_dx(g, *layer_operands, K, bits, axis), grad_y),
        "outlier_grad": (lambda g: ops.outlier_grad(g, saved, x_scale, x_zero_point, dims, axis), grad_y),
        "scale_grad": (lambda g: ops.scale_grad(g, x, None, None, packed, zero_point, bits), grad_y),
    }


OPERATORS = sorted(doctor.operator_names())


def results(call: Callable, operand: Tensor) -> list[Tensor]:
    given = call(operand)
    return list(given) if isinstance(given, tuple) else [given]


def assert_same_bits(actual: list[Tensor], expected: list[Tensor]) -> None:
    assert actual
    for one, other in zip(actual, expected, strict=True):
        assert_identical(one, other)
