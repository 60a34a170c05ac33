"""The report of quantize_model: errors, outliers, bytes, coverage, and its progress bar."""

import copy
import math

import pytest
from transformers import AutoModel
from transformers.pytorch_utils import Conv1D
from transformers.utils import logging as transformers_logging

from prequant_ext.config import PreQuantConfig
from prequant_ext.model import quantize_model
from prequant_ext.report import Report
from support.tiny_models import tiny_model


def test_errors_in_the_report_are_those_of_the_weights():
    model = tiny_model("gpt2")
    twin = copy.deepcopy(model)
    report = quantize_model(model, PreQuantConfig(r=2))
    for row in report.rows:
        weight = twin.get_submodule(row.name).weight
        weight = weight.T if isinstance(twin.get_submodule(row.name), Conv1D) else weight
        error = (model.get_submodule(row.name).dequantize().double() - weight.double()).norm().item()
        assert row.l2_error == pytest.approx(error, rel=1e-5)
    matrices = [row.l2_error for row in report.rows if row.kind == "linear"]
    assert report.l2_error == pytest.approx(math.sqrt(sum(error**2 for error in matrices)))


def test_outliers_in_the_report_are_counted_on_the_full_matrix():
    model = tiny_model("bert")
    weight = model.bert.encoder.layer[0].output.dense.weight.double()
    expected = ((weight - weight.mean()).abs() > 2 * weight.std(correction=0)).sum().item()
    row = next(
        row
        for row in quantize_model(model, PreQuantConfig(r=1, outlier_threshold=2.0)).rows
        if row.name == "bert.encoder.layer.0.output.dense"
    )
    assert row.num_outliers == expected > 0


def test_bytes_and_coverage():
    model = tiny_model("bert")
    before, total = (
        sum(parameter.nbytes for parameter in model.parameters()),
        sum(parameter.numel() for parameter in model.parameters()),
    )
    report = quantize_model(model, PreQuantConfig(r=1))
    assert (report.bytes_before, report.total_weights) == (before, total)
    # as stored: kernels' layouts are padded
    assert report.bytes_after == sum(tensor.nbytes for tensor in model.state_dict().values())
    quantized = 2 * (4 * 32 * 32 + 2 * 32 * 64) + (50 + 40 + 2) * 32
    assert report.coverage == quantized / total
    assert report.coverage_line() == f"quantized {100 * quantized / total:.1f} % of the weights; not covered: " + (
        "bert.pooler.dense (32, 32), task head; classifier (2, 32), task head"
    )


def test_the_report_prints_a_table_and_survives_json():
    report = quantize_model(tiny_model("bert"), PreQuantConfig(r=2))
    lines = str(report).splitlines()
    assert lines[0].split() == [
        "module",
        "shape",
        "axis",
        "bits",
        "r",
        "outliers",
        "L2",
        "error",
        "kB",
        "before",
        "kB",
        "after",
    ]
    row = next(line for line in lines if line.startswith("bert.encoder.layer.1.intermediate.dense"))
    assert row.split()[1:7] == ["64", "x", "32", "input", "4", "2"]
    assert Report.from_dict(report.to_dict()) == report


def test_progress_obeys_the_switch_of_transformers(capfd):
    # a command of an earlier test may have switched it off
    was_enabled = transformers_logging.is_progress_bar_enabled()
    shown = []
    try:
        for switch in (transformers_logging.enable_progress_bar, transformers_logging.disable_progress_bar):
            switch()
            quantize_model(tiny_model("bert"), PreQuantConfig(r=1))
            shown.append("quantizing" in capfd.readouterr().err)
    finally:
        (transformers_logging.enable_progress_bar if was_enabled else transformers_logging.disable_progress_bar)()
    assert shown == [True, False]


def test_a_real_checkpoint_is_a_fifth_of_its_float_self(minilm_dir, tmp_path):
    model = AutoModel.from_pretrained(minilm_dir)
    report = quantize_model(model, PreQuantConfig())
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").stat().st_size <= 0.23 * (minilm_dir / "model.safetensors").stat().st_size
    linears = [row for row in report.rows if row.axis is not None]
    assert len(linears) == 36 and sum(row.bytes for row in linears) <= 0.15 * sum(row.bytes_before for row in linears)
