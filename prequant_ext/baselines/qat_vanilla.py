"""The plain form of quantization-aware training: one scale a tensor, from its largest value in each forward pass;
nothing about the scales is learned.
"""

from torch import Tensor, nn
from torch.nn import functional

from prequant_ext.baselines.fake_quantization import SMALLEST, in_own_range, round_through
from prequant_ext.baselines.matrices import matrices_of, replace_matrices, train_only
from prequant_ext.baselines.options import Options
from prequant_ext.sites import Site


class RoundedLinear(nn.Module):
    """weight / scale in -(2^(b-1) - 1) ... 2^(b-1) - 1 with scale = max|weight| / (2^(b-1) - 1); x on the grid of its
    batch's range.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, bits: int, activation_bits: int | None):
        super().__init__()
        self.bits, self.activation_bits = bits, activation_bits
        self.weight = nn.Parameter(weight.clone())
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        scale = (self.weight.detach().abs().amax() / (2 ** (self.bits - 1) - 1)).clamp(min=SMALLEST)
        return functional.linear(
            in_own_range(x, self.activation_bits), round_through(self.weight / scale) * scale, self.bias
        )


def prepare(model: nn.Module, options: Options) -> None:
    def rounded(site: Site, weight: Tensor, bias: Tensor | None) -> nn.Module:
        return RoundedLinear(weight, bias, site.bits, options.config.activation_bits)

    replace_matrices(model, matrices_of(model, options.config), rounded)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, [name for name, _ in model.named_parameters()])
