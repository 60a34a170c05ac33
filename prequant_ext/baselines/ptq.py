"""Post-training quantization (Bondarenko et al., 2021) of a model that was fine-tuned before: b-bit weights in groups,
8-bit activations in ranges that were seen on a few batches, one for a matrix or one for each group of channels ("per
embedding group").

The weights are true codes; the activations are rounded to their grid and stay float.
"""

import torch
from torch import Tensor, nn

from prequant_ext.baselines.calibration import Activations, observe
from prequant_ext.baselines.fake_quantization import in_range
from prequant_ext.baselines.matrices import matrices_of, replace_matrices
from prequant_ext.baselines.options import Options
from prequant_ext.config import PreQuantConfig
from prequant_ext.linear import PreQuantLinear
from prequant_ext.sites import Site


def channel_ranges(seen: Activations, groups: int) -> tuple[Tensor, Tensor]:
    """low and high (K,) that channels use: those of their group, made of channels whose own ranges are of about the
    same width.

    Raises ValueError where there are more groups than channels.
    """
    K = len(seen.low)
    if groups > K:
        raise ValueError(f"activation_groups must be at most K = {K}, got {groups}")
    low, high = torch.empty_like(seen.low), torch.empty_like(seen.high)
    for members in (seen.high - seen.low).argsort(stable=True).tensor_split(groups):
        low[members], high[members] = seen.low[members].min(), seen.high[members].max()
    return low, high


class StaticLinear(nn.Module):
    """layer(x on the grid of its channels' ranges)."""

    def __init__(self, layer: PreQuantLinear, ranges: tuple[Tensor, Tensor] | None, bits: int | None):
        super().__init__()
        self.layer, self.bits = layer, bits
        self.low: Tensor | None
        self.high: Tensor | None
        self.register_buffer("low", ranges[0] if ranges else None)
        self.register_buffer("high", ranges[1] if ranges else None)

    def forward(self, x: Tensor) -> Tensor:
        if self.low is None or self.high is None or self.bits is None:
            return self.layer(x)
        return self.layer(in_range(x.float(), self.low, self.high, self.bits).to(x.dtype))


def prepare(model: nn.Module, options: Options) -> None:
    """Raises ValueError without calibration batches (unless activations stay float), and where a group does not divide
    a matrix's K.
    """
    config = options.config
    sites = matrices_of(model, config, group_size=options.group_size)
    seen = {} if config.activation_bits is None else observe(model, [site.name for site in sites], options.calibration)
    coding = PreQuantConfig(strategy="group_wise", group_size=options.group_size, r=0, activation_bits=None)

    def quantized(site: Site, weight: Tensor, bias: Tensor | None) -> nn.Module:
        N, K = site.shape
        linear = nn.Linear(K, N, bias=False, device="meta")
        linear.weight = nn.Parameter(weight.contiguous())
        linear.register_parameter("bias", None if bias is None else nn.Parameter(bias.detach()))
        layer = PreQuantLinear.from_linear(linear, coding, name=site.name, bits=site.bits)
        return StaticLinear(
            layer, channel_ranges(seen[site.name], options.activation_groups) if seen else None, config.activation_bits
        )

    replace_matrices(model, sites, quantized)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """None: all training was before."""
    model.requires_grad_(False)
    return {}
