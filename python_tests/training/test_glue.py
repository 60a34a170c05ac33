"""GLUE's tasks, metrics, batches, and the generated task."""

import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch

from prequant_ext.glue import metrics, synthetic
from prequant_ext.glue.batches import Collator, LengthGroupedSampler, by_length
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, TASKS, find_file, get_task, load_rows, resolve_data_dir, subset

ROW = {"sentence": "fine", "label": 1, "idx": 0}


def write_rows(folder, task="sst2", split="validation", lines=('{"sentence": "fine", "label": 1, "idx": 0}',)):
    path = folder / task / f"{split}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


# ---- tasks -----------------------------------------------------------------------------------------------------------

PAPER_METRIC = {"cola": "matthews", "stsb": "spearman"}


def test_the_eight_tasks_of_glue_are_there():
    assert set(TASKS) == {"cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte"}


@pytest.mark.parametrize("name", TASKS)
def test_runs_are_ranked_by_the_papers_metric(name):
    assert get_task(name).metrics[0] == PAPER_METRIC.get(name, "accuracy")


@pytest.mark.parametrize(("name", "beside"), [("mrpc", "f1"), ("qqp", "f1"), ("stsb", "pearson")])
def test_second_metrics_stand_beside(name, beside):
    assert get_task(name).metrics[1:] == (beside,)


def test_unknown_task_lists_the_known():
    with pytest.raises(ValueError, match=r"task must be one of cola, .*, got 'sst3'"):
        get_task("sst3")


def test_plain_and_gzipped_files_are_read_alike(tmp_path):
    lines = [json.dumps({"sentence": f"text {i} é", "label": i % 2, "idx": i}) for i in range(5)]
    write_rows(tmp_path / "plain", lines=lines)
    packed = tmp_path / "packed" / "sst2" / "validation.jsonl.gz"
    packed.parent.mkdir(parents=True)
    packed.write_bytes(gzip.compress(("\n".join(lines) + "\n").encode()))
    rows = [load_rows(TASKS["sst2"], "validation", tmp_path / name) for name in ("plain", "packed")]
    assert rows[0] == rows[1]
    assert rows[0][1] == {"sentence": "text 1 é", "label": 1}


def test_missing_file_names_what_it_looked_for(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"no train rows of rte: looked for .*rte/train\.jsonl and .*rte/train\.jsonl\.gz"
    ):
        find_file(tmp_path, TASKS["rte"], "train")


def test_a_named_folder_without_the_file_never_falls_back_to_the_hub(tmp_path):
    with pytest.raises(FileNotFoundError, match=str(tmp_path)):
        load_rows(TASKS["rte"], "train", tmp_path)


@pytest.mark.parametrize(
    ("task", "label"),
    [
        ("sst2", 2),
        ("sst2", -1),
        ("sst2", 0.5),
        ("sst2", "1"),
        ("sst2", None),
        ("sst2", True),
        ("stsb", 5.1),
        ("stsb", -0.1),
        ("stsb", "3"),
    ],
)
def test_label_outside_the_range_names_file_and_line(tmp_path, task, label):
    good = {field: "fine" for field in TASKS[task].fields} | {"label": 1}
    path = write_rows(tmp_path, task, lines=[json.dumps(good), json.dumps(good | {"label": label})])
    with pytest.raises(ValueError, match=rf"{path}:2: label of {task} must be .* from 0 to \d, got"):
        load_rows(TASKS[task], "validation", tmp_path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"sentence": "a"}', "needs the field 'label'"),
        ('{"text": "a", "label": 1}', "needs the field 'sentence'"),
        ('{"sentence": 3, "label": 1}', "field 'sentence' must be text, got 3"),
        ('{"sentence": "a"', "not a JSON object"),
        ("[1]", "needs the field 'sentence'"),
    ],
    ids=["no label", "no text", "text is a number", "cut off", "not an object"],
)
def test_broken_row_names_file_and_line(tmp_path, line, message):
    path = write_rows(tmp_path, lines=[json.dumps(ROW), line])
    with pytest.raises(ValueError, match=rf"{path}:2: .*{message}"):
        load_rows(TASKS["sst2"], "validation", tmp_path)


