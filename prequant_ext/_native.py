"""Loads the compiled library that registers torch.ops.prequant, or raises an ImportError that says what is wrong and
what to do.

The library is built on libtorch's stable ABI: any torch from ``MINIMUM_TORCH`` on loads it, and an older one fails with
an unreadable linker error.
"""

import importlib
from pathlib import Path

import torch

MINIMUM_TORCH = "2.11"  # also in setup.py (TORCH_TARGET_VERSION) and pyproject.toml
REBUILD = "pip install --no-build-isolation --force-reinstall --no-deps ."
_FOLDER = Path(__file__).parent


def check_torch(version: str) -> None:
    """``version`` of torch is one that the library was made for. Raises ImportError naming both."""
    release = tuple(int(part) for part in version.split("+")[0].split(".")[:2])
    if release < tuple(int(part) for part in MINIMUM_TORCH.split(".")):
        raise ImportError(
            f"prequant_ext is built for torch >= {MINIMUM_TORCH}, but torch {version} is installed: pip install "
            f"'torch>={MINIMUM_TORCH}'"
        )


def load() -> None:
    """Register ``torch.ops.prequant``. Raises ImportError that names the library, torch's version and the remedy."""
    check_torch(torch.__version__)
    try:
        importlib.import_module("prequant_ext._C")
    except ImportError as error:
        libraries = [path.name for path in sorted(_FOLDER.glob("_C*.so"))]
        if not libraries:
            raise ImportError(
                f"prequant_ext in {_FOLDER} is not built: it has no _C.abi3.so. In the source tree run: {REBUILD}"
            ) from error
        raise ImportError(
            f"{libraries[0]}, built for torch >= {MINIMUM_TORCH}, does not load with torch {torch.__version__}: "
            f"{error}. In the source tree run: {REBUILD}"
        ) from error


load()
