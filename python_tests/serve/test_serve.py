"""The server over real HTTP: answers, shared batches, limits, tasks that come and go, health, metrics and the page."""

import asyncio
import json
import re
import threading

import httpx
import pytest
import torch

from prequant_ext.serve.app import create_app
from prequant_ext.serve.backbone import load
from prequant_ext.serve.settings import Settings
from support.serving import (
    OTHER,
    TASKS,
    TEXT,
    counts,
    direct_logits,
    expected,
    query,
    running,
    until,
    values_of,
)


@pytest.fixture(scope="module")
def client(base, files):
    """A server whose tasks stay."""
    settings = Settings(max_text=200, max_rows=8, max_body=4096)
    app = create_app(load(base, list(files.values()), settings), settings)
    with running(app) as found:
        found.app = app
        yield found


@pytest.fixture
def changing(base, files, spare, folder):
    """A server whose tasks may change; it starts with sst2 and takes three."""
    settings = Settings(task_dir=folder / "tasks", max_tasks=3, max_body=1024)  # less than a task file has
    app = create_app(load(base, [files["sst2"]], settings), settings)
    with running(app) as found:
        found.app = app
        yield found


def detail(response, status):
    assert response.status_code == status, response.text
    return response.json()["detail"]


# ---- answers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_an_answer_is_that_of_the_model_with_the_task_alone(client, base, files, name):
    answer = client.post("/predict", json=query(name)).raise_for_status().json()
    wanted = expected(base, files[name], name)
    torch.testing.assert_close(values_of(answer), wanted, atol=2e-4, rtol=1e-4)
    assert (
        answer["task"] == name
        and answer["is_cut"] is False
        and answer["tokens"] == (8 if name in ("sst2", "topics") else 15)
    )
    if len(wanted) > 1:
        assert answer["label"] == list(answer["probabilities"])[int(wanted.argmax())]


def test_labels_are_those_of_glue_or_numbers(client):
    found = {task["name"]: task for task in client.get("/tasks").json()["tasks"]}
    assert {name: task["labels"] for name, task in found.items()} == {
        "sst2": ["negative", "positive"],
        "mnli": ["entailment", "neutral", "contradiction"],
        "stsb": [],
        "topics": ["0", "1"],
    }
    assert {name: task["num_texts"] for name, task in found.items()} == {
        "sst2": 1,
        "mnli": 2,
        "stsb": 2,
        "topics": None,
    }
    assert {task["max_length"] for task in found.values()} == {32} and found["sst2"]["version"] == 1


def test_a_list_of_all_tasks_is_one_batch_in_its_order(client, base, files):
    before = counts(client)
    queries = [query(name) for name in (*TASKS, "sst2")]
    answers = client.post("/predict", json=queries).raise_for_status().json()
    after = counts(client)
    assert [answer["task"] for answer in answers] == [one["task"] for one in queries]
    assert all(answer["batch"] == {"rows": 5, "tasks": list(TASKS)} for answer in answers)
    for answer in answers:
        torch.testing.assert_close(
            values_of(answer), expected(base, files[answer["task"]], answer["task"]), atol=2e-4, rtol=1e-4
        )
    grown = {
        name: after[name] - before[name]
        for name in ("prequant_batch_rows_count", "prequant_batch_rows_sum", "prequant_batch_tasks_sum")
    }
    assert grown == {"prequant_batch_rows_count": 1, "prequant_batch_rows_sum": 5, "prequant_batch_tasks_sum": 4}
    assert after['prequant_rows_total{task="sst2"}'] - before['prequant_rows_total{task="sst2"}'] == 2


def test_a_task_outside_glue_takes_one_text_or_two(client, base, files):
    answer = client.post("/predict", json={"task": "topics", "text": TEXT, "text_pair": OTHER}).json()
    wanted = direct_logits(base, files["topics"], 2, TEXT, OTHER).softmax(0)
    torch.testing.assert_close(values_of(answer), wanted, atol=2e-4, rtol=1e-4)


def test_a_long_text_is_cut_and_says_so(client):
    answer = client.post("/predict", json=query("sst2", "river " * 33)).json()
    assert (answer["tokens"], answer["is_cut"]) == (32, True)
    assert client.post("/predict", json=query("sst2", "river " * 30)).json()["is_cut"] is False


