"""What the server says over HTTP: predictions, the tasks, health, metrics and the page."""

import asyncio
import functools
import json
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from fastapi import Body, Depends, FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from prequant_ext.serve import metrics as counts
from prequant_ext.serve.backbone import Backbone, Query, ServedTask, TooManyTasks, UnknownTask
from prequant_ext.serve.batcher import Batcher, Draining, QueueFull
from prequant_ext.serve.page import PAGE, POLICY
from prequant_ext.serve.settings import Settings
from prequant_ext.task_file import check_task_name

RETRY_SECONDS = "1"
STATUS: dict[type[Exception], int] = {UnknownTask: 404, TooManyTasks: 409, QueueFull: 503, Draining: 503}


@dataclass(frozen=True)
class Serving:
    """What the handlers share."""

    backbone: Backbone
    batcher: Batcher
    metrics: counts.Metrics
    settings: Settings


async def _serving(request: Request) -> Serving:
    return request.app.state.serving


Shared = Annotated[Serving, Depends(_serving)]


class QueryBody(BaseModel):
    """A text, or a pair of texts, for a task."""

    model_config = ConfigDict(extra="forbid")
    task: str
    text: str = Field(min_length=1)
    text_pair: str | None = Field(None, min_length=1)


# By the kind of JSON value, so that a mistake is told once and not for either form.
OneOrSeveral = Annotated[
    Annotated[QueryBody, Tag("one")] | Annotated[list[QueryBody], Tag("several")],
    Discriminator(lambda body: "several" if isinstance(body, list) else "one"),
    Body(),
]


async def predict(body: OneOrSeveral, serving: Shared) -> JSONResponse:
    """The answer to a query, or the answers to a list of them, in its order. All of a request is answered, or none of
    it.
    """
    bodies = body if isinstance(body, list) else [body]
    _check_sizes(bodies, serving.settings)
    queries = [Query(**one.model_dump()) for one in bodies]
    for query in queries:
        _check_texts(query, serving.backbone)
    answers = await asyncio.gather(*map(asyncio.wrap_future, serving.batcher.submit(queries)))
    return JSONResponse(answers if isinstance(body, list) else answers[0])


def _check_sizes(bodies: list[QueryBody], settings: Settings) -> None:
    if not 1 <= len(bodies) <= settings.max_rows:
        raise HTTPException(422, f"a list must hold 1 to {settings.max_rows} queries, got {len(bodies)}")
    for body in bodies:
        for name in ("text", "text_pair"):
            length = len(getattr(body, name) or "")
            if length > settings.max_text:
                raise HTTPException(422, f"{name} must have at most {settings.max_text} characters, got {length}")


def _check_texts(query: Query, backbone: Backbone) -> None:
    """As many texts as the task compares. Raises UnknownTask."""
    task = backbone.tasks.get(query.task)
    if task is None:
        raise backbone.unknown(query.task)
    given = 1 if query.text_pair is None else 2
    if task.num_texts not in (None, given):
        wanted = "two texts, text and text_pair" if task.num_texts == 2 else "one text, without text_pair"
        raise HTTPException(422, f"task {task.name!r} takes {wanted}")


# ---- tasks -----------------------------------------------------------------------------------------------------------


async def list_tasks(serving: Shared) -> JSONResponse:
    """The tasks, in the order in which they came."""
    can_change = serving.settings.task_dir is not None
    return JSONResponse({"tasks": [asdict(task) for task in serving.backbone.tasks.values()], "can_change": can_change})


async def put_task(name: str, request: Request, serving: Shared) -> JSONResponse:
    """Load a task, or replace the one of this name: from ``{"file": "..."}`` in the server's folder of task files, or
    from an uploaded one (application/octet-stream). Queries that were accepted before are answered by what was there.
    """
    folder = _folder_of_tasks(serving)
    try:
        check_task_name(name)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    kind = request.headers.get("content-type", "").split(";")[0].strip()
    if kind == "application/json":
        path = _inside(folder, await request.body())
        found = await _read(serving.backbone, path, name, str(path.relative_to(folder)))
    elif kind == "application/octet-stream":
        with tempfile.TemporaryDirectory(prefix="prequant-upload-") as scratch:
            path = Path(scratch) / "upload"
            with path.open("wb") as file:
                async for part in request.stream():
                    file.write(part)
            found = await _read(serving.backbone, path, name, "the uploaded file")
    else:
        raise HTTPException(
            415,
            f'content-type must be application/json with {{"file": "..."}} or application/octet-stream, got {kind!r}',
        )
    is_new = name not in serving.backbone.tasks
    put: ServedTask = await asyncio.wrap_future(serving.batcher.change(functools.partial(serving.backbone.put, *found)))
    return JSONResponse(asdict(put), 201 if is_new else 200)


async def delete_task(name: str, serving: Shared) -> Response:
    """Forget a task. Queries that were accepted before are still answered by it."""
    _folder_of_tasks(serving)
    await asyncio.wrap_future(serving.batcher.change(functools.partial(serving.backbone.remove, name)))
    return Response(status_code=204)


