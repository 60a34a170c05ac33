"""device_map: a quantized checkpoint loads with modules on the CPU and on disk, and computes the same bits."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from prequant_ext import PreQuantConfig, merge, prepare_model, quantize_model
from prequant_ext.frozen import FrozenWeight
from support.toys import assert_same, make_toy, save_toy, toy_output

CONFIG = PreQuantConfig(r=2)
BLOCKS_ON_DISK = {"bert.embeddings": "cpu", "bert.encoder": "disk", "bert.pooler": "cpu", "classifier": "disk"}
MAPS = {  # and how many of the 12 linears and 3 tables are then on disk
    "auto": ("auto", 0),
    "cpu": ({"": "cpu"}, 0),
    "blocks": (BLOCKS_ON_DISK, 12),
    "everything but the head": ({"bert": "disk", "classifier": "cpu"}, 15),
    "one layer": (
        {
            "bert.embeddings": "cpu",
            "bert.encoder.layer.0": "cpu",
            "bert.encoder.layer.1": "disk",
            "bert.pooler": "cpu",
            "classifier": "cpu",
        },
        6,
    ),
}


@pytest.fixture
def directory(tmp_path):
    model = make_toy("bert")
    quantize_model(model, CONFIG)
    model.save_pretrained(tmp_path / "quantized", max_shard_size="20KB")
    return tmp_path / "quantized"


def num_offloaded(model) -> int:
    return sum(module.weight_packed.is_meta for module in model.modules() if isinstance(module, FrozenWeight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("device_map", "num_on_disk"), MAPS.values(), ids=MAPS.keys())
def test_the_output_has_the_same_bits_wherever_the_weights_are(device_map, num_on_disk, dtype, directory):
    model = BertForSequenceClassification.from_pretrained(directory, device_map=device_map, dtype=dtype)
    output = toy_output(model)
    assert torch.equal(output, toy_output(BertForSequenceClassification.from_pretrained(directory, dtype=dtype)))
    assert torch.equal(toy_output(model), output)  # and again: nothing of the first use is left over
    assert num_offloaded(model) == num_on_disk


def test_auto_puts_on_disk_what_does_not_fit(directory, tmp_path):
    model = BertForSequenceClassification.from_pretrained(
        directory, device_map="auto", max_memory={"cpu": 20_000}, offload_folder=tmp_path / "offload"
    )
    assert "disk" in model.hf_device_map.values() and "cpu" in model.hf_device_map.values()
    assert torch.equal(toy_output(model), toy_output(BertForSequenceClassification.from_pretrained(directory)))


@pytest.mark.parametrize(
    ("name", "on_disk", "in_memory"),
    [
        ("gpt2", ["transformer.h"], ["transformer.wte", "transformer.wpe", "transformer.ln_f", "lm_head"]),
        ("t5", ["encoder.block"], ["shared", "encoder.embed_tokens", "encoder.final_layer_norm", "decoder", "lm_head"]),
    ],
)
def test_other_families_offload(name, on_disk, in_memory, tmp_path):
    model_class = save_toy(name, tmp_path / "float")
    model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG).save_pretrained(tmp_path / "quantized")
    device_map = dict.fromkeys(on_disk, "disk") | dict.fromkeys(in_memory, "cpu")
    model = model_class.from_pretrained(tmp_path / "quantized", device_map=device_map)
    assert num_offloaded(model) > 0
    assert torch.equal(toy_output(model), toy_output(model_class.from_pretrained(tmp_path / "quantized")))


def test_an_offloaded_model_saves_what_it_was_loaded_from(directory, tmp_path):
    model = BertForSequenceClassification.from_pretrained(directory, device_map=BLOCKS_ON_DISK)
    model.save_pretrained(tmp_path / "again")
    assert_same(
        BertForSequenceClassification.from_pretrained(tmp_path / "again"),
        BertForSequenceClassification.from_pretrained(directory),
    )


@pytest.mark.parametrize("use", [prepare_model, merge])
def test_an_offloaded_model_is_for_inference(use, directory):
    model = BertForSequenceClassification.from_pretrained(directory, device_map=BLOCKS_ON_DISK)
    with pytest.raises(
        ValueError, match=r"bert\.encoder\.layer\.0\.attention\.self\.query is offloaded, which serves inference alone"
    ):
        use(model)


def test_values_on_disk_are_checked(directory):
    """The kernels rely on them, wherever they are."""
    name = "bert.encoder.layer.1.output.dense.outlier_dims"
    file = next(path for path in directory.glob("*.safetensors") if name in load_file(path))
    save_file(load_file(file) | {name: torch.tensor([1, 32])}, file, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=r"layer\.1\.output\.dense\.outlier_dims must lie in 0 to 31, got values from 1 to 32"
    ):
        BertForSequenceClassification.from_pretrained(directory, device_map=BLOCKS_ON_DISK)


@pytest.mark.parametrize("device_map", ["auto", BLOCKS_ON_DISK], ids=["auto", "blocks"])
def test_a_float_checkpoint_is_not_quantized_to_disk(device_map, tmp_path):
    """The loader would take the float file's weight for the codes."""
    model_class = save_toy("bert", tmp_path / "float")
    memory = {"max_memory": {"cpu": 20_000}} if device_map == "auto" else {}
    with pytest.raises(
        ValueError,
        match=r"device_map puts bert\.\S+ on disk while the float checkpoint is being quantized: quantize and save it "
        r"first",
    ):
        model_class.from_pretrained(
            tmp_path / "float",
            quantization_config=CONFIG,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
            **memory,
        )
    head_on_disk = {"bert": "cpu", "classifier": "disk"}
    model = model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG, device_map=head_on_disk)
    assert torch.equal(
        toy_output(model), toy_output(model_class.from_pretrained(tmp_path / "float", quantization_config=CONFIG))
    )
