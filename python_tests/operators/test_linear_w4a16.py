"""linear_w4a16: float activations on frozen codes."""

import pytest
import torch

from prequant_ext import ops, reference
from support.operands import (
    BF16,
    F16,
    F32,
    LAYERS,
    Layer,
    assert_as_accurate,
    assert_identical,
    block_bound,
    covering,
    random_matrix,
    random_outliers,
    random_weight,
    uneven_matrix,
)

COVERING = covering((F16, BF16))
# Layers that the emulated GPU, of 108 multiprocessors, makes in other ways than those above: each is here for a branch
# of csrc/cuda/dispatch.h.
LARGE = {
    "reduction cut in parts, 16 tokens": Layer(13, 1224, 40, r=17, dtype=F16),
    "reduction cut in parts, 64 tokens": Layer(70, 1032, 34, axis=0, blocks="row", dtype=BF16),
    "a group cut in parts": Layer(17, 1536, 24, blocks="group", group_size=768, dtype=F16),
    "odd N in parts": Layer(16, 1088, 33, bits=8, dtype=F16),
    "8 tokens, columns in slabs": Layer(8, 4168, 20, dtype=F16),
    "5 tokens, groups in slabs": Layer(5, 4608, 37, axis=0, blocks="group", group_size=128, dtype=BF16),
    "small weight, tiles of 16 tokens": Layer(40, 128, 130, dtype=F16),
    "large weight, tiles of 64 tokens": Layer(20, 512, 2056, blocks="row", dtype=F16),
    "513 tokens go the dense way": Layer(513, 64, 24, dtype=F16),
}
# At most 3 tokens of what tensor cores do not multiply: float32, and 16-bit floats whose groups end inside a chunk
# (bfloat16 on sm_75: below).
SIMT = covering((F32,), M=(1, 2, 3), K=(24, 65, 128, 320), N=(8, 17, 33)) | {
    "simt, 3 tokens, columns in slabs": Layer(3, 4160, 17),
    "simt, one token, reduction cut in parts": Layer(1, 4616, 40, axis=0, blocks="row"),
    "simt, groups of 8": Layer(1, 72, 24, blocks="group", group_size=8, dtype=F16),
    "simt, groups of 32": Layer(2, 2144, 19, r=17, blocks="group", group_size=32, dtype=BF16),
    "simt, groups of 96, 8 bits": Layer(3, 192, 31, axis=0, blocks="group", group_size=96, bits=8, dtype=F16),
    "simt, groups of 40, 2 bits": Layer(3, 200, 16, blocks="group", group_size=40, bits=2),
    "groups of 12 go the dense way": Layer(2, 72, 24, blocks="group", group_size=12, dtype=F16),
}


def operands(layer: Layer, device: str):
    x, bias = (
        random_matrix(layer.M, layer.K, layer.dtype, device),
        random_matrix(1, layer.N, layer.dtype, device, seed=3)[0],
    )
    return x, (*random_weight(layer, device), *random_outliers(layer, device), bias, layer.bits, layer.axis)


def plain_torch(x, weight_packed, scale, zero_point, outlier_dims, outlier_weight, bias, bits, axis):
    """The same layer the way a user without this library would write it: one dense weight in x's dtype."""
    dense = reference.dequantize(weight_packed, scale, zero_point, x.shape[1], bits, torch.float32)
    dense = reference.scatter_outlier_(dense, outlier_dims, outlier_weight, axis, True)
    return torch.nn.functional.linear(x, dense.to(x.dtype), bias.to(x.dtype))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_as_accurate_as_torch(layer, device):
    x, rest = operands(layer, device)
    y = ops.linear_w4a16(x, *rest)
    assert y.dtype == layer.dtype
    assert_as_accurate(y, plain_torch(x, *rest), reference.linear_w4a16(x.double(), *rest))


@pytest.mark.parametrize("layer", COVERING.values(), ids=COVERING.keys())
def test_every_edge(layer, device, monkeypatch):
    # blocks of 32 rows where tokens are few; of 16
    monkeypatch.setenv("PREQUANT_EMULATED_MULTIPROCESSORS", "1" if layer.N % 2 else "108")
    test_as_accurate_as_torch(layer, device)


