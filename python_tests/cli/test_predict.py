"""prequant predict: rows of any mix of tasks, in one model and in the same batches."""

import json

import pytest
import torch

from support.command_line import invoke
from support.serving import OTHER, TEXT, direct_logits, query, save_base, save_random_task

LABELS = {"sst2": 2, "mnli": 3, "stsb": 1}


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """(base, task files by name)."""
    folder = tmp_path_factory.mktemp("predict")
    base = save_base(folder)
    return base, {
        name: save_random_task(base, folder / f"{name}.task", name, labels, seed)
        for seed, (name, labels) in enumerate(LABELS.items())
    }


def predict(served, rows, *options):
    base, files = served
    text = rows if isinstance(rows, str) else "".join(json.dumps(row) + "\n" for row in rows)
    return invoke("predict", base, *files.values(), *options, text=text)


def test_each_row_is_answered_as_by_its_task_alone(served):
    rows = [query(name) for name in LABELS] * 2
    done = predict(served, rows, "--json")
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.exit_code == 0 and [answer["task"] for answer in answers] == [row["task"] for row in rows]
    base, files = served
    for answer in answers:
        name = answer["task"]
        logits = direct_logits(base, files[name], LABELS[name], *((TEXT,) if name == "sst2" else (TEXT, OTHER)))
        found = (
            torch.tensor(list(answer["probabilities"].values()))
            if "probabilities" in answer
            else torch.tensor([answer["score"]])
        )
        torch.testing.assert_close(found, logits.softmax(0) if len(logits) > 1 else logits, atol=1e-4, rtol=1e-3)


def test_the_table_counts_tasks_and_batches(served):
    done = predict(served, [query("sst2"), query("mnli"), query("sst2")], "--max-batch", "2")
    assert done.exit_code == 0 and "3 rows of 2 tasks in 2 batches" in done.stdout and done.stdout.count("sst2") == 2


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"task": "cola", "text": "a"}], "no task 'cola': there are sst2, mnli, stsb"),
        ("{", "rows, line 1: not a JSON object"),
        ([query("sst2"), {"task": "sst2"}], 'rows, line 2: must have a "task", a "text" and perhaps a "text_pair"'),
        ([{"task": "sst2", "text": 3}], "rows, line 1: must have"),
    ],
)
def test_bad_rows_are_named(served, rows, message):
    done = predict(served, rows)
    assert done.exit_code == 2 and message in done.stderr
