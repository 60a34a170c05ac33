"""Runs the trainings of an experiment: one process and one JSON line each. What has run is skipped, so a killed
experiment goes on when it is started again.

Learning rates
    quick    one of each method (run.LEARNING_RATES), or the middle of an arm's own grid
    once     each method's best of its grid on one task, by the lowest seed and after SEARCH_EPOCHS, then used for all
             of its arms without a grid of their own
    each     the best of the grid for each arm and task, by the lowest seed, with all epochs (the paper's way)

A rate that is given, for a method or for a method on one task, is searched by none of them; arms with a grid of their
own do not take it.
"""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path

from prequant_ext.glue.run import LEARNING_RATES, FinishedRun, RunResult, RunSettings
from prequant_ext.study.experiments import GRIDS, Arm, Experiment
from prequant_ext.task_file import write_atomically

SEARCHES = ("quick", "once", "each")
SEARCH_TASK, SEARCH_EPOCHS = "sst2", 1
# of single tasks
LIMITS: dict[str, dict[str, int]] = {"sst2": {"max_train": 4000, "max_length": 64}, "qnli": {"max_train": 4000}}
EPOCHS, BATCH, MAX_LENGTH = 3, 32, 128
SEEDS = (0, 1, 2)


@dataclass(frozen=True)
class Plan:
    """An experiment on a model: ``seeds`` ascending, the first of which searches learning rates; ``rates`` are those
    given, by METHOD or TASK/METHOD.
    """

    experiment: Experiment
    model: str
    tasks: Sequence[str]
    seeds: Sequence[int]
    search: str
    data: str = "glue"
    epochs: int = EPOCHS
    max_train: int | None = None  # of every task that the experiment leaves whole; None: LIMITS
    rates: Mapping[str, float] = field(default_factory=dict)

    def settings(self, arm: Arm, task: str, lr: float, seed: int, epochs: int | None = None) -> RunSettings:
        quantization = None if arm.quantization is None else dict(arm.quantization)
        if arm.seeds_selector and quantization is not None:
            quantization["seed"] = seed
        limits = LIMITS.get(task, {})
        return RunSettings(
            self.model,
            task,
            arm.method,
            data=self.data,
            epochs=epochs or self.epochs,
            lr=lr,
            seed=seed,
            batch_size=BATCH,
            max_length=limits.get("max_length", MAX_LENGTH),
            max_train=arm.max_train or self.max_train or limits.get("max_train"),
            quantization=quantization,
            options=None if arm.options is None else dict(arm.options),
        )

    def possible(self, finished: Sequence[FinishedRun]) -> Iterator[RunSettings]:
        """Every run that can be started with what ``finished`` tells; searches first."""
        scores = scores_of(finished)
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
            return arm.grid[len(arm.grid) // 2] if arm.grid else LEARNING_RATES[arm.method]
        tried = {run.learning_rate: scores.get(run.identity) for run in self._searching(arm, task)}
        found = {lr: score for lr, score in tried.items() if score is not None}
        return max(found, key=lambda lr: (found[lr], -lr)) if len(found) == len(tried) else None

    def given(self, arm: Arm, task: str) -> float | None:
        """The learning rate that an arm need not search on a task.
        One of the task goes before one of the method alone.
        """
        return None if arm.grid else self.rates.get(f"{task}/{arm.method}", self.rates.get(arm.method))

    def cells(self) -> list[tuple[Arm, str]]:
        return [(arm, task) for task in self.tasks for arm in self.experiment.arms]

    def every(self, finished: Sequence[FinishedRun]) -> dict[str, RunSettings]:
        """All runs that there will be, by identity. A learning rate that is not known yet stands at the first of its
        grid.
        """
        scores, runs = scores_of(finished), [run for arm, task in self.cells() for run in self._searching(arm, task)]
        for arm, task in self.cells():
            lr = self.rate(arm, task, scores)
            # A search of the same length has run the lowest seed at the best rate.
            seeds = self.seeds[1:] if lr is None and self.search == "each" else self.seeds
            runs += [self.settings(arm, task, _grid(arm)[0] if lr is None else lr, seed) for seed in seeds]
        return {run.identity: run for run in runs}

    def _searching(self, arm: Arm, task: str) -> Iterator[RunSettings]:
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


def scores_of(finished: Sequence[FinishedRun]) -> dict[str, float]:
    """By identity."""
    return {run.settings.identity: run.result.score for run in finished}


def read_runs(path: Path) -> list[FinishedRun]:
    """The finished runs, [] where there is no file. Raises ValueError naming the line that is none."""
    runs = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            runs.append(FinishedRun.from_line(line))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{path}, line {number} is no finished run: {type(error).__name__}: {error}") from error
    return runs


def _whole_lines(path: Path) -> list[str]:
    """A last line without its newline was cut off by a kill and does not count."""
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [line for line in lines if line.endswith("\n")]


def perform(settings: RunSettings, threads: int, processes: int = 1) -> RunResult:
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
    command = [sys.executable, *launcher, "-m", "prequant_ext.study.worker", json.dumps(vars(settings))]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr.strip()[-6000:]}")
    return RunResult.from_json(done.stdout)


