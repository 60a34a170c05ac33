"""Random operands for the operator tests, and the two ways of comparing with the reference."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from prequant_ext import reference
from support.covering import pairwise


@dataclass(frozen=True)
class Layer:
    """One linear problem: why it is here is its key in LAYERS."""

    M: int
    K: int
    N: int
    r: int = 5
    axis: int = 1
    blocks: str = "tensor"
    bits: int = 4
    dtype: torch.dtype = torch.float32
    group_size: int = 0  # with blocks="group": 0 is 32 where it divides K, else two groups

    def __str__(self) -> str:
        blocks = f"{self.blocks}{self.group_size or ''}"
        return (
            f"M{self.M} K{self.K} N{self.N} r{self.r} axis{self.axis} {blocks} {self.bits}bit "
            f"{str(self.dtype).removeprefix('torch.')}"
        )


F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
LAYERS = {
    "one token": Layer(1, 64, 32),
    "no tokens": Layer(0, 64, 32),
    "no outliers": Layer(5, 64, 32, r=0),
    "no outliers, output axis": Layer(5, 64, 32, r=0, axis=0),
    "one outlier row": Layer(3, 48, 40, r=1, axis=0),
    "all rows are outliers": Layer(4, 24, 6, r=6, axis=0),
    "r above one tensor-core step": Layer(9, 96, 33, r=17),
    "odd K": Layer(6, 65, 31),
    "odd K, output axis": Layer(6, 33, 17, axis=0),
    "off every tile": Layer(7, 130, 13, blocks="group"),
    "minilm query": Layer(40, 384, 384),
    "minilm feed-forward": Layer(33, 384, 1536, blocks="row"),
    "minilm feed-forward output": Layer(37, 1536, 384, axis=0),
    "more rows than a panel's reuse": Layer(211, 128, 70, blocks="row"),
    "groups of 32": Layer(20, 256, 64, blocks="group"),
    "groups, output axis": Layer(20, 96, 64, blocks="group", axis=0),
    "bfloat16": Layer(19, 192, 50, dtype=BF16),
    "bfloat16 rows, output axis": Layer(19, 192, 50, axis=0, blocks="row", dtype=BF16),
    "float16": Layer(8, 100, 36, dtype=F16),
    "2 bits": Layer(12, 90, 44, bits=2),
    "2 bits, groups, output axis": Layer(12, 90, 44, bits=2, blocks="group", axis=0),
    "3 bits in a 4-bit container": Layer(12, 66, 20, bits=3, blocks="row"),
    "8 bits": Layer(12, 90, 44, bits=8),
    "8 bits, rows, bfloat16": Layer(35, 77, 23, bits=8, blocks="row", axis=0, dtype=BF16),
    "one feature in, one out": Layer(3, 1, 1, r=1),
}
GROUPS = 2  # of the cases with blocks="group", unless K is a multiple of 32


# What the kernels of linear operators branch on. Numbers lie on a tile's edge, or one past it: tokens are taken 8, 16
# and 64 at a time, columns k 64 and 128 (copied 8 by 8), rows n 16, 128 and 256, outliers 16.
FACTORS = {
    "M": (0, 1, 3, 8, 16, 17, 63, 64, 65, 128, 200),
    "K": (24, 64, 65, 128, 200, 320),
    "N": (8, 17, 128, 129, 256, 257),
    "r": (0, 1, 5, 16, 17),
    "axis": (0, 1),
    "blocks": ("tensor", "row", "group"),
    "bits": (2, 4, 8),
}


def covering(dtypes: Sequence[torch.dtype], **factors: Sequence) -> dict[str, Layer]:
    """Layers in which every two values of FACTORS (or of those given) meet; r is cut to its axis, and groups are of 64
    in the next K that has some.
    """
    layers = []
    for case in pairwise(**{name: list(values) for name, values in {**FACTORS, "dtype": dtypes, **factors}.items()}):
        if case["blocks"] == "group":
            case |= {"K": max(128, -(-case["K"] // 64) * 64), "group_size": 64}
        case["r"] = min(case["r"], case["K"] if case["axis"] == 1 else case["N"])
        layers.append(Layer(**case))
    return {str(layer): layer for layer in layers}


def block_shape(layer: Layer) -> tuple[int, int]:
    groups = layer.K // layer.group_size if layer.group_size else layer.K // 32 if layer.K % 32 == 0 else GROUPS
    return {"tensor": (1, 1), "row": (layer.N, 1), "group": (layer.N, groups)}[layer.blocks]


def random_weight(layer: Layer, device: str, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """weight_packed, scale, zero_point with every code and every zero point possible."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 2**layer.bits, (layer.N, layer.K), generator=generator, dtype=torch.uint8)
    shape = block_shape(layer)
    scale = 0.01 + 0.05 * torch.rand(shape, generator=generator)
    zero_point = torch.randint(0, 2**layer.bits, shape, generator=generator, dtype=torch.uint8)
    return reference.pack(codes, layer.bits).to(device), scale.to(device), zero_point.to(device)


def random_outliers(layer: Layer, device: str, seed: int = 1) -> tuple[Tensor, Tensor]:
    """outlier_dims and outlier_weight."""
    generator = torch.Generator().manual_seed(seed)
    dims = torch.randperm(layer.K if layer.axis == 1 else layer.N, generator=generator)[: layer.r].sort().values
    r = len(dims)
    values = torch.randn((layer.N, r) if layer.axis == 1 else (r, layer.K), generator=generator)
    return dims.to(device), values.to(device)


def random_matrix(rows: int, cols: int, dtype: torch.dtype, device: str, seed: int = 2) -> Tensor:
    return torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed)).to(dtype).to(device)


def assert_as_accurate(actual: Tensor, plain: Tensor, exact: Tensor) -> None:
    """The largest error is at most twice that of plain torch in the same dtype, or 4 ulp of the largest value; both
    against float64.
    """
    assert actual.shape == exact.shape
    if exact.numel() == 0:
        return
    assert torch.isfinite(actual).all()
    error = (actual.double() - exact.double()).abs().max().item()
    plain_error = (plain.double() - exact.double()).abs().max().item()
    ulp = torch.finfo(actual.dtype).eps * exact.double().abs().max().item()
    assert error <= max(2 * plain_error, 4 * ulp), (
        f"error {error:.3g}, plain torch {plain_error:.3g}, ulp of the largest value {ulp:.3g}"
    )


def block_bound(a: Tensor, weight: Tensor) -> Tensor:
    """What rounding ``a`` (M, depth) to int16 in blocks of 128 columns may cost ``a @ weight``: 2^-15 * sum over blocks
    of max|a| * sum|weight|.
    """
    blocks = zip(a.double().abs().split(128, dim=1), weight.double().abs().split(128), strict=True)
    return 2.0**-15 * sum(part.amax(1, keepdim=True) * rows.sum(0) for part, rows in blocks)


def uneven_matrix(rows: int, cols: int, dtype: torch.dtype, device: str) -> Tensor:
    """Values over several orders of magnitude, as gradients have them."""
    return (
        (random_matrix(rows, cols, F32, "cpu") * random_matrix(rows, cols, F32, "cpu", seed=12).mul(2).exp())
        .to(dtype)
        .to(device)
    )


def assert_identical(actual: Tensor, expected: Tensor) -> None:
    assert actual.dtype == expected.dtype and actual.shape == expected.shape
    assert torch.equal(
        torch.nan_to_num(actual, nan=-12345.0) if actual.is_floating_point() else actual,
        torch.nan_to_num(expected, nan=-12345.0) if expected.is_floating_point() else expected,
    )
