"""Several tasks on one quantized base: train them one after another, keep each as a file, then answer a batch whose
rows belong to different tasks.

A task is a CSV file with the columns "text" and "label" (0, 1, ...); its name is the file's. All tasks have as many
labels as the one with most. Leaves OUT/base and OUT/NAME.task for each.
"""

import argparse
from pathlib import Path

import quickstart
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, set_seed

from prequant_ext import PreQuantConfig, add_task, list_tasks, load_task, quantize_model, save_task, set_task
from prequant_ext.checkpoint import save_model_dir

EXAMPLES = """examples:
  python examples/many_tasks.py --toy
  python examples/many_tasks.py --model bert-base-uncased --train-files reviews.csv questions.csv --out runs/two_tasks
"""


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", default="bert-base-uncased", help="a directory, or a name on the hub (default: %(default)s)"
    )
    parser.add_argument("--train-files", type=Path, nargs="+", help="a file of rows for each task")
    parser.add_argument(
        "--toy", action="store_true", help="a tiny BERT and generated rows instead: offline, in seconds on one core"
    )
    parser.add_argument("--out", type=Path, default=Path("runs/many_tasks"), help="a folder (default: %(default)s)")
    parser.add_argument("--epochs", type=int, default=3, help="default: %(default)s")
    parser.add_argument(
        "--learning-rate", type=float, default=5e-3, help="at first; it falls to 0 (default: %(default)s)"
    )
    parser.add_argument("--batch-size", type=int, default=32, help="default: %(default)s")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the head, dropout and the order of rows (default: %(default)s)"
    )
    args = parser.parse_args()
    if not args.toy and args.train_files is None:
        parser.error("name --train-files, or say --toy")
    return args


def toy_tasks(out):
    """(model, tasks): which of two topics a text is about, and the same question answered the other way round."""
    import toy

    texts, labels = toy.rows("sst2", "train")
    return toy.save_model(out / "float"), {
        "topic": (texts, labels),
        "other-topic": (texts, [1 - label for label in labels]),
    }


@torch.no_grad()
def main() -> None:
    args = parse_arguments()
    set_seed(args.seed)
    if args.toy:
        source, tasks = toy_tasks(args.out)
    else:
        source, tasks = args.model, {path.stem: quickstart.read_rows(path) for path in args.train_files}
    num_labels = max(max(labels) for _, labels in tasks.values()) + 1
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = AutoTokenizer.from_pretrained(source)
    model = AutoModelForSequenceClassification.from_pretrained(source, num_labels=num_labels).to(device)
    quantize_model(model, PreQuantConfig())
    save_model_dir(model, tokenizer, args.out / "base")

    for name, (texts, labels) in tasks.items():
        add_task(model, name)  # starts from the base, and is live
        with torch.enable_grad():
            quickstart.train(model, tokenizer, list(zip(texts, labels, strict=True)), args)
        save_task(model, name, args.out / f"{name}.task")

    server = (
        AutoModelForSequenceClassification.from_pretrained(args.out / "base", num_labels=num_labels).to(device).eval()
    )
    for name in tasks:
        load_task(server, args.out / f"{name}.task")
    sizes = ", ".join(f"{name} {(args.out / f'{name}.task').stat().st_size:,} bytes" for name in list_tasks(server))
    print(
        f"one base, {sum(path.stat().st_size for path in (args.out / 'base').glob('*.safetensors')):,} bytes, and "
        f"{sizes}"
    )

    texts = [texts[row] for row in range(4) for texts, _ in tasks.values()]
    names = list(tasks) * 4
    batch = quickstart.encode(tokenizer, texts).to(device)
    mixed = server(**batch, task_names=names).logits
    for row, (name, text) in enumerate(zip(names, texts, strict=True)):
        print(f"{name:<16}{mixed[row].argmax().item()}  {text[:70]}")

    apart = torch.empty_like(mixed)
    for name in tasks:
        set_task(server, name)  # in place: no parameter moves, nothing is compiled anew
        own = [row for row, other in enumerate(names) if other == name]
        apart[own] = server(**{key: values[own] for key, values in batch.items()}).logits
    print(
        f"largest difference between the mixed batch and one task at a time: {(mixed - apart).abs().max().item():.1e}"
    )


if __name__ == "__main__":
    main()
