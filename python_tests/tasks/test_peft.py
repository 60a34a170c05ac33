"""The PEFT tuner: adapters of outlier weights and head through PEFT's and transformers' own calls."""

from importlib.metadata import version

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from prequant_ext import (
    PreQuantConfig,
    PreQuantLinear,
    add_task,
    load_task,
    merge,
    quantize_model,
    save_task,
    trainable_parameters,
)
from prequant_ext.task_file import read_task, task_tensors
from support.tiny_models import SETTINGS, VOCAB, assert_unchanged, from_config, snapshot, tiny_model, token_ids

pytest.importorskip("peft")

from peft import PeftModel, get_peft_model

from prequant_ext.peft import PreQuantColumnsConfig, PreQuantColumnsLayer, adapter_to_task, task_to_adapter
from support.adapters import adapted, logits, quantized, train_a_little, two_adapters

NAMES = ["mrpc", "__base__", "sst2", "mrpc"]


def batch():
    ids = torch.randint(3, 50, (len(NAMES), 7), generator=torch.Generator().manual_seed(5))
    ids[:, -1] = 1  # T5 reads its classification off the end of the sentence
    return ids


@torch.no_grad()
def separate(model, ids, names, answer=lambda model, row: model(input_ids=row).logits):
    """What each row gives alone, with its adapter active."""
    rows = []
    for row, name in zip(ids, names, strict=True):
        if name == "__base__":
            with model.disable_adapter():
                rows.append(answer(model, row[None]))
        else:
            model.set_adapter(name)
            rows.append(answer(model, row[None]))
    return torch.cat(rows)


def test_the_peft_minor_is_the_one_the_tuner_was_read_against():
    assert version("peft").startswith("0.21."), (
        "peft's internals move between minors. Check in the new one, then move this line and the bound in "
        "pyproject.toml: the four names that peft.py imports "
        "from peft.mapping, peft.tuners.tuners_utils and peft.utils.other; the BaseTuner methods that "
        "PreQuantColumnsModel overrides, and that "
        "inject_adapter calls _check_new_adapter_config first; that ModulesToSaveWrapper takes adapter_names and "
        "matches names by their end; the keys of a "
        "saved adapter; transformers.integrations.peft.MIN_PEFT_VERSION"
    )


# ---- what an adapter is ----------------------------------------------------------------------------------------------


def test_a_new_adapter_answers_as_the_base_and_trains_what_a_task_trains():
    model = quantized()
    wanted, answer = {id(parameter) for parameter in trainable_parameters(model)}, logits(model)
    numbers = sum(parameter.numel() for parameter in trainable_parameters(model))
    wrapped = get_peft_model(model, PreQuantColumnsConfig()).eval()
    assert torch.equal(logits(wrapped), answer)
    trained = {name: parameter for name, parameter in wrapped.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in trained.values()) == numbers
    assert all(".prequant_columns_weight.default" in name or ".modules_to_save.default." in name for name in trained)
    assert not wanted & {id(parameter) for parameter in trained.values()}  # the base's own values stay


def test_gradients_are_those_of_the_quantized_model():
    model, wrapped = quantized(), get_peft_model(quantized(), PreQuantColumnsConfig())
    for each in (model, wrapped):
        each.eval()(input_ids=token_ids(), labels=torch.tensor([0, 1])).loss.backward()
    layers = dict(model.named_modules())
    tuned = {
        name: module
        for name, module in wrapped.base_model.model.named_modules()
        if isinstance(module, PreQuantColumnsLayer)
    }
    assert len(tuned) == 12
    for name, layer in tuned.items():
        assert torch.equal(layer.prequant_columns_weight["default"].grad, layers[name].outlier_weight.grad)
    assert torch.equal(wrapped.base_model.model.classifier.weight.grad, model.classifier.weight.grad)


