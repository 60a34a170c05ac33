"""A batch whose rows belong to many tasks: one mixed call beside the tasks one after another, and beside PEFT's LoRA on
the float model, in the same rounds.

    python bench/mixed_tasks.py                                      64 rows of 64 tokens; 1, 4, 16 and 64 tasks
    python bench/mixed_tasks.py --layers 2 --rows 16 --tasks 1 4

All classify with a BERT of random weights in eval mode under no_grad; rows go to the tasks in turn. "One task" is the
same batch with one task live: what a mixed call costs beyond it is the price of mixing. The error is that of the logits
against the same method's tasks one after another. PEFT mixes through adapter_names; its adapters share one head here.
Needs peft for them: pip install 'prequant_ext[peft]'.
"""

import copy
import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

import reporting
import timing
from prequant_ext import PreQuantConfig, add_task, quantize_model, set_task, task_parameters
from reporting import say
from timing import Contender, Row

FLOAT = "float32, no tasks"
Call = Callable[[], Tensor]


def spread(parameters: Sequence[nn.Parameter], seed: int) -> None:
    """Make a task unlike the others."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def rows_of_tasks(names: Sequence[str]) -> dict[str, Tensor]:
    """Task -> its rows."""
    return {name: torch.tensor([row for row, own in enumerate(names) if own == name]) for name in dict.fromkeys(names)}


def one_after_another(names: Sequence[str], logits: Callable[[str, Tensor], Tensor]) -> Call:
    """A pass of the rows of each task, put back in the batch's order."""
    rows = rows_of_tasks(names)

    def call() -> Tensor:
        parts = [logits(name, own) for name, own in rows.items()]
        return torch.cat(parts)[torch.cat(list(rows.values())).argsort()]

    return call


def prequant_calls(base: nn.Module, ids: Tensor, names: Sequence[str]) -> dict[str, Call]:
    model = copy.deepcopy(base)
    quantize_model(model, PreQuantConfig())
    for seed, name in enumerate(dict.fromkeys(names)):
        add_task(model, name)
        spread(task_parameters(model, name), seed)

    def logits(name: str, rows: Tensor) -> Tensor:
        set_task(model, name)
        return model(input_ids=ids[rows]).logits

    return {
        "prequant, one task": lambda: model(input_ids=ids).logits,
        "prequant, mixed": lambda: model(input_ids=ids, task_names=names).logits,
        "prequant, one after another": one_after_another(names, logits),
    }


def lora_calls(base: nn.Module, ids: Tensor, names: Sequence[str]) -> dict[str, Call]:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=8, target_modules=["query", "key", "value", "dense"], exclude_modules=".*pooler.*")
    first, *others = dict.fromkeys(names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(copy.deepcopy(base), config, adapter_name=first)
        for name in others:
            model.add_adapter(name, config)
    for seed, name in enumerate((first, *others)):
        spread([parameter for key, parameter in model.named_parameters() if f".{name}." in key], seed)
    model.eval()

    def logits(name: str, rows: Tensor) -> Tensor:
        model.set_adapter(name)
        return model(input_ids=ids[rows]).logits

    return {
        "LoRA r=8, mixed": lambda: model(input_ids=ids, adapter_names=names).logits,
        "LoRA r=8, one after another": one_after_another(names, logits),
    }


def results_table(rows: Sequence[Row]) -> str:
    titles = ["tasks", "threads", "way", "ms", "×", "rows/s", "difference of the logits"]
    return reporting.table(
        titles,
        (
            [
                str(row["tasks"]),
                str(row["threads"]),
                row["name"],
                f"{row['milliseconds']:.1f}",
                f"{row['speedup']:.2f}{reporting.mark([row])}",
                f"{1e3 * row['rows'] / row['milliseconds']:.0f}",
                "–" if row["error"] is None else f"{row['error']:.1e}",
            ]
            for row in rows
        ),
    )


def measure(
    base: nn.Module, ids: Tensor, tasks: int, threads: int, peaks: timing.Peaks, rounds: int, budget: float
) -> tuple[list[Row], dict[str, str]]:
    """A row for each way to serve ``tasks`` tasks, and the reasons of those that cannot run here."""
    names = [f"task{row % tasks}" for row in range(len(ids))]
    calls: dict[str, Call] = {FLOAT: lambda: base(input_ids=ids).logits, **prequant_calls(base, ids, names)}
    missing = {}
    try:
        calls |= lora_calls(base, ids, names)
    except ImportError as error:
        missing["LoRA"] = str(error)
    errors = {
        mixed: timing.relative_error(call(), calls[mixed.replace("mixed", "one after another")]().double())
        for mixed, call in calls.items()
        if "mixed" in mixed
    }
    config = base.config
    flops = timing.encoder_flops(config.num_hidden_layers, config.hidden_size, *ids.shape)  # type: ignore[union-attr,arg-type]
    contenders = [Contender(name, call, FLOAT, flops, error=errors.get(name)) for name, call in calls.items()]
    rows = timing.measure(contenders, rounds, budget, threads, peaks)
    say(
        f"{threads} thread(s), {tasks} tasks: "
        + ", ".join(f"{row['name']} {row['milliseconds']:.0f} ms" for row in rows)
    )
    return [{**row, "tasks": tasks, "rows": len(ids), "seq": ids.shape[1]} for row in rows], missing


@torch.no_grad()
def main() -> None:
    parser = reporting.options(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=4, help="default: 4")
    parser.add_argument("--hidden", type=int, default=768, help="default: 768")
    parser.add_argument("--rows", type=int, default=64, help="of the batch; default: 64")
    parser.add_argument("--seq", type=int, default=64, help="default: 64")
    parser.add_argument("--tasks", nargs="+", type=int, default=[1, 4, 16, 64], help="default: 1 4 16 64")
    parser.add_argument(
        "--budget", type=float, default=30.0, help="seconds for the rounds of one number of tasks; default: 30"
    )
    arguments = parser.parse_args()
    from transformers import BertConfig, BertForSequenceClassification

    about = reporting.header(arguments.threads, ["transformers", "peft"])
    by_threads = {threads: timing.peaks(threads) for threads in arguments.threads}
    torch.manual_seed(0)
    heads = max(1, arguments.hidden // 64)
    shape = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * arguments.hidden,
    }
    base = BertForSequenceClassification(BertConfig(max_position_embeddings=max(512, arguments.seq), **shape)).eval()
    ids = torch.randint(1000, 30000, (arguments.rows, arguments.seq), generator=torch.Generator().manual_seed(0))
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for tasks in arguments.tasks:
        for threads, peak in by_threads.items():
            torch.set_num_threads(threads)
            found, absent = measure(base, ids, tasks, threads, peak, arguments.rounds, arguments.budget)
            rows, missing = rows + found, missing | absent
    model = {"layers": arguments.layers, "hidden": arguments.hidden}
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, model=model, missing=missing))
    print(reporting.headline(about))
    print(
        f"BERT of {arguments.layers} layers of {arguments.hidden}, {arguments.rows} rows of {arguments.seq} tokens. "
        f"×: speed of {FLOAT}, same rounds. *: noisy"
    )
    print(results_table(rows))
    print(reporting.missing_lines(missing))


if __name__ == "__main__":
    main()
