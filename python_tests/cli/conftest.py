"""A float model and its quantized directory, which the tests of the commands read and never change."""

import pytest

from support.command_line import run
from support.tiny_checkpoint import save_float_model


@pytest.fixture(scope="session")
def float_model(tmp_path_factory):
    return save_float_model(tmp_path_factory.mktemp("models") / "float")


@pytest.fixture(scope="session")
def base(float_model, tmp_path_factory):
    """A quantized directory."""
    folder = tmp_path_factory.mktemp("base") / "base"
    run("quantize", float_model, "-o", folder, "--r", "3")
    return folder
