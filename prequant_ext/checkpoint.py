"""What a checkpoint holds, checked before any kernel sees it: first the files' headers, then the loaded values. And how
a model directory is written.
"""

import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from prequant_ext.frozen import FrozenWeight, quantized_modules
from prequant_ext.linear import PreQuantLinear

_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class Header:
    """One tensor of a file: the name it has there,
    its dtype (the file's own word where torch has none) and its shape.
    """

    key: str
    dtype: torch.dtype | str
    shape: tuple[int, ...]

    @property
    def is_floating(self) -> bool:
        return isinstance(self.dtype, torch.dtype) and self.dtype.is_floating_point

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {self.shape}"


def read_headers(files: Iterable[str | os.PathLike]) -> dict[str, Header]:
    """Name, dtype and shape of every tensor of a checkpoint; no data is read.

    Raises ValueError naming the file if it is truncated or is no checkpoint.
    """
    headers = {}
    for path in files:
        file = os.fspath(path)
        try:
            if file.endswith(".safetensors"):
                with safe_open(file, framework="pt") as tensors:
                    for key in tensors.keys():  # noqa: SIM118  a safe_open is no mapping
                        part = tensors.get_slice(key)
                        headers[key] = Header(
                            key, _DTYPES.get(part.get_dtype(), part.get_dtype()), tuple(part.get_shape())
                        )
            else:
                for key, tensor in torch.load(file, map_location="meta", weights_only=True).items():
                    if isinstance(tensor, Tensor):
                        headers[key] = Header(key, tensor.dtype, tuple(tensor.shape))
        except (SafetensorError, RuntimeError, EOFError) as error:
            raise ValueError(f"{file} is truncated or corrupted: {error}") from error
    return headers


def compute_dtype(model: nn.Module) -> torch.dtype:
    """The dtype of the float part: ``model.dtype`` is that of the first parameter, which may be a float32 scale."""
    own = {id(parameter) for _, module in quantized_modules(model) for parameter in module.parameters(recurse=False)}
    for parameter in model.parameters():
        if parameter.is_floating_point() and id(parameter) not in own:
            return parameter.dtype
    return next((module.compute_dtype for _, module in quantized_modules(model)), torch.get_default_dtype())


