"""Packages that are optional here: which versions work with this one, and what to say where another version is
installed, or none.

``import prequant_ext`` never fails because of a neighbour. The door that needs it does, when it is opened.
"""

import importlib
import importlib.metadata
import importlib.util
import warnings
from typing import NamedTuple

from packaging.specifiers import SpecifierSet

from prequant_ext.strictness import PreQuantWarning


class Neighbour(NamedTuple):
    """
    extra         the extra of prequant_ext that installs it
    versions      those that work, as pip writes them; "" for any
    distribution  its name for pip, where that is not the name of the module
    """

    extra: str
    versions: str = ""
    distribution: str | None = None


NEIGHBOURS = {  # by the name of the module, as the extras of pyproject.toml have them
    "transformers": Neighbour("hf", ">=5.23,<6"),
    "datasets": Neighbour("eval"),
    "sklearn": Neighbour("eval", distribution="scikit-learn"),
    "scipy": Neighbour("eval"),
    "accelerate": Neighbour("eval"),
    "typer": Neighbour("cli"),
    "rich": Neighbour("cli"),
    "jinja2": Neighbour("report"),
    "matplotlib": Neighbour("report"),
    "peft": Neighbour("peft", ">=0.21,<0.22"),
    "onnx": Neighbour("onnx"),
    "onnxruntime": Neighbour("onnx"),
    "onnxscript": Neighbour("onnx"),
    "fastapi": Neighbour("serve", ">=0.165"),
    "uvicorn": Neighbour("serve"),
}


class NeighbourError(ImportError):
    """A door cannot use a neighbour: another version is installed, or none."""


_failed: dict[str, str] = {}  # module -> why it does not import, although its version is one that works


def installed_version(module: str) -> str | None:
    """The version of the neighbour that ``import module`` would find; None: there is none."""
    try:
        is_there = importlib.util.find_spec(module) is not None
    except ValueError:  # an entry of sys.modules says that there is none
        is_there = False
    if not is_there:
        return None
    try:
        return importlib.metadata.version(NEIGHBOURS[module].distribution or module)
    except importlib.metadata.PackageNotFoundError:
        return "of an unknown version"


def misfit(module: str, version: str | None) -> str | None:
    """What is wrong with ``version`` of a neighbour, None being one that is not installed; None: nothing is."""
    name, versions = NEIGHBOURS[module].distribution or module, NEIGHBOURS[module].versions
    if version is None:
        return f"{name} is not installed"
    if not versions or SpecifierSet(versions).contains(version, prereleases=True):
        return None
    return f"{name} {version} is installed"


def failure(module: str) -> str | None:
    """Why our modules on the neighbour could not be imported, although its version works; None: nothing failed."""
    return _failed.get(module)


def need(module: str, door: str, wrong: str) -> str:
    """The message of a door that cannot use a neighbour: what it needs, what is ``wrong``, and what to do."""
    neighbour = NEIGHBOURS[module]
    wanted = (neighbour.distribution or module) + neighbour.versions
    return f"{door} needs {wanted}, but {wrong}: pip install 'prequant_ext[{neighbour.extra}]'"


def require(module: str, door: str) -> None:
    """Raises NeighbourError where ``door`` cannot use the neighbour: which versions it needs, which one is there."""
    wrong = misfit(module, installed_version(module)) or failure(module)
    if wrong is not None:
        raise NeighbourError(need(module, door, wrong))


def open_if_installed(module: str, door: str, *rooms: str) -> None:
    """Import ``rooms``, our modules that build on the neighbour, where that is installed.

    Warns where its version does not work or it fails to import; from then on :func:`require` says why.
    """
    version = installed_version(module)
    if version is None:
        return
    wrong = misfit(module, version)
    if wrong is None:
        try:
            for room in rooms:
                importlib.import_module(room)
            return
        except Exception as error:  # a broken installation may raise anything
            wrong = _failed[module] = f"importing it fails ({type(error).__name__}: {error})"
    warnings.warn(f"{need(module, door, wrong)}. The rest of prequant_ext works.", PreQuantWarning, stacklevel=3)
