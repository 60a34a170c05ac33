"""PreQuantLinear: the one layer."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from prequant_ext import PreQuantConfig
from prequant_ext.linear import PreQuantLinear
from support.operands import assert_as_accurate

CONFIGS = {
    "default": PreQuantConfig(),
    "paper": PreQuantConfig.paper(),
    "weight only": PreQuantConfig(activation_bits=None),
    "rows": PreQuantConfig(strategy="row_wise"),
    "groups": PreQuantConfig(strategy="group_wise", group_size=16),
    "2 bits": PreQuantConfig(bits=2),
    "8 bits, min max": PreQuantConfig(bits=8, strategy="min_max"),
    "no outliers": PreQuantConfig(r=0),
    "raw outliers": PreQuantConfig(raw_outlier_activations=True),
}


def linear(K: int = 64, N: int = 48, bias: bool = True, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(K, N, bias=bias)


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_forward_is_the_dequantized_layer(config, axis):
    source = linear()
    layer = PreQuantLinear.from_linear(source, config, axis=axis)
    x = torch.randn(3, 5, 64)
    y = layer(x)
    dense = nn.functional.linear(x, layer.dequantize(), source.bias)
    assert y.shape == (3, 5, 48)
    noise = 0 if config.activation_bits is None else 0.03  # of 8-bit activations
    assert (y - dense).norm() <= max(noise, 1e-6) * dense.norm()
    weight_error = (layer.dequantize() - source.weight).square().sum().item()
    assert layer.squared_error == pytest.approx(weight_error, rel=1e-4)


@pytest.mark.parametrize("axis", ["input", "output"])
def test_outlier_dimensions_keep_their_original_values(axis):
    source = linear()
    layer = PreQuantLinear.from_linear(source, PreQuantConfig(r=7), axis=axis)
    dim = 1 if axis == "input" else 0
    assert (
        layer.dequantize()
        .index_select(dim, layer.outlier_dims)
        .equal(source.weight.detach().index_select(dim, layer.outlier_dims))
    )


@pytest.mark.parametrize("axis", ["input", "output"])
def test_dequantized_start_equals_no_outliers(axis):
    source = linear()
    without = PreQuantLinear.from_linear(source, PreQuantConfig(r=0), axis=axis)
    started = PreQuantLinear.from_linear(source, PreQuantConfig(r=5, init="dequantized"), axis=axis)
    assert started.dequantize().equal(without.dequantize())


@pytest.mark.parametrize("axis", ["input", "output"])
def test_given_outlier_weights_take_the_place_of_the_layers_own(axis):
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig(r=3), axis=axis)
    given = torch.randn_like(layer.outlier_weight, requires_grad=True)
    other = copy.deepcopy(layer)
    other.outlier_weight.data.copy_(given)
    x = torch.randn(2, 5, 64)
    y, wanted = layer(x, given), other(x)
    assert torch.equal(y, wanted)
    y.square().sum().backward()
    wanted.square().sum().backward()
    assert torch.equal(given.grad, other.outlier_weight.grad) and layer.outlier_weight.grad is None
    mixed = layer(x, torch.stack([given, layer.outlier_weight]))
    torch.testing.assert_close(mixed, torch.stack([wanted[0], layer(x)[1]]))


def saved_bytes(layer: PreQuantLinear, x: torch.Tensor) -> list[torch.Tensor]:
    """Tensors kept for backward that do not belong to the layer."""
    own, kept = {p.data_ptr() for p in layer.parameters()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        y = layer(x)
    y.sum().backward()
    return [t for t in kept if t.data_ptr() not in own or t.numel() == 0]


@pytest.mark.parametrize("activation_bits", [8, None])
def test_backward_keeps_r_columns_on_the_input_axis(activation_bits):
    M, K, r = 96, 256, 5
    layer = PreQuantLinear.from_linear(
        linear(K, 128), PreQuantConfig(r=r, activation_bits=activation_bits), axis="input"
    )
    kept = saved_bytes(layer, torch.randn(M, K, requires_grad=True))
    assert sum(t.nbytes for t in kept) <= M * r * 4


@pytest.mark.parametrize("activation_bits", [8, None])
def test_backward_keeps_codes_on_the_output_axis(activation_bits):
    M, K = 96, 256
    layer = PreQuantLinear.from_linear(linear(K, 128), PreQuantConfig(activation_bits=activation_bits), axis="output")
    kept = saved_bytes(layer, torch.randn(M, K, requires_grad=True))
    ranges = 5 * M  # a float32 scale and a uint8 zero point for each token
    assert sum(t.nbytes for t in kept) <= (M * K + ranges if activation_bits else M * K * 4)
    assert max(t.nbytes for t in kept) == (M * K if activation_bits else M * K * 4)


def test_a_frozen_layer_keeps_nothing():
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig()).requires_grad_(False)
    assert sum(t.nbytes for t in saved_bytes(layer, torch.randn(9, 64, requires_grad=True))) == 0


def test_train_scales_is_prequant_alpha():
    config = PreQuantConfig(r=0, train_scales=True)
    layer = PreQuantLinear.from_linear(linear(96, 32), config, hidden_size=32)
    assert (
        layer.weight_scale.shape == (32, 3)
        and layer.weight_scale.requires_grad
        and not layer.outlier_weight.requires_grad
    )
    codes = layer.weight_packed.clone()
    layer(torch.randn(8, 96)).square().sum().backward()
    assert layer.weight_scale.grad.shape == (32, 3) and layer.weight_scale.grad.abs().sum() > 0
    assert layer.weight_packed.equal(codes) and layer.outlier_weight.grad is None


@pytest.mark.parametrize("axis", ["input", "output"])
@pytest.mark.parametrize("config", [CONFIGS["default"], CONFIGS["weight only"]], ids=["W4A8", "W4A16"])
def test_a_gradient_of_a_gradient_is_refused(config, axis):
    """The kernels of the backward pass have no gradient: it would be zero, as for a gradient penalty."""
    layer, x = PreQuantLinear.from_linear(linear(), config, axis=axis), torch.randn(3, 64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"prequant::linear_w4a\d+ is not differentiable twice"):
        torch.autograd.grad(layer(x).pow(3).sum(), x, create_graph=True)
    torch.autograd.grad(layer(x).pow(3).sum(), [x, layer.outlier_weight])


def test_half_precision_keeps_masters_in_float32():
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig())
    layer(torch.randn(2, 64)).sum().backward()
    masters = layer.outlier_weight.detach().clone()
    for dtype in (torch.bfloat16, torch.float16):
        layer.to(dtype)
        x = torch.randn(2, 64, dtype=dtype)
        assert layer(x).dtype == dtype and layer.weight.dtype == dtype and layer.bias.dtype == dtype
        assert (
            layer.weight_scale.dtype == layer.outlier_weight.dtype == layer.outlier_weight.grad.dtype == torch.float32
        )
        assert layer.outlier_weight.equal(masters)


def test_forward_follows_x_and_autocast():
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig())
    assert layer(torch.randn(2, 64).bfloat16()).dtype == torch.bfloat16
    x = torch.randn(2, 64, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and layer.outlier_weight.grad.dtype == torch.float32


def test_weight_serves_those_who_look_and_poisons_those_who_read():
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig())
    assert layer.weight.shape == (48, 64) and layer.weight.dtype == torch.float32 and layer.weight.stride() == (0, 0)
    assert torch.isnan(layer.weight).all()
    assert "weight" not in layer.state_dict() and not isinstance(layer, nn.Linear)


def test_state_dict_round_trip_and_the_name_on_disk():
    layer, other = (PreQuantLinear.from_linear(linear(seed=seed), PreQuantConfig()) for seed in (0, 1))
    state = layer.state_dict()
    state["weight"] = state.pop("weight_packed")
    other.load_state_dict(state)
    assert all(other.state_dict()[name].equal(tensor) for name, tensor in layer.state_dict().items())


def test_copies_and_moves():
    layer = copy.deepcopy(PreQuantLinear.from_linear(linear(), PreQuantConfig()))
    assert layer.outlier_weight.requires_grad and not layer.weight_packed.requires_grad
    assert layer.to("meta").weight.device.type == "meta"


def test_to_linear_computes_what_the_layer_holds():
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig(activation_bits=None))
    x = torch.randn(7, 64)
    float_layer = layer.to_linear()
    assert type(float_layer) is nn.Linear and float_layer.weight.equal(layer.dequantize())
    assert_as_accurate(layer(x), float_layer(x), float_layer.double()(x.double()))


def test_conv1d_comes_and_goes_transposed():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(48, 64)
    layer = PreQuantLinear.from_linear(conv1d, PreQuantConfig(bits=8, strategy="min_max", activation_bits=None))
    x = torch.randn(5, 64)
    assert (layer(x) - conv1d(x)).norm() < 0.02 * conv1d(x).norm()
    restored = layer.to_linear()
    assert type(restored) is type(conv1d) and restored.weight.shape == conv1d.weight.shape
    torch.testing.assert_close(restored(x), layer(x))


@pytest.mark.parametrize("shape", [(64,), (0, 64), (2, 0, 64), (1, 2, 3, 64)], ids=str)
def test_leading_dimensions(shape):
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig())
    assert layer(torch.randn(shape)).shape == (*shape[:-1], 48)


def test_trains_towards_a_target():
    torch.manual_seed(0)
    layer = PreQuantLinear.from_linear(linear(), PreQuantConfig())
    x, target = torch.randn(64, 64), torch.randn(64, 48)
    optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(50):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.95 * losses[0]


@pytest.mark.parametrize(
    ("config_axis", "axis", "expected"),
    [("hidden", None, "input"), ("output", None, "output"), ("output", "input", "input")],
)
def test_the_axis_is_the_config_s_unless_given(config_axis, axis, expected):
    assert PreQuantLinear.from_linear(linear(), PreQuantConfig(axis=config_axis), axis).axis == expected


def test_rejects():
    with pytest.raises(
        ValueError,
        match="axis must be input or output for a single layer, got 'hidden'; \"hidden\" is decided by the role",
    ):
        PreQuantLinear.from_linear(linear(), PreQuantConfig(), axis="hidden")
    with pytest.raises(TypeError, match=r"linear must be an nn\.Linear or a transformers Conv1D, got Conv2d"):
        PreQuantLinear.from_linear(nn.Conv2d(1, 1, 1), PreQuantConfig())
    with pytest.raises(ValueError, match="x has K = 63 but the layer has in_features = 64"):
        PreQuantLinear.from_linear(linear(), PreQuantConfig())(torch.zeros(2, 63))
    with pytest.raises(ValueError, match="r"):
        PreQuantLinear.from_linear(linear(), PreQuantConfig(r=49), axis="output")
    bad = linear()
    bad.weight.data[3, 3] = float("nan")
    with pytest.raises(ValueError, match=r"query"):
        PreQuantLinear.from_linear(bad, PreQuantConfig(), name="query")


AXES = ("input", "output")
CASES = {
    "w4a8": PreQuantConfig(),
    "w4a16": PreQuantConfig(activation_bits=None),
    "alpha": PreQuantConfig(r=0, train_scales=True),
}
PEAKS_SCRIPT = """
import json, re, sys, torch
from pathlib import Path
from torch import nn
from prequant_ext import PreQuantConfig, PreQuantLinear

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

