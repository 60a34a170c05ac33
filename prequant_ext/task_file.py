"""Task files: one safetensors file of outlier weights and head, tied to its base by a fingerprint. task.py moves them
in and out of models.
"""

import hashlib
import os
import re
import tempfile
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from prequant_ext.checkpoint import default_mode
from prequant_ext.config import FORMAT_VERSION
from prequant_ext.frozen import FrozenWeight, quantized_modules, whole
from prequant_ext.linear import PreQuantLinear
from prequant_ext.model import head_parameter_names
from prequant_ext.sites import without_base_prefix

NAME_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
RESERVED_METADATA = ("format_version", "base_fingerprint", "name")
WRAPPED = ".base_layer"  # the end of a layer's name where PEFT has wrapped it


def check_task_name(name: str) -> str:
    """``name`` itself. Raises ValueError where it could not be a file name on every system."""
    if not isinstance(name, str) or not NAME_PATTERN.fullmatch(name):
        raise ValueError(f"task name must match {NAME_PATTERN.pattern}, got {name!r}")
    return name


# model -> what its base was when it was hashed, and the hash. No attribute: a model is copied and pickled with those.
_hashed: "weakref.WeakKeyDictionary[nn.Module, tuple[list[_State], str]]" = weakref.WeakKeyDictionary()


class _State(NamedTuple):
    """A tensor of the base as it was: itself, and how often it had been written to; None if torch does not say."""

    name: str
    tensor: "weakref.ref[Tensor]"
    writes: int | None

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> "_State":
        return cls(name, weakref.ref(tensor), None if tensor.is_inference() else tensor._version)

    def still_holds(self, name: str, tensor: Tensor) -> bool:
        return self.writes is not None and self == _State.of(name, tensor)


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the quantized base: packed codes, scales, zero points, outlier indices and the format version, as 64
    hexadecimal digits.

    Outlier weights, heads and PreQuant-alpha's trained scales are a task's own and stay out. Names count without the
    prefix that a task model puts before its backbone's, so that a bare backbone and every task model on it agree; and
    without what PEFT puts behind those it wraps.

    A base is hashed once: the answer is kept until one of its tensors is replaced or written to.

    Raises ValueError if the model has no quantized module.
    """
    modules = sorted(
        (without_base_prefix(model, name).removesuffix(WRAPPED), module) for name, module in quantized_modules(model)
    )
    if not modules:
        raise ValueError(
            f"model must be quantized (quantize_model) to have a base fingerprint, got a {type(model).__name__} "
            "without quantized modules"
        )
    tensors = [(f"{name}.{key}", tensor) for name, module in modules for key, tensor in _base_tensors(module).items()]
    states, known = _hashed.get(model, ([], ""))
    if len(states) == len(tensors) and all(
        state.still_holds(*tensor) for state, tensor in zip(states, tensors, strict=True)
    ):
        return known
    known = _hash_of(modules)
    _hashed[model] = ([_State.of(name, tensor) for name, tensor in tensors], known)
    return known


def _base_tensors(module: FrozenWeight) -> dict[str, nn.Parameter]:
    """What of a quantized module belongs to the base, in the order in which it is hashed."""
    names = {"weight_packed", "weight_scale", "weight_zero_point"} - set(module.trained_names)
    names |= {"outlier_dims"} if isinstance(module, PreQuantLinear) else set()
    return {name: getattr(module, name) for name in sorted(names)}


def _hash_of(modules: Sequence[tuple[str, FrozenWeight]]) -> str:
    digest = hashlib.sha256(f"prequant {FORMAT_VERSION}".encode())
    for name, module in modules:
        kind = f"linear {module.bits} {module.axis}" if isinstance(module, PreQuantLinear) else "embedding"
        digest.update(f"\n{name} {kind}".encode())
        for key, parameter in _base_tensors(module).items():
            canonical = module.canonical_packed() if key == "weight_packed" else parameter.detach()
            tensor = whole(canonical).cpu().contiguous()
            digest.update(f"\n{key} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def task_tensors(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that belong to a task, by name: outlier weights (PreQuant-alpha: scales) and the head, pooler
    included.

    Raises ValueError for a model that PEFT has wrapped: its adapters are the tasks.
    """
    names = set(head_parameter_names(model))
    for name, module in quantized_modules(model):
        if name.endswith(WRAPPED):
            raise ValueError(
                f"model is wrapped by PEFT ({name}), whose adapters are its tasks: use add_adapter, set_adapter, "
                "save_pretrained; or unload() it first"
            )
        names.update(f"{name}.{own}" for own in module.trained_names)
    return {name: parameter for name, parameter in model.named_parameters() if name in names}


