"""AlphaTuning (Kwon et al., 2022): W = sum over i of alpha_i B_i with signs B_i in {-1, 1}, which are frozen, and a
trained alpha_i for each hidden_size consecutive weights of a row.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from prequant_ext.baselines.matrices import matrices_of, parameters_called, replace_matrices, train_only
from prequant_ext.baselines.options import Options
from prequant_ext.sites import Site


def binary_coding(weight: Tensor, bits: int, group_size: int, refinements: int) -> tuple[Tensor, Tensor]:
    """codes (N, K) uint8, bit i of which is 1 where B_i is, and alpha (N, K / group_size, bits).

    Greedy: B_i = sign of what is left, alpha_i its mean magnitude. Then ``refinements`` times in turn: alpha of least
    squares for these signs, and for each weight the nearest of the 2^bits sums that these alphas make; neither ever
    raises the error (Xu et al., 2018).
    """
    N, K = weight.shape
    if K % group_size:
        raise ValueError(f"group_size must divide K = {K}, got {group_size}")
    values = weight.float().view(N, K // group_size, group_size)
    left, codes, alphas = values.clone(), torch.zeros_like(values, dtype=torch.uint8), []
    for i in range(bits):
        alphas.append(left.abs().mean(-1))
        is_positive = left >= 0
        codes |= is_positive.to(torch.uint8) << i
        left -= torch.where(is_positive, alphas[-1][..., None], -alphas[-1][..., None])
    alpha = torch.stack(alphas, -1)
    all_codes = torch.arange(2**bits, device=weight.device, dtype=torch.uint8)
    sums_of = _signs(all_codes, bits)  # (bits, 2^bits)
    for _ in range(refinements):
        alpha = _least_squares(values, codes, alpha)
        sums, order = (alpha @ sums_of).sort(-1)
        codes = all_codes[order.gather(-1, torch.searchsorted((sums[..., 1:] + sums[..., :-1]) / 2, values))]
    return codes.view(N, K), alpha


def _signs(codes: Tensor, bits: int) -> Tensor:
    """(bits, ...) of -1 and 1."""
    return torch.stack([(codes >> i & 1).float() * 2 - 1 for i in range(bits)])


def _least_squares(values: Tensor, codes: Tensor, alpha: Tensor) -> Tensor:
    """alpha that makes the least squared error with these signs; the one before where the signs of a group do not tell
    their alphas apart.
    """
    signs = _signs(codes, alpha.shape[-1]).movedim(0, -1).double()  # (N, G, group, bits)
    normal = signs.mT @ signs
    solution, info = torch.linalg.solve_ex(normal, (signs.mT @ values[..., None].double()))
    solved, is_solved = solution.squeeze(-1), info[..., None] == 0
    return torch.where(is_solved & solved.isfinite().all(-1, keepdim=True), solved, alpha.double()).float()


class _SumOfSigns(torch.autograd.Function):
    """W (N, K) of alpha and codes. The backward pass makes the signs again. Kept, they would be ``bits`` copies of
    the matrix.
    """

    @staticmethod
    def forward(ctx: Any, alpha: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        ctx.shape = alpha.shape
        groups = codes.view(*alpha.shape[:2], -1)
        weight = torch.zeros_like(groups, dtype=alpha.dtype)
        for i in range(alpha.shape[-1]):
            weight += alpha[..., i, None] * ((groups >> i & 1).to(alpha.dtype) * 2 - 1)
        return weight.view(codes.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (codes,), (grad,) = ctx.saved_tensors, grads
        N, G, bits = ctx.shape
        groups, grad = codes.view(N, G, -1), grad.view(N, G, -1)
        return torch.stack([(grad * ((groups >> i & 1).to(grad.dtype) * 2 - 1)).sum(-1) for i in range(bits)], -1), None


class BinaryCodedLinear(nn.Module):
    def __init__(self, codes: Tensor, alpha: Tensor, bias: Tensor | None):
        super().__init__()
        self.codes: Tensor
        self.register_buffer("codes", codes)
        self.alpha = nn.Parameter(alpha)
        self.bias = None if bias is None else nn.Parameter(bias.detach().clone(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear(x, _SumOfSigns.apply(self.alpha, self.codes).to(x.dtype), self.bias)


def prepare(model: nn.Module, options: Options) -> None:
    """Activations stay float, as in the paper of the method. Raises ValueError where the hidden size does not divide a
    matrix's K.
    """

    def coded(site: Site, weight: Tensor, bias: Tensor | None) -> nn.Module:
        N, K = site.shape
        group_size = site.hidden_size or K
        if weight.is_meta:
            return BinaryCodedLinear(
                weight.new_empty((N, K), dtype=torch.uint8), weight.new_empty((N, K // group_size, site.bits)), bias
            )
        return BinaryCodedLinear(*binary_coding(weight, site.bits, group_size, options.refinements), bias)

    replace_matrices(model, matrices_of(model, options.config, has_hidden_groups=True), coded)


def trainables(model: nn.Module) -> dict[str, nn.Parameter]:
    return train_only(model, parameters_called(model, BinaryCodedLinear, "alpha"))
