"""Mixed-task batches equal the tasks' separate runs, in their answers and in their gradients."""

import copy

import pytest
import torch
from torch import nn

from prequant_ext import PreQuantConfig, add_task, merge, quantize_model, set_task, task_parameters
from prequant_ext.task_file import task_tensors
from support.tiny_models import tiny_model, token_ids

ROWS = ["a", None, "b", "a", "__base__", "c"]


@torch.no_grad()
def with_tasks(model):
    """The model with the tasks a, b and c, none of them live."""
    for seed, name in enumerate("abc"):
        add_task(model, name)
        generator = torch.Generator().manual_seed(seed)
        for parameter in task_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    set_task(model, None)
    return model


def tasks_model(model_type="bert", **changes):
    model = tiny_model(model_type)
    quantize_model(model, PreQuantConfig(**({"r": 3} | changes)))
    return with_tasks(model)


def batch():
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 50, (len(ROWS), token_ids().shape[1]), generator=generator)
    ids[:, -1] = 1  # T5 reads its classification off the end of the sentence
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def answer_of(model, inputs, name, row):
    """The logits of one row, alone and with its task live."""
    set_task(model, None if name == "__base__" else name)
    logits = model(**{key: value[row : row + 1] for key, value in inputs.items()}).logits
    set_task(model, None)
    return logits


@torch.no_grad()
def separate(model, inputs, names):
    return torch.cat([answer_of(model, inputs, name, row) for row, name in enumerate(names)])


SETTINGS = {
    "per token": {},
    "weight only": {"activation_bits": None},
    "input columns": {"axis": "input"},
    "output rows": {"axis": "output"},
    "raw outliers": {"raw_outlier_activations": True},
    "groups": {"strategy": "group_wise", "group_size": 16},
}


@torch.no_grad()
@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("model_type", ["bert", "roberta", "t5", "gpt2", "modernbert", "electra"])
def test_equals_the_separate_runs(model_type, settings):
    model = tasks_model(model_type, **settings)
    wanted = separate(model, batch(), ROWS)
    assert not torch.allclose(wanted[0], model(**batch()).logits[0], atol=1e-3)  # the task is not the base
    torch.testing.assert_close(model(**batch(), task_names=ROWS).logits, wanted, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_a_call_without_task_names_is_the_live_task_again():
    model = tasks_model()
    before = model(**batch()).logits
    model(**batch(), task_names=ROWS)
    assert torch.equal(model(**batch()).logits, before)
    assert torch.equal(model(**batch(), task_names=None).logits, before)


@torch.no_grad()
def test_the_live_task_may_be_among_the_rows():
    model = tasks_model()
    wanted = separate(model, batch(), ROWS)
    set_task(model, "b")
    torch.testing.assert_close(model(**batch(), task_names=ROWS).logits, wanted, atol=2e-4, rtol=1e-4)


@torch.no_grad()
def test_positional_inputs_work():
    model = tasks_model()
    inputs = batch()
    named = model(**inputs, task_names=ROWS).logits
    assert torch.equal(model(inputs["input_ids"], inputs["attention_mask"], task_names=ROWS).logits, named)


@torch.no_grad()
def test_a_compiled_model_takes_mixed_batches():
    model = tasks_model()
    wanted = model(**batch(), task_names=ROWS).logits
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**batch(), task_names=ROWS).logits, wanted)
    torch.testing.assert_close(compiled(**batch()).logits, model(**batch()).logits)


@torch.no_grad()
def test_one_product_a_layer_whatever_the_number_of_tasks(monkeypatch):
    """Neither the frozen products nor the batched ones grow with the tasks of a batch."""
    model = tasks_model()
    counts = []
    for names in (["a"] * 6, ROWS):
        with torch.profiler.profile() as profile:
            model(**batch(), task_names=names)
        counts.append(
            {
                event.key: event.count
                for event in profile.key_averages()
                if event.key in ("prequant::linear_w4a8", "aten::bmm")
            }
        )
    assert counts[0] == counts[1]
    assert counts[0]["prequant::linear_w4a8"] == 12


@torch.no_grad()
def test_a_copy_mixes_its_own_values():
    model = tasks_model()
    before = model(**batch(), task_names=ROWS).logits
    twin = copy.deepcopy(model)
    for parameter in task_parameters(twin, "a"):
        parameter.zero_()
    assert torch.equal(model(**batch(), task_names=ROWS).logits, before)
    after = twin(**batch(), task_names=ROWS).logits
    assert not torch.allclose(after[0], before[0])
    torch.testing.assert_close(after[2], before[2])


