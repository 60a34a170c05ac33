"""T5's encoder as a classifier, as the paper uses it: the mean of the last hidden states over the tokens that are not
padding, and a linear head.

transformers classifies with encoder and decoder. Importing this module registers the class with AutoConfig and
AutoModelForSequenceClassification under a model_type of its own; a plain T5 checkpoint is read by
``T5EncoderForSequenceClassification.from_pretrained``, which leaves its decoder aside.
"""

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModelForSequenceClassification, T5Config, T5EncoderModel
from transformers.modeling_outputs import SequenceClassifierOutput
from transformers.models.t5.modeling_t5 import T5PreTrainedModel

from prequant_ext.families import FAMILIES


class T5EncoderConfig(T5Config):
    model_type = "t5_encoder"


class T5EncoderForSequenceClassification(T5PreTrainedModel):
    """logits (batch, num_labels) = classifier(dropout(mean of the last hidden states)). num_labels = 1: a regression,
    whose loss is the squared error.
    """

    config_class = T5EncoderConfig
    base_model_prefix = "transformer"
    _keys_to_ignore_on_load_unexpected: ClassVar = [r"decoder", r"lm_head"]
    _tied_weights_keys: ClassVar = {"transformer.encoder.embed_tokens.weight": "transformer.shared.weight"}
    _prequant_family: ClassVar = FAMILIES["t5"]  # the model_type is its own, the modules are T5's

    def __init__(self, config: T5Config):
        super().__init__(config)
        self.transformer = T5EncoderModel(config)
        self.dropout = nn.Dropout(config.classifier_dropout or config.dropout_rate)
        self.classifier = nn.Linear(config.d_model, config.num_labels)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if module is getattr(self, "classifier", None):
            nn.init.normal_(self.classifier.weight, std=self.config.initializer_factor * self.config.d_model**-0.5)
            nn.init.zeros_(self.classifier.bias)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> SequenceClassifierOutput:
        hidden = self.transformer(
            input_ids=input_ids, attention_mask=attention_mask, inputs_embeds=inputs_embeds, **kwargs
        ).last_hidden_state
        mask = hidden.new_ones(hidden.shape[:2]) if attention_mask is None else attention_mask.to(hidden.dtype)
        mean = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        logits = self.classifier(self.dropout(mean))
        loss = None
        if labels is not None:
            is_regression = self.config.num_labels == 1
            loss = (
                functional.mse_loss(logits.squeeze(-1), labels.to(logits.dtype))
                if is_regression
                else functional.cross_entropy(logits, labels)
            )
        return SequenceClassifierOutput(loss=loss, logits=logits)


AutoConfig.register(T5EncoderConfig.model_type, T5EncoderConfig, exist_ok=True)
AutoModelForSequenceClassification.register(T5EncoderConfig, T5EncoderForSequenceClassification, exist_ok=True)
