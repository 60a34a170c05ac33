"""What the tests of the server share: a tiny base with task files, direct answers to compare with, and a running
server.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prequant_ext import PreQuantConfig, add_task, directory, load_task, save_task
from prequant_ext.serve import server as servers
from prequant_ext.task_file import task_tensors
from support.tiny_checkpoint import save_float_model

TASKS = {"sst2": 2, "mnli": 3, "stsb": 1, "topics": 2}  # name: labels; the last is none of GLUE
TEXT, OTHER = "the river near some quiet forest", "every engine under the old valley"


def save_base(folder: Path, **settings) -> str:
    """A quantized directory with a tokenizer."""
    save_float_model(folder / "float")
    directory.quantize_directory(str(folder / "float"), PreQuantConfig(**({"r": 3} | settings)), folder / "base")
    return str(folder / "base")


@torch.no_grad()
def save_random_task(base: str, path: Path, name: str, num_labels: int, seed: int, **metadata) -> Path:
    """A task file whose values are drawn from ``seed``, the head's first ones too."""
    torch.manual_seed(seed)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, dtype=torch.float32)
    add_task(model, name)
    generator = torch.Generator().manual_seed(seed)
    for parameter in task_tensors(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3)
    save_task(model, name, path, {"num_labels": num_labels, "max_length": 32, "data": "glue"} | metadata)
    return path


def save_tasks(base: str, folder: Path) -> dict[str, Path]:
    """A task file in ``folder`` for each of TASKS."""
    folder.mkdir()
    return {
        name: save_random_task(base, folder / f"{name}.task", name, labels, seed)
        for seed, (name, labels) in enumerate(TASKS.items())
    }


def save_spare_tasks(base: str, files: dict[str, Path], folder: Path) -> dict[str, Path]:
    """Task files in ``folder``/tasks that no server starts with, by what is special about each."""
    tasks = folder / "tasks"
    other_base = save_base(folder / "other", bits=3)
    damaged = tasks / "damaged.task"
    damaged.write_bytes(files["sst2"].read_bytes()[:-100])
    (tasks / "link.task").symlink_to(folder / "base" / "model.safetensors")
    return {
        "second": save_random_task(base, tasks / "second.task", "sst2", 2, 10, score=0.875),
        "generated": save_random_task(base, tasks / "generated.task", "sst2", 2, 11, data="synthetic"),
        "wide": save_random_task(base, tasks / "wide.task", "wide", 5, 12),
        "wrong base": save_random_task(other_base, tasks / "foreign.task", "foreign", 2, 13),
        "endless": save_random_task(base, tasks / "endless.task", "endless", 2, 14, max_length=65),
        "damaged": damaged,
    }


@torch.no_grad()
def direct_logits(base: str, path: Path, num_labels: int, *texts: str) -> torch.Tensor:
    """Of one text or pair, by the model with that task alone."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, dtype=torch.float32).eval()
    load_task(model, path)
    return model(**AutoTokenizer.from_pretrained(base)(*texts, return_tensors="pt")).logits[0]


def query(task: str, text: str = TEXT) -> dict:
    """For a task of TASKS: a pair where it compares two texts."""
    return {"task": task, "text": text} | ({"text_pair": OTHER} if task in ("mnli", "stsb") else {})


def expected(base, path, name, text=TEXT):
    """What the server must answer of its task file at ``path``: probabilities or a score, in order."""
    texts = [value for key, value in query(name, text).items() if key != "task"]
    logits = direct_logits(base, path, TASKS.get(name, 2), *texts)
    return logits if len(logits) == 1 else logits.softmax(0)


def values_of(answer):
    return torch.tensor(list(answer["probabilities"].values()) if "probabilities" in answer else [answer["score"]])


def counts(client):
    """The samples of /metrics by name and labels."""
    lines = client.get("/metrics").text.splitlines()
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines if not line.startswith("#"))}


def until(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


@contextlib.contextmanager
def running(app):
    """An httpx.Client of ``app``, served by a thread of this process."""
    server, bound = servers.make_server(app), servers.bind("127.0.0.1", 0)
    bound.listen()
    url = servers.url_of(bound)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            while client.get("/health").json()["status"] == "starting":
                time.sleep(0.01)
            yield client
    finally:
        servers.stop(server, app)
        thread.join(60)
        assert not thread.is_alive()


@contextlib.contextmanager
def subprocess_server(*arguments: object):
    """(process, URL) of ``prequant serve ARGUMENTS`` on a free port."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "prequant_ext.cli", "serve", *map(str, arguments), "--port", "0", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
    try:
        line = process.stdout.readline()
        assert line, process.communicate()[1]
        yield process, json.loads(line)["url"]
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
