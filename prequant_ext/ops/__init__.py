"""``torch.ops.prequant`` for Python: a typed function for each operator (calls.py), its output shapes (fakes.py) and
its gradients (gradients.py).
"""

from prequant_ext.ops import fakes, gradients
from prequant_ext.ops.calls import (
    dequantize,
    embedding,
    linear_dx,
    linear_w4a8,
    linear_w4a16,
    outlier_counts,
    outlier_grad,
    pack,
    prepack,
    quantize_activations,
    quantize_pack,
    reads_prepacked,
    scale_grad,
    scatter_outlier_,
    select_outlier_dims,
    unpack,
    unprepack,
    wants_float32,
    weight_stats,
)

__all__ = [
    "OPERATORS",
    "dequantize",
    "embedding",
    "linear_dx",
    "linear_w4a8",
    "linear_w4a16",
    "outlier_counts",
    "outlier_grad",
    "pack",
    "prepack",
    "quantize_activations",
    "quantize_pack",
    "reads_prepacked",
    "register",
    "scale_grad",
    "scatter_outlier_",
    "select_outlier_dims",
    "unpack",
    "unprepack",
    "wants_float32",
    "weight_stats",
]

OPERATORS = tuple(fake.__name__ for fake in fakes.FAKES)


def register(name: str, has_chunks: bool = False) -> None:
    """Register the fakes and gradients of ``torch.ops.<name>``: of the installed library, and of those that the
    tests build.

    ``has_chunks``: the library's CPU tensors meet the GPU's kernels, and its prepacked weights are tensor-core chunks.
    """
    fakes.register(name, has_chunks)
    gradients.register(name)


register("prequant")
