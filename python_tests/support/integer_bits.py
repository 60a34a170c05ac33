"""The integers that every level of the CPU and the GPU's kernels must make alike, as digests of the operators' results.

    PYTHONPATH=python_tests python -m support.integer_bits      a JSON object on the last line: the installed
                                                                library's level, and case -> digest

Float results are in it where float32 holds them exactly: products with scales that are powers of two, whatever the
order of their sums.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from prequant_ext import ops, reference
from support.operands import F16, F32, LAYERS, Layer, random_matrix, random_weight

CASES = {
    **{name: layer for name, layer in LAYERS.items() if layer.M * layer.K * layer.N < 4_000_000},
    "a tall layer": Layer(19, 1040, 200, blocks="row"),
    "8 tokens": Layer(8, 520, 72),
    "9 tokens of halves": Layer(9, 260, 40, blocks="group", group_size=26, dtype=F16),
}
_LARGEST = 2.0**24  # float32 holds every integer up to it


def digest(*tensors: Tensor) -> str:
    return hashlib.sha256(b"".join(tensor.contiguous().cpu().numpy().tobytes() for tensor in tensors)).hexdigest()[:16]


def exact_product(layer: Layer, per_token: bool) -> Tensor:
    """linear_w4a8 in float32 on random codes; every scale is a power of two, near enough to each other that no sum is
    rounded.
    """
    generator = torch.Generator().manual_seed(7)
    packed, scale, zero_point = random_weight(layer, "cpu")
    tokens = layer.M if per_token else 1

    def powers(shape: tuple[int, ...]) -> Tensor:
        return torch.ldexp(torch.ones(shape), torch.randint(-3, 1, shape, generator=generator))

    scale, x_scale = powers((scale.shape[0], 1)).expand(scale.shape).contiguous(), powers((tokens, 1))
    codes = torch.randint(0, 256, (layer.M, layer.K), generator=generator, dtype=torch.uint8)
    x_zero_point = torch.randint(0, 256, (tokens, 1), generator=generator, dtype=torch.uint8)
    sums = codes.view(layer.M, scale.shape[1], layer.K // scale.shape[1]).sum(2, dtype=torch.int32)
    dims, values = torch.zeros(0, dtype=torch.int64), torch.zeros((layer.N, 0) if layer.axis == 1 else (0, layer.K))
    x = torch.zeros(layer.M, layer.K)
    y = ops.linear_w4a8(
        x,
        codes,
        x_scale,
        x_zero_point,
        sums,
        packed,
        scale,
        zero_point,
        dims,
        values,
        None,
        layer.bits,
        layer.axis,
        False,
    )
    assert layer.M == 0 or (y / x_scale / scale[:, :1].T).abs().max() < _LARGEST, "the case is too deep to be exact"
    return y


def digests() -> Iterator[tuple[str, str]]:
    for name, layer in CASES.items():
        M, N, K, bits = layer.M, layer.N, layer.K, layer.bits
        packed, scale, zero_point = random_weight(layer, "cpu")
        group_size = K // scale.shape[1]
        dense = random_matrix(N, K, F32, "cpu", seed=5) * scale.mean() * 2**bits / 4
        dims = torch.arange(0, K if layer.axis == 1 else N, 7)
        codes = ops.unpack(packed, K, bits)
        prepacked = ops.prepack(packed, K, bits)
        yield f"unpack, pack: {name}", digest(codes, ops.pack(codes, bits))
        yield f"unprepack: {name}", digest(ops.unprepack(prepacked, N, K, bits))
        yield f"prepack: {name}", digest(prepacked)  # a GPU has a layout of its own
        statistics = ops.weight_stats(dense.to(layer.dtype), group_size)
        yield f"weight_stats: {name}", digest(*statistics)
        mean, std = (part.reshape(1, 1) for part in reference.weight_stats(dense, N * K)[:2])
        counts = ops.outlier_counts(dense, mean, std, 1.5)
        yield f"outlier_counts: {name}", digest(*counts)
        yield (
            f"select_outlier_dims: {name}",
            digest(ops.select_outlier_dims(*counts[:2], min(5, K)), ops.select_outlier_dims(*counts[2:], min(5, N))),
        )
        yield f"quantize_pack: {name}", digest(ops.quantize_pack(dense, scale, zero_point, bits, dims, layer.axis))
        for per_token in (True, False):
            x = random_matrix(M, K, layer.dtype, "cpu") * 3 + 0.5
            kind = "token" if per_token else "tensor"
            yield (
                f"quantize_activations, {kind}: {name}",
                digest(*ops.quantize_activations(x, per_token, 0 if scale.shape[1] == 1 else group_size)),
            )
            yield f"linear_w4a8, {kind}: {name}", digest(exact_product(replace(layer, dtype=F32), per_token))


if __name__ == "__main__":
    print(json.dumps({"level": torch.ops.prequant.build_info(), **dict(digests())}))
