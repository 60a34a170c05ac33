"""Every operator has all its rooms; the map of the tree names what exists."""

import ast
import inspect
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from prequant_ext import ops, reference
from prequant_ext.cli.commands import app
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
def test_has_a_reference_a_typed_function_and_a_fake_with_the_same_signature(op):
    signature = inspect.signature(getattr(reference, op))
    wanted = [re.sub(r"=.*", "", argument).split()[-1] for argument in OPERATORS[op].split(", ")]
    assert list(signature.parameters) == wanted
    assert inspect.signature(getattr(ops, op)) == signature
    # an operator that works in place returns nothing, the function around it the tensor
    returned = None if op.endswith("_") else signature.return_annotation
    assert inspect.signature(getattr(ops.fakes, op)) == signature.replace(return_annotation=returned)


@pytest.mark.parametrize("op", OPERATORS)
def test_is_registered_with_a_kernel_and_a_test(op):
    assert op in ops.OPERATORS  # those whose fakes are registered
    for key in ("CPU", "CUDA"):  # on CUDA a missing kernel meets the host function's own error
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"prequant::{op}", key)
    assert re.search(rf"\(\*{op}\)\(", (ROOT / "csrc" / "kernels.h").read_text())
    assert (ROOT / "python_tests" / "operators" / f"test_{SHARED_TEST.get(op, op)}.py").exists()


# Each room may import those above it in this list and, without a circle, its neighbours on the same line.
ROOMS = (
    ("config", "reference", "strictness", "measure", "html_page", "distributed"),
    ("neighbours", "guards", "_native"),
    ("ops",),
    ("outliers",),
    ("quantize", "frozen"),
    ("linear", "embedding", "families", "doctor", "t5_encoder"),
    ("blocks", "sites", "report"),
    ("model",),
    ("row_tasks", "checkpoint", "task_file", "prepare", "bit_allocation"),
    ("hf", "task", "export", "peft"),
    ("__init__",),
    ("directory",),
    ("perplexity",),
    ("baselines",),
    ("glue",),
    ("study",),
    ("pages",),
    ("serve",),
    ("cli",),
    ("__main__",),
)
PACKAGE = ROOT / "prequant_ext"


def module_name(path: Path) -> str:
    """prequant_ext/cli/app.py -> cli.app; a package is called after its folder, and the whole of it __init__."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts) or "__init__"


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imported(module: str) -> set[str]:
    """The modules of this package that a module imports, within functions too, and those that it names as text."""
    found = set()

    def add(name: str) -> None:
        """The module called so, or the one that the last part is an attribute of."""
        name = name.removeprefix("prequant_ext").removeprefix(".")
        found.add(name if name in MODULES else name.rpartition(".")[0] or "__init__")

    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} imports from {node.module!r} by dots"
            if (node.module or "").split(".")[0] == "prequant_ext":
                for alias in node.names:
                    add(f"{node.module}.{alias.name}")
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "prequant_ext":
                    add(alias.name)
        elif isinstance(node, ast.Constant) and node.value in {f"prequant_ext.{other}" for other in MODULES}:
            add(node.value)
    return found - {module}


def room(module: str) -> str:
    return module.split(".")[0]


def circles(edges: dict[str, set[str]]) -> list[str]:
    """Modules that import themselves by way of others."""
    reached = {module: set(others) for module, others in edges.items()}
    for middle in edges:
        for module, own in reached.items():
            if middle in own:
                reached[module] = own | reached[middle]
    return sorted(module for module, own in reached.items() if module in own)


def reached(modules: set[str]) -> set[str]:
    """``modules``, and all that they import, through others too; of __init__ only where it is one of ``modules``."""
    seen, left = set(), set(modules)
    while left:
        seen |= left
        left = set().union(*map(imported, left)) - seen - {"__init__"}
    return seen


def test_every_module_has_its_place():
    listed = [name for names in ROOMS for name in names]
    assert len(listed) == len(set(listed))
    assert sorted({room(module) for module in MODULES} ^ set(listed)) == []


def test_imports_point_down_only():
    level = {name: height for height, names in enumerate(ROOMS) for name in names}
    upward = [
        (module, other) for module in MODULES for other in imported(module) if level[room(other)] > level[room(module)]
    ]
    assert upward == []


def test_no_module_imports_itself_by_way_of_others():
    # That a package is loaded before its modules is Python's doing and no import of theirs.
    edges = {module: imported(module) for module in MODULES}
    assert circles(edges) == []
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == ["a", "b", "c"]


def test_what_is_asked_of_a_run_needs_no_torch():
    """Settings and results of runs, and the experiments as data: lists, estimates and tables need no torch."""
    seen = reached({"glue.run", "study.experiments"})
    importing = []
    for module in sorted(seen):
        for node in ast.parse(MODULES[module].read_text()).body:
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            importing += [module] * any(name.split(".")[0] in ("torch", "transformers") for name in names)
    assert importing == [] and {"baselines.options", "glue.tasks", "config"} <= seen


def test_the_server_takes_in_model_directories_and_no_baselines():
    """Not through others either: import prequant_ext.serve runs __init__, too."""
    seen = reached({"__init__", *(module for module in MODULES if room(module) == "serve")})
    assert "directory" in seen and not {module for module in seen if room(module) in ("baselines", "cli", "study")}


def options_of(command: Any) -> set[str]:
    """The options of a command and of those in it, such as --layer-bits."""
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    below = [options_of(inner) for inner in getattr(command, "commands", {}).values()]
    return {name for name in own.union(*below) if name.startswith("--")}


def test_what_is_below_the_command_line_neither_prints_nor_names_options():
    """Errors name arguments, which a caller in Python has, too."""
    options = options_of(typer.main.get_command(app))
    assert {"--layer-bits", "--task-file"} <= options
    entry_points, found = ("doctor", "study.worker"), []
    for module in sorted(MODULES):
        if room(module) == "cli" or module in entry_points:
            continue
        for node in ast.walk(ast.parse(MODULES[module].read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                # not --text: and var(--text), which are CSS
                names = set(re.findall(r"(?<![\w(-])--[a-z-]+(?![\w:-])", node.value))
                found += [(module, node.lineno, name) for name in names & options]
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                found.append((module, node.lineno, "print"))
    assert found == []


MAPPED = ("csrc", "prequant_ext", "python_tests", "bench", "docs")
FOUND_BY_NAME = {"__init__.py", "__main__.py", "conftest.py"}  # by Python and pytest, in every project alike


def test_readme_map_is_true():
    """It names nothing that is not there, and every file and folder of the folders in MAPPED is in it."""
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
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    entries = {path.split("/")[1] for path in tracked if path.split("/")[0] in MAPPED and "/" in path}
    unmapped = sorted(entry for entry in entries - FOUND_BY_NAME if not re.search(rf"(?<!\w){re.escape(entry)}", tree))
    assert not unmapped, f"README.md does not name {unmapped}"
