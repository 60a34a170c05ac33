"""prepare_model: what a quantized model needs before it is trained. It casts nothing: layers follow their input's
dtype, masters are float32 already.
"""

from torch import nn

from prequant_ext.distributed import check_strategy
from prequant_ext.guards import memory_guard, nan_guard
from prequant_ext.linear import quantized_linears
from prequant_ext.model import require_in_memory, trainable_parameters
from prequant_ext.sites import is_pretrained_model


def prepare_model(
    model: nn.Module,
    *,
    gradient_checkpointing: bool = False,
    use_reentrant: bool = False,
    sharded: bool = False,
    biases: bool = False,
    layer_norms: bool = False,
    guard_nan: bool = False,
    guard_memory: bool = False,
) -> nn.Module:
    """Make a quantized ``model`` ready for training, in place, and return it: the base frozen, outlier weights (or
    scales) and the head trained.

    gradient_checkpointing  of a transformers model: blocks are run again in the backward pass instead of kept, and the
                            cache of keys and values is off
    use_reentrant           torch's older way to do it; the embeddings, frozen as they are, then have an output with a
                            gradient, which it needs
    sharded                 for FSDP2, before ``fully_shard``: packed codes stay in the layout of the files, whose rows
                            can be cut and filled anywhere
    biases, layer_norms     train those of the base, too, as in :func:`trainable_parameters`
    guard_nan, guard_memory install :func:`nan_guard` and :func:`memory_guard` for good

    Raises ValueError where the model is not quantized, has nothing to train, is offloaded, cannot be checkpointed, or
    where FSDP1 or DeepSpeed's ZeRO-3 is about to take it.
    """
    check_strategy()
    require_in_memory(model)
    if use_reentrant and not gradient_checkpointing:
        raise ValueError("use_reentrant=True is a way of gradient checkpointing and needs gradient_checkpointing=True")
    if gradient_checkpointing and not (is_pretrained_model(model) and model.supports_gradient_checkpointing):
        raise ValueError(
            f"gradient_checkpointing=True needs a transformers model that supports it, got {type(model).__name__}"
        )
    trainable_parameters(model, biases=biases, layer_norms=layer_norms)
    if gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": use_reentrant})  # type: ignore[operator]
        model.config.use_cache = False  # type: ignore[union-attr]
    if sharded:
        for _, layer in quantized_linears(model):
            layer.stays_canonical = True
            layer.unprepack_()
    if guard_nan:
        nan_guard(model)
    if guard_memory:
        memory_guard(model)
    return model
