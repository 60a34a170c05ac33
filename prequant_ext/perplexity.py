"""Perplexity of a causal language model on a text: what quantization costs and fine-tuning gains where no task has a
score.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm
from transformers import PreTrainedModel

from prequant_ext.directory import CAUSAL_LM_HEADS, load_tokenizer, model_config, own_class, resolve_model
from prequant_ext.task import load_task

# at most: a window of all positions of a long-context model would take the memory of their square
DEFAULT_MAX_LENGTH = 2048


def perplexity(
    model: nn.Module, tokens: Tensor | Sequence[int], *, max_length: int | None = None, stride: int | None = None
) -> float:
    """:func:`exp_mean` of :func:`token_losses`, whose arguments and errors it has."""
    return exp_mean(token_losses(model, tokens, max_length=max_length, stride=stride))


def exp_mean(losses: Tensor) -> float:
    """``exp(mean(losses))``: of negative log likelihoods, the perplexity over the tokens they are of, each counted
    once.
    """
    return losses.double().mean().exp().item()


@torch.no_grad()
def token_losses(
    model: nn.Module, tokens: Tensor | Sequence[int], *, max_length: int | None = None, stride: int | None = None
) -> Tensor:
    """``-log p(token | the tokens before it in its window)`` in nats, float32 on the CPU, for every predicted token in
    the order of the text.

    model       a causal language model of transformers; evaluated in eval mode, and left in the mode it came in
    tokens      (n,) ids of the whole text, n >= 2
    max_length  tokens of a window (default: the model's positions, but at most 2048)
    stride      from the begin of one window to the next (default: half a window). See :func:`windows` for which tokens
                a window predicts

    Where activations have a range per tensor a token's loss depends on what else is in its window, later tokens
    included; per token it does not.

    Raises ValueError for a model that is not causal, tokens that it cannot take, a window or stride out of range, and a
    loss that is not finite.
    """
    ids = _checked_tokens(model, tokens)
    max_length, stride = window_sizes(model, max_length, stride)
    device = next(model.parameters()).device
    losses = []
    was_training = model.training
    model.eval()
    try:
        spans = list(windows(len(ids), max_length, stride))
        for begin, first, end in tqdm(spans, desc="perplexity", unit="window", disable=None, leave=False):
            logits = model(input_ids=ids[None, begin:end].to(device), use_cache=False).logits
            # the logits at a position are of the token after it
            predicting = logits[0, first - begin - 1 : end - begin - 1].float()
            losses.append(cross_entropy(predicting, ids[first:end].to(device), reduction="none").cpu())
    finally:
        model.train(was_training)
    result = torch.cat(losses)
    if not result.isfinite().all():
        position = int(result.isfinite().logical_not().nonzero()[0])
        raise ValueError(
            f"model gives the loss {result[position].item()} to predicted token {position}: its logits are not finite"
        )
    return result


def windows(num_tokens: int, max_length: int, stride: int) -> Iterator[tuple[int, int, int]]:
    """(begin, first, end) of each window: it reads tokens begin to end - 1 and predicts those from ``first`` on.

    Windows begin at 0, stride, 2 stride, ... until one reaches the end of the text. A window predicts the tokens that
    no earlier one has predicted, except its own first, which has no context: the first token of the text, and with
    stride = max_length the first of every window, is predicted by none. All others are predicted by exactly one, from
    max_length - stride tokens of context or more (from fewer in the first window).
    """
    predicted = 0  # the tokens before this one are done with
    for begin in range(0, num_tokens, stride):
        end = min(begin + max_length, num_tokens)
        first = max(predicted, begin + 1)
        if first < end:
            yield begin, first, end
        if end == num_tokens:
            return
        predicted = end


def window_sizes(model: nn.Module, max_length: int | None = None, stride: int | None = None) -> tuple[int, int]:
    """(max_length, stride) with the defaults filled in. Raises ValueError where they do not fit the model or each
    other.
    """
    positions = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    if max_length is None:
        max_length = min(positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    if not _is_int(max_length) or max_length < 2:
        raise ValueError(f"max_length must be an integer of at least 2, got {max_length!r}")
    if positions is not None and max_length > positions:
        raise ValueError(f"max_length = {max_length} exceeds the {positions} positions of {type(model).__name__}")
    stride = max_length // 2 if stride is None else stride
    if not _is_int(stride) or not 1 <= stride <= max_length:
        raise ValueError(
            f"stride must be an integer from 1 to max_length = {max_length}, got {stride!r}: a longer one would leave "
            "tokens out"
        )
    return max_length, stride


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _checked_tokens(model: nn.Module, tokens: Tensor | Sequence[int]) -> Tensor:
    config: Any = getattr(model, "config", None)
    # A bidirectional model sees the token that it is asked for: its number would be low, and mean nothing.
    is_causal = (
        config is not None
        and not config.is_encoder_decoder
        and getattr(config, "is_decoder", True)
        and "MaskedLM" not in type(model).__name__
    )
    if not is_causal or model.get_output_embeddings() is None:  # type: ignore[operator]
        raise ValueError(f"model must be a causal language model of transformers, got {type(model).__name__}")
    ids = torch.as_tensor(tokens)
    if ids.dim() == 1 and len(ids) < 2:
        raise ValueError(f"tokens must be at least 2, the second of which is predicted, got {len(ids)}")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"tokens must be a row of integers, got {ids.dtype} of shape {tuple(ids.shape)}")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= config.vocab_size:
        raise ValueError(
            f"tokens must be ids from 0 to {config.vocab_size - 1}, got {low if low < 0 else high}: are they of "
            "another tokenizer?"
        )
    return ids.long().cpu()


# ---- model directories -----------------------------------------------------------------------------------------------


def language_model(name: str, task_file: Path | None) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a causal language model, float or quantized, with a task in it where a file is named.

    Raises FileNotFoundError where there is none, or no tokenizer with it; ValueError where it is another kind of
    model, or as load_task.
    """
    path = resolve_model(name)
    own_config = model_config(path)
    architecture = next(iter(own_config.architectures or ()), "none")
    if not architecture.endswith(CAUSAL_LM_HEADS):
        raise ValueError(
            f"{name} must be a causal language model, but its config.json names the architecture {architecture}"
        )
    tokenizer = load_tokenizer(path)
    model = own_class(own_config).from_pretrained(path)
    if task_file is not None:
        load_task(model, task_file)
    return model, tokenizer


def perplexities(
    name: str,
    task_file: Path | None,
    other: str | None,
    text_file: Path,
    max_length: int | None,
    stride: int | None,
    max_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity of the model ``name`` on a text, and of the model ``other`` on the same tokens; with the sizes of the
    windows. ``max_tokens``: only the first tokens of the text count.

    Raises ValueError where the two take the text for different tokens: perplexities are per token, and would not
    compare.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} must be a text in UTF-8: {error}") from error
    model, tokenizer = language_model(name, task_file)
    tokens = tokenizer(text)["input_ids"][:max_tokens]
    max_length, stride = window_sizes(model, max_length, stride)
    losses = token_losses(model, tokens, max_length=max_length, stride=stride)
    result: dict[str, Any] = {
        "model": name,
        "perplexity": exp_mean(losses),
        "predicted_tokens": len(losses),
        "max_length": max_length,
        "stride": stride,
    }
    if other is not None:
        del model  # one at a time in memory
        model, tokenizer = language_model(other, None)
        if tokenizer(text)["input_ids"][:max_tokens] != tokens:
            raise ValueError(
                f"{name} and {other} must have the same tokenizer, but make different tokens of {text_file}"
            )
        result["compared"] = {
            "model": other,
            "perplexity": exp_mean(token_losses(model, tokens, max_length=max_length, stride=stride)),
        }
    return result
