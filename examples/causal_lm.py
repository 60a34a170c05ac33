"""Fine-tune a causal language model on a text, through the outlier dimensions of its 4-bit weights.

Prints the perplexity of a held-out text three times: of the float model, once it is quantized, and once it is
fine-tuned. Leaves OUT/base, the quantized model that serves every task, and OUT/NAME.task, what this text has added to
it.
"""

import argparse
import random
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    set_seed,
)

from prequant_ext import PreQuantConfig, quantize_model, trainable_parameters
from prequant_ext.checkpoint import save_model_dir
from prequant_ext.perplexity import perplexity
from prequant_ext.task import save_task

EXAMPLES = """examples:
  python examples/causal_lm.py --toy
  python examples/causal_lm.py --model gpt2 --train-file mine.txt --eval-file held_out.txt --name mine --out runs/mine
  prequant perplexity runs/mine/base --task-file runs/mine/mine.task --text held_out.txt --max-length 256"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="gpt2", help="a directory, or a name on the hub (default: %(default)s)")
    parser.add_argument("--train-file", type=Path, nargs="+", help="texts to fine-tune on")
    parser.add_argument("--eval-file", type=Path, help="a text that is held out")
    parser.add_argument(
        "--toy", action="store_true", help="a tiny Llama and generated texts instead: offline, in seconds on one core"
    )
    parser.add_argument("--name", default="text", help="of the task (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/causal_lm"), help="a folder (default: %(default)s)")
    parser.add_argument("--bits", type=int, default=4, help="of a weight (default: %(default)s)")
    parser.add_argument(
        "--r", type=int, default=5, help="outlier dimensions of a matrix, which are trained (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=200, help="of fine-tuning (default: %(default)s)")
    parser.add_argument(
        "--learning-rate", type=float, default=2e-3, help="at first; it falls to 0 (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=8, help="blocks of a step (default: %(default)s)")
    parser.add_argument(
        "--block-size",
        type=int,
        default=256,
        help="tokens of a block, and of a window of perplexity (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn (default: %(default)s)")
    args = parser.parse_args()
    if args.toy:
        parser.set_defaults(block_size=64, batch_size=16, steps=100)
        args = parser.parse_args()
    elif args.train_file is None or args.eval_file is None:
        parser.error("name --train-file and --eval-file, or say --toy")
    return args


def train(model, tokenizer, text, args, steps, learning_rate):
    """Train what is trainable in ``model`` on ``text``, cut into blocks."""
    tokens = tokenizer(text)["input_ids"]
    blocks = [
        {"input_ids": tokens[begin : begin + args.block_size]}
        for begin in range(0, len(tokens) - args.block_size + 1, args.block_size)
    ]
    if not blocks:
        raise SystemExit(f"the text has {len(tokens)} tokens, less than one block of {args.block_size}")
    schedule = {
        "max_steps": steps,
        "learning_rate": learning_rate,
        "per_device_train_batch_size": args.batch_size,
        "weight_decay": 0.01,
        "seed": args.seed,
    }
    settings = TrainingArguments(args.out, **schedule, logging_steps=50, save_strategy="no", report_to=[])
    Trainer(model, settings, DataCollatorForLanguageModeling(tokenizer, mlm=False), blocks).train()


def made_up_text(topics, seed, sentences):
    """Sentences of a topic's nouns / verbs / prepositions, the topic drawn for each."""
    pick = random.Random(seed).choice
    text = []
    for _ in range(sentences):
        nouns, verbs, prepositions = (part.split() for part in pick(topics).split("/"))
        text.append(f"the {pick(nouns)} {pick(verbs)} the {pick(nouns)} {pick(prepositions)} the {pick(nouns)}.")
    return " ".join(text)


def toy(args):
    """(model, tokenizer, text to fine-tune on, text held out): a Llama that has read of a farm and of the sea shall
    write of the sea alone.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    farm = "farmer horse cow barn field fence goose / feeds sees follows fears leads / behind beside under near"
    sea = "sailor whale gull harbour storm mast island / hears meets passes fears leads / beyond beside above near"
    characters = Tokenizer(
        models.BPE(
            {token: i for i, token in enumerate(["<pad>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}, merges=[]
        )
    )
    characters.pre_tokenizer, characters.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=characters, pad_token="<pad>")
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
    }
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=None, eos_token_id=None, **sizes)
    )
    train(model, tokenizer, made_up_text([farm, sea], 0, sentences=2000), args, steps=250, learning_rate=5e-3)
    return model, tokenizer, made_up_text([sea], 1, sentences=400), made_up_text([sea], 2, sentences=40)


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    if args.toy:
        model, tokenizer, text, held_out = toy(args)
    else:
        model, tokenizer = AutoModelForCausalLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        model.to("cuda" if torch.cuda.is_available() else "cpu")
        tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # GPT-2 has none
        text, held_out = (
            "\n\n".join(path.read_text("utf-8") for path in args.train_file),
            args.eval_file.read_text("utf-8"),
        )

    def measure():
        return perplexity(model, tokenizer(held_out)["input_ids"], max_length=args.block_size)

    perplexities = {"float": measure()}
    report = quantize_model(model, PreQuantConfig(bits=args.bits, r=args.r))
    perplexities[f"{args.bits} bits"] = measure()
    save_model_dir(model, tokenizer, args.out / "base")  # before fine-tuning: the base belongs to no task

    trained = sum(parameter.numel() for parameter in trainable_parameters(model))
    train(model, tokenizer, text, args, args.steps, args.learning_rate)
    perplexities["fine-tuned"] = measure()
    save_task(model, args.name, args.out / f"{args.name}.task")

    inputs = tokenizer(" ".join(held_out.split()[:4]), return_tensors="pt").to(model.device)
    sample = model.eval().generate(**inputs, max_new_tokens=48, do_sample=False)

    print(report.coverage_line())
    print(f"{trained:,} weights were trained, {args.out / args.name}.task has them\n\nmodel       perplexity")
    for name, value in perplexities.items():
        print(f"{name:<12}{value:>10.3f}")
    print(f"\n{tokenizer.decode(sample[0], skip_special_tokens=True)}")


if __name__ == "__main__":
    main()