@pytest.mark.parametrize("layer", LARGE.values(), ids=LARGE.keys())
def test_large_layers(layer, device):
    test_as_accurate_as_torch(layer, device)


@pytest.mark.parametrize("layer", SIMT.values(), ids=SIMT.keys())
def test_few_tokens_without_tensor_cores(layer, device):
    test_as_accurate_as_torch(layer, device)


BLOCKS = covering((F32,), M=(1, 2, 5, 9, 40)) | {
    "groups of a block, few tokens": Layer(3, 512, 40, blocks="group", group_size=128),
    "groups of two blocks, few tokens, 2 bits": Layer(8, 768, 33, blocks="group", group_size=256, bits=2),
    "groups of a block, one token, 8 bits": Layer(1, 256, 70, axis=0, blocks="group", group_size=128, bits=8),
}


@pytest.mark.parametrize("layer", BLOCKS.values(), ids=BLOCKS.keys())
def test_blocks_of_int16_stay_within_their_bound(layer, device):
    """in_float32=False: the CPU rounds x in blocks; elsewhere the result is only the more exact."""
    _, rest = operands(layer, device)
    x = uneven_matrix(layer.M, layer.K, layer.dtype, device)
    exact = reference.linear_w4a16(x.double(), *rest)
    dense = reference.dequantize(*rest[:3], layer.K, layer.bits, torch.float32)
    slack = 2e-6 * exact.abs().amax() if exact.numel() else 0
    assert ((ops.linear_w4a16(x, *rest, None, False).double() - exact).abs() <= block_bound(x, dense.T) + slack).all()


def test_only_blocks_are_rounded_where_they_may_be():
    """An activation 1000 times the rest costs its own block of 128 columns precision, and no other; in float32 none."""
    x, rest = operands(Layer(3, 256, 32, r=0), "cpu")
    x[:, 7] *= 1000
    exact = reference.linear_w4a16(x.double(), *rest)
    in_float32, in_blocks = (ops.linear_w4a16(x, *rest, None, choice).double() - exact for choice in (True, False))
    assert in_float32.norm() < 1e-6 * exact.norm() < in_blocks.norm() < 1e-3 * exact.norm()
    torch.set_float32_matmul_precision("high")
    try:
        assert_identical(ops.linear_w4a16(x, *rest), ops.linear_w4a16(x, *rest, None, False))
    finally:
        torch.set_float32_matmul_precision("highest")
    assert_identical(ops.linear_w4a16(x, *rest), ops.linear_w4a16(x, *rest, None, True))


@pytest.mark.parametrize("M", [2, 30])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-40, 0.0])
def test_blocks_of_any_value(value, M):
    x, rest = operands(Layer(M, 130, 40, r=0), "cpu")
    x[1] = value
    y, exact = ops.linear_w4a16(x, *rest, None, False), reference.linear_w4a16(x.double(), *rest)
    assert torch.isfinite(y[0]).all()
    if value == value and value < 1:
        torch.testing.assert_close(y[1].double(), exact[1], rtol=1e-4, atol=1e-41)
    else:
        assert not torch.isfinite(y[1]).any()


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("M", [2, 7, 12, 70])
def test_on_a_gpu_without_cp_async(M, dtype, device, monkeypatch):
    """sm_75: a ring of two slots, and bfloat16 goes without tensor cores."""
    monkeypatch.setenv("PREQUANT_EMULATED_SM", "75")
    test_as_accurate_as_torch(Layer(M, 328, 136, dtype=dtype), device)


@pytest.mark.parametrize("M", [2, 12, 70])
def test_misaligned_x(M, device):
    """Rows of x that do not lie on 16 bytes."""
    layer = Layer(M, 72, 24, dtype=F16)
    x, rest = operands(layer, device)
    shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view_as(x)
    assert_identical(ops.linear_w4a16(shifted, *rest), ops.linear_w4a16(x, *rest))


