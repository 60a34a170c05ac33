"""Quadapter (Park et al., 2022): 8-bit weights and activations, made easier to round by a trained scaling of the
channels between them.

    y = Q(x * s) Q(W / s)^T + bias,  s (K,) > 0

Without the quantizers s cancels. It is set block by block, so that a block's output stays what it was (L2), and then
trained on the task; weights are frozen.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant_ext.baselines.calibration import without_labels
from prequant_ext.baselines.fake_quantization import in_own_range
from prequant_ext.baselines.matrices import matrices_of, parameters_called, replace_matrices, train_only
from prequant_ext.baselines.options import Batch, Options
from prequant_ext.blocks import blocks_of
from prequant_ext.sites import Site, family_of

WEIGHT_BITS = 8  # the method's, whatever the others use
CALIBRATION_RATE = 1e-2


class ScaledLinear(nn.Module):
    """``log_scale`` (K,) is trained: s = exp(log_scale) stays positive, and its inverse finite. ``is_quantized`` turns
    both quantizers off and on.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, activation_bits: int | None):
        super().__init__()
        self.activation_bits, self.is_quantized = activation_bits, True
        self.weight = nn.Parameter(weight.clone(), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)
        self.log_scale = nn.Parameter(weight.new_zeros(weight.shape[1]))

    def forward(self, x: Tensor) -> Tensor:
        scale = self.log_scale.exp()
        x, weight = x * scale, self.weight / scale
        if self.is_quantized:
            x, weight = in_own_range(x, self.activation_bits), in_own_range(weight, WEIGHT_BITS)
        return functional.linear(x, weight, self.bias)


def prepare(model: nn.Module, options: Options) -> None:
    """Raises ValueError without calibration batches, unless calibration_steps is 0; and for a model of no known family,
    whose blocks are not known.
    """
    if options.calibration_steps and not options.calibration:
        raise ValueError("calibration must hold at least one batch: quadapter sets its scales on them")
    blocks = [block.name for block in blocks_of(model, family_of(model))]
    if not blocks:
        raise ValueError(
            f"quadapter is calibrated block by block, and the blocks of {type(model).__name__} are not known"
        )

    def scaled(site: Site, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return ScaledLinear(weight, bias, options.config.activation_bits)

    replace_matrices(model, matrices_of(model, options.config), scaled)
    if options.calibration_steps:
        _calibrate(model, blocks, options)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, parameters_called(model, ScaledLinear, "log_scale"))


def _calibrate(model: nn.Module, blocks: list[str], options: Options) -> None:
    """Block by block, what came in before and what went out:
    the scales that bring the quantized block nearest to it.
    """
    was_training = model.training
    model.eval()
    model.requires_grad_(False)
    try:
        for name in blocks:
            block = model.get_submodule(name)
            scales = [module.log_scale for module in block.modules() if isinstance(module, ScaledLinear)]
            if not scales:
                continue
            calls = _calls(model, block, options.calibration)
            optimizer = torch.optim.Adam([scale.requires_grad_() for scale in scales], lr=CALIBRATION_RATE)
            for step in range(options.calibration_steps):
                arguments, named, wanted = calls[step % len(calls)]
                loss = functional.mse_loss(_first(block(*arguments, **named)), wanted)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    finally:
        model.train(was_training)


def _calls(
    model: nn.Module, block: nn.Module, batches: Sequence[Batch]
) -> list[tuple[tuple[Any, ...], dict[str, Any], Tensor]]:
    """For each batch what the block is called with and what it returns, with the quantizers off.

    A pass through the model for every block: those of all blocks at once would take as many times the memory.
    """
    found: list[tuple[tuple[Any, ...], dict[str, Any], Tensor]] = []
    handle = block.register_forward_hook(
        lambda _, arguments, named, output: found.append((arguments, named, _first(output))), with_kwargs=True
    )
    layers = [module for module in model.modules() if isinstance(module, ScaledLinear)]
    try:
        for layer in layers:
            layer.is_quantized = False
        with torch.no_grad():
            for batch in batches:
                model(**without_labels(batch))
    finally:
        for layer in layers:
            layer.is_quantized = True
        handle.remove()
    return found


def _first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]
