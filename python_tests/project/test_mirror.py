"""Every operator has all its rooms; the map of the tree names what exists."""

import ast
import re

import pytest
import torch

from prequant_ext import ops, reference
from support import ROOT

SHARED_TEST = {"unpack": "pack", "unprepack": "prepack"}  # an operator and its inverse are tested together


def schemas() -> dict[str, str]:
    text = re.sub(r'"\s*\n\s*"', "", (ROOT / "csrc" / "ops.cpp").read_text())
    found = {name: arguments for name, arguments in re.findall(r'"(\w+)\((.*?)\) -> ', text)}
    found.pop("build_info")  # of the library, not of tensors
    return found


OPERATORS = schemas()


def test_there_are_operators():
    assert len(OPERATORS) == 17


@pytest.mark.parametrize("op", OPERATORS)
def test_has_a_reference_and_a_typed_function_with_the_same_arguments(op):
    wanted = [re.sub(r"=.*", "", argument).split()[-1] for argument in OPERATORS[op].split(", ")]
    for module in (reference, ops):
        function = getattr(module, op)
        assert list(function.__annotations__)[:-1] == wanted, module.__name__


@pytest.mark.parametrize("op", OPERATORS)
def test_has_a_fake_a_kernel_and_a_test(op):
    assert op in ops.FAKES
    for key in ("CPU", "CUDA"):  # on CUDA a missing kernel meets the host function's own error
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prequant::{op}", key)
    assert re.search(rf"\(\*{op}\)\(", (ROOT / "csrc" / "kernels.h").read_text())
    assert (ROOT / "python_tests" / "operators" / f"test_{SHARED_TEST.get(op, op)}.py").exists()


def test_imports_point_down_only():
    """reference <- ops <- linear <- model <- {hf, task} <- baselines <- glue <- cli; the one exception says why where
    it stands.
    """
    rooms = [
        ["config", "reference", "strictness", "measure", "html_page", "distributed"],
        ["_native", "guards"],
        ["ops"],
        ["outliers"],
        ["quantize", "frozen"],
        ["linear", "embedding", "families", "doctor", "t5_encoder", "perplexity"],
        ["blocks", "sites", "report"],
        ["model"],
        ["row_tasks", "checkpoint", "task_file", "prepare", "bit_allocation"],
        ["hf", "task", "export", "peft"],
        ["baselines"],
        ["glue"],
        ["study"],
        ["pages"],
        ["directory"],
        ["serve"],
        ["cli"],
    ]
    level = {name: height for height, names in enumerate(rooms) for name in names}
    upward = []
    for path in (ROOT / "prequant_ext").rglob("*.py"):
        own = level.get(path.relative_to(ROOT / "prequant_ext").parts[0].removesuffix(".py"))
        for node in ast.walk(ast.parse(path.read_text())):
            if (
                own is None
                or not isinstance(node, ast.ImportFrom)
                or not (node.module or "").startswith("prequant_ext")
            ):
                continue
            parts = (node.module or "").split(".")[1:]
            names = [parts[0]] if parts else [alias.name for alias in node.names]
            upward += [(path.name, name) for name in names if level.get(name, 0) > own]
    assert sorted(upward) == [("directory.py", "cli"), ("model.py", "hf")]


def test_readme_map_is_true():
    readme = (ROOT / "README.md").read_text()
    tree = readme.split("## The tree", 1)[1].split("```", 2)[1]
    folder, missing = "", []
    for line in tree.splitlines():
        entry = re.match(r"( *)(\S+)", line)
        if not entry:
            continue
        indent, name = len(entry[1]), entry[2]
        path = name if indent == 0 else folder + name
        if indent == 0:
            folder = name
        missing += [path] * (not (ROOT / path.rstrip("/")).exists())
    assert not missing, f"README.md names {missing}, which do not exist"
