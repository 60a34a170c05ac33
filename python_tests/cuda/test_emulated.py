"""Every operator on the emulated CUDA kernels: nothing stray, nothing racing, and one result whatever the order of
blocks, warps, lanes and copies.

That the results are right is for the tests of each operator, whose ``device`` is "emulated" too.
"""

import subprocess
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from prequant_ext import ops
from support import ROOT, emulated
from support.every_operator import LAYERS, OPERATORS, calls
from support.operands import assert_identical
from tools.tracing import aligned, trace

SMALL = {name: layer for name, layer in LAYERS.items() if layer.M < 100}
each_operator = pytest.mark.parametrize("operator", OPERATORS)
each_layer = pytest.mark.parametrize("layer", SMALL.values(), ids=SMALL.keys())


class Recorder:
    """Passes operators on to a library and keeps their arguments."""

    def __init__(self, library: Any) -> None:
        self._library, self.arguments = library, {}

    def __getattr__(self, operator: str) -> Any:
        def call(*arguments: Any) -> Any:
            self.arguments[operator] = arguments
            return getattr(self._library, operator)(*arguments)

        return call


@pytest.fixture
def sample(emulated_library, monkeypatch):
    """(operator, layer) -> the arguments of a call, every tensor aligned as on a GPU."""

    def arguments(operator: str, layer: Any) -> list[Any]:
        recorder = Recorder(emulated_library)
        monkeypatch.setattr(ops.calls, "library", recorder)
        call, operand = calls(layer, "cpu")[operator]
        call(operand)
        return [
            aligned(argument) if isinstance(argument, Tensor) else argument for argument in recorder.arguments[operator]
        ]

    return arguments


def run(library: Any, operator: str, arguments: list[Any]) -> list[Tensor]:
    """The results; of an operator that works in place, the tensor it worked on."""
    if operator.endswith("_"):
        arguments = [aligned(arguments[0]), *arguments[1:]]
        getattr(library, operator)(*arguments)
        return [arguments[0]]
    given = getattr(library, operator)(*arguments)
    return list(given) if isinstance(given, tuple) else [given]


@each_layer
@each_operator
def test_the_order_changes_no_bit(operator, layer, sample, emulated_library, request):
    arguments = sample(operator, layer)
    options = emulated.load(emulated_library.variant).options
    request.addfinalizer(options)
    expected = run(emulated_library, operator, arguments)
    for choice in ({"seed": 1, "cp_async": "random"}, {"seed": 2, "cp_async": "eager"}):
        options(**choice)
        for actual, wanted in zip(run(emulated_library, operator, arguments), expected, strict=True):
            assert_identical(actual, wanted)


def off_alignment(tensor: Tensor) -> Tensor:
    """A contiguous copy that begins one element into its storage, with numbers around it that no kernel may use."""
    buffer = torch.full((tensor.numel() + 2,), 99, dtype=tensor.dtype)
    return buffer[1:-1].view(tensor.shape).copy_(tensor)


@each_operator
def test_tensors_off_alignment(operator, sample, emulated_library):
    """Each tensor in turn where no 128-bit access may begin. What is summed another way may round another way."""
    arguments = sample(operator, SMALL["a tile, groups"])
    expected = run(emulated_library, operator, arguments)
    for i, argument in enumerate(arguments):
        # prepacked storage is the device's own
        if not isinstance(argument, Tensor) or (i == 0 and operator.endswith("_")) or operator == "unprepack":
            continue
        moved = [*arguments[:i], off_alignment(argument), *arguments[i + 1 :]]
        for actual, wanted in zip(run(emulated_library, operator, moved), expected, strict=True):
            if wanted.is_floating_point():
                torch.testing.assert_close(
                    actual.double(), wanted.double(), rtol=2e-3, atol=2e-3 * float(wanted.double().abs().max())
                )
            else:
                assert_identical(actual, wanted)


@each_layer
@each_operator
def test_nothing_stray_and_nothing_racing(operator, layer, sample, emulated_library):
    if emulated_library.variant != "fast":
        pytest.skip("emulated: the sanitized library runs alone")
    arguments = sample(operator, layer)
    tensors = {
        f"argument_{i}{'_' * (i == 0 and operator.endswith('_'))}": tensor
        for i, tensor in enumerate(arguments)
        if isinstance(tensor, Tensor)
    }
    with trace(**tensors) as traced:
        getattr(traced.ops, operator)(*arguments)
    assert traced.kernels and not traced.findings, traced.table()


@pytest.mark.exhaustive
@pytest.mark.slow
def test_the_sanitizers_find_nothing(emulated_library):
    """AddressSanitizer and UndefinedBehaviorSanitizer on all operators; a sanitized library loads only into a process
    of its own.
    """
    if emulated_library.variant != "fast":
        pytest.skip("emulated: the sanitized library runs alone")
    emulated.build("sanitized")
    some = "alignment or (order and (ragged or few))"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "python_tests/cuda/test_emulated.py",
        "-k",
        some,
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=emulated.sanitizer_environment(), cwd=ROOT)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:] + done.stderr[-8000:]
