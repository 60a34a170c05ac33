"""ONNX of single layers: MatMulNBits has their codes, scales and zero points, and onnxruntime computes what they do."""

import copy

import pytest
import torch
from torch import nn

from prequant_ext import PreQuantConfig, PreQuantEmbedding, PreQuantLinear, ops, reference
from prequant_ext.export import block_size, exportable_, onnx_bytes, run_onnx, weight_only_

pytest.importorskip("onnx")
pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from support.onnx_file import File

# One layer a line, each here for a reason. N is odd where nothing asks for more.
LAYERS = {  # K, N, axis, has a bias, hidden size, settings
    "columns": (64, 24, "input", True, None, {}),
    "rows": (64, 24, "output", True, None, {}),
    "rows without a bias": (64, 7, "output", False, None, {}),
    "no outlier dimensions": (64, 7, "input", False, None, {"r": 0}),
    "ranges without the outlier columns": (64, 7, "input", True, None, {"raw_outlier_activations": True}),
    "several blocks a row": (96, 7, "input", True, None, {}),
    "a scale a row": (128, 7, "output", True, None, {"strategy": "row_wise"}),
    "groups of a block": (96, 7, "input", True, None, {"strategy": "group_wise", "group_size": 32}),
    "groups of several blocks": (144, 7, "output", True, None, {"strategy": "group_wise_sigma", "group_size": 48}),
    "groups that no block divides": (96, 7, "input", True, None, {"strategy": "group_wise", "group_size": 24}),
    "trained scales": (96, 7, "input", True, 32, {"train_scales": True, "r": 0}),
    "odd K": (33, 7, "input", True, None, {}),
    "odd K, a scale a row": (33, 7, "output", False, None, {"strategy": "row_wise"}),
    "a long row that no block divides": (300, 7, "input", True, None, {}),
    "2 bits": (64, 7, "input", True, None, {"bits": 2}),
    "2 bits, odd K": (33, 7, "input", True, None, {"bits": 2}),
    "3 bits": (64, 7, "output", True, None, {"bits": 3}),
    "6 bits": (64, 7, "output", True, None, {"bits": 6}),
    "8 bits, odd K": (33, 7, "input", True, None, {"bits": 8, "strategy": "min_max"}),
}
TABLES = ("row", "tensor")  # granularities


