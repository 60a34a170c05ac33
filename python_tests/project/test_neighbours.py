"""Packages that are optional: whatever is installed in their place, the package imports, its core works, and the door
that needs one says which version it wants and which is there.
"""

import json
import os
import re
import subprocess
import sys

import pytest
from packaging.requirements import Requirement

from prequant_ext import neighbours
from support import ROOT

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# What a user does, and what comes of it; a neighbour is told apart by what happens when its door is opened.
USE = """
import json, warnings
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import prequant_ext
import torch
from prequant_ext import doctor, ops
from torch import nn
found = {"warnings": [str(entry.message) for entry in caught if "prequant_ext" in str(entry.message)]}
model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
report = prequant_ext.quantize_model(model, prequant_ext.PreQuantConfig(axis="input", r=2))
found["finite"] = bool(model(torch.ones(3, 64)).isfinite().all())
found["problems"] = doctor.examine()["problems"]
for door in ("hf", "peft"):
    try:
        __import__(f"prequant_ext.{door}")
        found[door] = "opened"
    except ImportError as error:
        found[door] = str(error)
print(json.dumps(found))
"""


def use(folder, **stand_ins):
    """USE with packages in the place of the installed ones: name -> (version, source), or None for a missing one."""
    blocked = []
    for name, package in stand_ins.items():
        if package is None:
            blocked.append(name)
            continue
        version, source = package
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text(source)
        information = folder / f"{name}-{version}.dist-info"
        information.mkdir()
        (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    block = f"import sys\nfor name in {blocked}: sys.modules[name] = None\n"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), str(ROOT)])}
    done = subprocess.run(
        [sys.executable, "-c", block + USE], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["finite"]
    return found


def test_without_neighbours_the_core_works(tmp_path):
    found = use(tmp_path, transformers=None, peft=None, typer=None)
    assert found["warnings"] == [] and found["problems"] == []
    assert found["hf"] == (
        "the transformers plug-in needs transformers>=5.23,<6, but transformers is not installed: "
        "pip install 'prequant_ext[hf]'"
    )
    assert found["peft"].startswith("the PEFT tuner needs peft>=0.21,<0.22, but peft is not installed")


@pytest.mark.parametrize("transformers, peft", [("4.57.1", "0.17.0"), ("6.0.0", "1.0.0")], ids=["too old", "too new"])
def test_other_versions_close_their_doors_alone(tmp_path, transformers, peft):
    found = use(tmp_path, transformers=(transformers, ""), peft=(peft, "raise RuntimeError('imported all the same')"))
    said = f"the transformers plug-in needs transformers>=5.23,<6, but transformers {transformers} is installed"
    assert found["warnings"] == [f"{said}: pip install 'prequant_ext[hf]'. The rest of prequant_ext works."]
    assert found["hf"] == f"{said}: pip install 'prequant_ext[hf]'"
    assert f"but peft {peft} is installed" in found["peft"]
    assert [entry["problem"] for entry in found["problems"]] == [
        said,
        f"the PEFT tuner needs peft>=0.21,<0.22, but peft {peft} is installed",
    ]


def test_a_broken_neighbour_closes_its_door_alone(tmp_path):
    found = use(tmp_path, peft=None, transformers=("5.23.0", "raise RuntimeError('no module torchvision')"))
    said = (
        "the transformers plug-in needs transformers>=5.23,<6, but importing it fails "
        "(RuntimeError: no module torchvision)"
    )
    assert found["warnings"] == [f"{said}: pip install 'prequant_ext[hf]'. The rest of prequant_ext works."]
    assert found["hf"].startswith(said) and [entry["problem"] for entry in found["problems"]] == [said]


def test_the_table_is_that_of_the_package():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    declared = {
        (requirement.name, str(requirement.specifier), extra)
        for extra in set(extras) - {"all", "bench", "test"}
        for requirement in map(Requirement, extras[extra])
    }
    listed = {
        (entry.distribution or module, ",".join(sorted(entry.versions.split(","), reverse=True)), entry.extra)
        for module, entry in neighbours.NEIGHBOURS.items()
    }
    normal = {(name, ",".join(sorted(versions.split(","), reverse=True)), extra) for name, versions, extra in declared}
    assert listed == normal


def test_what_is_installed_here_fits():
    for module in neighbours.NEIGHBOURS:
        neighbours.require(module, "this test")


def test_an_unknown_version_is_told():
    with pytest.raises(ImportError, match=re.escape("a door needs peft>=0.21,<0.22, but peft 0.19.1 is installed")):
        raise ImportError(neighbours.need("peft", "a door", neighbours.misfit("peft", "0.19.1")))
