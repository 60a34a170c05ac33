"""What PreQuantLinear and PreQuantEmbedding share: parameters that stay in float32, and a `weight` for code that only
looks.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from prequant_ext.config import PreQuantConfig


def empty_parameter(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str | None, requires_grad: bool = False
) -> nn.Parameter:
    return nn.Parameter(torch.empty(shape, dtype=dtype, device=device), requires_grad=requires_grad)


def is_sharded(tensor: Tensor) -> bool:
    """Whether ``tensor`` is a DTensor, a rank's share of a parameter under FSDP2. Told by its attribute: torch may be
    built without distributed.
    """
    return hasattr(tensor, "device_mesh")


def whole(tensor: Tensor) -> Tensor:
    """``tensor``, gathered from every rank where it is sharded; then all ranks must call this together."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def on_whole(function: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """``function`` of the whole tensor, then sharded as ``tensor`` is: a layout of packed codes does not cut where rows
    do.
    """
    return sharded_like(tensor, function(whole(tensor)))


def sharded_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """``tensor`` in the layout of ``parameter``, whole or sharded: equal on all ranks where it is whole. Without a copy
    where it has that layout already.
    """
    if is_sharded(parameter) == is_sharded(tensor):
        return tensor
    if not is_sharded(parameter):
        return whole(tensor)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)  # type: ignore[attr-defined]


def keeping_dtype(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn`` as nn.Module applies it to a tensor, but where it would change the dtype it changes the device alone."""

    def moved(tensor: Tensor) -> Tensor:
        result = fn(tensor)
        return tensor.to(result.device) if result.dtype != tensor.dtype else result

    return moved


class FrozenWeight(nn.Module):
    """A module whose packed weight, scales and indices are frozen Parameters.

    Parameters, not buffers: DDP broadcasts buffers at every forward. Not called ``weight``: T5 casts its activations to
    ``wo.weight.dtype``.
    """

    # whatever .to(dtype) asks for: masters of training, factors of every product
    keeps_float32 = ("weight_scale", "outlier_weight")
    shape: tuple[int, int]  # (N, K), or (V, D) of a table
    weight_packed: nn.Parameter
    weight_scale: nn.Parameter
    weight_zero_point: nn.Parameter
    # With which settings of a whole model the layer was made; None: by itself (from_linear, from_embedding)
    quantized_with: PreQuantConfig | None = None

    @property
    def trained_names(self) -> tuple[str, ...]:
        """Its parameters that each task trains; all others are the frozen base."""
        return ()

    def __init__(self, dtype: torch.dtype | None) -> None:
        super().__init__()
        self.compute_dtype = torch.get_default_dtype() if dtype is None else dtype

    def _set(self, name: str, value: Tensor) -> None:
        """Replace a parameter's tensor, keeping whether it is trained."""
        parameter = getattr(self, name)
        if value.shape != parameter.shape:
            raise ValueError(f"{name} must have shape {tuple(parameter.shape)}, got {tuple(value.shape)}")
        setattr(self, name, nn.Parameter(value, requires_grad=parameter.requires_grad))

    def canonical_packed(self) -> Tensor:
        """weight_packed in the layout of the disk."""
        return self.weight_packed.detach()

    def stored_bytes(self) -> int:
        """Bytes of its tensors as a checkpoint holds them, whatever layout of weight_packed the kernels of its device
        read.
        """
        return sum(parameter.nbytes for parameter in self.parameters())

    @property
    def weight(self) -> Tensor:
        """A stand-in with the weight's shape, dtype and device, one NaN in memory: code that looks at it is served,
        code that reads it sees NaN.
        """
        probe: Any = self.weight_scale.detach().new_full((), float("nan"), dtype=self.compute_dtype).expand(self.shape)
        if not torch.compiler.is_compiling():
            probe._is_hf_initialized = True  # T5's initialisation would write into it
        return probe

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenWeight":
        kept = [parameter for name, parameter in self.named_parameters(recurse=False) if name in self.keeps_float32]
        masters = {id(tensor) for parameter in kept for tensor in (parameter, parameter.grad) if tensor is not None}
        moved = keeping_dtype(fn)
        super()._apply(lambda tensor: moved(tensor) if id(tensor) in masters else fn(tensor), recurse)
        self.compute_dtype = fn(torch.empty(0, dtype=self.compute_dtype, device=self.weight_scale.device)).dtype
        return self

    @staticmethod
    def _take_disk_name(state_dict: dict[str, Any], prefix: str) -> None:
        """Accept the name on disk, ``weight``, for the name in memory: Trainer resumes by load_state_dict on a file of
        save_pretrained.
        """
        stored = state_dict.get(f"{prefix}weight")
        if stored is not None and stored.dtype == torch.uint8:
            state_dict[f"{prefix}weight_packed"] = state_dict.pop(f"{prefix}weight")


def quantized_modules(model: nn.Module) -> Iterator[tuple[str, FrozenWeight]]:
    """The quantized layers and tables of ``model`` with their names, in the model's order."""
    for name, module in model.named_modules():
        if isinstance(module, FrozenWeight):
            yield name, module