class Zoo(nn.Module):
    """All of LAYERS on the first columns of one input, and all of TABLES on the other."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleDict()
        for name, (K, N, axis, has_bias, hidden_size, settings) in LAYERS.items():
            linear = nn.Linear(K, N, bias=has_bias)
            linear.weight.data.add_(0.1)  # zero points off the middle of the codes
            self.layers[name] = PreQuantLinear.from_linear(
                linear, PreQuantConfig(**({"r": 2} | settings)), axis, hidden_size=hidden_size
            )
        table = nn.Embedding(20, 9)
        table.weight.data.add_(0.5)
        configs = {granularity: PreQuantConfig(embedding_granularity=granularity) for granularity in TABLES}
        self.tables = nn.ModuleDict(
            {granularity: PreQuantEmbedding.from_embedding(table, config) for granularity, config in configs.items()}
        )

    def forward(self, x, ids):
        products = {name: layer(x[..., : layer.weight.shape[1]]) for name, layer in self.layers.items()}
        return products | {name: table(ids) for name, table in self.tables.items()}


@pytest.fixture(scope="module")
def zoo():
    return weight_only_(Zoo().eval().requires_grad_(False))


@pytest.fixture(scope="module")
def zoo_content(zoo):
    return onnx_bytes(
        exportable_(copy.deepcopy(zoo)),
        {"x": torch.randn(2, 8, 300), "ids": torch.zeros(2, 8, dtype=torch.int64)},
        [*LAYERS, *TABLES],
    )


@pytest.fixture(scope="module")
def zoo_outputs(zoo_content):
    """(inputs of a shape that was not traced, outputs by name)."""
    inputs = {
        "x": torch.randn(3, 5, 300, generator=torch.Generator().manual_seed(1)),
        "ids": torch.arange(15).view(3, 5),
    }
    return inputs, dict(zip([*LAYERS, *TABLES], run_onnx(zoo_content, inputs), strict=True))


@pytest.mark.parametrize(
    ("length", "container", "wanted"),
    [
        (768, 4, 256),
        (384, 4, 128),
        (96, 4, 32),
        (48, 4, 16),
        (272, 4, 16),  # divides, though larger ones would take fewer bytes
        (33, 4, 64),  # 36.5 bytes; two of 32 would be 41, three of 16 would be 37.5
        (33, 8, 16),  # 63 bytes; one of 64 would be 69, two of 32 would be 74
        (300, 4, 64),  # 182.5 bytes; ten of 32 would be 205, three of 128 would be 205.5
        (8, 4, 16),
    ],
)
def test_block_size(length, container, wanted):
    assert block_size(length, container) == wanted


@pytest.mark.parametrize("name", LAYERS)
def test_onnxruntime_computes_what_the_layer_does(name, zoo, zoo_outputs):
    inputs, outputs = zoo_outputs
    layer = zoo.layers[name]
    wanted = layer(inputs["x"][..., : layer.in_features])
    torch.testing.assert_close(outputs[name], wanted, rtol=0, atol=1e-5 * wanted.abs().max().item())
    assert not (layer.weight_zero_point == 2 ** (layer.bits - 1)).all()  # what a missing zero point would mean


@pytest.mark.parametrize("granularity", TABLES)
def test_a_lookup_is_the_same_to_the_last_bit(granularity, zoo, zoo_content, zoo_outputs):
    inputs, outputs = zoo_outputs
    table = zoo.tables[granularity]
    assert torch.equal(outputs[granularity], table(inputs["ids"])) and (table.weight_zero_point > 0).any()
    assert torch.equal(File(zoo_content).tensors[f"tables.{granularity}.weight_packed"], table.weight_packed)


@pytest.mark.parametrize("name", LAYERS)
def test_the_file_holds_the_layers_codes_scales_and_zero_points(name, zoo, zoo_content):
    layer = zoo.layers[name]
    N, K, container = layer.out_features, layer.in_features, reference.container_bits(layer.bits)
    attributes, packed, scale, zero_point = File(zoo_content).product(f"layers.{name}")
    block = attributes["block_size"]
    blocks = -(-attributes["K"] // block)
    assert (attributes["N"], attributes["bits"], attributes["accuracy_level"]) == (N, container, 1)
    assert packed.dtype == torch.uint8 and packed.shape == (N, blocks, block * container // 8)
    assert (
        scale.shape == (N, blocks)
        and zero_point.dtype == torch.uint8
        and zero_point.shape == (N, -(-blocks * container // 8))
    )

    # The operator's own reading: code k of a row belongs to block k // block_size; lowest bits first.
    stored = reference.unpack(packed.flatten(1), blocks * block, layer.bits).view(N, blocks, block).float()
    values = ((stored - reference.unpack(zero_point, blocks, layer.bits)[..., None].float()) * scale[..., None]).view(
        N, layer.weight_scale.shape[1], -1
    )
    group = K // layer.weight_scale.shape[1]
    dense = ops.dequantize(
        layer.canonical_packed(), layer.weight_scale, layer.weight_zero_point, K, layer.bits, torch.float32
    )
    assert torch.equal(values[..., :group].flatten(1), dense)
    assert not values[..., group:].any()  # padding is worth nothing
    if group % block == 0:
        assert torch.equal(packed.flatten(1), layer.canonical_packed()) and attributes["K"] == K


def test_rows_of_groups_alone_are_lengthened(zoo, zoo_content):
    file = File(zoo_content)
    lengths = {name: file.product(f"layers.{name}")[0]["K"] for name in LAYERS}
    assert {name: K for name, K in lengths.items() if LAYERS[name][0] != K} == {"groups that no block divides": 4 * 32}