def step(layer, x):
    layer(x).sum().backward()

def held_by_a_step(config, axis):
    warm = PreQuantLinear.from_linear(nn.Linear(64, 64), config, axis=axis)
    step(warm, torch.randn(16, 64, requires_grad=True))
    layer = PreQuantLinear.from_linear(nn.Linear(4096, 4096), config, axis=axis)
    x = torch.randn(16, 4096, requires_grad=True)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from what is held now
    before = peak()
    step(layer, x)
    return peak() - before

for config in json.loads(sys.argv[1]):
    print(*(held_by_a_step(PreQuantConfig.from_dict(config), axis) for axis in ("input", "output")))
"""


@pytest.fixture(scope="module")
def peaks():
    """(case, axis) -> the bytes that a step takes on top of what is held before it, in a process of its own: memory
    that other tests have freed would hide them.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pytest.skip("this system does not reset a process's peak memory")
    configs = json.dumps([config.to_dict() for config in CASES.values()])
    done = subprocess.run(
        [sys.executable, "-c", PEAKS_SCRIPT, configs],
        env=os.environ
        | {"MALLOC_MMAP_THRESHOLD_": "1048576"},  # what one case has freed is the system's, not the next's
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    rows = zip(CASES, done.stdout.splitlines(), strict=True)
    return {(case, axis): int(held) for case, row in rows for axis, held in zip(AXES, row.split(), strict=True)}


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("case", CASES)
def test_a_step_never_holds_a_dense_weight(case, axis, peaks):
    """Forward and backward of a 4096 x 4096 layer: a dense copy, or a dense gradient, would be 67 MB in float32."""
    assert peaks[case, axis] < 12e6
