"""The base and the task files that the tests of the server share. A test reads them; what it writes, it writes to a
folder of its own.
"""

from pathlib import Path

import pytest

from support.serving import save_base, save_spare_tasks, save_tasks


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where they lie: float/, base/ and tasks/."""
    return tmp_path_factory.mktemp("serve")


@pytest.fixture(scope="session")
def base(folder: Path) -> str:
    """A quantized directory with a tokenizer."""
    return save_base(folder)


@pytest.fixture(scope="session")
def files(folder: Path, base: str) -> dict[str, Path]:
    """A task file for each of support.serving.TASKS."""
    return save_tasks(base, folder / "tasks")


@pytest.fixture(scope="session")
def spare(folder: Path, base: str, files: dict[str, Path]) -> dict[str, Path]:
    """Task files that no server starts with, by what is special about each."""
    return save_spare_tasks(base, files, folder)
