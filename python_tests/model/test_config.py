"""PreQuantConfig: defaults, what is refused and how, and the way to JSON and back."""

import dataclasses
import json

import pytest

from prequant_ext.config import DEFAULT_GROUP_SIZE, PreQuantConfig


def test_defaults_are_the_documented_ones():
    settings = PreQuantConfig().to_dict()
    documented = {
        "bits": 4,
        "strategy": "outlier_aware",
        "group_size": None,
        "r": 5,
        "axis": "hidden",
        "selector": "outlier",
        "outlier_threshold": 3.0,
        "activation_bits": 8,
        "activation_granularity": "token",
        "embedding_bits": 8,
        "layer_bits": None,
        "init": "original",
        "train_scales": False,
        "modules_to_not_convert": None,
        "seed": 0,
    }
    assert {name: settings[name] for name in documented} == documented


def test_paper_differs_from_the_defaults_only_where_documented():
    default, paper = PreQuantConfig().to_dict(), PreQuantConfig.paper().to_dict()
    changed = {name: value for name, value in paper.items() if value != default[name]}
    assert changed == {"activation_granularity": "tensor", "embedding_granularity": "tensor", "init": "dequantized"}


def test_paper_takes_changes():
    config = PreQuantConfig.paper(r=10, init="original")
    assert (config.r, config.init, config.activation_granularity) == (10, "original", "tensor")


def test_best_quantizes_by_groups_and_trains_as_many_weights():
    default, best = PreQuantConfig().to_dict(), PreQuantConfig.best().to_dict()
    assert {name: value for name, value in best.items() if value != default[name]} == {
        "strategy": "group_wise",
        "selector": "error",
    }
    assert PreQuantConfig.best(group_size=16, r=3) == PreQuantConfig(
        strategy="group_wise", selector="error", group_size=16, r=3
    )


def test_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PreQuantConfig().bits = 8


REFUSED = [
    ("bits", 1),
    ("bits", 9),
    ("bits", 4.0),
    ("bits", True),
    ("strategy", "minmax"),
    ("group_size", 0),
    ("group_size", 64.0),
    ("r", -1),
    ("r", 2.5),
    ("axis", "rows"),
    ("selector", "best"),
    ("outlier_threshold", 0),
    ("outlier_threshold", -3.0),
    ("outlier_threshold", float("nan")),
    ("outlier_threshold", "3"),
    ("outlier_threshold", ("density", 0.0)),
    ("outlier_threshold", ("probability", 0.1)),
    ("outlier_threshold", ("density", 0.1, 0.2)),
    ("outlier_threshold", ("log_density", float("inf"))),
    ("activation_bits", 4),
    ("activation_bits", 8.0),
    ("activation_granularity", "row"),
    ("embedding_bits", 4),
    ("embedding_granularity", "token"),
    ("layer_bits", 4),
    ("layer_bits", "4"),
    ("layer_bits", [4, 9]),
    ("layer_bits", {"layers.0": 1}),
    ("layer_bits", {0: 4}),
    ("init", "zeros"),
    ("train_scales", 1),
    ("modules_to_not_convert", "classifier"),
    ("modules_to_not_convert", [1]),
    ("seed", 0.5),
    ("raw_outlier_activations", "yes"),
]


@pytest.mark.parametrize(("name", "value"), REFUSED, ids=[f"{name}={value!r}" for name, value in REFUSED])
def test_refuses_and_names_the_setting(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be .*, got "):
        PreQuantConfig(**{name: value})


def test_group_size_needs_a_group_strategy():
    with pytest.raises(ValueError, match="group_size = 64 needs a group strategy"):
        PreQuantConfig(group_size=64)
    assert PreQuantConfig(strategy="group_wise", group_size=64).group == 64
    assert PreQuantConfig(strategy="group_wise").group == DEFAULT_GROUP_SIZE


def test_train_scales_needs_r_0_and_a_scale_per_tensor():
    with pytest.raises(ValueError, match="needs r = 0, got r = 5"):
        PreQuantConfig(train_scales=True)
    with pytest.raises(ValueError, match=r"one scale per tensor .* got strategy='row_wise'"):
        PreQuantConfig(train_scales=True, r=0, strategy="row_wise")


CONFIGS = {
    "defaults": PreQuantConfig(),
    "paper": PreQuantConfig.paper(),
    "best": PreQuantConfig.best(),
    "density": PreQuantConfig(outlier_threshold=("density", 0.01), modules_to_not_convert=["pooler"]),
    "bits as a list": PreQuantConfig(layer_bits=[2, 4, 8]),
    "bits as rules": PreQuantConfig(layer_bits={"encoder.0-7": 2, "encoder.3": 4}),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_survives_json(config):
    assert PreQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_rules_keep_their_order():
    """Later rules win, so order is part of the meaning."""
    config = PreQuantConfig(layer_bits={"layers.5": 8, "layers.0-7": 2})
    assert list(PreQuantConfig.from_dict(json.loads(json.dumps(config.to_dict()))).layer_bits) == [
        "layers.5",
        "layers.0-7",
    ]


def test_unknown_setting_is_refused_by_name():
    with pytest.raises(ValueError, match=r"no setting colour; it has .*bits"):
        PreQuantConfig.from_dict({"bits": 4, "colour": "red"})


def test_a_caller_cannot_change_the_rules_afterwards():
    rules = {"layers.0": 2}
    config = PreQuantConfig(layer_bits=rules)
    rules["layers.0"] = 99
    assert config.layer_bits == {"layers.0": 2}
