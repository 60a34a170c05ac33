"""A queue before the model, and the one thread that owns the model: queries of all tasks share its batches."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from prequant_ext.serve.backbone import Answer, Query
from prequant_ext.serve.metrics import Metrics
from prequant_ext.serve.settings import Settings


class QueueFull(RuntimeError):
    """More rows than may wait."""


class Draining(RuntimeError):
    """The server is about to stop."""


@dataclass
class _Row:
    query: Query
    future: "Future[Answer]" = field(default_factory=Future)
    arrived: float = field(default_factory=time.monotonic)


@dataclass
class _Change:
    """Something that is done to the model between two batches."""

    call: Callable[[], Any]
    future: "Future[Any]" = field(default_factory=Future)


class Batcher:
    """Answers queries in batches of at most ``max_batch`` rows, none of which waits longer than ``max_wait``
    milliseconds for others to join.

    What came first is done first, changes to the model included: a query that was accepted before its task is replaced
    or removed is answered by the task as it was. Once :meth:`drain` is called nothing is accepted any more, and
    everything that was is still answered.
    """

    def __init__(
        self, answer: Callable[[Sequence[Query]], Sequence[Answer | Exception]], settings: Settings, metrics: Metrics
    ) -> None:
        self.answer, self.settings, self.metrics = answer, settings, metrics
        self.queue: deque[_Row | _Change] = deque()
        self.changed = threading.Condition()
        self.is_draining = False
        # A daemon: a forward that never returns must not keep the process from ending.
        self.thread = threading.Thread(target=self._work, name="prequant-model", daemon=True)

    @property
    def status(self) -> str:
        """starting, ready, draining, or failed: the model's thread has died."""
        if self.is_draining:
            return "draining"
        if self.thread.ident is None:
            return "starting"
        return "ready" if self.thread.is_alive() else "failed"

    def start(self) -> None:
        self.thread.start()

    def submit(self, queries: Sequence[Query]) -> "list[Future[Answer]]":
        """The answers to come, of all queries or, where QueueFull or Draining is raised, of none."""
        rows = [_Row(query) for query in queries]
        self._enqueue(rows)
        return [row.future for row in rows]

    def change(self, call: Callable[[], Any]) -> "Future[Any]":
        """The result to come of ``call()``, made by the model's thread after all that came before. Raises as
        :meth:`submit`.
        """
        change = _Change(call)
        self._enqueue([change])
        return change.future

    def _enqueue(self, items: Sequence[_Row | _Change]) -> None:
        with self.changed:
            if self.is_draining:
                raise Draining("the server is about to stop")
            if len(self.queue) + len(items) > self.settings.max_queue:
                raise QueueFull(f"{len(self.queue)} texts wait already, and at most {self.settings.max_queue} may")
            self.queue.extend(items)
            self.changed.notify_all()

    def drain(self, seconds: float) -> bool:
        """Accept nothing more, and finish what is queued. Returns whether that was done within ``seconds``; if not,
        what is left fails with Draining.
        """
        with self.changed:
            self.is_draining = True
            self.changed.notify_all()
        if self.thread.ident is not None:
            self.thread.join(seconds)
        with self.changed:
            left = [item for item in self.queue if item.future.set_running_or_notify_cancel()]
            self.queue.clear()
        for item in left:
            item.future.set_exception(Draining("the server had to stop before this was answered"))
        return not left and not self.thread.is_alive()

    # ---- the model's thread
    # ------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while (due := self._next()) is not None:
            if isinstance(due, _Change):
                self._make(due)
            else:
                self._answer(due)

    def _next(self) -> list[_Row] | _Change | None:
        """The next batch or change, when it is due; None: the queue is empty and stays so."""
        with self.changed:
            self.changed.wait_for(lambda: self.queue or self.is_draining)
            if not self.queue:
                return None
            first = self.queue[0]
            if isinstance(first, _Change):
                self.queue.popleft()
                return first
            due = first.arrived + self.settings.max_wait / 1e3
            self.changed.wait_for(self._nobody_may_join, max(0.0, due - time.monotonic()))
            batch: list[_Row] = []
            while self.queue and isinstance(self.queue[0], _Row) and len(batch) < self.settings.max_batch:
                row = self.queue.popleft()
                assert isinstance(row, _Row)
                batch.append(row)
            return batch

    def _nobody_may_join(self) -> bool:
        """The batch is full, ends at a change, or nothing more is accepted."""
        return (
            self.is_draining
            or len(self.queue) >= self.settings.max_batch
            or any(isinstance(item, _Change) for item in self.queue)
        )

    def _make(self, change: _Change) -> None:
        if not change.future.set_running_or_notify_cancel():
            return
        try:
            change.future.set_result(change.call())
        except Exception as error:
            change.future.set_exception(error)

    def _answer(self, batch: list[_Row]) -> None:
        rows = [row for row in batch if row.future.set_running_or_notify_cancel()]  # the others' clients have gone
        if not rows:
            return
        begin = time.monotonic()
        answers = self._attempt([row.query for row in rows])
        took = time.monotonic() - begin
        tasks = list(dict.fromkeys(row.query.task for row in rows))
        self.metrics.observe("prequant_batch_rows", len(rows))
        self.metrics.observe("prequant_batch_tasks", len(tasks))
        for row, answer in zip(rows, answers, strict=True):
            if isinstance(answer, Exception):
                self.metrics.count("prequant_failed_rows_total")
                row.future.set_exception(answer)
            else:
                self.metrics.count("prequant_rows_total", task=row.query.task)
                times = {"queue": round(1e3 * (begin - row.arrived), 3), "model": round(1e3 * took, 3)}
                row.future.set_result({**answer, "batch": {"rows": len(rows), "tasks": tasks}, "milliseconds": times})

    def _attempt(self, queries: Sequence[Query]) -> Sequence[Answer | Exception]:
        """A batch that fails is tried again row by row: one bad text must not fail its neighbours'."""
        try:
            return self.answer(queries)
        except Exception as error:
            return [error] if len(queries) == 1 else [answer for query in queries for answer in self._attempt([query])]
