"""torch.ops.prequant for Python: one typed function an operator, its fake and its gradient. No numerics live here.

The operators are native (csrc/ops.cpp): their host functions make the checks and raise the errors. What they compute is
the function of the same name and arguments in ``reference.py``.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from prequant_ext import _native  # noqa: F401  loads the library that registers torch.ops.prequant
from prequant_ext.reference import container_bits

_prequant = torch.ops.prequant
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
    """Whether the linear operators on this tensor's device want the result of :func:`prepack`; another layout costs a
    conversion in every call.
    """
    return weight_packed.is_cpu or (weight_packed.is_cuda and _gpu_reads_prepacked())


def weight_stats(weight: Tensor, block_size: int) -> _Stats:
    return _prequant.weight_stats(weight, block_size)


def outlier_counts(weight: Tensor, mean: Tensor, std: Tensor, threshold: float) -> _Stats:
    return _prequant.outlier_counts(weight, mean, std, threshold)


def select_outlier_dims(counts: Tensor, energy: Tensor, r: int) -> Tensor:
    return _prequant.select_outlier_dims(counts, energy, r)


def quantize_pack(
    weight: Tensor, scale: Tensor, zero_point: Tensor, bits: int, outlier_dims: Tensor, axis: int
) -> Tensor:
    return _prequant.quantize_pack(weight, scale, zero_point, bits, outlier_dims, axis)


def pack(codes: Tensor, bits: int) -> Tensor:
    return _prequant.pack(codes, bits)


def unpack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    return _prequant.unpack(weight_packed, K, bits)


def prepack(weight_packed: Tensor, K: int, bits: int) -> Tensor:
    return _prequant.prepack(weight_packed, K, bits)


def unprepack(prepacked: Tensor, N: int, K: int, bits: int) -> Tensor:
    return _prequant.unprepack(prepacked, N, K, bits)


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
    return _prequant.dequantize(weight_packed, scale, zero_point, K, bits, dtype, row_begin, row_end)


def scatter_outlier_(
    dense: Tensor, outlier_dims: Tensor, outlier_weight: Tensor, axis: int, accumulate: bool
) -> Tensor:
    # returns nothing: functionalization takes no aliased result
    _prequant.scatter_outlier_(dense, outlier_dims, outlier_weight, axis, accumulate)
    return dense


def quantize_activations(x: Tensor, per_token: bool, group_size: int, excluded_dims: Tensor | None = None) -> _Stats:
    return _prequant.quantize_activations(x, per_token, group_size, excluded_dims)


def embedding(ids: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    return _prequant.embedding(ids, codes, scale, zero_point, dtype)


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
        return _prequant.linear_w4a16(
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
        return _prequant.linear_w4a8(
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
    return _prequant.linear_dx(
        grad_y, weight_packed, scale, zero_point, outlier_dims, outlier_weight, K, bits, axis, in_float32
    )


def outlier_grad(
    grad_y: Tensor, x: Tensor, x_scale: Tensor | None, x_zero_point: Tensor | None, outlier_dims: Tensor, axis: int
) -> Tensor:
    return _prequant.outlier_grad(grad_y, x, x_scale, x_zero_point, outlier_dims, axis)


def scale_grad(
    grad_y: Tensor,
    x: Tensor,
    x_scale: Tensor | None,
    x_zero_point: Tensor | None,
    weight_packed: Tensor,
    zero_point: Tensor,
    bits: int,
) -> Tensor:
    return _prequant.scale_grad(grad_y, x, x_scale, x_zero_point, weight_packed, zero_point, bits)


# ---- fakes: the output shapes, once more, without data ---------------------------------------------------------------


def _stats_shape(weight: Tensor, block_size: int) -> tuple[int, int]:
    N, K = weight.shape
    return (1, 1) if block_size == N * K else (N, K // block_size)


def _row_bytes(K: int, bits: int) -> int:
    return (K * container_bits(bits) + 7) // 8


def _prepacked_shape(weight_packed: Tensor, K: int, bits: int, is_gpu: bool) -> tuple[int, int, int]:
    """Tensor-core chunks of 16 x 64 codes for a GPU's kernels, panels of 16 rows for the CPU's (csrc/formats.h)."""
    panels = (weight_packed.shape[0] + 15) // 16
    return (
        (panels, (K + 63) // 64, 128 * container_bits(bits))
        if is_gpu
        else (panels, (_row_bytes(K, bits) + 3) // 4 + 1, 64)
    )


def _out_features(weight_packed: Tensor, given: tuple[int | None, ...]) -> int:
    """N: what the caller says of a prepacked weight (the last, optional argument), or the rows of a canonical one."""
    return given[0] if given and given[0] is not None else weight_packed.shape[0]


FAKES: dict[str, Callable[..., Any]] = {
    "weight_stats": lambda weight, block_size: tuple(
        weight.new_empty(_stats_shape(weight, block_size), dtype=torch.float64) for _ in range(4)
    ),
    "outlier_counts": lambda weight, mean, std, threshold: tuple(
        weight.new_empty(weight.shape[dim], dtype=torch.int64) for dim in (1, 1, 0, 0)
    ),
    "select_outlier_dims": lambda counts, energy, r: counts.new_empty(r),
    "quantize_pack": lambda weight, scale, zero_point, bits, outlier_dims, axis: zero_point.new_empty(
        weight.shape[0], _row_bytes(weight.shape[1], bits)
    ),
    "pack": lambda codes, bits: codes.new_empty(codes.shape[0], _row_bytes(codes.shape[1], bits)),
    "unpack": lambda weight_packed, K, bits: weight_packed.new_empty(weight_packed.shape[0], K),
    "prepack": lambda weight_packed, K, bits: weight_packed.new_empty(
        _prepacked_shape(weight_packed, K, bits, weight_packed.device.type == "cuda")
    ),
    "unprepack": lambda prepacked, N, K, bits: prepacked.new_empty(N, _row_bytes(K, bits)),
    "dequantize": lambda weight_packed, scale, zero_point, K, bits, dtype, row_begin=0, row_end=None: scale.new_empty(
        (weight_packed.shape[0] if row_end is None else row_end) - row_begin, K, dtype=dtype
    ),
    "scatter_outlier_": lambda dense, outlier_dims, outlier_weight, axis, accumulate: None,
    "quantize_activations": lambda x, per_token, group_size, excluded_dims=None: (
        x.new_empty(x.shape, dtype=torch.uint8),
        x.new_empty((x.shape[0] if per_token else 1, 1), dtype=torch.float32),
        x.new_empty((x.shape[0] if per_token else 1, 1), dtype=torch.uint8),
        x.new_empty((x.shape[0], x.shape[1] // group_size if group_size else 1), dtype=torch.int32),
    ),
    "embedding": lambda ids, codes, scale, zero_point, dtype: scale.new_empty(
        ids.shape[0], codes.shape[1], dtype=dtype
    ),
    "linear_w4a16": lambda x, weight_packed, *rest: x.new_empty(x.shape[0], _out_features(weight_packed, rest[7:])),
    "linear_w4a8": lambda x, x_codes, x_scale, x_zero_point, x_sums, weight_packed, *rest: x.new_empty(
        x.shape[0], _out_features(weight_packed, rest[8:])
    ),
    "linear_dx": lambda grad_y, weight_packed, scale, zero_point, dims, outlier_weight, K, bits, axis, _float32=True: (
        grad_y.new_empty(grad_y.shape[0], K)
    ),
    "outlier_grad": lambda grad_y, x, x_scale, x_zero_point, outlier_dims, axis: grad_y.new_empty(
        (grad_y.shape[1] if axis == 1 else outlier_dims.shape[0], x.shape[1]), dtype=torch.float32
    ),
    "scale_grad": lambda grad_y, x, x_scale, x_zero_point, weight_packed, zero_point, bits: grad_y.new_empty(
        (grad_y.shape[1], zero_point.shape[1]), dtype=torch.float32
    ),
}


# ---- gradients (method: dx = dy W + outliers, dO = dy^T x[:, idx] or dy[:, idx]^T x; the dense weight gradient is ----
# never formed) --------


class _Saved:
    """What a linear keeps for its backward, in the order of ``ctx.saved_tensors``; the first five belong to the layer
    and cost nothing.

    activations: the r outlier columns of x (axis 1), or all of x (axis 0, or where scales are trained); uint8 codes
    where x was quantized.
    """

    def __init__(self, ctx: Any) -> None:
        (self.weight_packed, self.scale, self.zero_point, self.outlier_dims, self.outlier_weight, *self.activations) = (
            ctx.saved_tensors
        )


def _save(
    ctx: Any,
    weight: tuple[Tensor, ...],
    activation: Tensor,
    quantization: tuple[Tensor, ...],
    needs_outliers: bool,
    needs_scale: bool,
) -> None:
    """Save the layer's tensors and no more of the activation than the gradients asked for read."""
    outlier_dims = weight[3]
    kept: list[Tensor] = []
    ctx.keeps_columns = needs_outliers and not needs_scale and ctx.axis == 1
    if ctx.keeps_columns:
        kept = [activation[:, outlier_dims], *quantization]
    elif needs_scale or (needs_outliers and outlier_dims.shape[0] > 0):
        kept = [activation, *quantization]
    ctx.save_for_backward(*weight, *kept)


