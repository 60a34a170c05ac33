"""What the tests of the server share: a tiny base with task files, direct answers to compare with, and a running server."""

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
from tiny_checkpoint import save_float_model
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from prequant_ext import PreQuantConfig, add_task, load_task, pipeline, save_task
from prequant_ext.serve import server as servers
from prequant_ext.task_file import task_tensors

TASKS = {"sst2": 2, "mnli": 3, "stsb": 1, "topics": 2}  # name: labels; the last is none of GLUE
TEXT, OTHER = "the river near some quiet forest", "every engine under the old valley"


def save_base(folder: Path, **settings) -> str:
    """A quantized directory with a tokenizer."""
    save_float_model(folder / "float")
    pipeline.quantize_directory(str(folder / "float"), PreQuantConfig(**({"r": 3} | settings)), folder / "base")
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


@torch.no_grad()
def direct_logits(base: str, path: Path, num_labels: int, *texts: str) -> torch.Tensor:
    """Of one text or pair, by the model with that task alone."""
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=num_labels, dtype=torch.float32).eval()
    load_task(model, path)
    return model(**AutoTokenizer.from_pretrained(base)(*texts, return_tensors="pt")).logits[0]


def query(task: str, text: str = TEXT) -> dict:
    """For a task of TASKS: a pair where it compares two texts."""
    return {"task": task, "text": text} | ({"text_pair": OTHER} if task in ("mnli", "stsb") else {})


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
