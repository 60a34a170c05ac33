"""The queue before the model: what shares a batch, in which order things are done,
what a full queue and the end say.
"""

import threading

import pytest

from prequant_ext.serve.backbone import Query
from prequant_ext.serve.batcher import Batcher, Draining, QueueFull
from prequant_ext.serve.metrics import Metrics
from prequant_ext.serve.settings import Settings

LONG = 600_000  # milliseconds that no test waits: only a full batch, a change or the end may cut it short


class Model:
    """Answers that wait until ``gate`` is open; ``seen`` has the texts of each call."""

    def __init__(self):
        self.seen, self.gate = [], threading.Event()

    def __call__(self, queries):
        assert self.gate.wait(60)
        self.seen.append([query.text for query in queries])
        if any(query.text == "broken" for query in queries):
            raise RuntimeError("no such token")
        return [{"text": query.text} for query in queries]


@pytest.fixture
def make():
    """make(**settings) -> (batcher, model), started and ended with the test."""
    made = []

    def make_one(**settings):
        model = Model()
        batcher = Batcher(model, Settings(**({"max_wait": 0.0, "max_rows": 1} | settings)), Metrics())
        batcher.start()
        made.append((batcher, model))
        return batcher, model

    yield make_one
    for batcher, model in made:
        model.gate.set()
        assert batcher.drain(60) or batcher.is_draining


def queries(*texts, task="a"):
    return [Query(task, text) for text in texts]


def held(batcher):
    """Keep the model's thread at a change until the returned event is set."""
    reached, release = threading.Event(), threading.Event()

    def hold():
        reached.set()
        assert release.wait(60)

    batcher.change(hold)
    assert reached.wait(60)
    return release


def test_what_waits_together_is_one_batch(make):
    batcher, model = make(max_batch=3)
    model.gate.set()
    release = held(batcher)
    futures = [batcher.submit(queries(text, task=task))[0] for text, task in zip("vwxyz", "abaca", strict=True)]
    release.set()
    answers = [future.result(60) for future in futures]
    assert model.seen == [["v", "w", "x"], ["y", "z"]]
    assert [answer["text"] for answer in answers] == list("vwxyz")
    assert answers[0]["batch"] == {"rows": 3, "tasks": ["a", "b"]} and answers[4]["batch"] == {
        "rows": 2,
        "tasks": ["c", "a"],
    }
    assert all(answer["milliseconds"].keys() == {"queue", "model"} for answer in answers)


def test_a_batch_waits_until_it_is_full(make):
    batcher, model = make(max_batch=2, max_wait=LONG)
    model.gate.set()
    first = batcher.submit(queries("x"))[0]
    assert not first.done()
    second = batcher.submit(queries("y"))[0]
    assert (first.result(60)["text"], second.result(60)["text"]) == ("x", "y") and model.seen == [["x", "y"]]


def test_a_lonely_row_does_not_wait_for_ever(make):
    batcher, model = make(max_wait=20)
    model.gate.set()
    assert batcher.submit(queries("x"))[0].result(60)["batch"]["rows"] == 1


def test_a_change_comes_after_what_was_accepted_before_it(make):
    batcher, model = make(max_batch=8, max_wait=LONG)
    model.gate.set()
    before = batcher.submit(queries("x", "y"))
    seen_by_change = batcher.change(lambda: list(model.seen))
    after = batcher.submit(queries("z"))
    assert seen_by_change.result(60) == [["x", "y"]] and all(future.done() for future in before)
    batcher.change(lambda: None)
    assert after[0].result(60)["batch"]["rows"] == 1


def test_a_change_that_fails_tells_its_caller_alone(make):
    batcher, model = make()
    model.gate.set()
    with pytest.raises(ValueError, match="wrong base"):
        batcher.change(lambda: (_ for _ in ()).throw(ValueError("wrong base"))).result(60)
    assert batcher.submit(queries("x"))[0].result(60)["text"] == "x" and batcher.status == "ready"


def test_a_bad_row_fails_alone(make):
    batcher, model = make()
    release = held(batcher)
    futures = batcher.submit(queries("x", "broken", "z"))
    model.gate.set()
    release.set()
    assert [futures[0].result(60)["text"], futures[2].result(60)["text"]] == ["x", "z"]
    with pytest.raises(RuntimeError, match="no such token"):
        futures[1].result(60)
    assert batcher.metrics.counts["prequant_failed_rows_total"] == {"": 1} and batcher.metrics.counts[
        "prequant_rows_total"
    ] == {'task="a"': 2}


def test_rows_whose_client_has_gone_are_not_computed(make):
    batcher, model = make()
    model.gate.set()
    release = held(batcher)
    gone, stays = batcher.submit(queries("x", "y"))
    assert gone.cancel()
    release.set()
    assert stays.result(60)["batch"]["rows"] == 1 and model.seen == [["y"]]


def test_a_full_queue_takes_all_of_a_request_or_none(make):
    batcher, model = make(max_queue=3)
    model.gate.set()
    release = held(batcher)
    futures = batcher.submit(queries("v", "w"))
    with pytest.raises(QueueFull, match="2 texts wait already, and at most 3 may"):
        batcher.submit(queries("x", "y"))
    futures += batcher.submit(queries("z"))
    release.set()
    assert [future.result(60)["text"] for future in futures] == ["v", "w", "z"]
    assert [text for batch in model.seen for text in batch] == ["v", "w", "z"]


def test_draining_answers_what_is_queued_and_accepts_nothing(make):
    batcher, model = make(max_batch=2, max_wait=LONG)
    release = held(batcher)
    futures = batcher.submit(queries("x", "y", "z"))
    ended = []
    drain = threading.Thread(target=lambda: ended.append(batcher.drain(60)))
    drain.start()
    while batcher.status != "draining":
        pass
    for refused in (lambda: batcher.submit(queries("late")), lambda: batcher.change(lambda: None)):
        with pytest.raises(Draining, match="about to stop"):
            refused()
    model.gate.set()
    release.set()
    drain.join(60)
    assert ended == [True] and [future.result(0)["text"] for future in futures] == ["x", "y", "z"]


def test_draining_ends_in_time_and_says_what_was_left(make):
    batcher, model = make(max_batch=1)
    futures = batcher.submit(queries("x", "y"))  # the model holds the first
    while len(batcher.queue) != 1:
        pass
    assert batcher.drain(0.05) is False
    with pytest.raises(Draining, match="before this was answered"):
        futures[1].result(0)
    model.gate.set()
    assert futures[0].result(60)["text"] == "x"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_status():
    model = Model()
    batcher = Batcher(model, Settings(), Metrics())
    assert batcher.status == "starting"
    batcher.start()
    assert batcher.status == "ready"

    def die():
        raise SystemExit  # not an Exception: nothing catches it

    batcher.change(die)
    batcher.thread.join(60)
    assert batcher.status == "failed"
    batcher.drain(1)
    assert batcher.status == "draining"


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"max_wait": -1.0}, "max_wait must be 0 or more, got -1.0"),
        ({"max_wait": float("nan")}, "max_wait must be 0 or more, got nan"),
        ({"max_queue": 8}, "max_rows must be at most max_queue = 8"),
        ({"max_length": 7}, "max_length must be at least 8, got 7"),
    ],
    ids=str,
)
def test_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong)
