"""Quantization-aware training: float weights that are rounded to b-bit codes in every forward pass, in groups, with
scales learned beside them (LSQ).
"""

from torch import Tensor, nn
from torch.nn import functional

from prequant_ext.baselines.calibration import observe
from prequant_ext.baselines.fake_quantization import first_step, learned_step
from prequant_ext.baselines.matrices import matrices_of, replace_matrices, train_only
from prequant_ext.baselines.options import Options
from prequant_ext.sites import Site


class LearnedStepLinear(nn.Module):
    """weight (N, K) in groups of ``group_size`` along K, each with a scale; x with one scale, or as it is where
    ``activation_scale`` is None.
    """

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        bits: int,
        group_size: int,
        activation_bits: int | None,
        activation_scale: Tensor | None,
    ):
        super().__init__()
        N, K = weight.shape
        self.bits, self.group_size, self.activation_bits = bits, group_size, activation_bits
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())
        self.weight_scale = nn.Parameter(
            first_step(weight.view(N, K // group_size, group_size).abs().mean(-1, keepdim=True), bits)
        )
        self.activation_scale = None if activation_scale is None else nn.Parameter(activation_scale)

    def quantized_weight(self) -> Tensor:
        """(N, K), on the grid."""
        N, G, _ = self.weight_scale.shape
        return learned_step(self.weight.view(N, G, self.group_size), self.weight_scale, self.bits).view_as(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        if self.activation_scale is not None and self.activation_bits is not None:
            x = learned_step(x, self.activation_scale, self.activation_bits)
        return functional.linear(x, self.quantized_weight(), self.bias)


def prepare(model: nn.Module, options: Options) -> None:
    """Raises ValueError without calibration batches (unless activations stay float), and where a group does not divide
    a matrix's K.
    """
    config = options.config
    sites = matrices_of(model, config, group_size=options.group_size)
    seen = {} if config.activation_bits is None else observe(model, [site.name for site in sites], options.calibration)

    def learned(site: Site, weight: Tensor, bias: Tensor | None) -> nn.Module:
        scale = (
            first_step(seen[site.name].mean_magnitude.to(weight.device), config.activation_bits or 8) if seen else None
        )
        return LearnedStepLinear(weight, bias, site.bits, options.group_size, config.activation_bits, scale)

    replace_matrices(model, sites, learned)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    """All weights, the scales among them."""
    return train_only(model, [name for name, _ in model.named_parameters()])
