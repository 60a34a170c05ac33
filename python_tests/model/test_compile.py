"""torch.compile(fullgraph=True): forward and backward of a quantized BERT, no graph break."""

import pytest
import torch

from prequant_ext import PreQuantConfig, quantize_model, trainable_parameters

transformers = pytest.importorskip("transformers")


def bert() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=99,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return transformers.BertForSequenceClassification(config)


CONFIGS = {
    "default": PreQuantConfig(r=2),
    "weight only": PreQuantConfig(r=2, activation_bits=None),
    "alpha": PreQuantConfig(r=0, train_scales=True),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS.keys())
def test_quantized_bert_compiles_whole(config):
    model = bert()
    quantize_model(model, config)
    parameters = trainable_parameters(model)
    ids, labels = torch.randint(0, 99, (3, 9)), torch.tensor([0, 1, 1])

    def step(module):
        model.zero_grad()
        loss = module(input_ids=ids, attention_mask=torch.ones_like(ids), labels=labels).loss
        loss.backward()
        return loss.detach(), [p.grad.clone() for p in parameters]

    loss, gradients = step(model)
    compiled_loss, compiled_gradients = step(torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager"))
    torch.testing.assert_close(compiled_loss, loss)
    for actual, expected in zip(compiled_gradients, gradients, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_inductor_compiles_it_too():
    model = bert()
    quantize_model(model, PreQuantConfig(r=2))
    ids = torch.randint(0, 99, (3, 9))
    compiled = torch.compile(model, fullgraph=True)
    torch.testing.assert_close(compiled(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-3, atol=1e-4)
    compiled(input_ids=ids, labels=torch.tensor([0, 1, 1])).loss.backward()
    assert all(p.grad is not None for p in trainable_parameters(model))