# ---- limits and mistakes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        (query("nosuch"), 404, "no task 'nosuch': there are sst2, mnli, stsb, topics"),
        ([query("sst2"), query("nosuch")], 404, "no task 'nosuch'"),
        ({"task": "mnli", "text": TEXT}, 422, "task 'mnli' takes two texts, text and text_pair"),
        (query("sst2") | {"text_pair": OTHER}, 422, "task 'sst2' takes one text, without text_pair"),
        (query("sst2", ""), 422, "text: String should have at least 1 character"),
        (query("sst2", "\ud800"), 422, "text: "),
        (query("sst2", "x" * 201), 422, "text must have at most 200 characters, got 201"),
        (query("mnli") | {"text_pair": "x" * 201}, 422, "text_pair must have at most 200 characters, got 201"),
        ({"text": TEXT}, 422, "task: Field required"),
        (query("sst2") | {"top": 3}, 422, "top: Extra inputs are not permitted"),
        ([query("sst2"), {"task": "sst2", "text": 5}], 422, "1.text: Input should be a valid string"),
        ([], 422, "a list must hold 1 to 8 queries, got 0"),
        ([query("sst2")] * 9, 422, "a list must hold 1 to 8 queries, got 9"),
        ("text", 422, "valid dictionary"),
    ],
    ids=lambda value: str(value)[:40].encode("ascii", "replace").decode() if not isinstance(value, int) else None,
)
def test_a_bad_request_is_told_what_is_wrong(client, body, status, message):
    before = counts(client)["prequant_batch_rows_count"]
    content = json.dumps(body)  # httpx's own would refuse half of a surrogate pair
    assert message in detail(
        client.post("/predict", content=content, headers={"content-type": "application/json"}), status
    )
    assert counts(client)["prequant_batch_rows_count"] == before


def test_what_is_no_json_is_refused(client):
    assert "JSON" in detail(client.post("/predict", content=b"{", headers={"content-type": "application/json"}), 422)


@pytest.mark.parametrize("body", [b" " * 4097, iter([b" " * 2048, b" " * 2049])], ids=["announced", "in chunks"])
def test_a_large_body_is_refused(client, body):
    assert client.post("/predict", content=body, headers={"content-type": "application/json"}).status_code == 413
    assert client.post("/predict", json=query("sst2")).status_code == 200


def held(app):
    """The model's thread waits until the returned event is set."""
    reached, release = threading.Event(), threading.Event()
    app.state.serving.batcher.change(lambda: (reached.set(), release.wait(60)))
    assert reached.wait(60)
    return release


def in_background(client, body, answers):
    """A request of its own connection, started; its response goes to ``answers``."""
    thread = threading.Thread(
        target=lambda: answers.append(httpx.post(f"{client.base_url}/predict", json=body, timeout=60))
    )
    thread.start()
    return thread


def test_a_full_queue_says_when_to_come_again(base, files):
    settings = Settings(max_queue=2, max_rows=2)
    app = create_app(load(base, [files["sst2"]], settings), settings)
    with running(app) as client:
        release, answers = held(app), []
        thread = in_background(client, [query("sst2")] * 2, answers)
        until(lambda: len(app.state.serving.batcher.queue) == 2)
        refused = client.post("/predict", json=query("sst2"))
        assert (
            detail(refused, 503) == "2 texts wait already, and at most 2 may" and refused.headers["retry-after"] == "1"
        )
        assert counts(client)["prequant_queue_rows"] == 2
        release.set()
        thread.join()
        assert [answer.status_code for answer in answers] == [200] and client.post(
            "/predict", json=query("sst2")
        ).status_code == 200


def test_the_end_answers_what_is_queued_and_refuses_the_rest(base, files):
    settings = Settings(max_batch=2)
    app = create_app(load(base, [files["sst2"]], settings), settings)
    with running(app) as client:
        release, answers = held(app), []
        threads = [in_background(client, query("sst2"), answers) for _ in range(5)]
        until(lambda: len(app.state.serving.batcher.queue) == 5)
        drain = threading.Thread(target=app.state.serving.batcher.drain, args=(60,))
        drain.start()
        until(lambda: app.state.serving.batcher.is_draining)
        refused = client.post("/predict", json=query("sst2"))
        assert (
            detail(refused, 503) == "the server is about to stop"
            and refused.headers["connection"] == "close"
            and refused.headers["retry-after"] == "1"
        )
        health = client.get("/health")
        assert health.status_code == 503 and health.json() == {"status": "draining", "tasks": 1}
        release.set()
        for thread in (*threads, drain):
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 5


