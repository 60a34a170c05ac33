"""The experiment behind the README's table: full fine-tuning, PreQuant, and PreQuant on random dimensions, by the same rules.

    python -m prequant_ext.glue.compare --tasks sst2,mrpc --seeds 0,1,2 --methods ft,prequant,random -o runs.jsonl
    python -m prequant_ext.glue.compare table runs.jsonl

Every method searches a grid of four learning rates with the lowest seed, on each task or (--search-task) on one of them for all, and runs the other seeds
at the best one. One process a run, one line a run in runs.jsonl; runs that are there already are skipped, so an interrupted experiment goes on when started
again. The table is made from the lines alone.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

from prequant_ext.glue import metrics
from prequant_ext.glue.runner import Line, perform, read_lines
from prequant_ext.glue.tasks import get_task, load_rows

GRID = {"ft": (3e-5, 5e-5, 1e-4, 2e-4), "prequant": (1e-3, 2e-3, 5e-3, 1e-2), "random": (1e-3, 2e-3, 5e-3, 1e-2)}
TITLES = {"ft": "full fine-tuning", "prequant": "PreQuant, outlier dimensions", "random": "PreQuant, random dimensions"}
LIMITS = {"sst2": {"epochs": 6, "max_train": 4000, "max_length": 64}, "mrpc": {"epochs": 5}}  # of single tasks; the rest: all rows, 128 tokens, EPOCHS
EPOCHS, BATCH = 3, 32

app = typer.Typer(help=__doc__, add_completion=False)


@dataclass(frozen=True)
class Run:
    """One training of the experiment; equal runs are the same line."""

    task: str
    method: str
    lr: float
    seed: int

    def settings(self, model: str, data_dir: str | None, data: str) -> dict[str, Any]:
        """Keyword arguments of train.Settings. ``random`` draws its dimensions from the run's seed, so a mean over seeds is one over draws too."""
        quantization = None
        if self.method != "ft":
            quantization = {"selector": "random", "seed": self.seed} if self.method == "random" else {}
        common = {"model": model, "task": self.task, "data": data, "data_dir": data_dir, "lr": self.lr, "seed": self.seed, "quantization": quantization}
        sizes = {"epochs": EPOCHS, "batch_size": BATCH, "max_length": 128} | LIMITS.get(self.task, {})
        return common | sizes | {"method": "ft" if self.method == "ft" else "prequant"}


def run_of(line: Line) -> Run:
    return Run(line["task"], line["arm"], line["lr"], line["seed"])


def rates_tried(lines: Sequence[Line], task: str, method: str, seed: int) -> dict[float, float]:
    """Learning rate -> score of ``seed``'s finished runs."""
    return {line["lr"]: line["score"] for line in lines if (line["task"], line["arm"], line["seed"]) == (task, method, seed)}


def best_rate(tried: dict[float, float]) -> float:
    """The learning rate with the best score, the smaller one of equals."""
    return max(tried, key=lambda rate: (tried[rate], -rate))


def ready(lines: Sequence[Line], tasks: Sequence[str], methods: Sequence[str], seeds: Sequence[int], search_task: str | None = None) -> Iterator[Run]:
    """Every run of the experiment that can be started with what ``lines`` tell: the grid of the lowest seed, then the other seeds at the best rate.

    ``search_task``: the one task whose grid is searched; the others run at its rates. None: each task searches its own.
    """
    for task in tasks:
        if search_task in (None, task):
            for method in methods:
                yield from (Run(task, method, rate, seeds[0]) for rate in GRID[method])
    for task in tasks:
        for method in methods:
            tried = rates_tried(lines, search_task or task, method, seeds[0])
            if set(GRID[method]) <= set(tried):
                rate = best_rate(tried)
                first = 1 if search_task in (None, task) else 0  # the grid has run the lowest seed already
                yield from (Run(task, method, rate, seed) for seed in seeds[first:])