def _folder_of_tasks(serving: Serving) -> Path:
    if serving.settings.task_dir is None:
        raise HTTPException(403, "this server's tasks are fixed: it was started without a task_dir")
    return serving.settings.task_dir.resolve()


def _inside(folder: Path, content: bytes) -> Path:
    """The file of ``folder`` that a body of JSON names; wherever else a name, or a link behind it,
    may lead is refused.
    """
    try:
        body = json.loads(content)
        if not isinstance(body, dict) or body.keys() != {"file"}:
            raise TypeError
        path = (folder / body["file"]).resolve()
    except (ValueError, TypeError) as error:  # no JSON, or no name that a file could have
        raise HTTPException(
            422, 'the body must be JSON, {"file": "..."}, the name of a file in the folder of task files'
        ) from error
    if not path.is_relative_to(folder):
        raise HTTPException(403, f"file must be inside the folder of task files, got {body['file']!r}")
    return path


async def _read(backbone: Backbone, path: Path, name: str, shown: str) -> tuple[ServedTask, Any]:
    """Backbone.read beside the event loop. ``shown``: what a client is told instead of a path of the server."""
    try:
        return await asyncio.to_thread(backbone.read, path, name)
    except (OSError, ValueError) as error:
        raise HTTPException(
            404 if isinstance(error, FileNotFoundError) else 422, str(error).replace(str(path), shown)
        ) from error


# ---- the rest --------------------------------------------------------------------------------------------------------


async def health(serving: Shared) -> JSONResponse:
    """200 while predictions are accepted, else 503."""
    status = serving.batcher.status
    return JSONResponse({"status": status, "tasks": len(serving.backbone.tasks)}, 200 if status == "ready" else 503)


async def metrics_text(serving: Shared) -> PlainTextResponse:
    """Counts since the start, for Prometheus."""
    gauges = {"prequant_queue_rows": len(serving.batcher.queue), "prequant_tasks": len(serving.backbone.tasks)}
    return PlainTextResponse(serving.metrics.text(gauges), media_type=counts.CONTENT_TYPE)


async def page() -> HTMLResponse:
    """A page to try the server on."""
    return HTMLResponse(PAGE, headers={"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"})


async def _refused(request: Request, error: Exception) -> JSONResponse:
    status = STATUS[type(error)]
    return JSONResponse({"detail": str(error)}, status, {"Retry-After": RETRY_SECONDS} if status == 503 else None)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """One line a mistake, without what was sent: it may be long."""
    assert isinstance(error, RequestValidationError)
    places = [
        (".".join(str(part) for part in one["loc"] if part not in ("body", "one", "several")), one["msg"])
        for one in error.errors()[:5]
    ]
    return JSONResponse(
        {"detail": "; ".join(f"{place}: {message}" if place else message for place, message in places)}, 422
    )


def observed(app: Callable[..., Awaitable[None]], serving: Serving) -> Callable[..., Awaitable[None]]:
    """ASGI middleware: counts each response, and closes connections once the server is about to stop, or a client would
    send its next request into the end.
    """

    async def call(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await app(scope, receive, send)
        begin, status = time.monotonic(), 500

        async def start(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if serving.batcher.is_draining:
                    message = {**message, "headers": [*message["headers"], (b"connection", b"close")]}
                if path() == "/predict":
                    serving.metrics.observe("prequant_predict_seconds", time.monotonic() - begin)
            await send(message)

        def path() -> str:
            # of the route, not of the request: names of tasks would be series without end
            return getattr(scope.get("route"), "path", "other")

        try:
            await app(scope, receive, start)
        finally:
            serving.metrics.count("prequant_requests_total", method=scope["method"], path=path(), status=str(status))

    return call


def create_app(backbone: Backbone, settings: Settings) -> FastAPI:
    """The application around a loaded backbone, whose model thread runs from its start to its end.
    ``app.state.serving`` has its parts.
    """
    metrics = counts.Metrics()
    serving = Serving(backbone, Batcher(backbone.answer, settings, metrics), metrics, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        serving.batcher.start()
        yield
        if not serving.batcher.is_draining:
            await asyncio.to_thread(serving.batcher.drain, settings.drain_seconds)

    # Without /docs, whose page takes its scripts from another host; /openapi.json is there.
    app = FastAPI(
        title="prequant serve", docs_url=None, redoc_url=None, lifespan=lifespan, max_body_size=settings.max_body
    )
    app.state.serving = serving
    app.add_middleware(observed, serving=serving)
    app.add_exception_handler(RequestValidationError, _invalid)
    for kind in STATUS:
        app.add_exception_handler(kind, _refused)
    app.add_api_route("/predict", predict, methods=["POST"])
    app.add_api_route("/tasks", list_tasks, methods=["GET"])
    app.add_api_route("/tasks/{name}", put_task, methods=["PUT"], max_body_size=backbone.max_task_bytes)
    app.add_api_route("/tasks/{name}", delete_task, methods=["DELETE"])
    app.add_api_route("/health", health, methods=["GET"])
    app.add_api_route("/metrics", metrics_text, methods=["GET"])
    app.add_api_route("/", page, methods=["GET"], include_in_schema=False)
    return app