def test_adapters_share_the_codes():
    model = quantized()
    codes = {
        id(module): module.weight_packed.data_ptr() for module in model.modules() if isinstance(module, PreQuantLinear)
    }
    base, own = (
        sum(parameter.nbytes for parameter in parameters)
        for parameters in (model.parameters(), task_tensors(model).values())
    )
    wrapped = two_adapters(model)
    assert {
        id(module): module.weight_packed.data_ptr()
        for module in wrapped.modules()
        if isinstance(module, PreQuantLinear)
    } == codes
    assert sum(parameter.nbytes for parameter in wrapped.parameters()) == base + 2 * own


def test_set_disable_and_delete():
    model = quantized()
    answers = {"base": logits(model)}
    wrapped = two_adapters(model)
    for name in ("sst2", "mrpc"):
        wrapped.set_adapter(name)
        answers[name] = logits(wrapped)
        trained = [own for own, parameter in wrapped.named_parameters() if parameter.requires_grad]
        assert trained and all(f".{name}" in own for own in trained)
    assert len({tuple(answer.flatten().tolist()) for answer in answers.values()}) == 3
    with wrapped.disable_adapter():
        assert torch.equal(logits(wrapped), answers["base"])
    assert torch.equal(logits(wrapped), answers["mrpc"])
    with pytest.warns(UserWarning, match="mrpc was active which is now deleted"):
        wrapped.delete_adapter("mrpc")
    assert torch.equal(logits(wrapped), answers["sst2"])
    assert not [name for name, _ in wrapped.named_parameters() if name.endswith(".mrpc") or ".mrpc." in name]


def test_two_adapters_at_once_are_refused():
    model = two_adapters(quantized("gpt2", "causal_lm"))  # without a head, of which PEFT itself would say so
    with pytest.raises(ValueError, match="one at a time can be active, got"):
        model.base_model.set_adapter(["mrpc", "sst2"])


def test_outlier_weights_stay_in_float32():
    model = adapted()
    layer = next(module for module in model.modules() if isinstance(module, PreQuantColumnsLayer))
    before = layer.prequant_columns_weight["default"].detach().clone()
    model.to(torch.bfloat16)
    assert torch.equal(layer.prequant_columns_weight["default"], before)
    assert logits(model).dtype == torch.bfloat16