@app.callback(invoke_without_command=True)
def compare(
    context: typer.Context,
    tasks: Annotated[str, typer.Option(help="GLUE tasks, separated by commas")] = "sst2,mrpc",
    seeds: Annotated[str, typer.Option(help="the lowest one searches the learning rate")] = "0,1,2",
    methods: Annotated[str, typer.Option(help="of ft, prequant, random")] = "ft,prequant,random",
    out: Annotated[Path, typer.Option("-o", "--out", help="one JSON line a run; finished runs in it are skipped")] = Path("runs.jsonl"),
    model: Annotated[str, typer.Option(help="float model: a directory, a hub name, or minilm")] = "minilm",
    search_task: Annotated[str | None, typer.Option(help="search the learning rates on this task only, and use them for all")] = None,
    data_dir: Annotated[str | None, typer.Option(help="folder of <task>/{train,validation}.jsonl[.gz]")] = None,
    data: Annotated[str, typer.Option(help="glue or synthetic")] = "glue",
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="runs side by side")] = 2,
) -> None:
    """Run what is missing in OUT. Example: python -m prequant_ext.glue.compare --tasks sst2 -o runs.jsonl"""
    if context.invoked_subcommand is not None:
        return
    from prequant_ext.glue.models import resolve_model  # torch and transformers: seconds that the table does not need

    task_names, method_names, seed_numbers = tasks.split(","), methods.split(","), sorted({int(seed) for seed in seeds.split(",")})
    for task in task_names:
        for split in ("train", "validation"):
            load_rows(get_task(task), split, data_dir, data)  # a missing file stops the experiment here, not after an hour
    for method in method_names:
        if method not in GRID:
            raise typer.BadParameter(f"methods must be of {', '.join(GRID)}, got {method!r}")
    path, lines = resolve_model(model), read_lines(out)
    if out.exists():
        out.write_text("".join(json.dumps(line) + "\n" for line in lines))  # drops a cut-off last line before appending after it
    running: dict[Future, Run] = {}
    failed: set[Run] = set()
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            taken = {run_of(line) for line in lines} | set(running.values()) | failed
            for run in ready(lines, task_names, method_names, seed_numbers, search_task):
                if len(running) < jobs and run not in taken:
                    running[pool.submit(perform, run.settings(path, data_dir, data), threads)] = run
                    taken.add(run)
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if (error := future.exception()) is not None:
                    failed.add(run)
                    print(f"error: {run} failed with {error}", file=sys.stderr)
                    continue
                line = {"arm": run.method} | future.result() | {"model": model}  # the name that was given, not the folder it has on this machine
                lines.append(line)
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                print(f"{run.task:6} {run.method:9} lr {run.lr:g} seed {run.seed}: {100 * line['score']:.2f} in {line['seconds']:.0f} s", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


# ---- the table ----------------------------------------------------------------------------------------------------------


def chosen(lines: Sequence[Line], task: str, method: str) -> list[Line]:
    """One line a seed, at the best learning rate of the lowest seed, found on this task or on the one that was searched for all."""
    of_arm = [line for line in lines if (line["task"], line["arm"]) == (task, method)]
    if not of_arm:
        return []
    rate = best_rate(rates_tried(lines, searched_task(lines, task, method), method, min(line["seed"] for line in lines)))
    return sorted((line for line in of_arm if line["lr"] == rate), key=lambda line: line["seed"])


def searched_task(lines: Sequence[Line], task: str, method: str) -> str:
    """The task whose grid gave ``task`` its learning rate: its own where it has run at more than one."""
    rates = {name: {line["lr"] for line in lines if (line["task"], line["arm"]) == (name, method)} for name in dict.fromkeys(line["task"] for line in lines)}
    return task if len(rates[task]) > 1 else max(rates, key=lambda name: len(rates[name]))


def correctness(lines: Sequence[Line], labels: np.ndarray) -> np.ndarray:
    """(seeds, examples) 0/1."""
    return np.stack([metrics.unpack(line["predictions"], is_regression=False) == labels for line in lines])


def table_lines(lines: Sequence[Line]) -> Iterator[str]:
    """The markdown table and its notes, from the runs alone."""
    yield "| task | method | learning rate | score, mean of seeds (each) | of full fine-tuning | trained | model | peak memory |"
    yield "|---|---|---|---|---|---|---|---|"
    names = list(dict.fromkeys(line["task"] for line in lines))
    notes: list[str] = []
    for name in names:
        task = get_task(name)
        arms = {method: chosen(lines, name, method) for method in GRID}
        reference = np.mean([line["score"] for line in arms["ft"]]) if arms["ft"] else None
        for method, runs in arms.items():
            if not runs:
                continue
            scores = [100 * line["score"] for line in runs]
            share = "" if reference is None else f"{np.mean(scores) / reference:.1f} %"
            cells = [
                f"{name} ({task.metrics[0]})",
                TITLES[method],
                f"{runs[0]['lr']:g}",
                f"{np.mean(scores):.2f} ({', '.join(f'{score:.2f}' for score in scores)})",
                share,
                f"{runs[0]['trainable_parameters']:,}",
                f"{runs[0]['model_bytes'] / 1e6:.1f} MB",
                f"{np.mean([line['peak_memory_mb'] for line in runs]):.0f} MB",
            ]
            yield f"| {' | '.join(cells)} |"
        searched = searched_task(lines, name, next(method for method, runs in arms.items() if runs)) if any(arms.values()) else name
        notes += _notes(lines, name, arms, searched)
    yield ""
    yield from (f"- {note}" for note in notes)


def _notes(lines: Sequence[Line], name: str, arms: dict[str, list[Line]], searched: str) -> Iterator[str]:
    task, first = get_task(name), next(runs[0] for runs in arms.values() if runs)
    seeds = sorted({line["seed"] for runs in arms.values() for line in runs})
    tried = {method: sorted(rates_tried(lines, searched, method, seeds[0])) for method, runs in arms.items() if runs}
    grids = "; ".join(f"{method} {', '.join(f'{rate:g}' for rate in rates)}" for method, rates in tried.items())
    yield (
        f"{name}: {first['n_train']:,} training rows, {first['n_validation']:,} validation rows, {first['epochs']} epochs, batch {first['batch_size']}, "
        f"max_length {first['max_length']}, best epoch of each run, seeds {', '.join(map(str, seeds))}; "
        f"learning rates tried on {searched} with seed {seeds[0]}: {grids}; "
        f"memory of training with {first['environment']['threads']} thread(s), above what the imports hold."
    )
    outlier, randoms = arms["prequant"], arms["random"]
    shared = sorted({line["seed"] for line in outlier} & {line["seed"] for line in randoms})
    if not shared or task.is_regression:
        return
    labels = metrics.unpack(outlier[0]["labels"], is_regression=False)
    first_arm, second_arm = (correctness([line for line in runs if line["seed"] in shared], labels) for runs in (outlier, randoms))
    difference, low, high = (100 * value for value in metrics.paired_bootstrap(first_arm, second_arm))
    yield (
        f"{name}, accuracy, outlier minus random dimensions: {difference:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f} "
        f"(paired bootstrap over the validation examples, 10,000 resamples, {len(shared)} seeds pooled)."
    )


@app.command("table")
def table(runs: Annotated[Path, typer.Argument(help="the lines of run")]) -> None:
    """Print the markdown table of RUNS. Example: python -m prequant_ext.glue.compare table runs.jsonl"""
    lines = read_lines(runs)
    if not lines:
        print(f"{runs} holds no finished run", file=sys.stderr)
        raise typer.Exit(2)
    print("\n".join(table_lines(lines)))


if __name__ == "__main__":
    app()
