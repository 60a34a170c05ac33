"""The output shapes of the operators, for tensors without data: one fake for each operator, with its arguments.

Each has the parameters of the function of the same name in ``reference.py``.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from prequant_ext.reference import container_bits, row_bytes

_Stats = tuple[Tensor, Tensor, Tensor, Tensor]


def weight_stats(weight: Tensor, block_size: int) -> _Stats:
    N, K = weight.shape
    shape = (1, 1) if block_size == N * K else (N, K // block_size)
    mean, std, low, high = (weight.new_empty(shape, dtype=torch.float64) for _ in range(4))
    return mean, std, low, high


def outlier_counts(weight: Tensor, mean: Tensor, std: Tensor, threshold: float) -> _Stats:
    N, K = weight.shape
    columns, column_energy = (weight.new_empty(K, dtype=torch.int64) for _ in range(2))
    rows, row_energy = (weight.new_empty(N, dtype=torch.int64) for _ in range(2))
    return columns, column_energy, rows, row_energy


def select_outlier_dims(counts: Tensor, energy: Tensor, r: int) -> Tensor:
    return counts.new_empty(r)


def pack(codes: Tensor, bits: int) -> Tensor:
    return codes.new_empty(codes.shape[0], row_bytes(codes.shape[1], bits))


def unpack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    return weight_packed.new_empty(weight_packed.shape[0], K)


def prepack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    """Panels of 16 rows on the CPU, tensor-core chunks on a GPU (csrc/formats.h)."""
    if weight_packed.device.type == "cuda":
        return tensor_core_chunks(weight_packed, K, bits)
    words = (row_bytes(K, bits) + 3) // 4
    return weight_packed.new_empty((weight_packed.shape[0] + 15) // 16, words + 1, 64)


def tensor_core_chunks(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    """:func:`prepack` of the GPU's kernels: chunks of 16 x 64 codes."""
    return weight_packed.new_empty((weight_packed.shape[0] + 15) // 16, (K + 63) // 64, 128 * container_bits(bits))


def unprepack(prepacked: Tensor, N: int, K: int, bits: int) -> Tensor:
    return prepacked.new_empty(N, row_bytes(K, bits))


def quantize_pack(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, outlier_dims: Tensor, axis: int
) -> Tensor:
    return zero_point.new_empty(weight.shape[0], row_bytes(weight.shape[1], bits))


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
    end = weight_packed.shape[0] if row_end is None else row_end
    return scale.new_empty(end - row_begin, K, dtype=dtype)


def scatter_outlier_(dense: Tensor, outlier_dims: Tensor, outlier_weight: Tensor, axis: int, accumulate: bool) -> None:
    """The operator works in place and returns nothing."""


def quantize_activations(x: Tensor, per_token: bool, group_size: int, excluded_dims: Tensor | None = None) -> _Stats:
    M, K = x.shape
    ranges = (M if per_token else 1, 1)
    return (
        x.new_empty((M, K), dtype=torch.uint8),
        x.new_empty(ranges, dtype=torch.float32),
        x.new_empty(ranges, dtype=torch.uint8),
        x.new_empty((M, K // group_size if group_size else 1), dtype=torch.int32),
    )


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    return scale.new_empty(ids.shape[0], codes.shape[1], dtype=dtype)


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
    return x.new_empty(x.shape[0], _out_features(weight_packed, out_features))


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
    return x.new_empty(x.shape[0], _out_features(weight_packed, out_features))


def _out_features(weight_packed: Tensor, out_features: int | None) -> int:
    """The caller names N where the weight is prepacked; a canonical weight has N rows."""
    return weight_packed.shape[0] if out_features is None else out_features


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
    return grad_y.new_empty(grad_y.shape[0], K)


def outlier_grad(
    grad_y: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, outlier_dims: Tensor, axis: int
) -> Tensor:
    rows = grad_y.shape[1] if axis == 1 else outlier_dims.shape[0]
    return grad_y.new_empty((rows, x.shape[1]), dtype=torch.float32)


def scale_grad(
    grad_y: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight_packed: Tensor,
    zero_point: Tensor,
    bits: int,
) -> Tensor:
    return grad_y.new_empty((grad_y.shape[1], zero_point.shape[1]), dtype=torch.float32)


FAKES: tuple[Callable[..., Any], ...] = (
    weight_stats,
    outlier_counts,
    select_outlier_dims,
    pack,
    unpack,
    prepack,
    unprepack,
    quantize_pack,
    dequantize,
    scatter_outlier_,
    quantize_activations,
    embedding,
    linear_w4a16,
    linear_w4a8,
    linear_dx,
    outlier_grad,
    scale_grad,
)


def register(name: str, has_chunks: bool) -> None:
    """Register the fakes of ``torch.ops.<name>``. ``has_chunks``: its CPU tensors are prepacked as a GPU's are."""
    for fake in FAKES:
        op = f"{name}::{fake.__name__}"
        shapes = tensor_core_chunks if has_chunks and fake is prepack else fake
        torch.library.register_fake(op, _on_one_device(op, shapes))


def _on_one_device(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The host functions refuse tensors on different devices. Where one of the tensors is on the meta device, the fake
    runs in place of the host function and must make that check itself.
    """

    def checked(*arguments: Any) -> Any:
        devices = list(dict.fromkeys(str(argument.device) for argument in arguments if isinstance(argument, Tensor)))
        if len(devices) > 1:
            raise RuntimeError(f"{op}: tensors must be on one device, got {' and '.join(devices)}")
        return fake(*arguments)

    return checked
