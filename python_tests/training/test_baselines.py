"""The methods that PreQuant is compared with: what defines each of them."""

import copy
import dataclasses
from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import RobertaConfig, RobertaModel

from prequant_ext.baselines import METHODS, Options, alphatuning, lora, prequant_ticket, ptq, qat_vanilla, quadapter
from prequant_ext.baselines.calibration import Activations, observe
from prequant_ext.baselines.fake_quantization import in_range, learned_step
from prequant_ext.baselines.matrices import matrices_of
from prequant_ext.config import PreQuantConfig
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import head_parameter_names
from support.tiny_models import from_config, tiny_model, token_ids

CONFIG = PreQuantConfig(r=2)


def options_for(name: str, **changes) -> Options:
    given = {
        "config": CONFIG,
        "group_size": 16,
        "calibration": [{"input_ids": token_ids()}],
        "calibration_steps": 3,
    } | changes
    if name == "prequant_ticket":
        given = {"tuned": moved(tiny_model("bert"))} | given
    return Options(**given)


def moved(model: nn.Module) -> nn.Module:
    """As if it had been fine-tuned."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model


def prepared(name: str, **changes) -> tuple[nn.Module, dict[str, nn.Parameter]]:
    model = tiny_model("bert")
    METHODS[name].prepare(model, options_for(name, **changes))
    return model, METHODS[name].trainables(model)


def matrices(model: nn.Module) -> list[str]:
    return [site.name for site in matrices_of(model, CONFIG)]


# ---- all of them -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_what_trains_is_what_is_named(name):
    """Everything named gets a gradient and moves, everything else is frozen and stays, and the task head trains with
    the rest.
    """
    model, trained = prepared(name)
    assert {key for key, parameter in model.named_parameters() if parameter.requires_grad} == set(trained)
    if not METHODS[name].is_trained:
        assert not trained
        return
    assert set(head_parameter_names(model)) <= set(trained)
    before = copy.deepcopy(model.state_dict())
    model.train()
    optimizer = torch.optim.SGD(trained.values(), lr=0.1)
    ids = token_ids()
    for _ in range(2):  # a low-rank update needs two steps until both of its factors move
        optimizer.zero_grad()
        model(input_ids=ids, labels=torch.arange(len(ids)) % 2).loss.backward()
        optimizer.step()
    changed = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed <= set(trained)
    # Rows of tables that no token of this batch asks for stay, and the key's bias cancels in the softmax: a rounding
    # error moves it, or none.
    assert {key for key in trained if "embeddings" not in key and "key.bias" not in key} <= changed


@pytest.mark.parametrize("name", METHODS)
def test_prepared_models_say_much_the_same(name):
    """Four or eight bits change the logits a little, LoRA not at all."""
    expected = tiny_model("bert")(input_ids=token_ids()).logits
    model, _ = prepared(name)
    with torch.no_grad():
        error = (model.eval()(input_ids=token_ids()).logits - expected).norm() / expected.norm()
    assert error < {"ft": 1e-6, "bitfit": 1e-6, "lora": 1e-6, "quadapter": 0.05, "qat": 0.7}.get(name, 0.6), error


def test_all_change_the_same_matrices():
    names = matrices(tiny_model("bert"))
    assert len(names) == 12
    for method in METHODS:
        model, _ = prepared(method)
        plain = {name for name in names if type(model.get_submodule(name)) is nn.Linear}
        assert plain == (set(names) if method in ("ft", "bitfit") else set()), method


def test_counts_of_the_paper_on_roberta_large():
    settings = RobertaConfig(
        vocab_size=50265, hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    )

    def count(name: str) -> int:
        model = from_config(settings, RobertaModel, "meta")
        METHODS[name].prepare(model, Options(calibration_steps=0))
        trained = METHODS[name].trainables(model)
        return sum(parameter.numel() for key, parameter in trained.items() if key not in head_parameter_names(model))

    assert count("alphatuning") == 4 * 294_912  # Table 2 prints 1.18 M
    assert count("lora") == 24 * 8 * (4 * 2 * 1024 + 2 * (1024 + 4096))
    assert count("quadapter") == 24 * (5 * 1024 + 4096)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.needs_calibration])
def test_calibration_is_asked_for(name):
    with pytest.raises(ValueError, match="calibration must hold at least one batch"):
        METHODS[name].prepare(tiny_model("bert"), options_for(name, calibration=[]))


def test_a_refused_model_stays_whole():
    model = tiny_model("bert")
    for name in ("ptq", "qat"):
        with pytest.raises(ValueError, match="group_size"):
            METHODS[name].prepare(model, options_for(name, group_size=24))
    assert all(type(model.get_submodule(name)) is nn.Linear for name in matrices(model))


@pytest.mark.parametrize(
    ("wrong", "value"),
    [("group_size", 0), ("rank", 0), ("activation_groups", 0), ("refinements", -1), ("calibration_steps", -1)],
)
def test_options_are_checked(wrong, value):
    with pytest.raises(ValueError, match=f"{wrong} must be at least"):
        Options(**{wrong: value})


# ---- calibration and ranges ------------------------------------------------------------------------------------------


def test_observe_sees_every_channel_of_every_batch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Identity(), nn.Linear(3, 2))
    batches = [torch.randn(4, 5, 3), torch.randn(2, 5, 3)]
    seen = observe(lambda_model(model), ["inner.1"], [{"x": batch} for batch in batches])["inner.1"]
    rows = torch.cat([batch.flatten(0, 1) for batch in batches])
    assert torch.equal(seen.low, rows.amin(0)) and torch.equal(seen.high, rows.amax(0))
    assert seen.mean_magnitude.item() == pytest.approx(rows.abs().mean().item())
    with pytest.raises(ValueError, match=r"no batch reached inner\.1\.unused"):
        inner = lambda_model(model)
        inner.inner[1].unused = nn.Linear(1, 1)
        observe(inner, ["inner.1.unused"], [{"x": batches[0]}])
    with pytest.raises(ValueError, match=r"what entered inner\.1 is not finite"):
        observe(lambda_model(model), ["inner.1"], [{"x": batches[0] * float("inf")}])


def lambda_model(inner: nn.Module) -> nn.Module:
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = inner

        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x)

    return Named()


def test_a_range_holds_what_lies_in_it():
    x = torch.tensor([-1.0, -0.1, 0.0, 0.3, 2.0, 5.0])
    on_grid = in_range(x, torch.tensor(-1.0), torch.tensor(2.0), 8)
    assert (on_grid[:5] - x[:5]).abs().max() <= 3 / 255 / 2 + 1e-6
    assert on_grid[2] == 0 and on_grid[5] == on_grid[4]  # 0 is a value of the grid; what lies beyond is clipped
    # stretched to hold 0
    assert in_range(torch.tensor([3.0]), torch.tensor(2.0), torch.tensor(4.0), 8).item() == pytest.approx(
        3, abs=4 / 255
    )


def test_channels_share_the_range_of_their_likes():
    """Per embedding group: one wild channel costs the others nothing once it has a range of its own."""
    low, high = torch.tensor([-1.0, -90.0, -1.1, -0.9]), torch.tensor([1.0, 80.0, 0.9, 1.2])
    seen = Activations(low, high)
    assert [side.tolist() for side in ptq.channel_ranges(seen, 1)] == [[-90.0] * 4, [80.0] * 4]
    low_of, high_of = ptq.channel_ranges(seen, 4)
    assert torch.equal(low_of, low) and torch.equal(high_of, high)
    low_of, high_of = ptq.channel_ranges(seen, 2)
    assert low_of[1] == -90 and high_of[1] == 80 and high_of[0] == high_of[2] == pytest.approx(1.0)
    with pytest.raises(ValueError, match="activation_groups must be at most K = 4, got 5"):
        ptq.channel_ranges(seen, 5)


def test_ptq_keeps_true_codes_and_calibrated_ranges():
    model, _ = prepared("ptq", activation_groups=4)
    float_model = tiny_model("bert")
    seen = observe(float_model, matrices(float_model), [{"input_ids": token_ids()}])
    for name in matrices(float_model):
        layer = model.get_submodule(name)
        assert (
            isinstance(layer, ptq.StaticLinear)
            and isinstance(layer.layer, PreQuantLinear)
            and layer.layer.activation_bits is None
        )
        assert layer.layer.weight_scale.shape == (layer.layer.out_features, layer.layer.in_features // 16)
        assert (
            (layer.low <= seen[name].low).all()
            and (layer.high >= seen[name].high).all()
            and len(layer.low.unique()) <= 4
        )


# ---- QAT -------------------------------------------------------------------------------------------------------------


def test_gradients_of_a_learned_step():
    """Straight through inside the range and none outside for x; rint(x / s) - x / s, or the limit, for the scale: LSQ,
    Equations 3 and 5.
    """
    x = torch.tensor([[-9.0, -1.3, 0.2, 0.8, 3.4, 20.0]], requires_grad=True)
    scale = torch.tensor([[0.5]], requires_grad=True)
    y = learned_step(x, scale, 4)
    assert torch.allclose(y, torch.tensor([[-4.0, -1.5, 0.0, 1.0, 3.5, 3.5]]))
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]])
    (y * weights).sum().backward()
    assert torch.equal(x.grad, weights * torch.tensor([[0.0, 1, 1, 1, 1, 0]]))
    per_value = torch.tensor([[-8.0, -3 + 2.6, 0 - 0.4, 2 - 1.6, 7 - 6.8, 7.0]])
    assert scale.grad.item() == pytest.approx((per_value * weights).sum().item() / (6 * 7) ** 0.5, rel=1e-5)


def test_qat_computes_with_codes():
    model, trained = prepared("qat")
    name = matrices(tiny_model("bert"))[0]
    layer = model.get_submodule(name)
    N, K = layer.weight.shape
    codes = (layer.quantized_weight().view(N, K // 16, 16) / layer.weight_scale).detach()
    assert (codes - codes.round()).abs().max() < 1e-4 and codes.min() >= -8 and codes.max() <= 7
    assert {f"{name}.weight", f"{name}.weight_scale", f"{name}.activation_scale"} <= set(trained)
    assert (
        "bert.encoder.layer.0.attention.self.query.activation_scale"
        not in prepared("qat", config=dataclasses.replace(CONFIG, activation_bits=None))[1]
    )


def test_plain_qat_learns_no_scale():
    _, trained = prepared("qat_vanilla")
    assert not [name for name in trained if "scale" in name]
    layer = qat_vanilla.RoundedLinear(torch.tensor([[0.7, -0.34, 0.04]]), None, 4, None)
    assert torch.allclose(layer(torch.eye(3)).flatten(), torch.tensor([0.7, -0.3, 0.0]))  # steps of max / 7
    layer(torch.tensor([[1.0, 2.0, 3.0]])).sum().backward()
    assert torch.equal(layer.weight.grad, torch.tensor([[1.0, 2.0, 3.0]]))


# ---- AlphaTuning -----------------------------------------------------------------------------------------------------


def decoded(codes: Tensor, alpha: Tensor) -> Tensor:
    layer = alphatuning.BinaryCodedLinear(codes, alpha, None)
    return layer(torch.eye(codes.shape[1])).T.detach()


def test_error_of_a_binary_coding_falls_with_each_bit_and_each_refinement():
    weight = torch.randn(12, 64, generator=torch.Generator().manual_seed(1))

    def error(bits: int, refinements: int) -> float:
        return (decoded(*alphatuning.binary_coding(weight, bits, 32, refinements)) - weight).norm().item()

    by_bits = [error(bits, 15) for bits in (1, 2, 3, 4, 5)]
    assert all(after < 0.75 * before for before, after in pairwise(by_bits)), by_bits
    by_refinement = [error(3, steps) for steps in range(8)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(by_refinement))
    assert by_refinement[-1] < 0.95 * by_refinement[0]


def test_binary_coding_of_values_that_it_can_hold():
    alpha = torch.tensor([1.0, 0.5])
    weight = torch.tensor([[1.5, 0.5, -0.5, -1.5, 1.5, -1.5, 0.5, -0.5]])
    codes, found = alphatuning.binary_coding(weight, 2, 8, 3)
    assert torch.allclose(decoded(codes, found), weight, atol=1e-6) and torch.allclose(
        found.flatten().abs().sort(descending=True).values, alpha
    )
    constant = torch.full((2, 8), 0.25)  # every sign the same: least squares cannot tell the alphas apart
    assert torch.allclose(decoded(*alphatuning.binary_coding(constant, 3, 4, 5)), constant, atol=1e-6)
    with pytest.raises(ValueError, match="group_size must divide K = 8, got 3"):
        alphatuning.binary_coding(weight, 2, 3, 0)


def test_gradient_of_the_alphas_and_codes_that_stay():
    weight = torch.randn(6, 32, generator=torch.Generator().manual_seed(2))
    codes, alpha = alphatuning.binary_coding(weight, 3, 16, 2)
    layer, x = alphatuning.BinaryCodedLinear(codes.clone(), alpha.clone(), None), torch.randn(5, 32)
    plain = alpha.clone().requires_grad_()
    signs = torch.stack([(codes.view(6, 2, 16) >> i & 1).float() * 2 - 1 for i in range(3)], -1)
    functional.linear(x, (signs * plain[:, :, None]).sum(-1).view(6, 32)).square().sum().backward()
    layer(x).square().sum().backward()
    torch.testing.assert_close(layer.alpha.grad, plain.grad)
    torch.optim.AdamW(layer.parameters(), lr=0.1).step()
    assert torch.equal(layer.codes, codes) and not torch.equal(layer.alpha, alpha)


# ---- Quadapter -------------------------------------------------------------------------------------------------------


def test_scale_and_its_inverse_cancel_without_quantizers():
    model, _ = prepared("quadapter", calibration_steps=0)
    expected = tiny_model("bert")(input_ids=token_ids()).logits
    for module in model.modules():
        if isinstance(module, quadapter.ScaledLinear):
            module.is_quantized = False
            nn.init.normal_(module.log_scale, std=0.7)
    torch.testing.assert_close(model(input_ids=token_ids()).logits, expected, rtol=1e-4, atol=1e-5)


def test_calibration_brings_wild_channels_in():
    """A channel a hundred times the others costs them their precision, until its scale is small."""

    def error(steps: int) -> float:
        model = tiny_model("bert")
        with torch.no_grad():
            model.bert.encoder.layer[0].attention.output.LayerNorm.weight[3] = 100.0
        expected = model.bert(input_ids=token_ids()).last_hidden_state
        METHODS["quadapter"].prepare(model, options_for("quadapter", calibration_steps=steps))
        with torch.no_grad():
            return (model.bert(input_ids=token_ids()).last_hidden_state - expected).norm().item()

    assert error(100) < 0.8 * error(0)


# ---- LoRA, and the selections of PreQuant ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lora", "qlora"])
def test_low_rank_update_starts_at_nothing_and_leaves_the_base(name):
    model, trained = prepared(name, rank=3)
    layers = {key: module for key, module in model.named_modules() if isinstance(module, lora.LowRankLinear)}
    assert len(layers) == 12 and all(f"{key}.{own}" in trained for key in layers for own in ("down", "up"))
    layer = next(iter(layers.values()))
    x = torch.randn(4, layer.down.shape[1])
    assert torch.equal(layer(x), layer.base(x)) and layer.down.shape[0] == layer.up.shape[1] == 3
    nn.init.normal_(layer.up)
    torch.testing.assert_close(layer(x) - layer.base(x), 2 * x @ layer.down.T @ layer.up.T, rtol=1e-4, atol=1e-4)
    assert isinstance(layer.base, PreQuantLinear) == (name == "qlora")


def test_l1_distance_pulls_back_to_where_it_began():
    model = tiny_model("bert")
    distance = prequant_ticket.L1Distance(model, CONFIG, 0.5)
    assert distance() == 0
    weight = model.bert.encoder.layer[0].output.dense.weight
    with torch.no_grad():
        weight[0, :3] += torch.tensor([0.25, -0.5, 0.0])
    assert distance().item() == pytest.approx(0.5 * 0.75, rel=1e-4)
    distance().backward()
    assert weight.grad[0, :3].tolist() == [0.5, -0.5, 0.0]
    assert model.classifier.weight.grad is None and model.bert.embeddings.word_embeddings.weight.grad is None


def test_tickets_are_the_dimensions_that_moved():
    tuned = tiny_model("bert")
    with torch.no_grad():
        tuned.bert.encoder.layer[0].attention.self.query.weight[:, [4, 9]] += 1
    tickets, outliers = (prepared(name, tuned=tuned)[0] for name in ("prequant_ticket", "prequant"))
    assert tickets.bert.encoder.layer[0].attention.self.query.outlier_dims.tolist() == [4, 9]
    shares = prequant_ticket.overlap(tickets, outliers)
    assert (
        len(shares) == 12
        and all(0 <= share <= 1 for share in shares.values())
        and set(prequant_ticket.overlap(tickets, tickets).values()) == {1.0}
    )
    with pytest.raises(ValueError, match="tuned must be the weights after the L1-distance run, got None"):
        METHODS["prequant_ticket"].prepare(tiny_model("bert"), Options(config=CONFIG))
    with pytest.raises(ValueError, match="the two models must have the same quantized matrices"):
        prequant_ticket.overlap(tickets, tiny_model("bert"))


def test_bits_of_blocks_follow_what_they_lose_within_the_average():
    model = tiny_model("bert")
    with torch.no_grad():
        for parameter in model.bert.encoder.layer[1].parameters():
            parameter.mul_(10)  # errors grow with the weights
    METHODS["prequant"].prepare(model, options_for("prequant", bits_per_weight=3.0))
    widths = [
        {module.bits for module in block.modules() if isinstance(module, PreQuantLinear)}
        for block in model.bert.encoder.layer
    ]
    assert widths == [{2}, {4}]
