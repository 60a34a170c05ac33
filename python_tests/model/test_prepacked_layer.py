"""A layer on a GPU holds its weight in the layout of the GPU's kernels, and nobody outside notices."""

import copy

import pytest
import torch
from torch import nn

from prequant_ext import PreQuantConfig, ops, quantize_model, reference
from prequant_ext.linear import PreQuantLinear
from prequant_ext.task_file import fingerprint

pytestmark = pytest.mark.parametrize(
    "device", ["emulated", pytest.param("cuda", marks=pytest.mark.cuda)], indirect=True
)
CONFIGS = {
    "default": PreQuantConfig(),
    "weight only, groups": PreQuantConfig(activation_bits=None, strategy="group_wise", group_size=64),
    "2 bits, rows": PreQuantConfig(bits=2, strategy="row_wise"),
    "8 bits": PreQuantConfig(bits=8),
}


@pytest.fixture(autouse=True)
def gpu_layout(device, monkeypatch):
    """The emulated kernels' tensors are on the CPU: say for them what a GPU's tensors say for themselves."""
    if device == "cpu":
        monkeypatch.setattr(ops, "reads_prepacked", lambda tensor: not tensor.is_meta)


def layer_on(device: str, config: PreQuantConfig, axis: str = "input", K: int = 192, N: int = 80) -> PreQuantLinear:
    torch.manual_seed(0)
    return PreQuantLinear.from_linear(nn.Linear(K, N), config, axis=axis).to(device)


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_forward_and_gradients_equal_those_of_canonical_storage(config, axis, device):
    layer = layer_on(device, config, axis)
    assert layer.is_prepacked
    x = torch.randn(2, 9, 192, device=device).bfloat16()
    results = []
    for _ in range(2):
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.square().sum().backward()
        results.append((y.detach(), leaf.grad, layer.outlier_weight.grad))
        layer.zero_grad(set_to_none=True)
        layer.unprepack_()
    assert all(a.equal(b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_a_state_dict_is_canonical_and_loads_into_either_layout(config, device):
    layer = layer_on(device, config)
    stored = layer.state_dict()
    assert stored["weight_packed"].shape == (80, 192 * reference.container_bits(config.bits) // 8)
    other = PreQuantLinear(192, 80, bias=True, axis="input", config=config, device=device)
    other.load_state_dict(stored)
    assert other.is_prepacked and other.weight_packed.equal(layer.weight_packed)
    other.unprepack_().load_state_dict(stored)
    assert other.dequantize().equal(layer.dequantize())


def test_moving_copying_and_casting_keep_the_weight(device):
    layer = layer_on(device, PreQuantConfig())
    dense = layer.dequantize()
    assert copy.deepcopy(layer).dequantize().equal(dense)
    assert layer.half().is_prepacked and layer.dequantize().equal(dense)
    parameter = layer.weight_packed
    layer.unprepack_().prepack_()
    assert layer.weight_packed is parameter  # optimizers and hooks hold the object
    assert layer.to_linear().weight.equal(dense.half())


def test_one_copy_in_memory(device):
    layer = layer_on(device, PreQuantConfig(), K=200, N=72)
    assert layer.weight_packed.shape == (5, 4, 512)  # padded to 80 x 256
    held = [value for value in vars(layer).values() if isinstance(value, torch.Tensor)]
    assert not held and sum(p.dtype == torch.uint8 and p.numel() > 100 for p in layer.parameters()) == 1


def test_the_base_fingerprint_does_not_depend_on_the_layout(device):
    from support.tiny_models import tiny_model

    model = quantize_model_of(tiny_model("bert")).to(device)
    prepacked = fingerprint(model)
    for module in model.modules():
        if isinstance(module, PreQuantLinear):
            module.unprepack_()
    assert fingerprint(model) == prepacked


def quantize_model_of(model: nn.Module) -> nn.Module:
    quantize_model(model, PreQuantConfig(r=2))
    return model
