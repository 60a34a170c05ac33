"""The names of labels: a task file's own, else GLUE's, else numbers."""

import json

import pytest

from prequant_ext.serve.backbone import Query, load
from prequant_ext.serve.settings import Settings
from support.serving import TEXT, save_base, save_random_task


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("labels"))


NAMES = ["news", "sport", "weather"]
LABELS = {  # task, number of labels, metadata, what the server names
    "the file's": ("topics", 3, {"labels": json.dumps(NAMES)}, NAMES),
    "the file's before GLUE's": ("mnli", 3, {"labels": json.dumps(NAMES)}, NAMES),
    "the file's of generated rows": ("mnli", 3, {"labels": json.dumps(NAMES), "data": "synthetic"}, NAMES),
    "GLUE's": ("mnli", 3, {}, ["entailment", "neutral", "contradiction"]),
    "numbers": ("topics", 3, {}, ["0", "1", "2"]),
    "none of a regression": ("stsb", 1, {"labels": "[]"}, []),
}


@pytest.mark.parametrize(("name", "count", "metadata", "wanted"), LABELS.values(), ids=LABELS.keys())
def test_answers_name_the_labels(name, count, metadata, wanted, base, tmp_path):
    path = save_random_task(base, tmp_path / "a.task", name, count, 0, **metadata)
    backbone = load(base, [path], Settings())
    (answer,) = backbone.answer([Query(name, TEXT)])
    assert list(backbone.tasks[name].labels) == list(answer.get("probabilities", {})) == wanted


@pytest.mark.parametrize("text", ["news", "{}", '["news"]', '["news", "news"]', '["news", 1]', '["news", ""]'])
def test_other_labels_are_refused_by_name(text, base, tmp_path):
    path = save_random_task(base, tmp_path / "a.task", "topics", 2, 0, labels=text)
    with pytest.raises(ValueError, match=r"a\.task: labels in its metadata must be a JSON list of 2 different names"):
        load(base, [path], Settings())
