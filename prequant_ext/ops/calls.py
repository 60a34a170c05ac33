"""One typed function for each operator of ``torch.ops.prequant``. No numerics live here.

The operators are native (csrc/ops.cpp): their host functions make the checks and raise the errors. The function of the
same name and arguments in ``reference.py`` defines what each of them computes.
"""

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from prequant_ext import _native  # noqa: F401  loads the library that registers torch.ops.prequant

# The tests put another library of the same operators in its place.
library = torch.ops.prequant
_Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def _autocast(x: Tensor) -> Tensor:
    """x in autocast's dtype where autocast is on. Nothing else is cast: codes, scales and outlier weights keep their
    types.
    """
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@torch.compiler.assume_constant_result
def wants_float32() -> bool:
    """Whether products of float32 may not be rounded: torch.set_float32_matmul_precision("highest"), its default.
    "high" and "medium" let CPU kernels round one factor to blocks of int16 (csrc/cpu/block_product.h states the error).
    A compiled model keeps what held when it was compiled.
    """
    return torch.get_float32_matmul_precision() == "highest"


def _gradients_of(*inputs: Tensor | None) -> AbstractContextManager[Any]:
    """Skips the Python half of autograd where no input of the call asks for a gradient: it would find that out by
    walking all arguments, which takes longer than the product of a token with a small layer.
    """
    if torch.compiler.is_compiling() or (
        torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in inputs)
    ):
        return nullcontext()
    return torch._C._AutoDispatchBelowAutograd()


@functools.cache
def _gpu_reads_prepacked() -> bool:
    return "linear_w4a16" in dict(field.split("=", 1) for field in torch.ops.prequant.build_info().split(";"))[
        "cuda_ops"
    ].split(",")


def reads_prepacked(weight_packed: Tensor) -> bool:
    """Whether the linear operators on this tensor's device read the result of :func:`prepack`, so that another layout
    costs a conversion in every call.
    """
    return weight_packed.is_cpu or (weight_packed.is_cuda and _gpu_reads_prepacked())


def weight_stats(weight: Tensor, block_size: int) -> _Stats:
    return library.weight_stats(weight, block_size)


def outlier_counts(weight: Tensor, mean: Tensor, std: Tensor, threshold: float) -> _Stats:
    return library.outlier_counts(weight, mean, std, threshold)


def select_outlier_dims(counts: Tensor, energy: Tensor, r: int) -> Tensor:
    return library.select_outlier_dims(counts, energy, r)


def quantize_pack(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, outlier_dims: Tensor, axis: int
) -> Tensor:
    return library.quantize_pack(weight, scale, zero_point, bits, outlier_dims, axis)


def pack(codes: Tensor, bits: int) -> Tensor:
    return library.pack(codes, bits)


def unpack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    return library.unpack(weight_packed, K, bits)


def prepack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    return library.prepack(weight_packed, K, bits)


def unprepack(prepacked: Tensor, N: int, K: int, bits: int) -> Tensor:
    return library.unprepack(prepacked, N, K, bits)


def dequantize(
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    K: int,
    bits: int,
    dtype: torch.dtype,
    row_begin: int = 0,
    row_end: int | None = None,
) -> Tensor:
    return library.dequantize(weight_packed, scale, zero_point, K, bits, dtype, row_begin, row_end)


def scatter_outlier_(
    dense: Tensor, outlier_dims: Tensor, outlier_weight: Tensor, axis: int, accumulate: bool
) -> Tensor:
    # returns nothing: functionalization takes no aliased result
    library.scatter_outlier_(dense, outlier_dims, outlier_weight, axis, accumulate)
    return dense


def quantize_activations(x: Tensor, per_token: bool, group_size: int, excluded_dims: Tensor | None = None) -> _Stats:
    return library.quantize_activations(x, per_token, group_size, excluded_dims)


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    return library.embedding(ids, codes, scale, zero_point, dtype)


def linear_w4a16(
    x: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    bits: int,
    axis: int,
    out_features: int | None = None,
    in_float32: bool | None = None,
) -> Tensor:
    x, in_float32 = _autocast(x), wants_float32() if in_float32 is None else in_float32
    with _gradients_of(x, scale, outlier_weight, bias):
        return library.linear_w4a16(
            x,
            weight_packed,
            scale,
            zero_point,
            outlier_dims,
            outlier_weight,
            bias,
            bits,
            axis,
            out_features,
            in_float32,
        )


def linear_w4a8(
    x: Tensor,
    x_codes: Tensor | None,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    x_sums: Tensor | None,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    bias: Tensor | None,
    bits: int,
    axis: int,
    raw_outliers: bool,
    out_features: int | None = None,
    per_token: bool = True,
) -> Tensor:
    with _gradients_of(x, scale, outlier_weight, bias):
        return library.linear_w4a8(
            _autocast(x),
            x_codes,
            x_scale,
            x_zero_point,
            x_sums,
            weight_packed,
            scale,
            zero_point,
            outlier_dims,
            outlier_weight,
            bias,
            bits,
            axis,
            raw_outliers,
            out_features,
            per_token,
        )


def linear_dx(
    grad_y: Tensor,
    weight_packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    outlier_dims: Tensor,
    outlier_weight: Tensor,
    K: int,
    bits: int,
    axis: int,
    in_float32: bool | None = None,
) -> Tensor:
    in_float32 = wants_float32() if in_float32 is None else in_float32
    return library.linear_dx(
        grad_y, weight_packed, scale, zero_point, outlier_dims, outlier_weight, K, bits, axis, in_float32
    )


def outlier_grad(
    grad_y: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, outlier_dims: Tensor, axis: int
) -> Tensor:
    return library.outlier_grad(grad_y, x, x_scale, x_zero_point, outlier_dims, axis)


def scale_grad(
    grad_y: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight_packed: Tensor,
    zero_point: Tensor,
    bits: int,
) -> Tensor:
    return library.scale_grad(grad_y, x, x_scale, x_zero_point, weight_packed, zero_point, bits)
