"""Quantized decoders: generate() with its caches against passes without one, language-model heads, fine-tuning.

With 4-bit weights alone, decoding by a cache differs from a full pass in the last digits. With 8-bit activations a
value that lies between two codes may fall on either side, and in bfloat16 every product is rounded: hence the larger
tolerances.
"""

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM, CompileConfig

from prequant_ext import PreQuantConfig, PreQuantEmbedding, PreQuantLinear, merge, quantize_model, trainable_parameters
from prequant_ext.task import fingerprint, load_task, save_task
from support.toys import make_toy, save_toy

DECODERS = ("gpt2", "llama", "qwen2", "qwen3")
WEIGHT_ONLY, W4A8 = PreQuantConfig(r=2, activation_bits=None), PreQuantConfig(r=2)
VARIANTS = {  # config, dtype, how far a logit may be off
    "weight-only": (WEIGHT_ONLY, torch.float32, 1e-4),
    "W4A8": (W4A8, torch.float32, 0.2),
    "W4A8 in bfloat16": (W4A8, torch.bfloat16, 0.3),
}
PROMPT = torch.randint(3, 99, (3, 6), generator=torch.Generator().manual_seed(3))
NEW = 8

every_decoder = pytest.mark.parametrize("name", DECODERS)
every_variant = pytest.mark.parametrize(("config", "dtype", "tolerance"), VARIANTS.values(), ids=VARIANTS.keys())


def quantized(name, config=WEIGHT_ONLY, dtype=torch.float32):
    model = make_toy(name, dtype)
    quantize_model(model, config)
    return model


def generate(model, prompt=PROMPT, mask=None, **settings):
    """(sequences, logits): (M, prompt + NEW) and (M, NEW, vocabulary)."""
    fixed = {
        "max_new_tokens": NEW,
        "eos_token_id": None,
        "pad_token_id": 0,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    mask = torch.ones_like(prompt) if mask is None else mask
    result = model.generate(prompt, attention_mask=mask, **({"do_sample": False} | fixed | settings))
    return result.sequences, torch.stack(result.logits, 1)


@torch.no_grad()
def assert_greedy(model, sequence, logits, tolerance):
    """``logits`` (NEW, vocabulary) are those of one pass over ``sequence`` without a cache, and each new token is the
    best of that pass.
    """
    expected = model(input_ids=sequence[None], use_cache=False).logits[0, -NEW - 1 : -1].float()
    torch.testing.assert_close(logits.float(), expected, rtol=0, atol=tolerance)
    chosen = expected.gather(1, sequence[-NEW:, None])[:, 0]
    assert (expected.amax(1) - chosen).max() <= tolerance


@every_variant
@every_decoder
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_a_cache_changes_nothing(cache, name, config, dtype, tolerance):
    model = quantized(name, config, dtype)
    assert model(PROMPT).logits.dtype == dtype
    for sequence, logits in zip(*generate(model, cache_implementation=cache), strict=True):
        assert_greedy(model, sequence, logits, tolerance)


@every_decoder
@torch.no_grad()
def test_static_and_dynamic_caches_and_none_say_the_same_tokens(name):
    model, tokens = quantized(name), PROMPT
    for _ in range(NEW):
        tokens = torch.cat([tokens, model(input_ids=tokens, use_cache=False).logits[:, -1:].argmax(-1)], 1)
    for cache in ({}, {"cache_implementation": "static"}, {"use_cache": False}):
        assert torch.equal(generate(model, **cache)[0], tokens)


@every_variant
@every_decoder
def test_a_row_with_left_padding_is_the_row_alone(name, config, dtype, tolerance):
    model, lengths = quantized(name, config, dtype), (6, 3, 5)
    mask = torch.stack([(torch.arange(6) >= 6 - length).long() for length in lengths])
    for length, sequence, logits in zip(lengths, *generate(model, PROMPT * mask, mask), strict=True):
        assert_greedy(model, sequence[6 - length :], logits, tolerance)


def test_sampling_repeats_under_a_seed():
    model = quantized("llama", W4A8)

    def sample(seed):
        torch.manual_seed(seed)
        return generate(model, do_sample=True, temperature=1.5, top_k=0)[0]

    assert torch.equal(sample(0), sample(0))
    assert not torch.equal(sample(0), sample(1))


def test_beams_are_reordered_with_their_cache():
    model = quantized("llama")
    with_cache, without = (generate(model, num_beams=3, use_cache=use_cache)[0] for use_cache in (True, False))
    assert torch.equal(with_cache, without)
    assert not torch.equal(with_cache, generate(model)[0])


@every_decoder
def test_a_reloaded_model_says_the_same(name, tmp_path):
    save_toy(name, tmp_path / "float")
    streamed = AutoModelForCausalLM.from_pretrained(tmp_path / "float", quantization_config=WEIGHT_ONLY)
    streamed.save_pretrained(tmp_path / "quantized")
    sequences, logits = generate(quantized(name))
    for model in (streamed, AutoModelForCausalLM.from_pretrained(tmp_path / "quantized")):
        other_sequences, other_logits = generate(model)
        assert torch.equal(other_sequences, sequences)
        torch.testing.assert_close(other_logits, logits, rtol=1e-4, atol=1e-4)


def test_generate_compiles_a_static_cache_whole():
    """As generate() does by itself on a GPU."""
    model, graphs = quantized("llama"), []
    torch._dynamo.reset()

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    settings = CompileConfig(backend=backend, mode=None, fullgraph=True)
    settings._compile_all_devices = True
    sequences, _ = generate(model, cache_implementation="static", compile_config=settings)
    assert len(graphs) == 1  # and no other as the cache fills
    assert any("linear_w4a16" in str(node.target) for node in graphs[0].graph.nodes)
    assert torch.equal(sequences, generate(model)[0])


@every_decoder
def test_language_model_heads_and_tied_tables_stay_float(name):
    model, original = quantized(name), make_toy(name)
    is_tied, table = original.config.tie_word_embeddings, model.get_input_embeddings()
    assert type(model.lm_head) is nn.Linear and torch.equal(model.lm_head.weight, original.lm_head.weight)
    assert (model.lm_head.weight is table.weight) == is_tied == (not isinstance(table, PreQuantEmbedding))
    assert not model.lm_head.weight.requires_grad


@every_decoder
def test_a_merged_model_says_the_same(name):
    model = quantized(name)
    _, before = generate(model)
    merge(model)
    assert not any(isinstance(module, PreQuantLinear) for module in model.modules())
    torch.testing.assert_close(generate(model)[1], before, rtol=0, atol=1e-3)


@every_decoder
def test_fine_tuning_lowers_the_loss_through_outlier_weights_alone(name, tmp_path):
    model = quantized(name, W4A8)
    before, base = {key: tensor.clone() for key, tensor in model.state_dict().items()}, fingerprint(model)
    optimizer = torch.optim.AdamW(trainable_parameters(model), lr=1e-2)
    losses = []
    for _ in range(12):
        losses.append(model(input_ids=PROMPT, labels=PROMPT, use_cache=False).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]
    moved = {key for key, tensor in model.state_dict().items() if not torch.equal(tensor, before[key])}
    assert moved == {key for key in before if key.endswith("outlier_weight")} and fingerprint(model) == base

    save_task(model, "prompt", tmp_path / "prompt.task")
    assert set(load_file(tmp_path / "prompt.task")) == moved
    other = quantized(name, W4A8)
    load_task(other, tmp_path / "prompt.task")
    tuned = model.state_dict()
    assert all(torch.equal(tensor, tuned[key]) for key, tensor in other.state_dict().items())
