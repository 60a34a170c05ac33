"""Requests a second of `prequant serve`, and how long one takes, with 1, 4 and 16 tasks mixed and with batches of one.

    python bench/serve.py
    python bench/serve.py --layers 12 --hidden 768 --requests 1000 --clients 32 --json serve.json

A server of a BERT with random weights runs as a process of its own; this one is its clients, each of which sends its
next text when it has its answer. They share the machine: on few cores a figure is that of both. Sides with the same
number of tasks take turns, and a figure is the median over the rounds.
"""

import asyncio
import contextlib
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import torch

import reporting
import timing
from prequant_ext import PreQuantConfig, add_task, quantize_model, save_task
from prequant_ext.task_file import task_tensors
from timing import Row

TASKS = (1, 4, 16)
WORDS = [f"word{number}" for number in range(1000)]
WARM_UP = 2  # requests of each client that are not counted

Round = tuple[list[float], float]  # seconds of each request, seconds of all of them


@torch.no_grad()
def write_model(folder: Path, layers: int, hidden: int, tasks: int) -> list[Path]:
    """A quantized BERT with a tokenizer in ``folder``/base, and task files that differ from it at random."""
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizerFast

    torch.manual_seed(0)
    vocabulary = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    shape = {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": max(1, hidden // 64),
        "intermediate_size": 4 * hidden,
    }
    model = BertForSequenceClassification(BertConfig(vocab_size=len(vocabulary), **shape))
    quantize_model(model, PreQuantConfig())
    model.save_pretrained(folder / "base")
    BertTokenizerFast(vocab={word: number for number, word in enumerate(vocabulary)}).save_pretrained(folder / "base")
    paths = []
    for number in range(tasks):
        add_task(model, f"task{number}")
        for parameter in task_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.01)
        paths.append(folder / f"task{number}.task")
        save_task(model, f"task{number}", paths[-1], {"num_labels": 2})
    return paths


@contextlib.contextmanager
def server(base: Path, tasks: list[Path], max_batch: int, threads: int) -> Iterator[str]:
    """The URL of a server, which is told to stop at the end. Raises RuntimeError where it does not start or does not
    stop.
    """
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": str(threads)}
    command = [
        sys.executable,
        "-m",
        "prequant_ext.cli",
        "serve",
        str(base),
        "--tasks",
        *map(str, tasks),
        "--port",
        "0",
        "--json",
    ]
    with subprocess.Popen(
        [*command, "--max-batch", str(max_batch)], stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        try:
            line = process.stdout.readline() if process.stdout else ""
            if not line:
                raise RuntimeError(f"the server ended with exit code {process.wait()}")
            yield json.loads(line)["url"]
        finally:
            process.terminate()
        if process.wait(60):
            raise RuntimeError(f"the server ended with exit code {process.returncode}")


async def load(url: str, tasks: int, words: int, requests: int, clients: int) -> Round:
    """One round of a closed loop. Raises httpx.HTTPStatusError where one is refused."""
    took: list[float] = []
    rng = random.Random(tasks)
    bodies = iter(
        [
            {"task": f"task{number % tasks}", "text": " ".join(rng.choices(WORDS, k=words))}
            for number in range(requests + clients * WARM_UP)
        ]
    )
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(limit: int | None) -> None:
            for turn, body in enumerate(bodies, 1):
                begin = time.perf_counter()
                (await client.post("/predict", json=body)).raise_for_status()
                took.append(time.perf_counter() - begin)
                if turn == limit:
                    return

        await asyncio.gather(*(ask(WARM_UP) for _ in range(clients)))
        took.clear()
        begin = time.perf_counter()
        await asyncio.gather(*(ask(None) for _ in range(clients)))
        return took, time.perf_counter() - begin


def row(
    name: str, tasks: int, max_batch: int, threads: int, rounds: list[Round], flops: float, peaks: timing.Peaks
) -> Row:
    p50, p99 = (
        statistics.median(statistics.quantiles(took, n=100, method="inclusive")[at] for took, _ in rounds)
        for at in (49, 98)
    )
    rate = statistics.median(len(took) / seconds for took, seconds in rounds)
    return {
        "name": name,
        "tasks": tasks,
        "max_batch": max_batch,
        "threads": threads,
        "milliseconds": 1e3 * p50,
        "p99_milliseconds": 1e3 * p99,
        "requests_per_second": rate,
        "roofline_share": peaks.share(rate * flops, 0, 1.0),
        "requests": len(rounds[0][0]),
        "rounds": len(rounds),
    }


def results_table(rows: list[Row]) -> str:
    return reporting.table(
        ["threads", "server", "p50 ms", "p99 ms", "requests/s", "%"],
        (
            [
                str(row["threads"]),
                row["name"],
                f"{row['milliseconds']:.1f}",
                f"{row['p99_milliseconds']:.1f}",
                f"{row['requests_per_second']:.0f}",
                f"{100 * row['roofline_share']:.0f}",
            ]
            for row in rows
        ),
    )


def main() -> None:
    parser = reporting.options(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=6, help="default: 6")
    parser.add_argument("--hidden", type=int, default=384, help="default: 384")
    parser.add_argument("--words", type=int, default=30, help="of a text, each of them a token; default: 30")
    parser.add_argument("--requests", type=int, default=200, help="of a round; default: 200")
    parser.add_argument("--clients", type=int, default=16, help="default: 16")
    parser.add_argument("--max-batch", type=int, default=32, help="default: 32")
    arguments = parser.parse_args()
    about = reporting.header(arguments.threads, ["transformers", "fastapi", "uvicorn", "httpx"])
    by_threads = {threads: timing.peaks(threads) for threads in arguments.threads}
    flops = timing.encoder_flops(arguments.layers, arguments.hidden, 1, arguments.words + 2)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        files = write_model(Path(folder), arguments.layers, arguments.hidden, max(TASKS))
        for threads, peaks in by_threads.items():
            sides: dict[tuple[int, int], list[Round]] = {
                (tasks, batch): [] for tasks in TASKS for batch in (arguments.max_batch, 1)
            }
            with (
                server(Path(folder) / "base", files, arguments.max_batch, threads) as mixed,
                server(Path(folder) / "base", files, 1, threads) as single,
            ):
                for turn in range(arguments.rounds):
                    for (tasks, batch), rounds in sides.items():
                        url = single if batch == 1 else mixed
                        rounds.append(
                            asyncio.run(load(url, tasks, arguments.words, arguments.requests, arguments.clients))
                        )
                    reporting.say(f"{threads} thread(s): round {turn + 1} of {arguments.rounds}")
            for (tasks, batch), rounds in sides.items():
                name = f"{tasks} task(s), batches of up to {batch}"
                rows.append(row(name, tasks, batch, threads, rounds, flops, peaks))
    model = {
        "layers": arguments.layers,
        "hidden": arguments.hidden,
        "words": arguments.words,
        "clients": arguments.clients,
    }
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, model=model))
    print(reporting.headline(about))
    print(
        f"BERT of {arguments.layers} layers of {arguments.hidden}, texts of {arguments.words} words, "
        f"{arguments.clients} clients"
    )
    print(f"{reporting.peaks_line(by_threads)}, for the products of the encoder alone")
    print(results_table(rows))


if __name__ == "__main__":
    main()
