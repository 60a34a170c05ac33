"""How a server starts and ends: what it refuses to serve, and that no request is lost while its tasks change and when
it is told to stop.
"""

import asyncio
import functools
import os
import signal
import statistics
import sys
import threading
import time

import httpx
import pytest
import torch
from safetensors.torch import load_file

from prequant_ext.serve import server
from prequant_ext.serve.backbone import Query, load
from prequant_ext.serve.settings import Settings
from prequant_ext.task_file import read_task, write_task
from support.command_line import invoke
from support.serving import (
    TASKS,
    TEXT,
    counts,
    direct_logits,
    expected,
    query,
    save_base,
    save_random_task,
    subprocess_server,
    until,
    values_of,
)


def test_a_finished_classifier_serves_tasks_of_more_labels(base, files, tmp_path):
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=2, dtype=torch.float32)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(base).save_pretrained(tmp_path)
    found = load(str(tmp_path), [files["mnli"]], Settings())
    answer = found.answer([Query(**query("mnli"))])[0]
    torch.testing.assert_close(values_of(answer), expected(base, files["mnli"], "mnli"), atol=2e-4, rtol=1e-4)


def test_the_head_has_room_for_the_widest_task(base, files, spare):
    found = load(base, [spare["wide"], files["sst2"]], Settings(max_length=16))
    answers = found.answer([Query("wide", TEXT), Query("sst2", TEXT)])
    torch.testing.assert_close(
        values_of(answers[0]), direct_logits(base, spare["wide"], 5, TEXT).softmax(0), atol=2e-4, rtol=1e-4
    )
    torch.testing.assert_close(values_of(answers[1]), expected(base, files["sst2"], "sst2"), atol=2e-4, rtol=1e-4)
    assert {task.max_length for task in found.tasks.values()} == {16}


def test_padding_changes_no_stored_value(base, files):
    """The zeros stay in the server: a head's tensors are those of the file, row by row."""
    _, tensors = load(base, [files["sst2"]], Settings()).read(files["sst2"])
    stored = load_file(files["sst2"])
    assert tensors["classifier.weight"].shape == (3, 32) and torch.equal(
        tensors["classifier.weight"][:2], stored["classifier.weight"]
    )
    assert not tensors["classifier.weight"][2].any() and not tensors["classifier.bias"][2].any()
    assert all(torch.equal(tensors[key], stored[key]) for key in stored if not key.startswith("classifier."))


