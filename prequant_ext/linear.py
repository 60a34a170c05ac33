"""PreQuantLinear: a frozen quantized weight and r trained outlier dimensions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prequant_ext import ops, quantize
from prequant_ext.config import PreQuantConfig
from prequant_ext.frozen import FrozenWeight, empty_parameter, is_sharded, on_whole, quantized_modules
from prequant_ext.outliers import AXES
from prequant_ext.reference import row_bytes


def is_conv1d(module: nn.Module) -> bool:
    """Whether ``module`` is transformers' Conv1D: a linear layer that stores its weight as (K, N). Told by name:
    transformers is optional.
    """
    return type(module).__name__ == "Conv1D" and type(module).__module__ == "transformers.pytorch_utils"


class PreQuantLinear(FrozenWeight):
    """``y = x W^T + x[:, idx] O^T + bias`` (axis input) or ``y = x W^T + bias; y[:, idx] += x O^T`` (axis output).
    PreQuant, Section 4.3.

    Frozen     weight_packed uint8: the layout of its device's kernels, 3 dimensions; a state dict has canonical
               storage, (N, B) · weight_scale float32 and weight_zero_point uint8: (1, 1), (N, 1) or (N, G) ·
               outlier_dims (r,) int64, ascending · bias (N,)
    Trained    outlier_weight float32, O: (N, r) or (r, K), the weights of the outlier dimensions; their codes are worth
               exactly 0. With ``train_scales`` (PreQuant-alpha) weight_scale is trained and r is 0.

    x is (..., K) float32, float16 or bfloat16 and y has its dtype (or autocast's); with ``activation_bits`` 8, x enters
    both products quantized. ``.to(dtype)`` leaves scales and outlier weights in float32.

    Raises ValueError if r exceeds the sliced axis, if a group or the hidden size does not divide K, or on non-finite
    weights.
    """

    # in a model with tasks: outlier weights for each row of a mixed batch, (B, N, r) or (B, r, K)
    row_weights: Callable[[], Tensor | None] | None = None
    stays_canonical = False  # for FSDP2 (prepare_model); the kernels then convert weight_packed in every call

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        bias: bool,
        axis: str,
        config: PreQuantConfig,
        bits: int | None = None,
        hidden_size: int | None = None,
        is_transposed: bool = False,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__(dtype)
        if axis not in AXES:
            hint = (
                '; "hidden" is decided by the role of a module in its model: use quantize_model'
                if axis == "hidden"
                else ""
            )
            raise ValueError(f"axis must be input or output for a single layer, got {axis!r}{hint}")
        self.in_features, self.out_features = in_features, out_features
        self.shape = (out_features, in_features)
        self.axis, self.is_transposed = axis, is_transposed
        self.bits = config.bits if bits is None else bits
        self.r = config.r
        self.activation_bits = config.activation_bits
        self.per_token = config.activation_granularity == "token"
        self.raw_outliers = config.raw_outlier_activations and axis == "input" and config.r > 0
        self.train_scales = config.train_scales
        self.squared_error: float | None = None  # of the quantization, where it was done in this process

        N, K, r = out_features, in_features, config.r
        blocks = quantize.scale_shape(config, N, K, hidden_size)
        self.group_size = K // blocks[1] if blocks[1] > 1 else 0
        self.weight_packed = empty_parameter((N, row_bytes(K, self.bits)), torch.uint8, device)
        self.weight_scale = empty_parameter(blocks, torch.float32, device, requires_grad=config.train_scales)
        self.weight_zero_point = empty_parameter(blocks, torch.uint8, device)
        self.outlier_dims = empty_parameter((r,), torch.int64, device)
        self.outlier_weight = empty_parameter(
            (N, r) if axis == "input" else (r, K), torch.float32, device, requires_grad=r > 0
        )
        self.bias: nn.Parameter | None
        self.register_parameter("bias", empty_parameter((N,), self.compute_dtype, device) if bias else None)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        config: PreQuantConfig,
        axis: str | None = None,
        *,
        name: str = "linear",
        bits: int | None = None,
        hidden_size: int | None = None,
        tuned: Tensor | None = None,
    ) -> "PreQuantLinear":
        """The pre-quantized twin of an ``nn.Linear`` (or transformers Conv1D), which stays as it is.

        ``axis``: None takes the config's, and "input" for its "hidden", which a layer without a model cannot decide.
        ``name`` is used in errors and seeds the random selector; ``hidden_size`` is the group of trained scales
        (default: in_features); ``tuned`` the fine-tuned weight of the ticket selector.
        """
        if axis is None:
            axis = "input" if config.axis == "hidden" else config.axis
        is_transposed = is_conv1d(linear)
        if not is_transposed and not isinstance(linear, nn.Linear):
            raise TypeError(f"linear must be an nn.Linear or a transformers Conv1D, got {type(linear).__name__}")
        stored: Tensor = linear.weight.detach()  # type: ignore[operator]
        weight = stored.T if is_transposed else stored
        bias: Tensor | None = linear.bias  # type: ignore[assignment]
        N, K = weight.shape
        hidden_size = K if hidden_size is None else hidden_size
        layer = cls(
            K,
            N,
            bias=bias is not None,
            axis=axis,
            config=config,
            bits=bits,
            hidden_size=hidden_size,
            is_transposed=is_transposed,
            dtype=weight.dtype,
            device="meta",
        )
        tuned = tuned.T if tuned is not None and is_transposed else tuned
        quantized = quantize.quantize_matrix(
            weight, config, name=name, axis=axis, bits=layer.bits, hidden_size=hidden_size, tuned=tuned
        )
        layer.load_quantized(quantized, bias)
        return layer

    @property
    def trained_names(self) -> tuple[str, ...]:
        return ("weight_scale",) if self.train_scales else ("outlier_weight",) if self.r else ()

    def load_quantized(self, quantized: "quantize.QuantizedMatrix", bias: Tensor | None) -> None:
        """Take over the tensors of a quantized matrix; which parameters are trained stays as it was."""
        self.unprepack_()
        for name in ("weight_packed", "weight_scale", "weight_zero_point", "outlier_dims", "outlier_weight"):
            self._set(name, getattr(quantized, name))
        if bias is not None:
            self._set("bias", bias.detach().clone())
        self.squared_error = quantized.squared_error
        self.prepack_()

    # ---- the layout of weight_packed: canonical rows, or what the kernels of its device read; one of them in memory,
    # never both

    @property
    def is_prepacked(self) -> bool:
        return self.weight_packed.dim() == 3

    @torch.no_grad()
    def canonical_packed(self) -> Tensor:
        """weight_packed as canonical rows (N, B), whatever layout the layer holds."""
        packed = self.weight_packed.detach()
        if not self.is_prepacked:
            return packed
        return on_whole(lambda codes: ops.unprepack(codes, self.out_features, self.in_features, self.bits), packed)

    def stored_bytes(self) -> int:
        code_bytes = self.out_features * row_bytes(self.in_features, self.bits)
        return super().stored_bytes() - self.weight_packed.nbytes + code_bytes

    @torch.no_grad()
    def prepack_(self) -> "PreQuantLinear":
        """Put weight_packed into the layout that the kernels of its device read, if they read one of their own.
        Lossless; done once, not per call.

        A layer that is or will be sharded stays as it is: FSDP2 holds on to its tensors, and fills them from canonical
        files.
        """
        if not (self.is_prepacked or self.stays_canonical or is_sharded(self.weight_packed)) and ops.reads_prepacked(
            self.weight_packed
        ):
            self.weight_packed.data = ops.prepack(self.weight_packed.detach(), self.in_features, self.bits)
        return self

    @torch.no_grad()
    def unprepack_(self) -> "PreQuantLinear":
        """The inverse of :meth:`prepack_`."""
        if self.is_prepacked and not is_sharded(self.weight_packed):
            self.weight_packed.data = self.canonical_packed()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PreQuantLinear":
        self.unprepack_()  # a device's layout means nothing on another one
        super()._apply(fn, recurse)
        return self.prepack_()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.is_prepacked:
            destination[f"{prefix}weight_packed"] = self.canonical_packed()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._take_disk_name(state_dict, prefix)
        self.unprepack_()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        self.prepack_()

    def forward(self, x: Tensor, outlier_weight: Tensor | None = None) -> Tensor:
        """``outlier_weight`` takes the place of the layer's own: float32 of its shape, or (B, ...) with one for each of
        the batch's B rows.
        """
        K = x.shape[-1]
        if self.in_features != K:  # the packed row alone cannot tell an odd K from the next even one
            raise ValueError(f"x has K = {K} but the layer has in_features = {self.in_features}")
        if outlier_weight is None and self.row_weights is not None:
            outlier_weight = self.row_weights()
        if outlier_weight is not None and outlier_weight.dim() == 3:
            return self._forward_mixed(x, outlier_weight)
        rows = x if x.dim() == 2 else x.reshape(-1, K)
        # an attribute costs Module a search, and a layer of one token is done in a few microseconds
        own: dict[str, Any] = self._parameters
        outlier_weight = own["outlier_weight"] if outlier_weight is None else outlier_weight
        weight = (
            own["weight_packed"],
            own["weight_scale"],
            own["weight_zero_point"],
            own["outlier_dims"],
            outlier_weight,
        )
        axis, bias = AXES[self.axis], own["bias"]
        if self.activation_bits is None:
            y = ops.linear_w4a16(rows, *weight, bias, self.bits, axis, self.out_features)
        else:
            # By the operator itself, where nobody needs them afterwards.
            quantized: tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None] = (None, None, None, None)
            if torch.is_grad_enabled():
                quantized = ops.quantize_activations(
                    rows.detach(), self.per_token, self.group_size, self.outlier_dims if self.raw_outliers else None
                )
            y = ops.linear_w4a8(
                rows, *quantized, *weight, bias, self.bits, axis, self.raw_outliers, self.out_features, self.per_token
            )
        return y if x.dim() == 2 else y.view(*x.shape[:-1], self.out_features)

    def _forward_mixed(self, x: Tensor, row_weights: Tensor) -> Tensor:
        """:meth:`forward` where each of the batch's B rows has outlier weights of its own: the frozen product of all
        rows, then one batched product.
        """
        B, rows = len(row_weights), x.reshape(-1, self.in_features)
        if len(rows) % B or (x.dim() > 2 and len(x) != B):
            raise ValueError(
                f"x must have the batch's {B} rows, a task each, got shape {tuple(x.shape)}: this layer is not called "
                "row by row"
            )
        axis, nothing = AXES[self.axis], self.outlier_weight.detach()
        nothing = nothing[:, :0] if self.axis == "input" else nothing[:0]
        weight = (self.weight_packed, self.weight_scale, self.weight_zero_point, self.outlier_dims[:0], nothing)
        columns = rows[:, self.outlier_dims] if self.axis == "input" else rows
        if self.activation_bits is None:
            y = ops.linear_w4a16(rows, *weight, self.bias, self.bits, axis, self.out_features)
        else:
            excluded = self.outlier_dims if self.raw_outliers else None
            codes, scale, zero_point, sums = ops.quantize_activations(
                rows.detach(), self.per_token, self.group_size, excluded
            )
            y = ops.linear_w4a8(
                rows,
                codes,
                scale,
                zero_point,
                sums,
                *weight,
                self.bias,
                self.bits,
                axis,
                False,
                self.out_features,
                self.per_token,
            )
            if not self.raw_outliers:
                # In place here and below: on a CPU the memory of another tensor as large as x or y takes longer to get
                # than its values to compute.
                value = (
                    (codes[:, self.outlier_dims] if self.axis == "input" else codes)
                    .float()
                    .sub_(zero_point.float())
                    .mul_(scale)
                )
                # Straight through where a gradient is wanted: the value is exact, the gradient x's.
                columns = (
                    value + (columns - columns.detach()) if torch.is_grad_enabled() and columns.requires_grad else value
                )
        with torch.autocast(x.device.type, enabled=False):
            columns = columns.float().view(B, -1, columns.shape[-1])
            if self.axis == "output":
                y.index_add_(
                    1, self.outlier_dims, torch.bmm(columns, row_weights.mT).view(len(rows), self.r).to(y.dtype)
                )
            elif y.dtype == torch.float32:  # baddbmm takes one dtype, and outlier weights are float32
                y.view(B, -1, self.out_features).baddbmm_(columns, row_weights.mT)
            else:
                y += torch.bmm(columns, row_weights.mT).view(y.shape).to(y.dtype)
        return y.view(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def dequantize(self) -> Tensor:
        """The dense (N, K) float32 weight, outlier dimensions included."""
        dense = ops.dequantize(
            self.canonical_packed(),
            self.weight_scale,
            self.weight_zero_point,
            self.in_features,
            self.bits,
            torch.float32,
        )
        return ops.scatter_outlier_(dense, self.outlier_dims, self.outlier_weight, AXES[self.axis], False)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """A float layer of the kind this one was made from, holding :meth:`dequantize` in the layer's dtype."""
        weight = self.dequantize().to(self.compute_dtype)
        bias = None if self.bias is None else nn.Parameter(self.bias.detach().clone())
        if self.is_transposed:
            from transformers.pytorch_utils import Conv1D

            conv1d = Conv1D(self.out_features, self.in_features)
            conv1d.weight, conv1d.bias = nn.Parameter(weight.T.contiguous()), bias  # a Conv1D always has one
            return conv1d
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight)
        linear.register_parameter("bias", bias)
        return linear

    def extra_repr(self) -> str:
        activations = (
            "float"
            if self.activation_bits is None
            else f"{self.activation_bits} bit per {'token' if self.per_token else 'tensor'}"
        )
        parts = [
            f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, bits={self.bits}, r={self.r}, "
            f"axis={self.axis}"
        ]
        return f"{parts[0]}, activations={activations}"


def quantized_linears(model: nn.Module) -> Iterator[tuple[str, PreQuantLinear]]:
    """The quantized linear layers of ``model`` with their names, in the model's order."""
    for name, module in quantized_modules(model):
        if isinstance(module, PreQuantLinear):
            yield name, module
