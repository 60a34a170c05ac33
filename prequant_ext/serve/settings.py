"""What a server accepts and how long it waits, validated once."""

from dataclasses import dataclass
from pathlib import Path

MIN_LENGTH = 8  # tokens: special ones, and something of each of two texts


@dataclass(frozen=True)
class Settings:
    """Limits of a server; what is beyond one is refused and never cut or dropped in silence.

    max_batch      rows of one forward
    max_wait       milliseconds that a row waits for others to join its batch
    max_queue      rows that may wait for the model
    max_rows       texts of one request
    max_text       characters of a text
    max_body       bytes of a request; task files have a limit of their own, from the size of a task
    max_tasks      tasks in the model
    max_length     tokens of an example, longer ones are cut and say so; None: as long as in the task's training
    drain_seconds  that the queue may take to empty when the server is told to stop
    task_dir       the folder of task files that may be loaded over HTTP. None: the tasks stay those of the start

    Raises ValueError naming the setting.
    """

    max_batch: int = 32
    max_wait: float = 5.0
    max_queue: int = 1024
    max_rows: int = 64
    max_text: int = 10_000
    max_body: int = 1 << 20
    max_tasks: int = 64
    max_length: int | None = None
    drain_seconds: float = 10.0
    task_dir: Path | None = None

    def __post_init__(self) -> None:
        for name in ("max_batch", "max_queue", "max_rows", "max_text", "max_body", "max_tasks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("max_wait", "drain_seconds"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be 0 or more, got {getattr(self, name)}")
        if self.max_rows > self.max_queue:
            raise ValueError(
                f"max_rows must be at most max_queue = {self.max_queue}, or the queue could never take a request of "
                f"so many, got {self.max_rows}"
            )
        if self.max_length is not None and self.max_length < MIN_LENGTH:
            raise ValueError(f"max_length must be at least {MIN_LENGTH}, got {self.max_length}")
        if self.task_dir is not None and not self.task_dir.is_dir():
            raise NotADirectoryError(f"task_dir must be a folder, got {self.task_dir}")