def estimate(missing: Iterable[RunSettings], finished: Sequence[FinishedRun]) -> float | None:
    """Seconds of ``missing``, one after another, at the pace of ``finished``: of the same task and method, else of the
    task, else of all; None where nothing has finished.
    """
    paces: dict[tuple[str | None, str | None], list[float]] = defaultdict(list)
    rows: dict[str, int] = {}
    for run in finished:
        task, result = run.settings.task, run.result
        for key in ((task, run.settings.method), (task, None), (None, None)):
            paces[key].append(result.seconds / (result.n_train * result.epochs))
        rows[task] = max(result.n_train, rows.get(task, 0))
    if not rows:
        return None

    def seconds(run: RunSettings) -> float:
        keys = ((run.task, run.method), (run.task, None), (None, None))
        pace = statistics.median(next(paces[key] for key in keys if key in paces))
        return pace * run.epochs * (run.max_train or rows.get(run.task) or max(rows.values()))

    return sum(map(seconds, missing))


def progress(plan: Plan, finished: Sequence[FinishedRun], jobs: int) -> str:
    """What is done of ``plan``, and how long the rest takes with ``jobs`` runs side by side."""
    every, done = plan.every(finished), set(scores_of(finished))
    missing = [run for key, run in every.items() if key not in done]
    seconds = estimate(missing, finished) if missing else None
    left = "" if seconds is None else f", about {seconds / jobs / 60:.0f} minutes left"
    return f"{len(every) - len(missing)} of {len(every)} runs done{left}"


def run_all(
    plan: Plan,
    out: Path,
    path: str,
    data_dir: str | None,
    threads: int,
    jobs: int,
    say: Callable[[str], None],
    processes: int = 1,
) -> list[str]:
    """Append the missing runs of ``plan`` to ``out``, ``jobs`` at a time; what failed comes back as messages.

    ``path`` is the folder that the plan's model has here; ``threads`` and ``processes`` are of each run.
    """
    finished = [run for run in read_runs(out) if run.settings.model == plan.model]
    out.parent.mkdir(parents=True, exist_ok=True)
    if out.exists():  # drops a cut-off last line before appending after it
        write_atomically(out, "".join(_whole_lines(out)).encode())
    running: dict[Future, RunSettings] = {}
    failed: dict[str, str] = {}
    with ThreadPoolExecutor(jobs) as pool:
        while True:
            taken = {*scores_of(finished), *(run.identity for run in running.values()), *failed}
            possible = {run.identity: run for run in plan.possible(finished)}
            for key, run in possible.items():
                if len(running) < jobs and key not in taken:
                    here = dataclasses.replace(run, model=path, data_dir=data_dir)
                    running[pool.submit(perform, here, threads, processes)] = run
            if not running:
                break
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                run = running.pop(future)
                if (error := future.exception()) is not None:
                    failed[run.identity] = f"{run.describe()} failed: {error}"
                    say(failed[run.identity])
                    continue
                finished.append(FinishedRun(run, future.result()))
                with out.open("a") as file:
                    file.write(finished[-1].to_line())
                result = finished[-1].result
                told = f"{100 * result.score:.2f} in {result.seconds:.0f} s; {progress(plan, finished, jobs)}"
                say(f"{run.describe()}: {told}")
    return list(failed.values())
