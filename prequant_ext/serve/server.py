"""Start and end: listens, serves, and on SIGTERM or Ctrl-C answers what it has accepted before it stops."""

import socket
import threading
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import FastAPI

BACKLOG = 2048  # connections that wait to be taken, as uvicorn has it
RESPONSE_SECONDS = 5  # for responses under way, once nothing is left for the model


def bind(host: str, port: int) -> socket.socket:
    """A socket that has ``port`` of ``host``, 0: a free one, and does not listen yet. Raises OSError naming both."""
    bound = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    try:
        # a server that has just stopped does not block its port
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind((host, port))
    except OSError as error:
        bound.close()
        raise OSError(f"cannot listen on port {port} of {host}: {error}") from error
    return bound


def url_of(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def make_server(app: FastAPI) -> uvicorn.Server:
    """uvicorn for ``app``, which :func:`stop` ends."""
    return uvicorn.Server(
        uvicorn.Config(app, log_level="warning", access_log=False, timeout_graceful_shutdown=RESPONSE_SECONDS)
    )


def stop(server: uvicorn.Server, app: FastAPI) -> bool:
    """From now on refuse with 503, answer what is queued, then close. Blocks for at most ``drain_seconds``; returns
    whether everything was answered.
    """
    serving = app.state.serving
    is_done: bool = serving.batcher.drain(serving.settings.drain_seconds)
    server.should_exit = True
    return is_done


def serve(app: FastAPI, bound: socket.socket, announce: Callable[[str], None]) -> bool:
    """Serve on ``bound`` until SIGTERM or SIGINT; a second one ends at once. Returns whether everything that was
    accepted was answered.

    announce  gets the URL once connections are taken

    Takes both signals over while it runs: uvicorn's own handlers would stop listening first, and end the process by the
    signal.
    """
    server = make_server(app)
    stopping: list[threading.Thread] = []
    outcome: list[bool] = []

    def on_signal(number: int, frame: Any) -> None:
        if stopping:
            server.should_exit = server.force_exit = True
            return
        # In a thread: a handler must not wait for a lock that the code it interrupts may hold.
        stopping.append(threading.Thread(target=lambda: outcome.append(stop(server, app)), daemon=True))
        stopping[0].start()

    server.handle_exit = on_signal
    bound.listen(BACKLOG)
    announce(url_of(bound))
    server.run(sockets=[bound])
    return outcome == [True]
