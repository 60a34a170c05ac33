"""The scripts of examples/ run to their end on toy sizes, and what they print is true."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from prequant_ext.perplexity import perplexity
from prequant_ext.task import load_task

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(script, *arguments, expect=0):
    """Standard output of ``python examples/SCRIPT ARGUMENTS``; where it is expected to fail, standard error."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / script, *(str(argument) for argument in arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == expect, done.stderr
    return done.stderr if expect else done.stdout


def test_the_readme_lists_every_script():
    listed = re.findall(r"\]\((\w+\.py)\)", (EXAMPLES / "README.md").read_text())
    assert sorted(listed) == sorted(path.name for path in EXAMPLES.glob("*.py"))


@pytest.mark.slow
def test_causal_lm(tmp_path):
    printed = run("causal_lm.py", "--toy", "--name", "sea", "--out", tmp_path)
    perplexities = {name.strip(): float(value) for name, value in re.findall(r"^(float|4 bits|fine-tuned) +([\d.]+)$", printed, re.MULTILINE)}
    assert 1 < perplexities["fine-tuned"] < perplexities["float"] < perplexities["4 bits"] < 3
    assert "quantized 85.4 % of the weights" in printed and "6,400 weights were trained" in printed

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tmp_path / "base"), AutoTokenizer.from_pretrained(tmp_path / "base")
    sample = tokenizer(printed.strip().splitlines()[-1])["input_ids"]
    before = perplexity(model, sample)
    assert load_task(model, tmp_path / "sea.task")["name"] == "sea"
    assert perplexity(model, sample) < before


def test_causal_lm_says_what_is_missing(tmp_path):
    assert "name --train-file and --eval-file, or say --toy" in run("causal_lm.py", "--out", tmp_path, expect=2)
