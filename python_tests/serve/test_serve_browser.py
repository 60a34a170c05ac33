"""The page in a real browser, against a real server: what a visitor types is what the server is asked, and its answer
is what stands there.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from prequant_ext.serve.app import create_app
from prequant_ext.serve.backbone import load
from prequant_ext.serve.settings import Settings
from support import ROOT
from support.serving import OTHER, TASKS, TEXT, query, running, save_random_task

BROWSER = ROOT / "python_tests" / "support" / "browser.py"
FIRST = "document.querySelector('#answers > li')"
ROWS = f"[...{FIRST}.querySelectorAll('.answer')].map((line) => [line.dataset.task, line.innerText])"


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """browse(url, *steps) -> what the steps found; see browser.py."""
    done = subprocess.run([sys.executable, "-c", "import PyQt6.QtWebEngineWidgets"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(
            "browser: PyQt6-WebEngine is not at hand: "
            f"{(done.stderr.strip().splitlines() or ['it does not start'])[-1]}"
        )
    pictures = Path(os.environ.get("PREQUANT_PICTURES") or tmp_path_factory.mktemp("pictures"))
    numbers = iter(range(100))

    def run(url, *steps):
        picture = pictures / f"page{next(numbers)}.png"
        done = subprocess.run(
            [sys.executable, str(BROWSER), str(url), str(picture), json.dumps(steps)],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert done.returncode == 0, done.stderr
        found = json.loads(done.stdout.splitlines()[-1])
        assert found["complaints"] == [] and picture.stat().st_size > 1000
        return found["found"]

    return run


@pytest.fixture(scope="module")
def client(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("scored")
    files = [
        save_random_task(base, folder / f"{name}.task", name, labels, seed, score=0.875)
        for seed, (name, labels) in enumerate(TASKS.items())
    ]
    with running(create_app(load(base, files, Settings()), Settings())) as found:
        yield found


def choose(task):
    return f"document.getElementById('task').options.length > 0 && (document.getElementById('task').value = '{task}', \
document.getElementById('task').dispatchEvent(new Event('change')), true)"


def type_into(field, text):
    return f"(document.getElementById('{field}').value = {json.dumps(text)}, true)"


def click(button):
    return f"!document.getElementById('{button}').disabled && (document.getElementById('{button}').click(), true)"


def shown(answer):
    """The lines that the page has for an answer."""
    if "score" in answer:
        return [answer["task"], f"score {answer['score']:.3f}"]
    return [
        answer["task"],
        *(part for label, share in answer["probabilities"].items() for part in (label, f"{100 * share:.1f} %")),
    ]


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_a_visitor_asks_one_task(browse, client):
    about, *_, rows, batch, text = browse(
        client.base_url,
        choose("sst2") + " && document.getElementById('about').innerText",
        type_into("text", TEXT),
        click("ask"),
        FIRST + " && true",
        ROWS,
        f"{FIRST}.querySelector('.batch').innerText",
        f"{FIRST}.querySelector('.texts').innerText",
    )
    answer = client.post("/predict", json=query("sst2")).json()
    assert [(task, lines(said)) for task, said in rows] == [("sst2", shown(answer))]
    assert about == "negative / positive · up to 32 tokens · 87.5 in its validation"
    assert "in a batch of 1 text for one task" in batch and text == TEXT


def test_a_visitor_asks_every_task_of_a_pair_in_one_batch(browse, client):
    *_, rows, batch = browse(
        client.base_url,
        choose("mnli"),
        type_into("text", TEXT),
        type_into("text-pair", OTHER),
        click("ask-all"),
        FIRST + " && true",
        ROWS,
        f"{FIRST}.querySelector('.batch').innerText",
    )
    names = ["mnli", "stsb", "topics"]  # sst2 takes one text
    answers = client.post("/predict", json=[{"task": name, "text": TEXT, "text_pair": OTHER} for name in names]).json()
    assert [(task, lines(said)) for task, said in rows] == [(answer["task"], shown(answer)) for answer in answers]
    assert "in a batch of 3 texts for 3 tasks" in batch


def test_a_refusal_is_shown_and_text_is_never_markup(browse, client):
    markup = "<img src=x onerror=\"document.title='run'\">"
    *_, said, _, _, text, images, title = browse(
        client.base_url,
        choose("sst2"),
        type_into("text", "x" * 10_001),
        click("ask"),
        "document.getElementById('error').innerText || null",
        type_into("text", markup),
        click("ask"),
        FIRST + f" && {FIRST}.querySelector('.texts').innerText",
        "document.images.length + 1",
        "document.title",
    )
    assert said == "text must have at most 10000 characters, got 10001"
    assert text == markup and images == 1 and title == "PreQuant: one backbone, many tasks"


def test_fields_have_labels_and_the_second_text_is_there_for_pairs_only(browse, client):
    unlabelled, for_one, for_two = browse(
        client.base_url,
        "[...document.querySelectorAll('select, textarea')].filter((field) => !field.labels.length).length + 1",
        choose("sst2") + " && [document.getElementById('pair').hidden]",
        choose("mnli") + " && [document.getElementById('pair').hidden]",
    )
    assert (unlabelled, for_one, for_two) == (1, [True], [False])