def test_a_fault_of_the_model_is_a_500_and_the_server_goes_on(base, files, monkeypatch):
    app = create_app(load(base, [files["sst2"]], Settings()), Settings())
    batcher = app.state.serving.batcher
    with running(app) as client, monkeypatch.context() as patched:

        def fail(queries):
            raise RuntimeError("out of memory")

        patched.setattr(batcher, "answer", fail)
        assert client.post("/predict", json=query("sst2")).status_code == 500
        patched.undo()
        assert client.post("/predict", json=query("sst2")).status_code == 200
        found = counts(client)
        assert (
            found["prequant_failed_rows_total"] == 1
            and found['prequant_requests_total{method="POST",path="/predict",status="500"}'] == 1
        )


# ---- tasks that come and go ------------------------------------------------------------------------------------------


def test_a_task_is_loaded_answers_and_is_removed(changing, base, files):
    assert changing.get("/tasks").json()["can_change"] is True
    put = changing.put("/tasks/stsb", json={"file": "stsb.task"})
    assert (put.status_code, put.json()["version"], put.json()["name"]) == (201, 2, "stsb")
    answer = changing.post("/predict", json=query("stsb")).raise_for_status().json()
    torch.testing.assert_close(values_of(answer), expected(base, files["stsb"], "stsb"), atol=2e-4, rtol=1e-4)
    assert changing.delete("/tasks/stsb").status_code == 204
    assert "no task 'stsb': there are sst2" in detail(changing.post("/predict", json=query("stsb")), 404)
    assert "no task 'stsb'" in detail(changing.delete("/tasks/stsb"), 404)
    assert [task["name"] for task in changing.get("/tasks").json()["tasks"]] == ["sst2"]


def test_a_task_is_replaced_by_an_upload(changing, base, spare):
    upload = {"content": spare["second"].read_bytes(), "headers": {"content-type": "application/octet-stream"}}
    put = changing.put("/tasks/sst2", **upload)
    assert (put.status_code, put.json()["version"], put.json()["score"]) == (200, 2, "0.875")
    answer = changing.post("/predict", json=query("sst2")).json()
    torch.testing.assert_close(values_of(answer), expected(base, spare["second"], "sst2"), atol=2e-4, rtol=1e-4)
    assert answer["version"] == 2
    put = changing.put("/tasks/sst2-again", **upload)  # under a name of its own; what it was trained on stays known
    assert put.status_code == 201 and put.json()["labels"] == ["negative", "positive"]


def test_a_task_of_generated_data_has_no_names_of_glue(changing):
    assert changing.put("/tasks/sst2", json={"file": "generated.task"}).json()["labels"] == ["0", "1"]


@pytest.mark.parametrize(
    ("name", "body", "status", "message"),
    [
        (
            "foreign",
            {"file": "foreign.task"},
            422,
            r"foreign.task was trained on the base [0-9a-f]{64} but the model's base is [0-9a-f]{64}",
        ),
        ("damaged", {"file": "damaged.task"}, 422, "damaged.task is damaged or no task file"),
        (
            "wide",
            {"file": "wide.task"},
            422,
            "wide.task has 5 labels but this server's head has 3: start the server with it among its tasks",
        ),
        (
            "endless",
            {"file": "endless.task"},
            422,
            "endless.task: max_length must be from 8 to 64, which the model has positions for, got 65",
        ),
        ("x", {"file": "nosuch.task"}, 404, "no task file at nosuch.task"),
        ("x", {"file": "."}, 404, "no task file at ."),
        ("x", {"file": "../base/model.safetensors"}, 403, "file must be inside the folder of task files"),
        ("x", {"file": "/etc/passwd"}, 403, "file must be inside the folder of task files"),
        ("x", {"file": "link.task"}, 403, "file must be inside the folder of task files"),
        ("x", {"file": "a\0b"}, 422, "the body must be JSON"),
        ("x", {"file": "\ud800"}, 422, "the body must be JSON"),
        ("x", {"file": 5}, 422, "the body must be JSON"),
        ("x", {"file": "x" * 300}, 422, "File name too long"),
        ("x", {"path": "sst2.task"}, 422, "the body must be JSON"),
        ("x", ["sst2.task"], 422, "the body must be JSON"),
        ("no name", {"file": "sst2.task"}, 422, "task name must match"),
    ],
    ids=lambda value: ascii(value)[:40].replace("\\", "") if isinstance(value, dict) else None,
)
def test_a_task_that_cannot_be_loaded_changes_nothing(changing, folder, name, body, status, message):
    before = changing.get("/tasks").json()
    content = json.dumps(body)  # httpx's own would refuse half of a surrogate pair
    said = detail(changing.put(f"/tasks/{name}", content=content, headers={"content-type": "application/json"}), status)
    assert re.search(message, said) and str(folder) not in said
    assert changing.get("/tasks").json() == before


