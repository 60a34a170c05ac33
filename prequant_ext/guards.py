"""Which layer was it: guards that name the module where a NaN or Inf first appears, or where memory runs out. For
debugging; they slow a model down.
"""

import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

# of CUDA's allocator, and of the CPU's, which raises a plain RuntimeError
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")
ADVICE = (
    "lower the batch size or the sequence length, or trade time for memory: prepare_model(model, "
    "gradient_checkpointing=True)"
)


def nan_guard(model: nn.Module) -> ExitStack:
    """From now on ``model`` raises FloatingPointError naming the first module whose output, or the first parameter or
    output whose gradient, is not finite.

    In force until ``close()``, or the end of a ``with``. Costs a synchronisation a module, and cannot be compiled. Not
    together with a GradScaler, which expects gradients to overflow now and then.
    """
    stack = ExitStack()
    for name, module in model.named_modules():
        stack.callback(module.register_forward_hook(_output_check(_called(name, module))).remove)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            stack.callback(parameter.register_hook(_gradient_check(f"the gradient of {name}")).remove)
    return stack


def _output_check(name: str) -> Any:
    def check(module: nn.Module, args: Any, output: Any) -> None:
        for tensor in _float_tensors(output):
            _require_finite(tensor, f"the output of {name}")
            if tensor.requires_grad:
                tensor.register_hook(_gradient_check(f"the gradient that reaches the output of {name}"))

    return check


def _gradient_check(what: str) -> Any:
    return lambda gradient: _require_finite(gradient, what)


def _require_finite(tensor: Tensor, what: str) -> None:
    bad = tensor.numel() - int(tensor.isfinite().sum())
    if bad:
        nans = int(tensor.isnan().sum())
        raise FloatingPointError(
            f"{what} has {nans} NaN and {bad - nans} Inf among its {tensor.numel()} values ({_described(tensor)})"
        )


def memory_guard(model: nn.Module) -> ExitStack:
    """From now on an out-of-memory error that passes through ``model`` says in which module, on what input, and what to
    do. It stays the error it was.

    In force until ``close()``, or the end of a ``with``. A ``with`` around the whole step, or around
    ``trainer.train()``, names the module in a backward pass, too: there no module is on the stack, and the last one
    whose gradient arrived is named.
    """
    stack = ExitStack()
    reached: list[str] = []  # at most one: the module whose output's gradient arrived last
    for name, module in model.named_modules():
        note = _memory_note(_called(name, module), reached)
        stack.callback(module.register_forward_hook(note, always_call=True, with_kwargs=True).remove)

    def note_backward(kind: Any, error: BaseException | None, trace: Any) -> None:
        if reached:
            _add_note(error, f"in the backward pass, where the gradient had reached the output of {reached[0]}")

    stack.push(note_backward)
    return stack


def _memory_note(name: str, reached: list[str]) -> Any:
    def note(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        # torch calls this hook where it handles the error, and drops what the hook itself raises
        error = sys.exc_info()[1]
        if error is not None:
            inputs = ", ".join(map(_described, _tensors((args, kwargs)))) or "no tensor"
            _add_note(error, f"in {name}, called with {inputs}")
            return
        for tensor in _float_tensors(output):
            if tensor.requires_grad:
                tensor.register_hook(lambda gradient: reached.__setitem__(slice(None), [name]))

    return note


def _add_note(error: BaseException | None, where: str) -> None:
    """Once, and in place: whoever catches torch's own type or looks for its words (accelerate's batch-size finder)
    still finds them.
    """
    text = str(error)
    if isinstance(error, RuntimeError) and any(words in text for words in OUT_OF_MEMORY) and ADVICE not in text:
        error.args = (f"{text}\nMemory ran out {where}: {ADVICE}",)


def _called(name: str, module: nn.Module) -> str:
    return f"{name or 'the model'} ({type(module).__name__})"


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _float_tensors(value: Any) -> Iterator[Tensor]:
    return (tensor for tensor in _tensors(value) if tensor.is_floating_point())


def _tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor in nested tuples, lists and mappings, which is what modules take and return."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for part in value.values():
            yield from _tensors(part)
    elif isinstance(value, tuple | list):
        for part in value:
            yield from _tensors(part)
