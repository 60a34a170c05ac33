"""Model families as data: which modules of a model read the residual stream and which write to it.

A matrix that reads the residual stream has the hidden size as its input, one that writes to it as its output; with
``axis="hidden"`` the outlier dimensions are input columns of the former and output rows of the latter (Section 4.3; the
paper's parameter counts admit no other reading). A family is one row of ``FAMILIES``; nothing else in the package knows
a model by name.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields


@dataclass(frozen=True)
class Family:
    """Where a model keeps its matrices, in dotted names.

    stacks        block lists by stack name, encoder first; a path may leave out what stands before it: "encoder.layer"
                  is found in "bert.encoder.layer". Rules of ``layer_bits`` name a stack ("decoder.3") or count through
                  all of them ("layers.0-7")
    reads         endings of names, within a block, of matrices whose input is the residual stream (of another stack,
                  too: cross-attention keys)
    writes        ... of matrices whose output is added to it
    heads         parts of the base model that belong to the task: float, trained
    lm_heads      language-model heads: float, not trained
    frozen        pre-trained modules between the base model and the task head: float, not trained
    float_tables  embedding tables that stay float: relative-position biases, tables whose weight the model reads
                  without a lookup

    Raises ValueError naming the field that is not made of names, or a name that both reads and writes.
    """

    stacks: Mapping[str, str]
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    heads: tuple[str, ...] = ()
    lm_heads: tuple[str, ...] = ("lm_head",)
    frozen: tuple[str, ...] = ()
    float_tables: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        is_mapping = isinstance(self.stacks, Mapping) and all(
            isinstance(text, str) for pair in self.stacks.items() for text in pair
        )
        if not is_mapping:
            raise ValueError(
                'Family: stacks must map stack names to block lists, such as {"encoder": "encoder.layer"}, got '
                f"{self.stacks!r}"
            )
        for field in fields(self)[1:]:
            names = getattr(self, field.name)
            if isinstance(names, str) or not all(isinstance(name, str) and name for name in names):
                raise ValueError(f"Family: {field.name} must be a list of module names, got {names!r}")
            object.__setattr__(self, field.name, tuple(names))
        both = set(self.reads) & set(self.writes)
        if both:
            raise ValueError(
                f"Family: a matrix either reads or writes the residual stream, but {', '.join(sorted(both))} stands "
                "in reads and in writes"
            )


_BERT = Family(
    stacks={"encoder": "encoder.layer"},
    reads=("self.query", "self.key", "self.value", "intermediate.dense"),
    writes=("output.dense",),
    heads=("pooler",),
    lm_heads=("cls.predictions",),
)
_ROBERTA = Family(stacks=_BERT.stacks, reads=_BERT.reads, writes=_BERT.writes, heads=_BERT.heads, lm_heads=("lm_head",))
_LLAMA = Family(
    stacks={"decoder": "layers"},
    reads=("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    writes=("o_proj", "down_proj"),
)

FAMILIES: dict[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "distilbert": Family(
        stacks={"encoder": "transformer.layer"},
        reads=("q_lin", "k_lin", "v_lin", "lin1"),
        writes=("out_lin", "lin2"),
        lm_heads=("vocab_transform", "vocab_layer_norm", "vocab_projector"),
    ),
    "electra": Family(
        stacks=_BERT.stacks,
        reads=_BERT.reads,
        writes=_BERT.writes,
        lm_heads=("generator_predictions", "generator_lm_head"),
    ),
    "mpnet": Family(
        stacks={"encoder": "encoder.layer"},
        reads=("attn.q", "attn.k", "attn.v", "intermediate.dense"),
        writes=("attn.o", "output.dense"),
        heads=("pooler",),
        float_tables=("relative_attention_bias",),
    ),
    "deberta-v2": Family(
        stacks={"encoder": "encoder.layer"},
        reads=("query_proj", "key_proj", "value_proj", "pos_key_proj", "pos_query_proj", "intermediate.dense"),
        writes=("output.dense",),
        lm_heads=("cls.predictions", "lm_predictions"),
        float_tables=("rel_embeddings",),
    ),
    "modernbert": Family(
        stacks={"encoder": "layers"},
        reads=("Wqkv", "Wi"),
        writes=("Wo",),
        lm_heads=("decoder",),
        frozen=("head",),
    ),
    "t5": Family(
        stacks={"encoder": "encoder.block", "decoder": "decoder.block"},
        reads=("q", "k", "v", "wi", "wi_0", "wi_1"),
        writes=("o", "wo"),
        heads=("qa_outputs",),  # T5ForQuestionAnswering is its own base model
        float_tables=("relative_attention_bias",),
    ),
    "gpt2": Family(
        stacks={"decoder": "h"},
        reads=("c_attn", "q_attn", "c_fc"),
        writes=("c_proj",),
    ),
    "opt": Family(
        stacks={"decoder": "decoder.layers"},
        reads=("q_proj", "k_proj", "v_proj", "fc1"),
        writes=("out_proj", "fc2"),
    ),
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
}

# What is left alone by its usual name in a model that has no row; such a model needs axis="input" or axis="output",
# which ask for no roles.
UNKNOWN = Family(
    stacks={},
    heads=("pooler",),
    lm_heads=("lm_head", "cls.predictions", "generator_lm_head", "vocab_projector"),
    float_tables=("relative_attention_bias", "rel_embeddings", "distance_embedding"),
)