command = functools.partial(invoke, "serve")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{base}",), "tasks must name at least one task file, got none"),
        (("{base}", "--tasks", "{damaged}"), "damaged.task is damaged or no task file"),
        (("{base}", "--tasks", "{sst2}", "{wrong base}"), "foreign.task was trained on the base"),
        (("{base}", "{sst2}", "{second}"), "both hold the task 'sst2'"),
        (("{base}", "--tasks", "nosuch.task"), "no task file at nosuch.task"),
        (("nosuch", "--tasks", "{sst2}"), "no model at nosuch"),
        (("{float}", "--tasks", "{sst2}"), "model must be quantized"),
        (("{base}", "{sst2}", "--max-length", "65"), "max_length must be at most 64"),
        (("{base}", "{sst2}", "--max-batch", "0"), "max_batch must be at least 1, got 0"),
        (("{base}", "{sst2}", "--task-dir", "{sst2}"), "task_dir must be a folder"),
        (("{base}", "{nameless}"), "its metadata must have a number num_labels"),
        (("{scales}", "{scaled}"), "task_names needs tasks of outlier weights"),
        (("{mute}", "{sst2}"), "has no tokenizer: looked for"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_served_is_refused_at_the_start(
    arguments, message, base, files, spare, folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(server, "serve", lambda *_: pytest.fail("it is served"))
    names = {key: path for key, path in (files | spare).items()} | {"base": base, "float": folder / "float"}
    if "{nameless}" in arguments:
        metadata, tensors = read_task(files["sst2"])
        names["nameless"] = tmp_path / "nameless.task"
        write_task(names["nameless"], "nameless", tensors, metadata["base_fingerprint"])
    if "{scales}" in arguments:
        names["scales"] = save_base(tmp_path, r=0, train_scales=True)
        names["scaled"] = save_random_task(names["scales"], tmp_path / "s.task", "s", 2, 0)
    if "{mute}" in arguments:
        names["mute"] = tmp_path / "mute"
        names["mute"].mkdir()
        for name in ("config.json", "model.safetensors"):
            os.link(f"{base}/{name}", names["mute"] / name)
    result = command(*(argument.format(**names) for argument in arguments))
    assert result.exit_code == 2 and message in result.stderr and not result.stdout


def test_a_taken_port_is_a_failure_that_says_so(base, files):
    with server.bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = taken.getsockname()[1]
        result = command(base, "--tasks", files["sst2"], "--port", port)
    assert result.exit_code == 1 and f"cannot listen on port {port} of 127.0.0.1" in result.stderr


@pytest.mark.parametrize("missing", ["fastapi", "uvicorn"])
def test_a_missing_library_names_the_extra(missing, base, files, monkeypatch):
    for name in ("server", "app"):
        monkeypatch.delitem(sys.modules, f"prequant_ext.serve.{name}")
        monkeypatch.delattr(f"prequant_ext.serve.{name}")
    monkeypatch.setitem(sys.modules, missing, None)
    result = command(base, "--tasks", files["sst2"])
    assert (
        result.exit_code == 2
        and f"but {missing} is not installed: pip install 'prequant_ext[serve]'" in result.stderr
        and f"prequant serve needs {missing}" in result.stderr
    )


def test_help_has_an_example():
    assert "Example: prequant serve base --tasks " in " ".join(command("--help").stdout.split())


# ---- under load ------------------------------------------------------------------------------------------------------

REQUESTS, CLIENTS = 300, 16


async def load_with_changes(url, files, spare, changes):
    """(status, seconds, query, answer) of REQUESTS requests by CLIENTS clients, while tasks are replaced and removed
    all the time.

    changes  is filled with the version of each loaded "swap": its file
    """
    results, left = [], iter(range(REQUESTS))
    async with httpx.AsyncClient(base_url=url, timeout=60, limits=httpx.Limits(max_connections=None)) as client:

        async def ask(number):
            for turn in left:
                body = [query("stsb"), query("topics"), {"task": "swap", "text": TEXT}, {"task": "gone", "text": TEXT}][
                    turn % 4
                ]
                begin = time.monotonic()
                response = await client.post("/predict", json=body)
                results.append((response.status_code, time.monotonic() - begin, body, response.json()))

        async def change():
            for turn in range(10_000):
                path = (files["sst2"], spare["second"])[turn % 2]
                found = await client.put("/tasks/swap", json={"file": path.name})
                changes[found.json()["version"]] = path
                assert found.status_code == 200
                if turn % 2:
                    assert (await client.delete("/tasks/gone")).status_code == 204
                else:
                    content = {
                        "content": files["topics"].read_bytes(),
                        "headers": {"content-type": "application/octet-stream"},
                    }
                    assert (await client.put("/tasks/gone", **content)).status_code in (200, 201)
                if len(results) == REQUESTS and turn % 2 == 0:
                    return
                await asyncio.sleep(0.01)

        await asyncio.gather(change(), *map(ask, range(CLIENTS)))
    return results


async def several(url, bodies):
    async with httpx.AsyncClient(base_url=url, timeout=60) as client:
        return await asyncio.gather(*(client.post("/predict", json=body) for body in bodies))


@pytest.mark.slow
def test_no_request_is_lost_while_tasks_change_and_the_server_stops(base, files, spare, folder, tmp_path):
    start = {"swap": "sst2", "gone": "topics"}
    for name, source in start.items():
        save_random_task(base, tmp_path / f"{name}.task", name, TASKS[source], list(TASKS).index(source))
    wanted = {name: expected(base, files[name], name) for name in ("stsb", "topics", "sst2")}
    versions = {files["sst2"]: wanted["sst2"], spare["second"]: expected(base, spare["second"], "sst2")}
    assert not torch.allclose(*versions.values(), atol=1e-2)
    tasks = [files["stsb"], files["topics"], tmp_path / "swap.task", tmp_path / "gone.task"]
    # A wait longer than the clients have patience: batches go when they are full, or when a change comes after them.
    limits = ("--max-batch", CLIENTS, "--max-wait", 100_000, "--task-dir", folder / "tasks")
    with subprocess_server(base, "--tasks", *tasks, *limits) as (process, url):
        changes = {3: files["sst2"]}  # the third file that the server started with has the values of sst2
        results = asyncio.run(load_with_changes(url, files, spare, changes))
        assert len(results) == REQUESTS and len(changes) > 4
        for status, _, body, answer in results:
            task = body["task"]
            if task == "gone" and status == 404:
                assert "no task 'gone'" in answer["detail"]
                continue
            assert status == 200, answer
            right = (
                versions[changes[answer["version"]]] if task == "swap" else wanted["topics" if task == "gone" else task]
            )
            torch.testing.assert_close(values_of(answer), right, atol=2e-4, rtol=1e-4)
        seconds = sorted(result[1] for result in results)
        print(
            f"{REQUESTS} requests, {CLIENTS} clients, {len(changes)} swaps: p50 "
            f"{1e3 * statistics.median(seconds):.0f} ms, p99 {1e3 * seconds[-4]:.0f} ms"
        )
        with httpx.Client(base_url=url, timeout=60) as client:
            found = counts(client)
            assert found["prequant_batch_tasks_sum"] > 1.5 * found["prequant_batch_tasks_count"]  # mixed, and
            assert found["prequant_batch_rows_sum"] > 2 * found["prequant_batch_rows_count"]  # shared

            answers = []
            waiting = threading.Thread(target=lambda: answers.extend(asyncio.run(several(url, [query("stsb")] * 10))))
            waiting.start()
            until(lambda: counts(client)["prequant_queue_rows"] == 10)
        process.send_signal(signal.SIGTERM)
        waiting.join()
        assert [answer.status_code for answer in answers] == [200] * 10
        error = process.communicate(timeout=60)[1]
        assert (process.returncode, error) == (0, "")