def test_a_layer_compiles_whole():
    model = two_adapters()
    layer = model.base_model.model.bert.encoder.layer[0].output.dense
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    x = torch.randn(2, 5, 64)
    for name in ("mrpc", "sst2"):
        model.set_adapter(name)
        assert torch.equal(compiled(x), layer.base_layer(x, layer.prequant_columns_weight[name]))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(use_reentrant):
    gradients = []
    for is_checkpointed in (False, True):
        model = get_peft_model(quantized(), PreQuantColumnsConfig())
        if is_checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.train()
        for module in model.modules():
            if isinstance(module, torch.nn.Dropout):
                module.p = 0.0
        model(input_ids=token_ids(), labels=torch.tensor([0, 1])).loss.backward()
        gradients.append(
            {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
        )
    assert all(torch.equal(gradients[0][name], gradient) for name, gradient in gradients[1].items())


# ---- mixed batches ---------------------------------------------------------------------------------------------------


MIXED = {
    "bert": ("bert", {}),
    "weight only": ("bert", {"activation_bits": None}),
    "raw outliers": ("bert", {"raw_outlier_activations": True}),
    "two modules in the head": ("roberta", {}),
    "encoder and decoder": ("t5", {}),
    "conv1d": ("gpt2", {}),
}


@pytest.mark.parametrize(("model_type", "settings"), MIXED.values(), ids=MIXED)
def test_a_mixed_batch_equals_the_separate_runs(model_type, settings):
    model = two_adapters(quantized(model_type, **settings))
    wanted = separate(model, batch(), NAMES)
    with torch.no_grad():
        active = model(input_ids=batch()).logits  # mrpc in every row
        assert not torch.allclose(active[1], wanted[1], atol=1e-3) and not torch.allclose(
            active[2], wanted[2], atol=1e-3
        )
        torch.testing.assert_close(model(input_ids=batch(), adapter_names=NAMES).logits, wanted, atol=2e-4, rtol=1e-4)
    assert torch.equal(logits(model), logits(model, adapter_names=None))


def test_one_product_a_layer_whatever_the_number_of_adapters():
    model = two_adapters()
    counts = []
    for names in (["mrpc"] * 4, NAMES):
        with torch.no_grad(), torch.profiler.profile() as profile:
            model(input_ids=batch(), adapter_names=names)
        counts.append(
            {
                event.key: event.count
                for event in profile.key_averages()
                if event.key in ("prequant::linear_w4a8", "aten::bmm")
            }
        )
    assert counts[0] == counts[1] and counts[0]["prequant::linear_w4a8"] == 12


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("model_type", ["llama", "t5"])
def test_generate_follows_the_rows(model_type, beams):
    model_class = {"llama": AutoModelForCausalLM, "t5": AutoModelForSeq2SeqLM}[model_type]
    base = from_config(AutoConfig.for_model(model_type, vocab_size=VOCAB, **SETTINGS[model_type]), model_class)
    quantize_model(base, PreQuantConfig(r=3))
    model = two_adapters(base)
    choices = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "num_beams": beams}
    wanted = separate(model, batch(), NAMES, lambda model, row: model.generate(input_ids=row, **choices))
    assert torch.equal(model.generate(input_ids=batch(), adapter_names=NAMES, **choices), wanted)
    assert not torch.equal(model.generate(input_ids=batch(), **choices), wanted)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["mrpc", "c", "sst2", "mrpc"], "adapter_names has 'c', but the model has 'mrpc', 'sst2'"),
        (["mrpc", "sst2"], "one name for each row of the batch, got 2 where a layer meets 4 rows"),
        ("mrpc", "a list with one name a row, '__base__' for the base, got 'mrpc'"),
    ],
)
def test_bad_adapter_names(names, message):
    model = two_adapters()
    before = logits(model)
    with pytest.raises(ValueError, match=message):
        model(input_ids=batch(), adapter_names=names)
    assert torch.equal(logits(model), before)


def test_mixed_batches_are_for_inference():
    with pytest.raises(ValueError, match=r"adapter_names is for inference: call model.eval\(\)"):
        two_adapters().train()(input_ids=batch(), adapter_names=NAMES)


def test_a_head_that_cannot_follow_its_rows_is_refused():
    model = two_adapters(quantized("roberta"), task_type="SEQ_CLS")  # whose classifier PEFT wraps whole
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules: Linear"):
        logits(model, adapter_names=["mrpc", "sst2"])


# ---- back ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [None, "mrpc"])
def test_merging_gives_the_float_model_of_one_adapter(tmp_path, name):
    model = two_adapters()
    model.save_pretrained(tmp_path)
    adapter_to_task(tmp_path / (name or "sst2"), tmp_path / "task", "task")
    twin = quantized()
    load_task(twin, tmp_path / "task")
    merged = model.merge_and_unload(adapter_names=name and [name])
    wanted = merge(twin).state_dict()
    assert type(merged) is type(twin) and merged.state_dict().keys() == wanted.keys()
    assert all(torch.equal(tensor, wanted[key]) for key, tensor in merged.state_dict().items())
    assert not hasattr(merged.config, "quantization_config") and not hasattr(merged, "peft_config")


def test_unloading_gives_the_base_back():
    base = quantized()
    state, answer, trained = (
        {key: tensor.clone() for key, tensor in base.state_dict().items()},
        logits(base),
        len(trainable_parameters(base)),
    )
    back = two_adapters(base).unload()
    assert back is base and back.state_dict().keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in back.state_dict().items())
    assert (
        torch.equal(logits(back), answer) and sum(parameter.requires_grad for parameter in back.parameters()) == trained
    )