def test_a_damaged_or_large_upload_is_refused(changing, spare):
    headers = {"content-type": "application/octet-stream"}
    said = detail(changing.put("/tasks/x", content=spare["damaged"].read_bytes(), headers=headers), 422)
    assert said.startswith("the uploaded file is damaged or no task file")
    largest = changing.app.state.serving.backbone.max_task_bytes
    assert spare["second"].stat().st_size < largest < 5_000_000
    assert changing.put("/tasks/x", content=bytes(largest + 1), headers=headers).status_code == 413
    assert "got 'text/plain'" in detail(
        changing.put("/tasks/x", content=b"x", headers={"content-type": "text/plain"}), 415
    )
    assert "JSON" in detail(changing.put("/tasks/x", content=b"{", headers={"content-type": "application/json"}), 422)
    assert len(changing.get("/tasks").json()["tasks"]) == 1


def test_no_more_tasks_than_the_server_takes(changing):
    for name in ("a", "b"):
        assert changing.put(f"/tasks/{name}", json={"file": "topics.task"}).status_code == 201
    assert "there are 3 tasks, and max_tasks is 3: remove one first" in detail(
        changing.put("/tasks/c", json={"file": "topics.task"}), 409
    )
    assert changing.put("/tasks/b", json={"file": "second.task"}).status_code == 200


def test_without_a_folder_the_tasks_stay(client, spare):
    assert client.get("/tasks").json()["can_change"] is False
    assert "started without a task_dir" in detail(client.put("/tasks/sst2", json={"file": "sst2.task"}), 403)
    headers = {"content-type": "application/octet-stream"}
    assert "started without a task_dir" in detail(
        client.put("/tasks/sst2", content=spare["second"].read_bytes(), headers=headers), 403
    )
    assert "started without a task_dir" in detail(client.delete("/tasks/sst2"), 403)


# ---- health, metrics, page -------------------------------------------------------------------------------------------


def test_health(client):
    found = client.get("/health")
    assert found.status_code == 200 and found.json() == {"status": "ready", "tasks": 4}


def test_health_before_the_model_runs_is_a_503(base, files):
    app = create_app(load(base, [files["sst2"]], Settings()), Settings())

    async def ask():
        # runs no start-up
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.get("/health")

    found = asyncio.run(ask())
    assert found.status_code == 503 and found.json()["status"] == "starting"


def test_metrics_are_in_the_text_format(client):
    client.post("/predict", json=query("sst2"))
    client.get("/nosuch/path")
    found = client.get("/metrics")
    assert found.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8" and found.text.endswith("\n")
    for line in found.text.splitlines():
        assert re.fullmatch(
            r'# (HELP|TYPE) prequant_\w+ .+|prequant_\w+(\{\w+="[^"]*"(,\w+="[^"]*")*\})? [0-9.e+-]+', line
        ), line
    samples = counts(client)
    for name in ("prequant_batch_rows", "prequant_batch_tasks", "prequant_predict_seconds"):
        buckets = [value for key, value in samples.items() if key.startswith(f"{name}_bucket")]
        assert (
            buckets == sorted(buckets) and buckets[-1] == samples[f"{name}_count"] >= 1 and samples[f"{name}_sum"] > 0
        )
    assert samples["prequant_tasks"] == 4 and samples["prequant_queue_rows"] == 0
    assert samples['prequant_requests_total{method="POST",path="/predict",status="200"}'] == samples[
        "prequant_predict_seconds_count"
    ] - sum(value for key, value in samples.items() if 'path="/predict"' in key and 'status="200"' not in key)
    assert samples['prequant_requests_total{method="GET",path="other",status="404"}'] == 1


def test_the_page_loads_nothing_from_elsewhere(client):
    found = client.get("/")
    assert (
        found.headers["content-type"].startswith("text/html")
        and "default-src 'none'" in found.headers["content-security-policy"]
    )
    assert not re.search(r"https?://|//[a-z]+\.|@import|url\(|innerHTML", found.text)
    assert client.get("/docs").status_code == 404
