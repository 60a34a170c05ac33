"""The emulated library's own module: the maps of csrc/formats.h, and kernels by the addresses of their operands
(csrc/emulator/unchecked.cpp).
"""

import os
from types import ModuleType

import pytest

from support import emulated


def emulated_kernels() -> ModuleType:
    """Of the variant that the tests run on; skips the test where it cannot be built."""
    if emulated.cuda_include() is None:
        pytest.skip("emulated: CUDA's headers are not at hand: nvcc is not installed")
    return emulated.load(os.environ.get("PREQUANT_EMULATED_VARIANT", "fast"))