@pytest.mark.parametrize("dtype", [F32, F16, BF16], ids=str)
@pytest.mark.parametrize("M", [1, 16, 64])
def test_zeroed_codes_contribute_nothing(M, dtype, device):
    """A code equal to its zero point is exactly 0, whatever it meets."""
    layer = Layer(M, 128, 48, r=0, blocks="row", dtype=dtype)
    x, rest = operands(layer, device)
    codes = rest[2].expand(layer.N, layer.K)
    y = ops.linear_w4a16(x * 1000, reference.pack(codes.cpu(), 4).to(device), *rest[1:5], None, *rest[6:])
    assert (y == 0).all()


@pytest.mark.parametrize("M", [3, 16, 64])
def test_large_values_are_scaled_before_they_are_rounded(M, device):
    """A sum beyond float16's range, times a small scale: in range."""
    layer = Layer(M, 256, 32, r=0, dtype=F16)
    x, rest = torch.full((M, layer.K), 1000.0, dtype=F16, device=device), operands(layer, device)[1]
    rest = (
        reference.pack(torch.full((layer.N, layer.K), 15, dtype=torch.uint8), 4).to(device),
        rest[1] * 0 + 1e-3,
        rest[2] * 0,
        *rest[3:5],
        None,
        *rest[6:],
    )
    assert_as_accurate(
        ops.linear_w4a16(x, *rest), reference.linear_w4a16(x, *rest), reference.linear_w4a16(x.double(), *rest)
    )


def test_non_contiguous_x_and_no_bias(device):
    layer = LAYERS["odd K"]
    x, rest = operands(layer, device)
    x, rest = x.T.contiguous().T, (*rest[:5], None, *rest[6:])
    assert_as_accurate(
        ops.linear_w4a16(x, *rest), reference.linear_w4a16(x, *rest), reference.linear_w4a16(x.double(), *rest)
    )


@pytest.mark.parametrize("name", ["off every tile", "groups, output axis", "minilm query", "bfloat16"])
def test_gradients(name, device):
    layer = LAYERS[name]
    x, rest = operands(layer, device)
    grad_y = random_matrix(layer.M, layer.N, layer.dtype, device, seed=4)
    gradients = []
    for call, given in ((ops.linear_w4a16, x), (plain_gradient_reference, x), (reference.linear_w4a16, x.double())):
        leaves = [given.clone().requires_grad_(), rest[4].clone().requires_grad_(), rest[5].clone().requires_grad_()]
        call(leaves[0], *rest[:4], leaves[1], leaves[2], *rest[6:]).backward(grad_y.to(given.dtype))
        gradients.append([leaf.grad for leaf in leaves])
    for actual, plain, exact in zip(*gradients, strict=True):
        assert_as_accurate(actual, plain, exact)


def plain_gradient_reference(x, weight_packed, scale, zero_point, outlier_dims, outlier_weight, bias, bits, axis):
    dense = reference.dequantize(weight_packed, scale, zero_point, x.shape[1], bits, torch.float32)
    dense = dense.index_copy(axis, outlier_dims, outlier_weight)
    return torch.nn.functional.linear(x, dense.to(x.dtype), bias.to(x.dtype))


def test_rejects(device):
    layer = LAYERS["one token"]
    x, rest = operands(layer, device)
    with pytest.raises(RuntimeError, match="x has K = 66 but weight_packed packs 64"):
        ops.linear_w4a16(torch.zeros(1, 66, device=device), *rest)
    with pytest.raises(RuntimeError, match="x must be float32, float16 or bfloat16, got float64"):
        ops.linear_w4a16(x.double(), *rest)
    with pytest.raises(RuntimeError, match=r"bias must have shape \(32\), got \(31\)"):
        ops.linear_w4a16(x, *rest[:5], rest[5][:31], *rest[6:])
    with pytest.raises(RuntimeError, match="outlier_weight must be float32, got bfloat16"):
        ops.linear_w4a16(x, *rest[:4], rest[4].bfloat16(), *rest[5:])
    with pytest.raises(RuntimeError, match=r"outlier_weight must have shape \(32, 5\), got \(5, 32\)"):
        ops.linear_w4a16(x, *rest[:4], rest[4].T, *rest[5:])
    if device == "cpu":
        with pytest.raises(RuntimeError, match="outlier_dims must be 0 to 63, got -1 at position 0"):
            ops.linear_w4a16(x, *rest[:3], rest[3] * 0 - 1, *rest[4:])
