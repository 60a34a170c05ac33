"""embedding, the operator, and PreQuantEmbedding, the table of 8-bit codes."""

import pytest
import torch
from torch import nn

from prequant_ext import PreQuantConfig, ops, reference
from prequant_ext.embedding import PreQuantEmbedding
from support.emulated_kernels import emulated_kernels
from support.operands import assert_identical, random_matrix


def table(V: int, D: int, per_row: bool, device: str):
    return ops.quantize_activations(random_matrix(V, D, torch.float32, device), per_row, 0)[:3]


@pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (50, 33), (1000, 384)], ids=str)
def test_identical_to_reference(shape, dtype, per_row, device):
    codes, scale, zero_point = table(*shape, per_row, device)
    ids = torch.randint(0, shape[0], (77,), generator=torch.Generator().manual_seed(0)).to(device)
    for some in (ids, ids[:0]):
        assert_identical(
            ops.embedding(some, codes, scale, zero_point, dtype),
            reference.embedding(some, codes, scale, zero_point, dtype),
        )


@pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("width", [16, 9], ids=["128-bit stores", "single values"])
def test_ids_out_of_range_make_nan(width, dtype, per_row):
    """On a GPU the host function does not read them back."""
    codes, scale, zero_point = table(5, width, per_row, "cpu")
    ids = torch.tensor([4, 5, -1, 0, 2**40, -(2**40)])
    rows = torch.empty(len(ids), width, dtype=dtype)
    code = [torch.float32, torch.float16, torch.bfloat16].index(dtype)  # in the order of Dtype in kernels.h
    operands = [tensor.data_ptr() for tensor in (ids, codes, scale, zero_point)]
    emulated_kernels().embed(*operands, 5, per_row, rows.data_ptr(), code, *rows.shape)
    known = [0, 3]
    assert_identical(rows[known], reference.embedding(ids[known], codes, scale, zero_point, dtype))
    assert rows[[1, 2, 4, 5]].isnan().all()


@pytest.mark.parametrize("per_row", [True, False], ids=["row", "tensor"])
def test_gradient_of_the_scale(per_row, device):
    codes, scale, zero_point = table(9, 6, per_row, device)
    ids = torch.tensor([1, 8, 1, 3], device=device)
    weight = random_matrix(4, 6, torch.float32, device)
    gradients = []
    for implementation in (ops, reference):
        leaf = scale.clone().requires_grad_()
        (implementation.embedding(ids, codes, leaf, zero_point, torch.float32) * weight).sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients)


def test_rejects(device):
    codes, scale, zero_point = table(4, 6, True, device)
    if device == "cpu":
        with pytest.raises(RuntimeError, match="ids must be 0 to 3, got 4 at position 1"):
            ops.embedding(torch.tensor([0, 4]), codes, scale, zero_point, torch.float32)
    ids = torch.tensor([0], device=device)
    with pytest.raises(RuntimeError, match="codes must be uint8, got float32"):
        ops.embedding(ids, codes.float(), scale, zero_point, torch.float32)
    with pytest.raises(RuntimeError, match="ids must be int64, got int32"):
        ops.embedding(ids.int(), codes, scale, zero_point, torch.float32)


@pytest.mark.parametrize("config", [PreQuantConfig(), PreQuantConfig.paper()], ids=["row", "tensor"])
def test_layer_is_within_a_step_and_a_half_of_the_float_table(config, device):
    """The top of the range is 256 steps above its bottom, one more than codes reach; rounding the zero point may cost
    half a step more.
    """
    embedding = nn.Embedding(40, 12, padding_idx=3).to(device)
    layer = PreQuantEmbedding.from_embedding(embedding, config)
    ids = torch.tensor([[0, 3], [39, 7]], device=device)
    assert layer(ids).shape == (2, 2, 12) and layer(ids.int()).equal(layer(ids))
    assert ((layer(ids) - embedding(ids)).abs() <= 1.51 * layer.weight_scale.max()).all()
    restored = layer.to_embedding()
    assert restored.padding_idx == 3 and restored.weight.requires_grad and restored(ids).equal(layer(ids))


def test_layer_follows_dtype_but_keeps_its_scale(device):
    layer = PreQuantEmbedding.from_embedding(nn.Embedding(5, 4), PreQuantConfig()).to(torch.bfloat16)
    assert layer(torch.tensor([1])).dtype == torch.bfloat16 and layer.weight.dtype == torch.bfloat16
    assert layer.weight_scale.dtype == torch.float32 and not any(p.requires_grad for p in layer.parameters())


def test_layer_refuses_non_finite_tables():
    embedding = nn.Embedding(5, 4)
    embedding.weight.data[2, 1] = float("nan")
    with pytest.raises(ValueError, match=r"word_embeddings"):
        PreQuantEmbedding.from_embedding(embedding, PreQuantConfig(), name="word_embeddings")
