"""Several tasks in one model: what is live, what is kept, and that switching keeps storage."""

import copy
import io

import pytest
import torch

import prequant_ext
from prequant_ext import (
    PreQuantConfig,
    active_task,
    add_task,
    list_tasks,
    load_task,
    merge,
    quantize_model,
    remove_task,
    save_task,
    set_task,
    task_parameters,
)
from prequant_ext.task_file import fingerprint, task_tensors
from support.tiny_models import tiny_model, token_ids


def quantized(model_type="bert", **changes):
    model = tiny_model(model_type)
    quantize_model(model, PreQuantConfig(**({"r": 3} | changes)))
    return model


@torch.no_grad()
def train_a_little(model, seed):
    """Move every live task tensor, as training would."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in task_tensors(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)


@torch.no_grad()
def logits(model):
    return model(token_ids()).logits


@pytest.fixture
def two_tasks():
    """A model with the tasks a and b, and what it answers as each, and as the base."""
    model = quantized()
    answers = {None: logits(model)}
    for seed, name in enumerate("ab"):
        add_task(model, name)
        train_a_little(model, seed)
        answers[name] = logits(model)
    return model, answers


@pytest.mark.parametrize("change", [set_task, lambda model, name: load_task(model, name, "again", overwrite=True)])
def test_a_switch_within_autocast_answers_with_the_new_head(two_tasks, change, tmp_path):
    """autocast keeps the casts of trained parameters for as long as its block lasts."""
    model, _ = two_tasks
    with torch.autocast("cpu", torch.bfloat16):
        alone = logits(model)  # as b
    save_task(model, "b", tmp_path / "b.task")
    set_task(model, "a")
    with torch.autocast("cpu", torch.bfloat16):
        assert not torch.equal(logits(model), alone)
        change(model, "b" if change is set_task else tmp_path / "b.task")
        assert torch.equal(logits(model), alone)


def test_each_task_answers_as_when_it_was_trained(two_tasks):
    model, answers = two_tasks
    assert len({tuple(answer.flatten().tolist()) for answer in answers.values()}) == 3
    for name in ("a", None, "b", "b", "a"):
        set_task(model, name)
        assert active_task(model) == name
        assert torch.equal(logits(model), answers[name])


def test_training_after_a_switch_is_stored_in_the_task_that_is_left(two_tasks):
    model, answers = two_tasks
    set_task(model, "a")
    train_a_little(model, 7)
    moved = logits(model)
    set_task(model, "b")
    assert torch.equal(logits(model), answers["b"])
    set_task(model, "a")
    assert torch.equal(logits(model), moved)


def test_a_new_task_starts_from_the_base_and_is_live(two_tasks):
    model, answers = two_tasks
    add_task(model, "c")
    assert (active_task(model), list_tasks(model)) == ("c", ["a", "b", "c"])
    assert torch.equal(logits(model), answers[None])


def test_switching_keeps_every_parameter_and_its_memory(two_tasks):
    model, _ = two_tasks
    before = {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()}
    slots = {parameter.data_ptr() for parameter in task_parameters(model, "a", None)}
    for name in ("a", None, "b"):
        set_task(model, name)
    assert {name: (id(parameter), parameter.data_ptr()) for name, parameter in model.named_parameters()} == before
    set_task(model, "b")
    assert {parameter.data_ptr() for parameter in task_parameters(model, "a", None)} == slots


def test_trainable_parameters_are_the_live_ones(two_tasks):
    model, _ = two_tasks
    live = {id(parameter) for parameter in prequant_ext.trainable_parameters(model)}
    assert (
        live
        == {id(parameter) for parameter in task_tensors(model).values()}
        == {id(parameter) for parameter in task_parameters(model, "b")}
    )


def test_a_switch_compiles_nothing_anew(two_tasks):
    model, answers = two_tasks
    graphs = []

    def counting(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(model, backend=counting)
    torch.testing.assert_close(logits(compiled), answers["b"])
    first = len(graphs)
    assert first > 0
    for name in ("a", None, "b"):
        set_task(model, name)
        torch.testing.assert_close(logits(compiled), answers[name])
    assert len(graphs) == first


def test_removing_the_live_task_leaves_the_base(two_tasks):
    model, answers = two_tasks
    remove_task(model, "b")
    assert (active_task(model), list_tasks(model)) == (None, ["a"])
    assert torch.equal(logits(model), answers[None])
    remove_task(model, "a")
    assert list_tasks(model) == []


def test_a_copy_of_the_model_has_tasks_of_its_own(two_tasks):
    model, answers = two_tasks
    twin = copy.deepcopy(model)
    set_task(twin, "a")
    train_a_little(twin, 9)
    assert active_task(model) == "b"
    set_task(model, "a")
    assert torch.equal(logits(model), answers["a"])


def test_the_state_dict_is_that_of_the_live_task(two_tasks):
    model, answers = two_tasks
    bare = quantized()
    assert set(model.state_dict()) == set(bare.state_dict())
    bare.load_state_dict(model.state_dict())
    assert torch.equal(logits(bare), answers["b"])


def test_a_model_with_tasks_can_be_pickled(two_tasks):
    model, answers = two_tasks
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    back = torch.load(buffer, weights_only=False)
    set_task(back, "a")
    assert torch.equal(logits(back), answers["a"])


@pytest.mark.parametrize("model_type", ["t5", "gpt2", "modernbert"])
def test_other_families(model_type):
    model = quantized(model_type)
    base = logits(model)
    add_task(model, "a")
    train_a_little(model, 0)
    moved = logits(model)
    set_task(model, None)
    assert torch.equal(logits(model), base)
    set_task(model, "a")
    assert torch.equal(logits(model), moved)


def test_scales_of_alpha_are_a_tasks_own():
    model = quantized(r=0, train_scales=True)
    base = logits(model)
    add_task(model, "a")
    train_a_little(model, 0)
    set_task(model, None)
    assert torch.equal(logits(model), base)


# ---- files -----------------------------------------------------------------------------------------------------------


def test_tasks_go_through_files_one_by_one(two_tasks, tmp_path):
    model, answers = two_tasks
    for name in "ab":
        save_task(model, name, tmp_path / f"{name}.task", {"score": 0.5, "lr": 5e-3})
    fresh = quantized()
    for name in "ab":
        metadata = load_task(fresh, tmp_path / f"{name}.task")
        assert (metadata["score"], metadata["lr"], metadata["base_fingerprint"]) == ("0.5", "0.005", fingerprint(model))
        assert torch.equal(logits(fresh), answers[name])
    set_task(fresh, "a")
    assert torch.equal(logits(fresh), answers["a"])
    set_task(fresh, None)
    assert torch.equal(logits(fresh), answers[None])


def test_a_file_can_be_loaded_under_another_name(two_tasks, tmp_path):
    model, answers = two_tasks
    save_task(model, "a", tmp_path / "a.task")
    load_task(model, tmp_path / "a.task", "a.2")
    assert list_tasks(model) == ["a", "b", "a.2"]
    assert torch.equal(logits(model), answers["a"])


def test_an_existing_name_is_replaced_only_when_asked(two_tasks, tmp_path):
    model, answers = two_tasks
    save_task(model, "a", tmp_path / "a.task")
    for again in (lambda: load_task(model, tmp_path / "a.task", "b"), lambda: add_task(model, "b")):
        with pytest.raises(ValueError, match="the model has a task 'b' already"):
            again()
    assert torch.equal(logits(model), answers["b"])
    load_task(model, tmp_path / "a.task", "b", overwrite=True)
    assert torch.equal(logits(model), answers["a"])


def test_a_refused_file_adds_no_task(two_tasks, tmp_path):
    other = quantized(bits=3)
    save_task(two_tasks[0], "a", tmp_path / "a.task")
    add_task(other, "mine")
    with pytest.raises(ValueError, match="was trained on the base"):
        load_task(other, tmp_path / "a.task")
    assert (list_tasks(other), active_task(other)) == (["mine"], "mine")


@pytest.mark.parametrize("name", [None, "a", "b"])
def test_merging_gives_the_float_model_of_one_task(two_tasks, name):
    model, _ = two_tasks
    if name is not None:
        set_task(model, name)
    wanted = {
        f"{own}.weight": module.dequantize()
        for own, module in model.named_modules()
        if isinstance(module, prequant_ext.PreQuantLinear)
    }
    head = {key: value.detach().clone() for key, value in model.named_parameters() if "classifier" in key}
    set_task(model, "b" if name is None else "a")
    merged = dict(merge(model, name).named_parameters())
    assert all(torch.equal(merged[key], value) for key, value in (wanted | head).items())
    assert list_tasks(model) == []
    assert model(token_ids()).logits.shape == (len(token_ids()), 2)


# ---- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "act", [set_task, remove_task, task_parameters, lambda model, name: save_task(model, name, "x"), merge]
)
def test_an_unknown_task_is_named_with_those_there_are(two_tasks, act):
    with pytest.raises(ValueError, match="no task 'c' in the model: it has 'a', 'b'"):
        act(two_tasks[0], "c")


def test_a_float_model_has_no_tasks():
    with pytest.raises(ValueError, match="BertForSequenceClassification is not quantized: call quantize_model first"):
        add_task(tiny_model("bert"), "a")


def test_the_base_cannot_be_removed(two_tasks):
    with pytest.raises(ValueError, match="the base cannot be removed"):
        remove_task(two_tasks[0], None)


@pytest.mark.parametrize("name", ["__base__", "", "a b"])
def test_bad_names(name):
    with pytest.raises(ValueError, match="task name must match"):
        add_task(quantized(), name)