def test_truncated_gzip_is_named(tmp_path):
    path = tmp_path / "sst2" / "train.jsonl.gz"
    path.parent.mkdir()
    path.write_bytes(gzip.compress((json.dumps(ROW) + "\n").encode() * 1000)[:-20])
    with pytest.raises(ValueError, match=f"{path}: damaged"):
        load_rows(TASKS["sst2"], "train", tmp_path)


def test_empty_file_is_refused(tmp_path):
    path = write_rows(tmp_path)
    path.write_text("")
    with pytest.raises(ValueError, match="the data of sst2 has no rows"):
        load_rows(TASKS["sst2"], "validation", tmp_path)


def test_data_dir_goes_before_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv(DATA_DIR_VARIABLE, "/from/environment")
    assert str(resolve_data_dir(None)) == "/from/environment"
    assert resolve_data_dir(tmp_path) == tmp_path
    monkeypatch.delenv(DATA_DIR_VARIABLE)
    assert resolve_data_dir(None) is None


def test_a_subset_is_the_beginning_of_every_larger_one():
    rows = [{"label": i} for i in range(100)]
    small, large = subset(rows, 10), subset(rows, 40)
    assert small == large[:10] and len(large) == 40
    assert small != rows[:10]  # files are often sorted, by label for instance
    assert subset(rows, None) == subset(rows, 100) == rows


def test_max_rows_must_be_positive(tmp_path):
    write_rows(tmp_path)
    with pytest.raises(ValueError, match="max_rows must be at least 1, got 0"):
        load_rows(TASKS["sst2"], "validation", tmp_path, max_rows=0)


