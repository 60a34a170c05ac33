"""Every setting of quantization has an option or is left out on purpose, and what is typed reaches the config."""

import dataclasses

import pytest
import typer
from typer.testing import CliRunner

from prequant_ext.cli.commands import app as prequant
from prequant_ext.cli.options import OPTIONS, AsJson, takes_quantization_options
from prequant_ext.config import PreQuantConfig

LEFT_OUT = {  # setting: why it has no option
    "embedding_granularity": "--paper sets it",
    "raw_outlier_activations": "a remedy for single models, from Python",
}

EXAMPLES = {  # parameter: what is typed, and the settings that differ from the default then
    "bits": ("--bits 3", {"bits": 3}),
    "layer_bits": (
        "--layer-bits layers.0-7=2 --layer-bits layers.5=8",
        {"layer_bits": {"layers.0-7": 2, "layers.5": 8}},
    ),
    "strategy": ("--strategy mse", {"strategy": "mse"}),
    "group_size": ("--strategy group_wise --group-size 16", {"strategy": "group_wise", "group_size": 16}),
    "r": ("--r 0", {"r": 0}),
    "axis": ("--axis input", {"axis": "input"}),
    "selector": ("--selector random", {"selector": "random"}),
    "outlier_threshold": ("--outlier-threshold 2.5", {"outlier_threshold": 2.5}),
    "activation_bits": ("--activation-bits 8", {}),
    "weight_only": ("--weight-only", {"activation_bits": None}),
    "activation_granularity": ("--activation-granularity tensor", {"activation_granularity": "tensor"}),
    "float_embeddings": ("--float-embeddings", {"embedding_bits": None}),
    "init": ("--init dequantized", {"init": "dequantized"}),
    "train_scales": ("--train-scales", {"train_scales": True, "r": 0}),
    "exclude": ("--exclude pooler --exclude classifier", {"modules_to_not_convert": ("pooler", "classifier")}),
    "seed": ("--seed 7", {"seed": 7}),
}


def call(*arguments):
    """(result, config) of a command with the options of quantization."""
    app, configs = typer.Typer(), []

    @app.command()
    @takes_quantization_options
    def command(model: str, config: PreQuantConfig, as_json: AsJson = False) -> None:
        configs.append(config)

    return CliRunner().invoke(app, ["model", *arguments]), *configs


def test_every_setting_has_an_option_or_is_left_out_on_purpose():
    settings = {setting.name for setting in dataclasses.fields(PreQuantConfig)}
    assert {setting.name for setting, _ in OPTIONS.values()} == settings - LEFT_OUT.keys()
    assert settings >= LEFT_OUT.keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_what_is_typed_reaches_the_config(name):
    typed, changes = EXAMPLES[name]
    result, config = call(*typed.split())
    assert result.exit_code == 0 and config == dataclasses.replace(PreQuantConfig(), **changes)


def test_without_options_the_config_is_the_default_and_paper_can_be_overridden():
    assert call()[1] == PreQuantConfig()
    assert call("--paper", "--init", "original")[1] == PreQuantConfig.paper(init="original")


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("--weight-only --activation-bits 8", "--activation-bits 8 and --weight-only contradict each other"),
        ("--layer-bits layers.0", "layer_bits must be rules such as layers.0-7=2, got 'layers.0'"),
        ("--train-scales --r 3", "needs r = 0, got r = 3"),
        ("--bits 9", "bits must be an integer from 2 to 8, got 9"),
        ("--strategy best", "--strategy"),
    ],
)
def test_what_cannot_be_used_is_refused_before_the_command_begins(typed, message):
    result, *configs = call(*typed.split())
    assert (result.exit_code, configs) == (2, []) and message in result.stderr


@pytest.mark.parametrize("name", ["quantize", "inspect"])
def test_the_commands_have_them_in_one_place(name):
    command = typer.main.get_command(prequant).commands[name]
    names = [parameter.name for parameter in command.params]
    first = names.index("bits")
    assert names[first : first + len(OPTIONS) + 1] == [*OPTIONS, "paper"] and names[0] == "model"