@torch.no_grad()
def test_bfloat16():
    model = tasks_model().to(torch.bfloat16)
    mixed = model(**batch(), task_names=ROWS).logits
    assert mixed.dtype == torch.bfloat16
    torch.testing.assert_close(mixed, separate(model, batch(), ROWS), atol=0.1, rtol=0.05)


@torch.no_grad()
def test_a_head_of_other_modules_follows_its_rows():
    """A head is whatever has a task's parameters: here with a LayerNorm, and tokens in between."""
    model = tiny_model("bert")
    model.classifier = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8), nn.GELU(), nn.Linear(8, 2))
    quantize_model(model, PreQuantConfig(r=3))
    with_tasks(model)
    wanted = separate(model, batch(), ROWS)
    torch.testing.assert_close(model(**batch(), task_names=ROWS).logits, wanted, atol=2e-4, rtol=1e-4)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{}, {"activation_bits": None}, {"raw_outlier_activations": True}],
    ids=["per token", "weight only", "raw outliers"],
)
def test_each_task_gets_the_gradient_of_its_own_rows(settings):
    model = tasks_model(**settings)
    labels = torch.tensor([0, 1, 1, 0, 1, 0])
    loss = nn.functional.cross_entropy(model(**batch(), task_names=ROWS).logits, labels, reduction="sum")
    parameters = task_parameters(model, "a", "b", "c")
    mixed = torch.autograd.grad(loss, parameters)
    separate_loss = {}
    for name in "abc":
        set_task(model, name)
        own = [row for row, other in enumerate(ROWS) if other == name]
        inputs = {key: value[own] for key, value in batch().items()}
        separate_loss[name] = torch.autograd.grad(
            nn.functional.cross_entropy(model(**inputs).logits, labels[own], reduction="sum"),
            task_parameters(model, name),
        )
    wanted = [gradient for name in "abc" for gradient in separate_loss[name]]
    assert any(gradient.abs().max() > 1e-3 for gradient in wanted)
    for ours, theirs in zip(mixed, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_a_step_of_two_tasks_leaves_the_third_and_the_base_alone():
    model = tasks_model().train()
    before = {
        name: [parameter.detach().clone() for parameter in task_parameters(model, name)]
        for name in (None, "a", "b", "c")
    }
    optimizer = torch.optim.SGD(task_parameters(model, "a", "b"), lr=0.1)
    model(**batch(), task_names=["a", "b"] * 3, labels=torch.tensor([0, 1] * 3)).loss.backward()
    optimizer.step()
    moved = {
        name: any(
            not torch.equal(old, new) for old, new in zip(before[name], task_parameters(model, name), strict=True)
        )
        for name in before
    }
    assert moved == {None: False, "a": True, "b": True, "c": False}


def test_gradient_checkpointing_is_refused():
    model = tasks_model().train()
    model.gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="cannot be combined with gradient checkpointing"):
        model(**batch(), task_names=ROWS)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a", "x", "b", "b", "b", "b"], "no task 'x' in the model: it has 'a', 'b', 'c'"),
        (["a"], "one name for each row of the batch, got 1 for 6 rows"),
        ("a", "a list with one name a row, None for the base, got 'a'"),
    ],
)
def test_bad_task_names(names, message):
    with pytest.raises(ValueError, match=message):
        tasks_model()(**batch(), task_names=names)


@torch.no_grad()
def test_a_failed_call_leaves_no_tasks_behind():
    model = tasks_model()
    before = model(**batch()).logits
    with pytest.raises(RuntimeError, match="ids must be 0 to 49"):
        model(input_ids=torch.full((6, 4), 10_000), task_names=ROWS)
    assert torch.equal(model(**batch()).logits, before)


def test_trained_scales_are_refused():
    model = tasks_model(r=0, train_scales=True)
    with pytest.raises(ValueError, match="this model trains scales"):
        model(**batch(), task_names=ROWS)


def test_a_layer_that_is_not_called_row_by_row_is_named():
    """DeBERTa's layers also read its table of relative positions, which all rows share."""
    with pytest.raises(ValueError, match=r"x must have the batch's 6 rows, a task each, got shape \(1, "):
        tasks_model("deberta-v2")(**batch(), task_names=ROWS)


@torch.no_grad()
def test_merging_takes_the_hooks_away():
    model = tasks_model()
    set_task(model, "b")
    wanted = model(**batch()).logits
    merge(model, "b")
    assert not model._forward_pre_hooks and not model._forward_hooks and not model.classifier._forward_hooks
    torch.testing.assert_close(model(**batch()).logits, wanted, atol=0.2, rtol=0.1)  # activations are float now
