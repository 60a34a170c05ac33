"""serve, predict: a base and its tasks, over HTTP or on the rows of a file."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from prequant_ext import neighbours
from prequant_ext.cli.app import app
from prequant_ext.cli.console import FAILED, exit_codes, quiet_libraries, say, show, show_json
from prequant_ext.cli.options import AsJson


@app.command(epilog="Example: prequant serve base --tasks tasks/sst2.task tasks/mrpc.task --task-dir tasks")
def serve(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize", metavar="DIR")],
    more_tasks: Annotated[
        list[Path] | None, typer.Argument(help="task files, with or without --tasks before them", metavar="[FILES]...")
    ] = None,
    tasks: Annotated[
        list[Path] | None, typer.Option("--tasks", help="task files of prequant finetune, one or more", metavar="FILES")
    ] = None,
    host: Annotated[str, typer.Option(help="address to listen on; there is no authentication")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="texts of one forward, of any mix of tasks")] = 32,
    max_wait: Annotated[
        float, typer.Option(help="milliseconds that a text waits for others to share its forward")
    ] = 5.0,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a text (default: that of the task's training)")
    ] = None,
    max_queue: Annotated[int, typer.Option(help="texts that may wait; beyond it 503")] = 1024,
    max_rows: Annotated[int, typer.Option(help="texts of one request; beyond it 422")] = 64,
    max_text: Annotated[int, typer.Option(help="characters of a text; beyond it 422")] = 10_000,
    max_body: Annotated[int, typer.Option(help="bytes of a request; beyond it 413")] = 1 << 20,
    task_dir: Annotated[
        Path | None,
        typer.Option(help="tasks may be loaded over HTTP from this folder, uploaded and removed (default: they stay)"),
    ] = None,
    drain: Annotated[float, typer.Option(help="seconds that SIGTERM leaves for what is queued")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Answer texts over HTTP, all tasks in one model and in the same batches. / is a page to try it on.

    POST /predict {"task", "text", "text_pair"}, or a list of these; GET /tasks, /health, /metrics; PUT and DELETE
    /tasks/NAME. SIGTERM answers what is queued.
    """
    with exit_codes():
        quiet_libraries()
        neighbours.require("fastapi", "prequant serve")
        neighbours.require("uvicorn", "prequant serve")
        from prequant_ext.serve import server
        from prequant_ext.serve.app import create_app
        from prequant_ext.serve.backbone import load
        from prequant_ext.serve.settings import Settings

        settings = Settings(
            max_batch,
            max_wait,
            max_queue,
            max_rows,
            max_text,
            max_body,
            max_length=max_length,
            drain_seconds=drain,
            task_dir=task_dir,
        )
        bound = server.bind(host, port)  # first: a port that is taken must not cost the time to load a model
        backbone = load(model, [*(tasks or ()), *(more_tasks or ())], settings)

        def announce(url: str) -> None:
            if as_json:
                show_json({"url": url, "tasks": list(backbone.tasks)})
            else:
                say(f"serving {', '.join(backbone.tasks)} on {url}")

        if not server.serve(create_app(backbone, settings), bound, announce):
            say("stopped before everything was answered")
            raise typer.Exit(FAILED)


@app.command(
    epilog="""Example: echo '{"task": "sst2", "text": "a fine film"}' | """
    "prequant predict base tasks/sst2.task tasks/mrpc.task"
)
def predict(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize", metavar="DIR")],
    tasks: Annotated[list[Path], typer.Argument(help="task files of prequant finetune", metavar="FILES...")],
    rows: Annotated[
        str,
        typer.Option(
            help='a file of JSON lines {"task", "text", "text_pair"}, of any mix of tasks; - is standard input'
        ),
    ] = "-",
    max_batch: Annotated[int, typer.Option(help="rows of one forward")] = 32,
    max_length: Annotated[
        int | None, typer.Option(help="tokens of a row (default: that of the task's training)")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="one JSON object a row on standard output")] = False,
) -> None:
    """Answer rows, each by its own task: all tasks in one model, and in the same batches."""
    with exit_codes():
        quiet_libraries()
        from prequant_ext.serve.backbone import Query, load
        from prequant_ext.serve.settings import Settings

        queries = [Query(**row) for row in _rows(rows)]
        backbone = load(model, tasks, Settings(max_batch, max_length=max_length))
        missing = next((query.task for query in queries if query.task not in backbone.tasks), None)
        if missing is not None:
            raise backbone.unknown(missing)
        answers: list[Any] = []
        for begin in range(0, len(queries), max_batch):
            answers += backbone.answer(queries[begin : begin + max_batch])
        if as_json:
            for answer in answers:
                show_json(answer)
            return
        cells = [
            (query.task, *_result(answer), query.text[:60]) for query, answer in zip(queries, answers, strict=True)
        ]
        batches = -(-len(queries) // max_batch)
        show(
            ("task", "answer", "", "text"),
            cells,
            f"{len(queries)} rows of {len({query.task for query in queries})} tasks in {batches} "
            f"batch{'es' if batches > 1 else ''}",
        )


def _rows(source: str) -> Iterator[dict[str, str]]:
    """Raises ValueError naming the line of one that is no row."""
    text = sys.stdin.read() if source == "-" else Path(source).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"rows, line {number}: not a JSON object: {error}") from error
        is_row = isinstance(row, dict) and {"task", "text"} <= row.keys() <= {"task", "text", "text_pair"}
        if not is_row or not all(isinstance(value, str) and value for value in row.values()):
            raise ValueError(
                f'rows, line {number}: must have a "task", a "text" and perhaps a "text_pair", all of them text, got '
                f"{line}"
            )
        yield row


def _result(answer: dict[str, Any]) -> tuple[str, str]:
    return (
        (answer["label"], f"{100 * answer['probabilities'][answer['label']]:.1f} %")
        if "label" in answer
        else (f"{answer['score']:.3f}", "")
    )
