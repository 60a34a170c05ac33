"""Guards name the layer where a NaN or Inf appears, and where memory runs out."""

import math

import pytest
import torch
from accelerate.utils.memory import should_reduce_batch_size
from torch import nn

from prequant_ext import PreQuantConfig, prepare_model, quantize_model
from prequant_ext.guards import memory_guard, nan_guard
from support.tiny_models import PLAIN_FAMILY, Plain
from support.toys import make_toy, toy_inputs, toy_output


def bert() -> nn.Module:
    model = make_toy("bert")
    quantize_model(model, PreQuantConfig(r=2))
    return model


def step(model: nn.Module) -> None:
    model(**toy_inputs(model), labels=torch.tensor([0, 1, 1])).loss.backward()


# ---- NaN and Inf -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [math.nan, math.inf], ids=str)
def test_the_first_module_with_a_bad_output_is_named(bad):
    model = bert()
    with torch.no_grad():
        model.bert.encoder.layer[1].intermediate.dense.bias[5] = bad
    counts = "21 NaN and 0 Inf" if math.isnan(bad) else "0 NaN and 21 Inf"  # one column of 3 x 7 tokens
    message = (
        rf"output of bert\.encoder\.layer\.1\.intermediate\.dense \(PreQuantLinear\) has {counts} among its "
        r"1344 values \(float32 \(3, 7, 64\)\)"
    )
    with nan_guard(model), pytest.raises(FloatingPointError, match=message):
        toy_output(model)
    toy_output(model)  # the guard went with the block


def test_a_bad_gradient_is_named_where_it_first_arrives():
    model = bert()
    model.bert.encoder.layer[0].output.dense.register_forward_hook(
        lambda module, args, output: output.register_hook(lambda gradient: gradient / 0) and None
    )
    with (
        nan_guard(model),
        pytest.raises(
            FloatingPointError, match=r"gradient that reaches the output of bert\.encoder\.layer\.0\.output\.dense \("
        ),
    ):
        step(model)


def test_a_bad_parameter_gradient_is_named():
    model = bert()
    name = "bert.encoder.layer.1.output.dense.outlier_weight"
    model.get_parameter(name).register_hook(lambda gradient: gradient * math.nan)
    with (
        nan_guard(model),
        pytest.raises(FloatingPointError, match=rf"the gradient of {name} has 128 NaN and 0 Inf among its 128 values"),
    ):
        step(model)


def test_a_healthy_model_passes_and_computes_the_same():
    model, other = bert(), bert()
    guard = nan_guard(model)
    step(model)
    step(other)
    assert all(
        torch.equal(parameter.grad, twin.grad)
        for parameter, twin in zip(model.parameters(), other.parameters(), strict=True)
        if twin.grad is not None
    )
    guard.close()
    assert not any(module._forward_hooks for module in model.modules()) and not any(
        parameter._backward_hooks for parameter in model.parameters()
    )


# ---- memory ----------------------------------------------------------------------------------------------------------


def test_the_module_that_runs_out_of_memory_is_named_and_the_error_stays_what_it_was():
    model = Plain()
    quantize_model(model, PreQuantConfig(r=2), family=PLAIN_FAMILY)
    too_many = torch.zeros(1, 7, dtype=torch.int64).expand(2**45, 7)  # more than a process can address
    with memory_guard(model), pytest.raises(RuntimeError, match=r"can't allocate memory") as caught:
        model(too_many)
    expected = (
        r"Memory ran out in table (PreQuantEmbedding), called with int64 (35184372088832, 7): lower the batch size"
    )
    # not once more for each module around it
    assert expected in str(caught.value) and str(caught.value).count("Memory ran out") == 1
    assert should_reduce_batch_size(caught.value)


def test_running_out_in_the_backward_pass_names_the_last_module_reached():
    model = bert()

    def run_out(module, args, output):
        def allocate(*gradients):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

        output.grad_fn.register_hook(allocate)

    # in eval mode the dropout after it returns the same tensor
    model.train().bert.encoder.layer[0].output.dense.register_forward_hook(run_out)
    with (
        pytest.raises(
            torch.OutOfMemoryError,
            match=r"in the backward pass, .* the output of bert\.encoder\.layer\.0\.output\.dense \(P",
        ) as caught,
        memory_guard(model),
    ):
        step(model)
    assert should_reduce_batch_size(caught.value)


def test_other_errors_pass_unchanged():
    model = bert()
    with pytest.raises(RuntimeError) as plain:
        model.classifier(torch.zeros(2, 7))
    with memory_guard(model), pytest.raises(RuntimeError) as guarded:
        model.classifier(torch.zeros(2, 7))
    assert str(guarded.value) == str(plain.value)


def test_prepare_model_installs_both_for_good():
    model = prepare_model(bert(), guard_nan=True, guard_memory=True)
    step(model)
    model.classifier.register_forward_pre_hook(lambda *_: torch.empty(2**60, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match=r"Memory ran out in classifier \(Linear\), called with float32 \(3, 32\)"):
        toy_output(model)
    with torch.no_grad():
        model.bert.pooler.dense.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"the output of bert\.pooler\.dense"):
        toy_output(model)
