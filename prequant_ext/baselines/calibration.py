"""What enters the matrices of a model, seen on a few batches."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from prequant_ext.baselines.options import Batch


@dataclass
class Activations:
    """Of one matrix, padding included: the least and the largest value of each channel (K,), and E|x|."""

    low: Tensor
    high: Tensor
    total: float = 0.0
    count: int = 0

    @property
    def mean_magnitude(self) -> Tensor:
        return torch.tensor(self.total / max(1, self.count))

    def add(self, x: Tensor) -> None:
        low, high = torch.aminmax(x, dim=0)
        self.low, self.high = torch.minimum(self.low, low), torch.maximum(self.high, high)
        self.total += x.abs().sum(dtype=torch.float64).item()
        self.count += x.numel()


def without_labels(batch: Batch) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "labels"}


@torch.no_grad()
def observe(model: nn.Module, names: Iterable[str], batches: Sequence[Batch]) -> dict[str, Activations]:
    """Run ``batches`` in eval mode and see what enters the modules called ``names``.

    Raises ValueError without batches, and naming a module that none of them reached or that something not finite
    entered.
    """
    if not batches:
        raise ValueError("calibration must hold at least one batch: ranges of activations cannot be set without data")
    seen: dict[str, Activations] = {}

    def watch(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach().flatten(0, -2).float()
            if name not in seen:
                seen[name] = Activations(torch.full_like(x[0], torch.inf), torch.full_like(x[0], -torch.inf))
            seen[name].add(x)

        return hook

    names = list(names)
    handles = [model.get_submodule(name).register_forward_pre_hook(watch(name)) for name in names]
    was_training = model.training
    model.eval()
    try:
        for batch in batches:
            model(**without_labels(batch))
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    for name in names:
        if name not in seen:
            raise ValueError(f"calibration: no batch reached {name}")
        if not (seen[name].low.isfinite().all() and seen[name].high.isfinite().all()):
            raise ValueError(f"calibration: what entered {name} is not finite")
    return seen
