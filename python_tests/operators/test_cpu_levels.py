"""Every instruction-set level of the CPU kernels passes the operators' tests and makes the same integers, whichever
this CPU has.

Levels that it has run through PREQUANT_ISA, in a process of their own; the others are in the libraries of
cpu_variants.py.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from prequant_ext import ops
from support import ROOT, cpu_variants, integer_bits

TESTS = Path(__file__).parent
OPERATORS = [op for op in ops.OPERATORS if (TESTS / f"test_{op}.py").exists()]
EMULATED_LEVELS = [variant for variant, chosen in cpu_variants.VARIANTS.items() if not chosen.is_sanitized]
SANITIZED = [variant for variant, chosen in cpu_variants.VARIANTS.items() if chosen.is_sanitized]

# Of these runs the whole suite would take minutes more and show nothing new. avxvnni is avx2 but for its integer
# products. The sanitizers take four times as long: they leave out named layers where test_every_edge compares the same
# way on smaller shapes.
PRODUCTS = ["linear_w4a16", "linear_w4a8", "linear_dx", "scale_grad"]
SOME_OPERATORS = {"avxvnni": PRODUCTS}
SANITIZED_TESTS = "not as_accurate and not integer_part and not gradients and not same_bits"


def level_in_use() -> str:
    return re.search("isa=([^;]*)", torch.ops.prequant.build_info())[1]


def environment_of(level: str) -> dict[str, str]:
    """Where the level runs on this machine, its own instructions if they are there. Skips the test where it cannot."""
    if level in cpu_variants.real_levels():
        return {name: value for name, value in os.environ.items() if name != "PREQUANT_CPU_VARIANT"} | {
            "PREQUANT_ISA": level
        }
    if level not in cpu_variants.VARIANTS:
        pytest.skip(f"this CPU lacks the level {level}, which no library emulates")
    return environment_of_variant(level)


def environment_of_variant(variant: str) -> dict[str, str]:
    if cpu_variants.gap(variant):
        pytest.skip(cpu_variants.gap(variant))
    cpu_variants.build(variant)
    return cpu_variants.environment(variant)


def run_operator_tests(subject: str, environment: dict[str, str], wanted: str = "cpu", *more: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-x",
        "-p",
        "no:cacheprovider",
        "-k",
        f"({wanted}) and cpu and not emulated and not cuda",
        *more,
    ]
    tests = [str(TESTS / f"test_{op}.py") for op in SOME_OPERATORS.get(subject, OPERATORS)]
    done = subprocess.run([*command, *tests], env=environment, capture_output=True, text=True, cwd=ROOT)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert done.returncode == 0 and passed, f"exit {done.returncode}\n{done.stdout[-5000:]}{done.stderr[-8000:]}"
    assert int(passed[1]) > 200, done.stdout[-1000:]
    # of what was left out, pytest -rP tells
    print("\n".join(line for line in done.stdout.splitlines() if " skipped" in line or " passed" in line))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("level", cpu_variants.LEVELS)
def test_it_passes_the_operator_tests(level):
    if level == level_in_use():
        pytest.skip(f"{level} is the level in use: the operators' tests of this run are its own")
    run_operator_tests(level, environment_of(level))


@pytest.mark.exhaustive
@pytest.mark.slow
@pytest.mark.parametrize("variant", SANITIZED)
def test_the_sanitizers_find_nothing(variant):
    # a report that ends the process is not lost in pytest's capture
    run_operator_tests(variant, environment_of_variant(variant), SANITIZED_TESTS, "-s")


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", EMULATED_LEVELS)
def test_an_emulated_library_has_its_level_alone(variant, monkeypatch):
    """Whatever PREQUANT_ISA says, and beside the installed library."""
    environment_of_variant(variant)
    monkeypatch.setenv("PREQUANT_ISA", "sse9")
    cpu_variants.load(variant)
    library = getattr(torch.ops, cpu_variants.library(variant))
    assert f"isa={variant};" in library.build_info()
    codes = torch.tensor([[1, 2, 3]], dtype=torch.uint8)
    assert torch.equal(library.unpack(library.pack(codes, 4), 3, 4), codes)


def integers_of(library: object, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What an operator library that this process has loaded makes."""
    monkeypatch.setattr(ops.calls, "library", library)
    return {"level": library.build_info(), **dict(integer_bits.digests())}


def integers_of_a_real_level(level: str) -> dict[str, str]:
    """What the installed library makes at this level: it chooses one for the whole life of a process."""
    environment = environment_of(level) | {"PYTHONPATH": str(ROOT / "python_tests")}
    done = subprocess.run(
        [sys.executable, "-m", "support.integer_bits"], env=environment, capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def integers_of_a_variant(variant: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    if cpu_variants.gap(variant):
        pytest.skip(cpu_variants.gap(variant))
    cpu_variants.load(variant)
    return integers_of(getattr(torch.ops, cpu_variants.library(variant)), monkeypatch)


@pytest.fixture(scope="module")
def portable_integers() -> dict[str, str]:
    found = integers_of_a_real_level("portable")
    assert found["level"].startswith("isa=portable;") and len(found) > 200
    return found


def marked(level: str) -> object:
    """A level that has to be compiled first, as a library that emulates it, is for make test-all."""
    return pytest.param(level, marks=[] if cpu_variants.runs_here(level) else pytest.mark.exhaustive)


@pytest.mark.parametrize("level", [marked(level) for level in cpu_variants.LEVELS if level != "portable"])
def test_every_level_makes_the_same_integers(level, portable_integers, monkeypatch):
    if level == level_in_use():
        found = integers_of(torch.ops.prequant, monkeypatch)
    elif level in cpu_variants.real_levels():
        found = integers_of_a_real_level(level)
    elif level in cpu_variants.VARIANTS:
        found = integers_of_a_variant(level, monkeypatch)
    else:
        pytest.skip(f"this CPU lacks the level {level}, which no library emulates")
    assert found.pop("level").startswith(f"isa={level};")
    assert found == {name: value for name, value in portable_integers.items() if name != "level"}


@pytest.mark.exhaustive
@pytest.mark.parametrize("variant", EMULATED_LEVELS)
def test_the_emulated_level_makes_the_integers_of_the_real_one(variant, portable_integers, monkeypatch):
    if variant not in cpu_variants.real_levels():
        pytest.skip(
            f"this CPU lacks {variant}: test_every_level_makes_the_same_integers has taken the emulated library"
        )
    found = integers_of_a_variant(variant, monkeypatch)
    assert found.pop("level").startswith(f"isa={variant};")
    assert found == {name: value for name, value in portable_integers.items() if name != "level"}


def test_the_gpus_kernels_make_the_same_integers(portable_integers, emulated_library, monkeypatch):
    """On the emulator; prepacked weights alone are laid out in another way."""
    found = integers_of(emulated_library, monkeypatch)
    assert found.pop("level").startswith("isa=emulated;")
    for name, value in found.items():
        assert name.startswith("prepack:") or value == portable_integers[name], name
