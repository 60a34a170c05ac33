"""Runs the trainings of an experiment: one process and one JSON line each. What has run is skipped, so a killed
experiment goes on when it is started again.

Learning rates
    quick    one of each method (train.LEARNING_RATES), or the middle of an arm's own grid
    once     each method's best of its grid on one task, by the lowest seed and after SEARCH_EPOCHS, then used for all
             of its arms without a grid of their own
    each     the best of the grid for each arm and task, by the lowest seed, with all epochs (the paper's way)

A rate that is given, for a method or for a method on one task, is searched by none of them; arms with a grid of their
own do not take it.
"""

import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prequant_ext.study.experiments import GRIDS, Arm, Experiment

SEARCHES = ("quick", "once", "each")
SEARCH_TASK, SEARCH_EPOCHS = "sst2", 1
# of single tasks
LIMITS: dict[str, dict[str, int]] = {"sst2": {"max_train": 4000, "max_length": 64}, "qnli": {"max_train": 4000}}
EPOCHS, BATCH, MAX_LENGTH = 3, 32, 128
SEEDS = (0, 1, 2)

Line = dict[str, Any]
Wanted = dict[str, Any]  # keyword arguments of train.Settings but for the model's folder and the data's


@dataclass(frozen=True)
class Plan:
    """An experiment on a model: ``seeds`` ascending, the first of which searches learning rates; ``rates`` are those
    given, by METHOD or TASK/METHOD.
    """

    experiment: Experiment
    tasks: Sequence[str]
    seeds: Sequence[int]
    search: str
    data: str = "glue"
    epochs: int = EPOCHS
    max_train: int | None = None  # of every task that the experiment leaves whole; None: LIMITS
    rates: Mapping[str, float] = field(default_factory=dict)

    def settings(self, arm: Arm, task: str, lr: float, seed: int, epochs: int | None = None) -> Wanted:
        quantization = None if arm.quantization is None else dict(arm.quantization)
        if arm.seeds_selector and quantization is not None:
            quantization["seed"] = seed
        limits = LIMITS.get(task, {})
        options = {"options": dict(arm.options)} if arm.options else {}
        return options | {
            "task": task,
            "method": arm.method,
            "quantization": quantization,
            "lr": lr,
            "seed": seed,
            "epochs": epochs or self.epochs,
            "batch_size": BATCH,
            "max_length": limits.get("max_length", MAX_LENGTH),
            "max_train": arm.max_train or self.max_train or limits.get("max_train"),
            "data": self.data,
        }

    def possible(self, lines: Sequence[Line]) -> Iterator[Wanted]:
        """Every run that can be started with what ``lines`` tell; searches first."""
        scores = scores_of(lines)
        for arm, task in self.cells():
            yield from self._searching(arm, task)
        for arm, task in self.cells():
            lr = self.rate(arm, task, scores)
            if lr is not None:
                yield from (self.settings(arm, task, lr, seed) for seed in self.seeds)

    def rate(self, arm: Arm, task: str, scores: dict[str, float]) -> float | None:
        """The learning rate of an arm on a task; None while its search has not ended."""
        if (given := self.given(arm, task)) is not None:
            return given
        if self.search == "quick":
            from prequant_ext.glue.train import LEARNING_RATES

            return arm.grid[len(arm.grid) // 2] if arm.grid else LEARNING_RATES[arm.method]
        tried = {wanted["lr"]: scores.get(identity(wanted)) for wanted in self._searching(arm, task)}
        found = {lr: score for lr, score in tried.items() if score is not None}
        return max(found, key=lambda lr: (found[lr], -lr)) if len(found) == len(tried) else None

    def given(self, arm: Arm, task: str) -> float | None:
        """The learning rate that an arm need not search on a task.
        One of the task goes before one of the method alone.
        """
        return None if arm.grid else self.rates.get(f"{task}/{arm.method}", self.rates.get(arm.method))

    def cells(self) -> list[tuple[Arm, str]]:
        return [(arm, task) for task in self.tasks for arm in self.experiment.arms]

    def every(self, lines: Sequence[Line]) -> dict[str, Wanted]:
        """All runs that there will be, by identity. A learning rate that is not known yet stands at the first of its
        grid.
        """
        scores, runs = scores_of(lines), [wanted for arm, task in self.cells() for wanted in self._searching(arm, task)]
        for arm, task in self.cells():
            lr = self.rate(arm, task, scores)
            # A search of the same length has run the lowest seed at the best rate.
            seeds = self.seeds[1:] if lr is None and self.search == "each" else self.seeds
            runs += [self.settings(arm, task, _grid(arm)[0] if lr is None else lr, seed) for seed in seeds]
        return {identity(wanted): wanted for wanted in runs}

    def _searching(self, arm: Arm, task: str) -> Iterator[Wanted]:
        if self.given(arm, task) is not None:
            return
        if self.search == "each":
            yield from (self.settings(arm, task, lr, self.seeds[0]) for lr in _grid(arm))
        elif self.search == "once":
            plain = Arm(
                arm.method, arm.method, None if arm.quantization is None else {}, seeds_selector=arm.seeds_selector
            )
            yield from (
                self.settings(arm if arm.grid else plain, SEARCH_TASK, lr, self.seeds[0], SEARCH_EPOCHS)
                for lr in _grid(arm)
            )


def _grid(arm: Arm) -> Sequence[float]:
    return arm.grid or GRIDS[arm.method]


def identity(wanted: Wanted) -> str:
    """What makes two runs the same."""
    return json.dumps(wanted, sort_keys=True)


def scores_of(lines: Sequence[Line]) -> dict[str, float]:
    return {identity(line["wanted"]): line["score"] for line in lines}


def read_lines(path: Path) -> list[Line]:
    """The finished runs. A last line without its newline was cut off by a kill and does not count."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]


def perform(settings: dict[str, Any], threads: int, processes: int = 1) -> Line:
    """Train in a process of its own: peak memory is per process, and threads are set before torch starts. Several
    ``processes``, one a GPU, by torchrun.

    Raises RuntimeError with what it said.
    """
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "TOKENIZERS_PARALLELISM": "false",
    }
    launcher = (
        [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    )
    command = [sys.executable, *launcher, "-m", "prequant_ext.study.worker", json.dumps(settings)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr.strip()[-6000:]}")
    return json.loads(done.stdout)


def estimate(missing: Iterable[Wanted], lines: Sequence[Line]) -> float | None:
    """Seconds of ``missing``, one after another, at the pace of ``lines``: of the same task and method, else of the
    task, else of all; None without lines.
    """
    paces: dict[tuple[str | None, str | None], list[float]] = defaultdict(list)
    rows: dict[str, int] = {}
    for line in lines:
        task, method = line["wanted"]["task"], line["wanted"]["method"]
        for key in ((task, method), (task, None), (None, None)):
            paces[key].append(line["seconds"] / (line["n_train"] * line["epochs"]))
        rows[task] = max(line["n_train"], rows.get(task, 0))
    if not rows:
        return None

    def seconds(wanted: Wanted) -> float:
        task = wanted["task"]
        key = next(key for key in ((task, wanted["method"]), (task, None), (None, None)) if key in paces)
        return (
            statistics.median(paces[key])
            * wanted["epochs"]
            * (wanted["max_train"] or rows.get(task) or max(rows.values()))
        )

    return sum(map(seconds, missing))


def progress(plan: Plan, lines: Sequence[Line], jobs: int) -> str:
    """What is done of ``plan``, and how long the rest takes with ``jobs`` runs side by side."""
    every, done = plan.every(lines), set(scores_of(lines))
    missing = [wanted for key, wanted in every.items() if key not in done]
    seconds = estimate(missing, lines) if missing else None
    left = "" if seconds is None else f", about {seconds / jobs / 60:.0f} minutes left"
    return f"{len(every) - len(missing)} of {len(every)} runs done{left}"


def run(
    plan: Plan,
    out: Path,
    model: str,
    path: str,
    data_dir: str | None,
    threads: int,
    jobs: int,
    say: Any,
    processes: int = 1,
) -> list[str]:
    """Append the missing runs of ``plan`` to ``out``, ``jobs`` at a time; what failed comes back as messages.

    ``model`` is the name that the lines keep, ``path`` the folder it has here; ``threads`` and ``processes`` are of
    each run.
    """
    lines = read_lines(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():  # drops a cut-off last line before appending after it
        temporary = out.with_name(f"{out.name}.tmp")
        temporary.write_text("".join(json.dumps(line) + "\n" for line in lines))
        os.replace(temporary, out)
    own = [line for line in lines if line["model"] == model]
    running: dict[Future, Wanted] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            done = set(scores_of(own))
            possible = {identity(wanted): wanted for wanted in plan.possible(own)}
            taken = done | {identity(wanted) for wanted in running.values()} | set(failed)
            for key, wanted in possible.items():
                if len(running) < jobs and key not in taken:
                    running[
                        pool.submit(perform, {**wanted, "model": path, "data_dir": data_dir}, threads, processes)
                    ] = wanted
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                wanted = running.pop(future)
                if (error := future.exception()) is not None:
                    failed[identity(wanted)] = f"{describe(wanted)} failed: {error}"
                    say(failed[identity(wanted)])
                    continue
                line = {"wanted": wanted} | future.result() | {"model": model}
                own.append(line)
                with out.open("a") as file:
                    file.write(json.dumps(line) + "\n")
                say(
                    f"{describe(wanted)}: {100 * line['score']:.2f} in {line['seconds']:.0f} s; "
                    f"{progress(plan, own, jobs)}"
                )
    return list(failed.values())


def describe(wanted: Wanted) -> str:
    changed = ", ".join(
        f"{name} {value}" for name, value in ((wanted["quantization"] or {}) | wanted.get("options", {})).items()
    )
    rows = f", {wanted['max_train']:,} rows" if wanted["max_train"] else ""
    name = f"{wanted['method']} ({changed})" if changed else wanted["method"]
    return f"{wanted['task']} {name}, lr {wanted['lr']:g}, seed {wanted['seed']}, {wanted['epochs']} epochs{rows}"