def write_atomically(path: str | os.PathLike, content: bytes) -> None:
    """Replace the file at ``path`` by ``content``, or leave what was there: a full disk, a crash or Ctrl-C never leaves
    half a file under the name.
    """
    target = Path(path)
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, default_mode())  # mkstemp makes private files; a task file is as readable as any other
        os.replace(temporary, target)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_task(
    path: str | os.PathLike,
    name: str,
    tensors: Mapping[str, Tensor],
    base_fingerprint: str,
    metadata: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Write a task's ``tensors`` to ``path``, those that are float32 as ``dtype``, and ``metadata`` beside
    format_version, base_fingerprint and name.

    Raises ValueError for a bad name, a reserved metadata key, metadata that is no text or number, or a dtype that is
    not float; OSError where the disk is full, and the old file stays.
    """
    extra = dict(metadata or {})
    reserved = sorted(set(extra) & set(RESERVED_METADATA))
    if reserved:
        raise ValueError(f"metadata must not hold the key {reserved[0]!r}: it is written by save_task")
    wrong = [key for key, value in extra.items() if not isinstance(value, str | int | float)]
    if wrong:
        raise ValueError(
            f"metadata must map names to text or numbers, got {type(extra[wrong[0]]).__name__} for {wrong[0]!r}"
        )
    if not dtype.is_floating_point:
        raise ValueError(f"dtype must be a floating type, got {dtype}")
    header = {key: str(value) for key, value in extra.items()}
    header |= {
        "format_version": str(FORMAT_VERSION),
        "base_fingerprint": base_fingerprint,
        "name": check_task_name(name),
    }
    stored = {}
    for key, tensor in tensors.items():
        values = whole(tensor.detach()).cpu()
        stored[key] = values.to(dtype if values.dtype == torch.float32 else values.dtype).contiguous()
        if not torch.equal(stored[key].float().isfinite(), values.float().isfinite()):
            raise ValueError(f"{key} does not fit {dtype}: its largest value is {values.abs().max().item():.4g}")
    write_atomically(path, save(stored, header))


def read_task(path: str | os.PathLike, *, allow_nonfinite: bool = False) -> tuple[dict[str, str], dict[str, Tensor]]:
    """(metadata, tensors) of a task file, before it is known which model they are for.

    allow_nonfinite  take NaN and Inf, too: to look at a training that diverged

    Raises FileNotFoundError; ValueError where the file is truncated, no task file, or of an unknown format version, and
    naming a tensor that is no floating one or not finite.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"no task file at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  safe_open is no mapping
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged or no task file: {error}") from error
    missing = [key for key in RESERVED_METADATA if key not in metadata]
    if missing:
        raise ValueError(f"{path} is no task file: its metadata lacks {', '.join(missing)}")
    version = metadata["format_version"]
    if not version.isdecimal() or not 1 <= int(version) <= FORMAT_VERSION:
        raise ValueError(
            f"{path} has format_version {version} but this prequant_ext reads 1 to {FORMAT_VERSION}; a newer file "
            "needs a newer prequant_ext"
        )
    for key, tensor in tensors.items():
        if not tensor.is_floating_point():
            kind = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{key} of {path} must be of a floating type, got {kind}")
        if not allow_nonfinite and not tensor.float().isfinite().all():
            raise ValueError(
                f"{key} of {path} must be finite, but it holds NaN or Inf: the training diverged, or the file is "
                "damaged (allow_nonfinite=True takes it all the same)"
            )
    return metadata, tensors


def check_fits(
    path: str | os.PathLike, metadata: Mapping[str, str], tensors: Mapping[str, Tensor], model: nn.Module
) -> None:
    """Raises ValueError, with both sides, where a task file's base, its tensors or one of their shapes are not those of
    ``model``.
    """
    check_matches(
        path,
        metadata,
        tensors,
        fingerprint(model),
        {key: parameter.shape for key, parameter in task_tensors(model).items()},
    )


def check_matches(
    path: str | os.PathLike,
    metadata: Mapping[str, str],
    tensors: Mapping[str, Tensor],
    base_fingerprint: str,
    shapes: Mapping[str, torch.Size],
) -> None:
    """:func:`check_fits` from what it reads of a model, for one that another thread is using or whose base has been
    hashed already.

    shapes  of the model's :func:`task_tensors`, by name
    """
    if metadata["base_fingerprint"] != base_fingerprint:
        raise ValueError(
            f"{path} was trained on the base {metadata['base_fingerprint']} but the model's base is {base_fingerprint}"
        )
    absent, surplus = sorted(set(shapes) - set(tensors)), sorted(set(tensors) - set(shapes))
    if absent or surplus:
        raise ValueError(
            f"{path} does not fit the model: it lacks {absent or 'nothing'} and holds {surplus or 'nothing'} that the "
            "model does not have"
        )
    for key, shape in shapes.items():
        if tensors[key].shape != shape:
            raise ValueError(f"{key} has shape {tuple(tensors[key].shape)} in {path} but {tuple(shape)} in the model")
