"""The scripts of examples/ run to their end on toy sizes, and what they print is true."""

import os
import re
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from prequant_ext.perplexity import perplexity
from prequant_ext.task import load_task
from support import ROOT
from support.scripts import run_script
from support.toys import make_toy

EXAMPLES = ROOT / "examples"
pytestmark = pytest.mark.usefixtures("one_thread")


def run(script, *arguments, expect=0):
    """Standard output of ``python examples/SCRIPT ARGUMENTS``; where it is expected to fail, standard error."""
    done = run_script(EXAMPLES / script, *arguments)
    assert done.returncode == expect, done.stderr
    return done.stderr if expect else done.stdout


def test_the_readme_lists_every_script():
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_causal_lm(tmp_path):
    # 2 bits: 4 cost a model of this size and ease no more than another seed would.
    printed = run("causal_lm.py", "--toy", "--bits", 2, "--name", "sea", "--out", tmp_path)
    perplexities = {
        name: float(value)
        for name, value in re.findall(r"^(float|2 bits|fine-tuned) +([\d.]+)$", printed, re.MULTILINE)
    }
    assert 1 < perplexities["fine-tuned"] < perplexities["float"] < perplexities["2 bits"] / 1.03 < 2
    assert "quantized 85.4 % of the weights" in printed and "6,400 weights were trained" in printed

    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(tmp_path / "base"),
        AutoTokenizer.from_pretrained(tmp_path / "base"),
    )
    sample = tokenizer(printed.strip().splitlines()[-1])["input_ids"]
    before = perplexity(model, sample)
    assert load_task(model, tmp_path / "sea.task")["name"] == "sea"
    assert perplexity(model, sample) < before


def test_causal_lm_takes_a_model_and_files(tmp_path):
    characters = Tokenizer(models.WordLevel({character: i for i, character in enumerate("abcdefgh ")}, unk_token=" "))
    characters.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=characters, eos_token=" ").save_pretrained(tmp_path / "float")
    make_toy("llama").save_pretrained(tmp_path / "float")
    (tmp_path / "text").write_text("abc def gh " * 20)
    files = (
        "--model",
        tmp_path / "float",
        "--train-file",
        tmp_path / "text",
        tmp_path / "text",
        "--eval-file",
        tmp_path / "text",
    )
    sizes = ("--bits", 8, "--r", 2, "--steps", 2, "--block-size", 16)
    printed = run("causal_lm.py", *files, *sizes, "--out", tmp_path / "out")
    tokens = [*range(3), 8, *range(3, 6), 8, 6, 7, 8] * 20
    assert f"\nfloat       {perplexity(make_toy('llama'), tokens, max_length=16):>10.3f}\n8 bits " in printed
    assert (tmp_path / "out" / "text.task").exists()
    too_large = ("--block-size", 512, "--out", tmp_path / "other")
    with pytest.raises(ValueError, match="exceeds the 40 positions"):
        run("causal_lm.py", *files, *too_large)


def test_causal_lm_says_what_is_missing(tmp_path):
    assert "name --train-file and --eval-file, or say --toy" in run("causal_lm.py", "--out", tmp_path, expect=2)


@pytest.mark.slow
def test_quickstart(tmp_path):
    """In a process of its own, as a reader starts it."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(EXAMPLES / "quickstart.py"), "--toy", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    printed = done.stdout
    accuracy, size = re.search(
        r"accuracy ([\d.]+) on 128 rows; .*task\.task has ([\d,]+) bytes; on a fresh base: the same answers", printed
    ).groups()
    assert float(accuracy) > 0.7
    assert (
        int(size.replace(",", ""))
        == (tmp_path / "task.task").stat().st_size
        < (tmp_path / "base" / "model.safetensors").stat().st_size / 2
    )


@pytest.mark.slow
def test_quickstart_reads_rows_of_a_file(tmp_path):
    sys.path.insert(0, str(EXAMPLES))
    try:
        import toy
    finally:
        sys.path.remove(str(EXAMPLES))
    model = toy.save_model(tmp_path / "model")
    for split in ("train", "validation"):
        texts, labels = toy.rows("sst2", split)
        (tmp_path / f"{split}.csv").write_text(
            "text,label\n" + "".join(f"{text},{label}\n" for text, label in zip(texts[:64], labels[:64], strict=True))
        )
    files = ("--train-file", tmp_path / "train.csv", "--eval-file", tmp_path / "validation.csv")
    printed = run("quickstart.py", "--model", model, *files, "--epochs", 1, "--name", "mine", "--out", tmp_path / "out")
    assert "on 64 rows" in printed and "the same answers" in printed and (tmp_path / "out" / "mine.task").exists()


@pytest.mark.slow
def test_many_tasks(tmp_path):
    printed = run("many_tasks.py", "--toy", "--out", tmp_path)
    rows = re.findall(r"^(topic|other-topic) +([01])  (.*)$", printed, re.MULTILINE)
    answers = {(name, text): answer for name, answer, text in rows}
    assert len(rows) == 8
    # the same text, opposite tasks
    assert sum(answers["topic", text] != answers["other-topic", text] for _, _, text in rows[::2]) >= 3
    assert float(re.search(r"one task at a time: (\S+)", printed)[1]) < 1e-5


@pytest.mark.parametrize("script", ["quickstart.py", "many_tasks.py"])
def test_what_is_missing_is_said(script):
    assert "or say --toy" in run(script, expect=2)
