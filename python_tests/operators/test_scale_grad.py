"""scale_grad: the gradient of PreQuant-alpha's scales, tile by tile."""

import pytest
import torch

from prequant_ext import ops, reference
from support.covering import case_id, pairwise
from support.operands import BF16, F16, F32, LAYERS, assert_as_accurate, assert_identical, random_matrix, random_weight

KINDS = ["codes per token", "codes per tensor", "float"]
# A tile has 128 rows and 64 columns of the weight and takes 16 tokens at a time, in runs of 256; rows of whole fours
# load four at a time.
EDGES = pairwise(
    M=[0, 1, 3, 8, 16, 17, 63, 64, 65, 128, 200, 257, 520],
    K=[60, 64, 65, 130],
    N=[33, 64, 128, 130],
    group=["tensor", "row", 1, 3, 13, 32, 65],  # columns of a group, where that divides K; else all of them
    bits=[2, 4, 8],
    kind=KINDS,
    dtype=[F32, F16, BF16],
    x_dtype=[F32, F16, BF16],
)


def check(
    grad_y: torch.Tensor, x: torch.Tensor, kind: str, weight_packed: torch.Tensor, zero_point: torch.Tensor, bits: int
) -> None:
    scale = x_zero_point = None
    if kind != "float":
        x, scale, x_zero_point, _ = reference.quantize_activations(x, kind == "codes per token", 0)
    arguments = (x, scale, x_zero_point, weight_packed, zero_point, bits)
    gradient = ops.scale_grad(grad_y, *arguments)
    assert gradient.dtype == torch.float32
    assert_as_accurate(
        gradient, reference.scale_grad(grad_y, *arguments), reference.scale_grad(grad_y.double(), *arguments)
    )


@pytest.mark.parametrize("kind", ["codes per token", "float"])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, kind, device):
    grad_y, x = (
        random_matrix(layer.M, layer.N, layer.dtype, device),
        random_matrix(layer.M, layer.K, layer.dtype, device, seed=5),
    )
    weight_packed, _, zero_point = random_weight(layer, device)
    check(grad_y, x, kind, weight_packed, zero_point, layer.bits)


@pytest.mark.parametrize("case", EDGES, ids=case_id)
def test_edges_of_tiles(case, device):
    M, N, K, bits, group = (case[name] for name in ("M", "N", "K", "bits", "group"))
    generator = torch.Generator().manual_seed(7)
    shape = {"tensor": (1, 1), "row": (N, 1)}.get(group) or (N, K // group if K % group == 0 else 1)
    codes = torch.randint(0, 2**bits, (N, K), generator=generator, dtype=torch.uint8)
    zero_point = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8).to(device)
    grad_y, x = random_matrix(M, N, case["dtype"], device), random_matrix(M, K, case["x_dtype"], device, seed=5)
    check(grad_y, x, case["kind"], reference.pack(codes, bits).to(device), zero_point, bits)


def test_two_runs_give_the_same_bits(device):
    layer = LAYERS["groups of 32"]
    weight_packed, _, zero_point = random_weight(layer, device)
    grad_y, x = random_matrix(600, layer.N, F32, device), random_matrix(600, layer.K, F32, device, seed=5)
    first = ops.scale_grad(grad_y, x, None, None, weight_packed, zero_point, 4)
    assert_identical(ops.scale_grad(grad_y, x, None, None, weight_packed, zero_point, 4), first)


def test_agrees_with_autograd_through_the_weight(device):
    layer = LAYERS["groups of 32"]
    weight_packed, scale, zero_point = random_weight(layer, device)
    x, grad_y = (
        random_matrix(layer.M, layer.K, torch.float32, device),
        random_matrix(layer.M, layer.N, torch.float32, device, seed=4),
    )
    leaf = scale.double().requires_grad_()
    steps = (
        reference.unpack(weight_packed, layer.K, 4).double().unflatten(1, (leaf.shape[1], -1))
        - zero_point.double().unsqueeze(-1)
    ) * leaf.unsqueeze(-1)
    (x.double() @ steps.flatten(1).T).backward(grad_y.double())
    assert_as_accurate(
        ops.scale_grad(grad_y, x, None, None, weight_packed, zero_point, 4), leaf.grad.float(), leaf.grad
    )


def test_rejects(device):
    layer = LAYERS["one token"]
    weight_packed, _, zero_point = random_weight(layer, device)
    with pytest.raises(RuntimeError, match="x has K = 60 but weight_packed packs 64"):
        ops.scale_grad(
            torch.zeros(2, 32, device=device),
            torch.zeros(2, 60, device=device),
            None,
            None,
            weight_packed,
            zero_point,
            4,
        )
    with pytest.raises(RuntimeError, match="grad_y has N = 30 but weight_packed has 32 rows"):
        ops.scale_grad(
            torch.zeros(2, 30, device=device),
            torch.zeros(2, 64, device=device),
            None,
            None,
            weight_packed,
            zero_point,
            4,
        )