def test_hub_that_does_not_answer_is_a_missing_file(monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.delenv(DATA_DIR_VARIABLE, raising=False)

    def unreachable(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        FileNotFoundError,
        match=r"looked for nyu-mll/glue, mnli, validation_matched on the hub \(no route\).*data_dir",
    ):
        load_rows(TASKS["mnli"], "validation")


# ---- the generated task ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TASKS)
def test_synthetic_rows_have_the_shape_of_every_task(name):
    task = TASKS[name]
    for split in ("train", "validation"):
        rows = load_rows(task, split, source="synthetic")
        assert len(rows) == synthetic.ROWS[split]
        assert all(
            set(row) == {*task.fields, "label"} and task.checked_label(row["label"], "") == row["label"] for row in rows
        )
    assert load_rows(task, "train", source="synthetic") == load_rows(task, "train", source="synthetic")


def test_synthetic_labels_follow_from_the_words():
    for row in synthetic.generate(("sentence",), 3, "train"):
        topics = Counter(
            topic for word in row["sentence"].split() for topic, words in enumerate(synthetic.TOPICS) if word in words
        )
        assert topics.most_common(1)[0][0] == row["label"]


def test_synthetic_is_used_only_when_named(tmp_path):
    with pytest.raises(ValueError, match="data must be one of glue, synthetic, got 'toy'"):
        load_rows(TASKS["sst2"], "train", source="toy")
    with pytest.raises(FileNotFoundError):
        load_rows(TASKS["sst2"], "train", tmp_path)


# ---- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_on_worked_examples():
    labels, predictions = np.array([1, 1, 0, 0, 1]), np.array([1, 0, 0, 1, 1])  # tp 2, fn 1, tn 1, fp 1
    found = metrics.score(("accuracy", "f1", "matthews"), labels, predictions)
    assert found == pytest.approx(
        {"accuracy": 3 / 5, "f1": 2 / 3, "matthews": (2 * 1 - 1 * 1) / np.sqrt(3 * 3 * 2 * 2)}
    )
    ranks = metrics.score(("spearman", "pearson"), np.array([0.0, 1, 2, 3]), np.array([0.0, 1, 10, 100]))
    assert ranks["spearman"] == pytest.approx(1) and ranks["pearson"] == pytest.approx(
        np.corrcoef([0, 1, 2, 3], [0, 1, 10, 100])[0, 1]
    )


@pytest.mark.parametrize("name", ["matthews", "spearman", "pearson"])
def test_constant_predictions_score_zero_not_nan(name):
    assert metrics.score((name,), np.array([0.0, 1, 1]), np.ones(3)) == {name: 0.0}


def test_diverged_logits_are_refused():
    with pytest.raises(ValueError, match="logits must be finite"):
        metrics.predictions_of(np.array([[0.0, np.nan]]), 2)


def test_score_refuses_other_lengths():
    with pytest.raises(ValueError, match=r"predictions has shape \(2,\) but labels has \(3,\)"):
        metrics.score(("accuracy",), np.zeros(3), np.zeros(2))


@pytest.mark.parametrize("is_regression", [False, True])
def test_packed_predictions_come_back(is_regression):
    values = np.array([0.25, 4.5, 3.0]) if is_regression else np.array([0, 2, 1])
    assert metrics.unpack(metrics.pack(values, is_regression), is_regression).tolist() == values.tolist()


def test_bootstrap_interval_matches_theory():
    rng = np.random.default_rng(0)
    first, second = rng.random((3, 2000)) < 0.8, rng.random((3, 2000)) < 0.7
    difference, low, high = metrics.paired_bootstrap(first, second)
    per_example = (first.astype(float) - second).mean(0)
    half = 1.96 * per_example.std() / np.sqrt(2000)
    assert difference == pytest.approx(per_example.mean())
    assert (low, high) == pytest.approx((difference - half, difference + half), abs=half / 10)


def test_bootstrap_of_a_method_with_itself_is_zero():
    same = np.random.default_rng(0).random((2, 50)) < 0.5
    assert metrics.paired_bootstrap(same, same) == (0.0, 0.0, 0.0)


def test_bootstrap_refuses_unpaired_runs():
    with pytest.raises(ValueError, match=r"first has shape \(1, 3\) but second has \(2, 3\)"):
        metrics.paired_bootstrap(np.ones((1, 3)), np.ones((2, 3)))


# ---- batches ---------------------------------------------------------------------------------------------------------


def batches_of(sampler, size):
    indices = list(sampler)
    return [indices[i : i + size] for i in range(0, len(indices), size)]


def test_sampler_visits_every_example_once_in_batches_of_similar_length():
    lengths = torch.randint(3, 60, (1001,), generator=torch.Generator().manual_seed(0)).tolist()
    sampler = LengthGroupedSampler(lengths, 32, seed=0)
    batches = batches_of(sampler, 32)
    assert sorted(i for batch in batches for i in batch) == list(range(1001))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    longest = [max(lengths[i] for i in batch) for batch in batches]
    # the order of batches does not follow their length
    assert abs(np.corrcoef(longest, range(len(longest)))[0, 1]) < 0.5


def test_sampler_order_is_a_function_of_seed_and_epoch():
    def order(seed, epoch):
        sampler = LengthGroupedSampler(list(range(100)), 8, seed)
        sampler.set_epoch(epoch)
        torch.rand(epoch + 1)  # the global generator has no say
        return list(sampler)

    assert order(0, 1) == order(0, 1)
    assert order(0, 0) != order(0, 1) != order(1, 1)


class PadOnly:
    pad_token_id, pad_token_type_id, padding_side = 9, 3, "right"


def test_collator_pads_to_the_longest_of_its_batch():
    examples = [
        {"input_ids": [1, 2, 4], "attention_mask": [1, 1, 1], "labels": 1},
        {"input_ids": [5], "attention_mask": [1], "labels": 0},
    ]
    batch = Collator(PadOnly())(examples)
    assert batch["input_ids"].tolist() == [[1, 2, 4], [5, 9, 9]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch["labels"].tolist() == [1, 0]
    left = PadOnly()
    left.padding_side = "left"
    assert Collator(left)(examples)["input_ids"].tolist() == [[1, 2, 4], [9, 9, 5]]


def test_by_length_is_longest_first_and_stable():
    assert by_length([{"input_ids": [0] * n} for n in (2, 5, 2, 9)]) == [3, 1, 0, 2]