@pytest.mark.parametrize(("names", "got"), [(["mrpc", "sst2"], r"\['mrpc', 'sst2'\]"), (["c"], r"\['c'\]")])
def test_one_adapter_that_exists_is_merged(names, got):
    model = two_adapters()
    before = logits(model)
    with pytest.raises(ValueError, match=f"one adapter can be merged, out of 'mrpc', 'sst2', got {got}"):
        model.merge_and_unload(adapter_names=names)
    assert torch.equal(logits(model), before)


def test_a_safe_merge_refuses_values_that_are_not_finite():
    model = adapted()
    with torch.no_grad():
        model.base_model.model.bert.encoder.layer[1].output.dense.prequant_columns_weight["default"][0, 0] = float(
            "inf"
        )
    with pytest.raises(
        ValueError,
        match=r"the outlier weights of bert.encoder.layer.1.output.dense in the adapter 'default' are not finite",
    ):
        model.merge_and_unload(safe_merge=True)


# ---- tasks -----------------------------------------------------------------------------------------------------------


def test_a_task_file_becomes_an_adapter_and_back(tmp_path):
    model = quantized("roberta")
    add_task(model, "a")
    train_a_little(model)
    save_task(model, "a", tmp_path / "a.task", {"score": 0.5})
    task_to_adapter(tmp_path / "a.task", tmp_path / "adapter")
    assert torch.equal(logits(PeftModel.from_pretrained(quantized("roberta"), tmp_path / "adapter")), logits(model))
    adapter_to_task(tmp_path / "adapter", tmp_path / "again.task", "a", {"score": 0.5})
    (metadata, tensors), (again, copies) = read_task(tmp_path / "a.task"), read_task(tmp_path / "again.task")
    assert (
        again == metadata
        and copies.keys() == tensors.keys()
        and all(torch.equal(copies[key], tensors[key]) for key in tensors)
    )


def test_a_task_of_scales_becomes_no_adapter(tmp_path):
    save_task(quantized(r=0, train_scales=True), "a", tmp_path / "a.task")
    with pytest.raises(ValueError, match=r"holds trained scales \(.*\.weight_scale\)"):
        task_to_adapter(tmp_path / "a.task", tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ---- refusals --------------------------------------------------------------------------------------------------------


def with_a_task():
    model = quantized()
    add_task(model, "a")
    return model


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tiny_model("bert"), "model must be quantized"),
        (lambda: quantized(r=0), r"model must have outlier dimensions to adapt \(r > 0\)"),
        (lambda: quantized(r=0, train_scales=True), r"model must have outlier dimensions to adapt \(r > 0\)"),
        (with_a_task, "model has tasks of add_task or load_task"),
    ],
    ids=["float", "r = 0", "scales", "tasks"],
)
def test_models_without_room_for_adapters(make, message):
    model = make()
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, PreQuantColumnsConfig())
    assert_unchanged(model, before)


def test_a_head_parameter_of_no_module_is_refused():
    model = quantized()
    model.temperature = torch.nn.Parameter(torch.ones(()))
    with pytest.raises(ValueError, match="temperature is a parameter of the task head that belongs to no module"):
        get_peft_model(model, PreQuantColumnsConfig())


ACTIONS = {
    "add_task": lambda model, path: add_task(model, "a"),
    "save_task": lambda model, path: save_task(model, "a", path / "a.task"),
}


@pytest.mark.parametrize("act", ACTIONS.values(), ids=ACTIONS)
def test_a_wrapped_model_takes_no_tasks(tmp_path, act):
    with pytest.raises(
        ValueError, match=r"model is wrapped by PEFT \(bert.encoder.layer.0.attention.self.query.base_layer\)"
    ):
        act(adapted().base_model.model, tmp_path)
    assert not list(tmp_path.iterdir())