def check_quantized_headers(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """The file has, for every quantized module of ``model``, every tensor in its dtype and shape, and packed weights
    for no other module.

    ``headers`` by the names that the tensors have in memory. Raises ValueError naming the tensor.
    """
    missing = []
    for name, module in quantized_modules(model):
        for parameter_name, parameter in module.named_parameters(recurse=False):
            header = headers.get(f"{name}.{parameter_name}")
            if header is None:
                missing.append(f"{name}.{parameter_name}".replace("weight_packed", "weight"))
                continue
            dtype = header.dtype if parameter_name == "bias" and header.is_floating else parameter.dtype
            wanted = Header(header.key, dtype, tuple(parameter.shape))
            if header != wanted:
                raise ValueError(f"{header.key} of the checkpoint must be {wanted}, got {header}")
    if missing:
        raise ValueError(
            f"the quantized checkpoint has no {some(missing)}, which {type(model).__name__} needs; quantize that "
            "model from its float checkpoint"
        )
    for name, parameter in model.named_parameters():
        header = headers.get(name)
        if header is not None and header.dtype == torch.uint8 and parameter.dtype.is_floating_point:
            raise ValueError(
                f"{header.key} is quantized in the checkpoint but must be float in {type(model).__name__}, where it "
                "is tied, a head or left out; "
                "quantize that model from its float checkpoint"
            )


def check_float_headers(model: nn.Module, headers: Mapping[str, Header]) -> None:
    """The weights that are about to be quantized are float and have the model's shapes; absent ones are none of this
    function's business.

    Raises ValueError naming the tensor.
    """
    for name, module in quantized_modules(model):
        # a plain key has become weight_packed; this one comes out of a conversion of several weights
        fused = headers.get(f"{name}.weight")
        if fused is not None:
            raise ValueError(
                f"{fused.key} of the checkpoint is split or merged into {name}.weight while it loads, which "
                "quantizing on the fly does not do; "
                "load the float model and call quantize_model"
            )
        header = headers.get(f"{name}.weight_packed")
        if header is None:
            continue
        shape = tuple(module.weight.shape)
        if getattr(module, "is_transposed", False):
            shape = shape[::-1]
        if not header.is_floating or header.shape != shape:
            raise ValueError(f"{header.key} of the checkpoint must be float {shape} to be quantized, got {header}")


def refuse_disk(modules: Iterable[str]) -> None:
    """No module of a float checkpoint that is being quantized may go to disk: the loader would leave its weight where
    it is, and take that for the codes.

    Raises ValueError naming the first of ``modules``, those that would.
    """
    name = next(iter(modules), None)
    if name is not None:
        raise ValueError(
            f"device_map puts {name} on disk while the float checkpoint is being quantized: quantize and save it "
            "first (save_pretrained), then load that with "
            "this device_map"
        )


def is_loaded(parameter: Tensor) -> bool:
    """Whether transformers' loader has filled ``parameter``, or left it on disk: on the meta device then, its header
    checked, to be read at each use.
    """
    return parameter.is_meta or getattr(parameter, "_is_hf_initialized", False)


def check_values(name: str, module: FrozenWeight) -> None:
    """The tensors of a quantized module hold what the kernels rely on; those that device_map left on disk are read for
    the moment.

    Raises ValueError naming the tensor if its dtype is wrong, a scale is not positive and finite, a zero point lies
    outside the code range, or outlier_dims are not ascending, distinct and inside their axis.
    """
    with _in_memory(module):
        for parameter_name, dtype in (
            ("weight_packed", torch.uint8),
            ("weight_scale", torch.float32),
            ("weight_zero_point", torch.uint8),
        ):
            _require_dtype(f"{name}.{parameter_name}", getattr(module, parameter_name), dtype)
        scale = module.weight_scale.detach()
        is_trained = "weight_scale" in module.trained_names  # a trained scale may have crossed zero
        if not bool(torch.isfinite(scale).all() if is_trained else ((scale > 0) & torch.isfinite(scale)).all()):
            raise ValueError(
                f"{name}.weight_scale must be {'finite' if is_trained else 'positive and finite'}, got {_range(scale)}"
            )
        if isinstance(module, PreQuantLinear):
            _check_linear(name, module)


def _in_memory(module: FrozenWeight) -> AbstractContextManager:
    if not module.weight_packed.is_meta:
        return nullcontext()
    from accelerate.utils import align_module_device

    return align_module_device(module)


def _check_linear(name: str, module: PreQuantLinear) -> None:
    top = 2**module.bits - 1
    if int(module.weight_zero_point.max()) > top:
        raise ValueError(
            f"{name}.weight_zero_point must be a {module.bits}-bit code, 0 to {top}, got "
            f"{int(module.weight_zero_point.max())}"
        )
    dims = module.outlier_dims
    _require_dtype(f"{name}.outlier_dims", dims, torch.int64)
    _require_dtype(f"{name}.outlier_weight", module.outlier_weight, torch.float32)
    if not len(dims):
        return
    length = module.in_features if module.axis == "input" else module.out_features
    if int(dims.min()) < 0 or int(dims.max()) >= length:
        raise ValueError(f"{name}.outlier_dims must lie in 0 to {length - 1}, got {_range(dims)}")
    if not bool((dims[1:] > dims[:-1]).all()):
        raise ValueError(f"{name}.outlier_dims must be ascending and distinct, got {dims.tolist()}")


def _require_dtype(name: str, tensor: Tensor, dtype: torch.dtype) -> None:
    if tensor.dtype != dtype:
        raise ValueError(
            f"{name} must be {str(dtype).removeprefix('torch.')}, got {str(tensor.dtype).removeprefix('torch.')}"
        )


def _range(tensor: Tensor) -> str:
    low, high = tensor.min().item(), tensor.max().item()
    return f"values from {low} to {high}"


def some(names: list[str], most: int = 4) -> str:
    """The first few of ``names``, for a message."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def default_mode() -> int:
    """The mode that open() gives to a new file."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


# ---- writing a model directory ---------------------------------------------------------------------------------------

WEIGHT_FILE = re.compile(r"(pytorch_)?model(-\d{5}-of-\d{5})?\.(safetensors|bin)(\.index\.json)?")


def save_model_dir(model: Any, tokenizer: Any | None, directory: str | os.PathLike) -> Path:
    """Write ``model.save_pretrained`` and the tokenizer's files as ``directory``: the whole of it, or nothing.

    They go to a temporary directory beside it, which then takes its name; a full disk, an error or Ctrl-C leaves an
    older model there as it was. Files of an older directory that a model does not have (notes, task files) are carried
    over; its other weight files go.

    Raises NotADirectoryError if ``directory`` is a file, and whatever made saving fail. Returns the directory's path.
    """
    target = Path(directory).resolve()
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"a model is saved as a directory, but {target} is a file")
    target.parent.mkdir(parents=True, exist_ok=True)
    # on the same file system: a rename moves no data
    workplace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    fresh, old = workplace / "new", workplace / "old"
    is_done = False
    try:
        model.save_pretrained(fresh)
        if tokenizer is not None:
            tokenizer.save_pretrained(fresh)
        for path in fresh.rglob("*"):
            if path.is_file():
                path.chmod(default_mode())  # safetensors makes private files; a base is there to be shared
        try:
            if target.exists():
                target.rename(old)
            fresh.rename(target)
        except BaseException:
            if old.exists() and not target.exists():
                old.rename(target)
            raise
        for entry in old.iterdir() if old.exists() else ():
            if not (target / entry.name).exists() and not WEIGHT_FILE.fullmatch(entry.name):
                entry.rename(target / entry.name)
        is_done = True
    finally:
        # interrupted while carrying files over: what is left of them stays in the workplace
        if is_done or not old.exists():
            shutil.rmtree(workplace, ignore_errors=True)
    return target
