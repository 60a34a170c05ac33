"""serve: a base and its tasks over HTTP."""

from pathlib import Path
from typing import Annotated

import typer

from prequant_ext.cli.app import app
from prequant_ext.cli.options import AsJson
from prequant_ext.console import FAILED, exit_codes, quiet_libraries, say, show_json

EXTRA = ("fastapi", "starlette", "pydantic", "uvicorn")


@app.command(epilog="Example: prequant serve base --tasks tasks/sst2.task tasks/mrpc.task --task-dir tasks")
def serve(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize", metavar="DIR")],
    more_tasks: Annotated[list[Path] | None, typer.Argument(help="task files, with or without --tasks before them", metavar="[FILES]...")] = None,
    tasks: Annotated[list[Path] | None, typer.Option("--tasks", help="task files of prequant finetune, one or more", metavar="FILES")] = None,
    host: Annotated[str, typer.Option(help="address to listen on; there is no authentication")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: one that is free", min=0, max=65535)] = 8000,
    max_batch: Annotated[int, typer.Option(help="texts of one forward, of any mix of tasks")] = 32,
    max_wait: Annotated[float, typer.Option(help="milliseconds that a text waits for others to share its forward")] = 5.0,
    max_length: Annotated[int | None, typer.Option(help="tokens of a text (default: that of the task's training)")] = None,
    max_queue: Annotated[int, typer.Option(help="texts that may wait; beyond it 503")] = 1024,
    max_rows: Annotated[int, typer.Option(help="texts of one request; beyond it 422")] = 64,
    max_text: Annotated[int, typer.Option(help="characters of a text; beyond it 422")] = 10_000,
    max_body: Annotated[int, typer.Option(help="bytes of a request; beyond it 413")] = 1 << 20,
    task_dir: Annotated[Path | None, typer.Option(help="tasks may be loaded over HTTP from this folder, uploaded and removed (default: they stay)")] = None,
    drain: Annotated[float, typer.Option(help="seconds that SIGTERM leaves for what is queued")] = 10.0,
    as_json: AsJson = False,
) -> None:
    """Answer texts over HTTP, all tasks in one model and in the same batches. / is a page to try it on.

    POST /predict {"task", "text", "text_pair"}, or a list of these; GET /tasks, /health, /metrics; PUT and DELETE /tasks/NAME. SIGTERM answers what is queued.
    """
    with exit_codes():
        quiet_libraries()
        try:
            from prequant_ext.serve import server
            from prequant_ext.serve.app import create_app
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] not in EXTRA:
                raise
            raise ValueError(f"prequant serve needs {error.name}, which is not installed: pip install 'prequant_ext[serve]'") from error
        from prequant_ext.serve.backbone import load
        from prequant_ext.serve.settings import Settings

        settings = Settings(max_batch, max_wait, max_queue, max_rows, max_text, max_body, max_length=max_length, drain_seconds=drain, task_dir=task_dir)
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
