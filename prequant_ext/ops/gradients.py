"""The gradients of the linear layers and of the embedding: what a call keeps, and the backward function on it.

    dx = dy W plus the outliers' part        dO = dy^T x[:, idx] (axis 1) or dy[:, idx]^T x (axis 0)

The dense gradient of the weight is never formed. Arguments and gradients go by their names in the operator's schema.
"""

from collections import namedtuple
from collections.abc import Callable
from itertools import compress
from typing import Any

import torch
from torch import Tensor

from prequant_ext.ops.calls import wants_float32

Gradients = dict[str, Tensor]  # of the arguments that need one, by name
# (library, ctx, arguments as a named tuple, names of those that need a gradient): keeps on ctx what backward reads
SetUp = Callable[[Any, Any, Any, set[str]], None]
# (library, ctx, gradient of the output, names of the arguments that need a gradient)
Backward = Callable[[Any, Any, Tensor, set[str]], Gradients]


# ---- the linear layers -----------------------------------------------------------------------------------------------


def _set_up_w4a16(library: Any, ctx: Any, arguments: Any, needed: set[str]) -> None:
    _keep(ctx, arguments, needed, arguments.x)


def _set_up_w4a8(library: Any, ctx: Any, arguments: Any, needed: set[str]) -> None:
    if arguments.raw_outliers:
        _keep(ctx, arguments, needed, arguments.x)
        return
    codes, scale, zero_point = arguments.x_codes, arguments.x_scale, arguments.x_zero_point
    if codes is None:  # the operator made them inside; a caller that trains hands them in
        codes, scale, zero_point, _ = library.quantize_activations(arguments.x.detach(), arguments.per_token, 0)
    _keep(ctx, arguments, needed, codes, scale, zero_point)


def _keep(
    ctx: Any,
    arguments: Any,
    needed: set[str],
    activation: Tensor,
    x_scale: Tensor | None = None,
    x_zero_point: Tensor | None = None,
) -> None:
    """Keep the layer's tensors, which exist anyway, and no more of the activation than the gradients in ``needed``
    read: the r outlier columns (axis 1), or all of it (axis 0, or where scales are trained).

    activation: x, or its uint8 codes together with x_scale and x_zero_point
    """
    outlier_dims, bias = arguments.outlier_dims, arguments.bias
    ctx.in_features, ctx.bits, ctx.axis = arguments.x.shape[1], arguments.bits, arguments.axis
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.keeps_columns = ctx.axis == 1 and "outlier_weight" in needed and "scale" not in needed
    kept: tuple[Tensor | None, ...] = (activation, x_scale, x_zero_point)
    if ctx.keeps_columns:
        kept = (activation.index_select(1, outlier_dims), x_scale, x_zero_point)
    elif "scale" not in needed and not ("outlier_weight" in needed and outlier_dims.shape[0] > 0):
        kept = (None, None, None)
    layer = (arguments.weight_packed, arguments.scale, arguments.zero_point, outlier_dims, arguments.outlier_weight)
    ctx.save_for_backward(*layer, *kept)


def _linear_backward(library: Any, ctx: Any, grad_y: Tensor, needed: set[str]) -> Gradients:
    *layer, activation, x_scale, x_zero_point = ctx.saved_tensors
    weight_packed, scale, zero_point, outlier_dims, outlier_weight = layer
    grad_y = grad_y.contiguous()
    gradients = {}
    if "x" in needed:
        gradients["x"] = library.linear_dx(grad_y, *layer, ctx.in_features, ctx.bits, ctx.axis, wants_float32())
    if "scale" in needed:
        per_row = library.scale_grad(grad_y, activation, x_scale, x_zero_point, weight_packed, zero_point, ctx.bits)
        gradients["scale"] = per_row if scale.shape[0] == per_row.shape[0] else per_row.sum(0, keepdim=True)
    if "outlier_weight" in needed:
        if activation is None:  # r = 0
            gradients["outlier_weight"] = torch.zeros_like(outlier_weight)
        else:
            columns = activation if ctx.keeps_columns or ctx.axis == 0 else activation.index_select(1, outlier_dims)
            gradients["outlier_weight"] = library.outlier_grad(
                grad_y, columns, x_scale, x_zero_point, outlier_dims, ctx.axis
            )
    if "bias" in needed:
        gradients["bias"] = grad_y.sum(0, dtype=torch.float32).to(ctx.bias_dtype)
    return gradients


# ---- the embedding ---------------------------------------------------------------------------------------------------


def _set_up_embedding(library: Any, ctx: Any, arguments: Any, needed: set[str]) -> None:
    ctx.save_for_backward(arguments.ids, arguments.codes, arguments.scale, arguments.zero_point)


def _embedding_backward(library: Any, ctx: Any, grad_rows: Tensor, needed: set[str]) -> Gradients:
    if "scale" not in needed:
        return {}
    ids, codes, scale, zero_point = ctx.saved_tensors
    # (q - z): the derivative of a row by its scale
    steps = library.embedding(ids, codes, torch.ones_like(scale), zero_point, torch.float32)
    per_id = (grad_rows.float() * steps).sum(1, keepdim=True)
    if scale.shape[0] > 1:
        return {"scale": torch.zeros_like(scale).index_add(0, ids, per_id)}
    return {"scale": per_id.sum(0, keepdim=True)}


# ---- registration ----------------------------------------------------------------------------------------------------

DIFFERENTIABLE: dict[str, tuple[SetUp, Backward]] = {
    "linear_w4a16": (_set_up_w4a16, _linear_backward),
    "linear_w4a8": (_set_up_w4a8, _linear_backward),
    "embedding": (_set_up_embedding, _embedding_backward),
}


def register(name: str) -> None:
    """Register the gradients of ``torch.ops.<name>``, which compute with operators of the same library."""
    for op, (set_up, backward) in DIFFERENTIABLE.items():
        _register(name, op, set_up, backward)


def _register(name: str, op: str, set_up: SetUp, backward: Backward) -> None:
    library = getattr(torch.ops, name)
    names = [argument.name for argument in getattr(library, op).default._schema.arguments]
    # Both functions below run in every training step of every layer, and a dict of the arguments would take longer.
    Arguments: Any = namedtuple(op, names)  # type: ignore[misc]  # the fields are the schema's
    none = dict.fromkeys(names)

    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        set_up(library, ctx, Arguments._make(inputs), set(compress(names, ctx.needs_input_grad)))

    def backward_in_order(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        # Only create_graph=True turns gradients on here, or torch.func.grad, which always does.
        if torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active():
            raise RuntimeError(
                f"{name}::{op} is not differentiable twice: its backward pass runs kernels that have no gradients of "
                "their own, so create_graph=True would give wrong gradients of gradients"
            )
        gradients = backward(library, ctx, grad_output, set(compress(names, ctx.needs_input_grad)))
        return tuple((none | gradients).values())

    torch.library.register_autograd(f"{name}::{op}", backward_in_order, setup_context=setup_context)
