"""Quantization that stays float: values on the grid of b-bit codes, with gradients that pass the rounding as if it were
not there (straight-through).
"""

import math

import torch
from torch import Tensor

SMALLEST = 2.0**-100  # of a scale


def round_through(x: Tensor) -> Tensor:
    """rint(x), whose gradient is that of x."""
    return x + (x.round() - x).detach()


def learned_step(x: Tensor, scale: Tensor, bits: int) -> Tensor:
    """clip(rint(x / scale), -2^(b-1), 2^(b-1) - 1) * scale; scale broadcasts and is trained with x.  LSQ, Esser et al.,
    2020, Eq. 1 to 5.

    The gradient of scale is rint(x / scale) - x / scale inside the range and the limit outside it, times 1 /
    sqrt(values of a scale * (2^(b-1) - 1)), which keeps its steps in proportion to those of the weights.
    """
    top = 2 ** (bits - 1)
    factor = 1 / math.sqrt(max(1, x.numel() // max(1, scale.numel())) * max(1, top - 1))
    positive = scale.abs().clamp(min=SMALLEST)
    step = positive * factor + (positive * (1 - factor)).detach()
    return round_through((x / step).clamp(-top, top - 1)) * step


def first_step(mean_magnitude: Tensor, bits: int) -> Tensor:
    """LSQ's first value of a scale: 2 E|x| / sqrt(2^(b-1) - 1)."""
    return (2 * mean_magnitude / math.sqrt(max(1, 2 ** (bits - 1) - 1))).clamp(min=SMALLEST)


def in_range(x: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """x on the grid of 2^b values from low to high, stretched to hold 0; low and high broadcast. Differentiable in all
    three.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    top = 2**bits - 1
    scale = ((high - low) / top).clamp(min=SMALLEST)
    zero_point = round_through(-low / scale)
    return ((round_through(x / scale) + zero_point).clamp(0, top) - zero_point) * scale


def in_own_range(x: Tensor, bits: int | None) -> Tensor:
    """in_range of the least and the largest value of x; None: x itself."""
    return x if bits is None else in_range(x, *torch.aminmax(x), bits)
