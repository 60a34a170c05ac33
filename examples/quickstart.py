"""Quantize a model once, fine-tune one task through its outlier dimensions, save the task, load it onto a fresh copy of
the base.

The rows are a CSV file's columns "text" and "label" (0, 1, ...). Leaves OUT/base and OUT/NAME.task.
"""

import argparse
import csv
import random
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from prequant_ext import PreQuantConfig, load_task, quantize_model, save_task, trainable_parameters
from prequant_ext.checkpoint import save_model_dir

EXAMPLES = """examples:
  python examples/quickstart.py --toy
  python examples/quickstart.py --model bert-base-uncased --train-file train.csv --eval-file dev.csv \\
      --name reviews --out runs/reviews
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="bert-base-uncased", help="a directory, or a name on the hub (default: %(default)s)"
    )
    parser.add_argument("--train-file", type=Path, help="rows to fine-tune on")
    parser.add_argument("--eval-file", type=Path, help="rows that are held out")
    parser.add_argument(
        "--toy", action="store_true", help="a tiny BERT and generated rows instead: offline, in seconds on one core"
    )
    parser.add_argument("--name", default="task", help="of the task (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"), help="a folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=5e-3,
        help="at first; it falls to 0. Small models want 5e-3, large ones 7e-4 (default: %(default)s)",
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the head, dropout and the order of rows (default: %(default)s)"
    )
    args = parser.parse_args()
    if not args.toy and (args.train_file is None or args.eval_file is None):
        parser.error("name --train-file and --eval-file, or say --toy")
    return args


def read_rows(path):
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [row["text"] for row in rows], [int(row["label"]) for row in rows]


def encode(tokenizer, texts):
    return tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")


def train(model, tokenizer, rows, args):
    parameters = trainable_parameters(model)  # the outlier weights and the head; all else is frozen
    steps = args.epochs * -(-len(rows) // args.batch_size)
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    model.train()
    for _ in range(args.epochs):
        random.shuffle(rows)
        for begin in range(0, len(rows), args.batch_size):
            texts, labels = zip(*rows[begin : begin + args.batch_size], strict=True)
            model(
                **encode(tokenizer, list(texts)).to(model.device), labels=torch.tensor(labels, device=model.device)
            ).loss.backward()
            clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()


@torch.no_grad()
def predict(model, tokenizer, texts):
    model.eval()
    return torch.cat(
        [
            model(**encode(tokenizer, texts[begin : begin + 64]).to(model.device)).logits.argmax(-1).cpu()
            for begin in range(0, len(texts), 64)
        ]
    )


def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    if args.toy:
        import toy

        source = toy.save_model(args.out / "float")
        (texts, labels), (held_out, wanted) = toy.rows("sst2", "train"), toy.rows("sst2", "validation")
    else:
        source = args.model
        (texts, labels), (held_out, wanted) = read_rows(args.train_file), read_rows(args.eval_file)
    wanted = torch.tensor(wanted)
    num_labels = max(labels) + 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels).to(device)

    report = quantize_model(model, PreQuantConfig())
    print(report)
    save_model_dir(model, tokenizer, args.out / "base")  # before fine-tuning: the base belongs to no task

    train(model, tokenizer, list(zip(texts, labels, strict=True)), args)
    predicted = predict(model, tokenizer, held_out)
    accuracy = (predicted == wanted).float().mean().item()
    path = args.out / f"{args.name}.task"
    save_task(
        model, args.name, path, {"accuracy": accuracy, "learning_rate": args.learning_rate, "epochs": args.epochs}
    )

    fresh = AutoModelForSequenceClassification.from_pretrained(args.out / "base", num_labels=num_labels).to(device)
    load_task(fresh, path)
    again = "the same answers" if torch.equal(predict(fresh, tokenizer, held_out), predicted) else "OTHER ANSWERS"
    print(
        f"accuracy {accuracy:.3f} on {len(held_out)} rows; {path} has {path.stat().st_size:,} bytes; on a fresh base: "
        f"{again}"
    )


if __name__ == "__main__":
    main()