def _linear_backward(
    library: Any, ctx: Any, grad_y: Tensor, needs: tuple[bool, bool, bool, bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of (x, scale, outlier_weight, bias), each where ``needs`` asks for it."""
    saved = _Saved(ctx)
    grad_y = grad_y.contiguous()
    dx = d_scale = d_outliers = d_bias = None
    weight = (saved.weight_packed, saved.scale, saved.zero_point, saved.outlier_dims, saved.outlier_weight)
    if needs[0]:
        dx = library.linear_dx(grad_y, *weight, ctx.in_features, ctx.bits, ctx.axis, wants_float32())
    if saved.activations:
        activation, x_scale, x_zero_point = (*saved.activations, None, None)[:3]
        if needs[1]:
            per_group = library.scale_grad(
                grad_y, activation, x_scale, x_zero_point, saved.weight_packed, saved.zero_point, ctx.bits
            )
            d_scale = per_group if saved.scale.shape[0] == per_group.shape[0] else per_group.sum(0, keepdim=True)
        if needs[2]:
            columns = activation if ctx.keeps_columns or ctx.axis == 0 else activation[:, saved.outlier_dims]
            d_outliers = library.outlier_grad(grad_y, columns, x_scale, x_zero_point, saved.outlier_dims, ctx.axis)
    if needs[2] and d_outliers is None:
        d_outliers = torch.zeros_like(saved.outlier_weight)  # r = 0
    if needs[3]:
        d_bias = grad_y.sum(0, dtype=torch.float32)
    return dx, d_scale, d_outliers, d_bias


def _on_one_device(op: str, fake: Callable[..., Any]) -> Callable[..., Any]:
    """The host functions refuse tensors on different devices; where one of them is on the meta device, the fake runs
    instead and must do so itself.
    """

    def checked(*arguments: Any) -> Any:
        devices = list(dict.fromkeys(str(argument.device) for argument in arguments if isinstance(argument, Tensor)))
        if len(devices) > 1:
            raise RuntimeError(f"{op}: tensors must be on one device, got {' and '.join(devices)}")
        return fake(*arguments)

    return checked


def register(name: str, has_chunks: bool = False) -> None:
    """Register fakes and gradients for ``torch.ops.<name>``: the library itself, and those of the tests.
    ``has_chunks``: its CPU tensors meet the GPU's kernels, and prepacked weights are made of tensor-core chunks.
    """
    library = getattr(torch.ops, name)
    fakes = dict(FAKES)
    if has_chunks:
        fakes["prepack"] = lambda weight_packed, K, bits: weight_packed.new_empty(
            _prepacked_shape(weight_packed, K, bits, True)
        )
    for op, fake in fakes.items():
        torch.library.register_fake(f"{name}::{op}", _on_one_device(f"{name}::{op}", fake))

    def setup_w4a16(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, *weight, bias, ctx.bits, ctx.axis, _, _ = inputs
        ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
        _save(ctx, tuple(weight), x, (), ctx.needs_input_grad[5], ctx.needs_input_grad[2])

    def backward_w4a16(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dx, d_scale, d_outliers, d_bias = _linear_backward(
            library, ctx, grad_y, (needs[0], needs[2], needs[5], needs[6])
        )
        return (
            dx,
            None,
            d_scale,
            None,
            None,
            d_outliers,
            None if d_bias is None else d_bias.to(ctx.bias_dtype),
            None,
            None,
            None,
            None,
        )

    def setup_w4a8(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, x_codes, x_scale, x_zero_point, _, *weight, bias, ctx.bits, ctx.axis, raw_outliers, _, per_token = inputs
        if x_codes is None and not raw_outliers:  # the operator made them inside; a caller that trains hands them in
            x_codes, x_scale, x_zero_point, _ = library.quantize_activations(x.detach(), per_token, 0)
        ctx.in_features, ctx.bias_dtype = x.shape[1], None if bias is None else bias.dtype
        activation, quantization = (x, ()) if raw_outliers else (x_codes, (x_scale, x_zero_point))
        _save(ctx, tuple(weight), activation, quantization, ctx.needs_input_grad[9], ctx.needs_input_grad[6])

    def backward_w4a8(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        needs = ctx.needs_input_grad
        dx, d_scale, d_outliers, d_bias = _linear_backward(
            library, ctx, grad_y, (needs[0], needs[6], needs[9], needs[10])
        )
        d_bias = None if d_bias is None else d_bias.to(ctx.bias_dtype)
        return dx, None, None, None, None, None, d_scale, None, None, d_outliers, d_bias, None, None, None, None, None

    def setup_embedding(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ids, codes, scale, zero_point, _ = inputs
        ctx.save_for_backward(ids, codes, scale, zero_point)

    def backward_embedding(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, codes, scale, zero_point = ctx.saved_tensors
        if not ctx.needs_input_grad[2]:
            return None, None, None, None, None
        # (q - z): the derivative of a row by its scale
        steps = library.embedding(ids, codes, torch.ones_like(scale), zero_point, torch.float32)
        per_id = (grad.float() * steps).sum(1, keepdim=True)
        d_scale = (
            torch.zeros_like(scale).index_add(0, ids, per_id) if scale.shape[0] > 1 else per_id.sum(0, keepdim=True)
        )
        return None, None, d_scale, None, None

    torch.library.register_autograd(f"{name}::linear_w4a16", backward_w4a16, setup_context=setup_w4a16)
    torch.library.register_autograd(f"{name}::linear_w4a8", backward_w4a8, setup_context=setup_w4a8)
    torch.library.register_autograd(f"{name}::embedding", backward_embedding, setup_context=setup_embedding)


register("prequant")
