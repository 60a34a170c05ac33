"""What a page tells of a quantized model, as numbers: of a float model and of a directory."""

import copy
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForSequenceClassification

from prequant_ext import task
from prequant_ext.config import PreQuantConfig
from prequant_ext.pages import inspection
from support.tiny_models import Plain, tiny_model

OUTPUT = "bert.encoder.layer.1.output.dense"


def inspected(model_type="bert", head="classifier", **changes):
    """(inspection of a float model, its float twin)."""
    model = tiny_model(model_type, head)
    return inspection.inspect_float("tiny", copy.deepcopy(model), PreQuantConfig(**({"r": 2} | changes))), model


def stored(found, folder):
    """The same from a directory, where the float weights are gone."""
    found.model.save_pretrained(folder)
    return inspection.inspect_quantized(
        "tiny", AutoModelForSequenceClassification.from_pretrained(folder), found.report
    )


def matrix_of(found, name=OUTPUT):
    return next(matrix for matrix in found.matrices if matrix.row.name == name)


# ---- matrices --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["bert", "gpt2"])  # gpt2 stores its matrices as (K, N)
def test_matrices_of_a_float_model(model_type):
    found, twin = inspected(model_type)
    assert [matrix.row.name for matrix in found.matrices] == [
        row.name for row in found.report.rows if row.kind == "linear"
    ]
    for matrix in found.matrices:
        weight = twin.get_submodule(matrix.row.name).weight.detach()
        weight = weight.T if model_type == "gpt2" else weight
        assert torch.equal(matrix.weight, weight)
        assert matrix.relative_error == pytest.approx(
            ((matrix.layer.dequantize() - weight).norm() / weight.norm()).item(), rel=1e-4
        )
        assert matrix.is_hidden and matrix.row.name == f"{matrix.block.name}.{matrix.part}"


def test_a_directory_has_no_float_weights_and_the_norm_of_the_stored_ones(tmp_path):
    before, _ = inspected()
    found = stored(before, tmp_path)
    assert (found.is_float, found.measured, found.config) == (False, None, before.config)
    for matrix, twin in zip(found.matrices, before.matrices, strict=True):
        assert matrix.weight is None and matrix.row == twin.row and matrix.dims == twin.dims
        assert matrix.norm == pytest.approx(twin.layer.dequantize().norm().item(), rel=1e-5)


def test_a_report_of_another_model_is_refused():
    found, _ = inspected()
    other, _ = inspected("roberta")
    with pytest.raises(ValueError, match=r"the report is of another model: report and model differ in bert\.encoder"):
        inspection.inspect_quantized("tiny", found.model, other.report)


# ---- outlier dimensions ----------------------------------------------------------------------------------------------


def test_recurrence_counts_the_matrices_of_each_dimension():
    model = tiny_model("bert")
    for i in (0, 1):  # dimension 7 is read by every query and written by every output; 3 is read by one matrix
        model.bert.encoder.layer[i].attention.self.query.weight.data[:, 7] = 3.0
        model.bert.encoder.layer[i].output.dense.weight.data[7] = 3.0
    found = inspection.inspect_float("tiny", model, PreQuantConfig(r=1))
    (recurrence,) = inspection.recurrences(found)
    in_matrices = {dim: [matrix for matrix in found.matrices if dim in matrix.dims] for dim in range(32)}
    assert recurrence.counts == {dim: len(own) for dim, own in in_matrices.items() if own}
    assert list(recurrence.counts.values()) == sorted(recurrence.counts.values(), reverse=True)
    assert recurrence.counts[7] >= 4 and recurrence.holding(7) == in_matrices[7] and matrix_of(found) in in_matrices[7]
    assert (recurrence.stack, recurrence.width, recurrence.by_chance) == ("encoder", 32, 12 / 32)
    matrix = matrix_of(found)
    own = recurrence.strengths[recurrence.matrices.index(matrix)]
    assert own == {7: pytest.approx((3.0 / matrix.weight.square().mean().sqrt()).item(), rel=1e-5)}
    reader = matrix_of(found, "bert.encoder.layer.0.intermediate.dense")
    (dim,), own = reader.dims, recurrence.strengths[recurrence.matrices.index(reader)]
    size = (reader.weight[:, dim].square().mean() / reader.weight.square().mean()).sqrt().item()
    assert own == {dim: pytest.approx(size, rel=1e-5)}
    assert recurrence.mean_strength(7) == pytest.approx(
        sum(each.get(7, 0) for each in recurrence.strengths) / recurrence.counts[7]
    )


def test_each_stack_has_a_residual_stream():
    found, _ = inspected("t5", "base")
    assert [(each.stack, len(each.matrices)) for each in inspection.recurrences(found)] == [
        ("encoder", 12),
        ("decoder", 20),
    ]


def test_input_columns_of_writers_are_no_hidden_dimensions():
    found, _ = inspected(axis="input")
    (recurrence,) = inspection.recurrences(found)
    assert {matrix.part for matrix in recurrence.matrices} == {
        *(f"attention.self.{name}" for name in ("query", "key", "value")),
        "intermediate.dense",
    }


def test_no_recurrence_without_outlier_dimensions_or_roles():
    assert inspection.recurrences(inspected(r=0)[0]) == []
    plain = inspection.inspect_float("plain", Plain(), PreQuantConfig(r=1, axis="input"))
    assert inspection.recurrences(plain) == [] and plain.matrices[0].part == plain.matrices[0].row.name == "blocks.0.up"


# ---- histograms ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("bits", "lowest", "highest"), [(4, -3, 2.625), (2, -3, 1.5)])
def test_the_clip_range_is_that_of_the_codes(bits, lowest, highest):
    """z is rint(2^(b-1) - mean / step): here the mean is far below half a step."""
    found, _ = inspected(bits=bits)
    matrix = matrix_of(found)
    sigma = matrix.weight.double().std(correction=0).item()
    low, high, scales = inspection.clip_range(matrix.layer)
    assert (low / sigma, high / sigma, scales) == (pytest.approx(lowest, rel=1e-5), pytest.approx(highest, rel=1e-5), 1)


def test_the_clip_range_of_several_scales_is_their_median():
    matrix = matrix_of(inspected(strategy="row_wise")[0])
    low, high, scales = inspection.clip_range(matrix.layer)
    scale, zero_point = matrix.layer.weight_scale, matrix.layer.weight_zero_point.float()
    assert (low, high, scales) == (
        (-zero_point * scale).median().item(),
        ((15 - zero_point) * scale).median().item(),
        32,
    )


@pytest.mark.parametrize(
    "changes", [{}, {"strategy": "row_wise"}, {"strategy": "group_wise", "group_size": 16}, {"axis": "input"}], ids=str
)
def test_histogram_of_float_weights(changes):
    found, _ = inspected(**changes)
    matrix = matrix_of(found)
    made, weight = inspection.histogram(matrix), matrix.weight
    is_outlier = torch.zeros_like(weight, dtype=torch.bool)
    if matrix.layer.axis == "output":
        is_outlier[matrix.dims] = True
    else:
        is_outlier[:, matrix.dims] = True
    assert (made.codes.sum(), made.outliers.sum()) == ((~is_outlier).sum(), is_outlier.sum())
    middle = made.edges[40:80]
    assert (made.codes[40:79] == np.histogram(weight[~is_outlier].numpy(), middle)[0]).all()
    error, step = (
        (matrix.layer.dequantize() - weight).abs(),
        matrix.layer.weight_scale.repeat_interleave(32 * 2 // matrix.layer.weight_scale.shape[1], dim=1),
    )
    assert made.clipped == pytest.approx((error > 0.5001 * step)[~is_outlier].double().mean().item())


def test_far_weights_are_counted_in_the_outermost_bin_and_named():
    model = tiny_model("bert")
    model.get_submodule(OUTPUT).weight.data[0, :2] = torch.tensor([50.0, -40.0])
    made = inspection.histogram(matrix_of(inspection.inspect_float("tiny", model, PreQuantConfig(r=0))))
    assert (
        made.beyond == (-40, 50)
        and made.codes[0] == made.codes[-1] == 1
        and made.codes.sum() == 32 * 64
        and made.edges[-1] < 50
    )


def test_histogram_of_codes_has_a_bin_a_code(tmp_path):
    matrix = matrix_of(stored(inspected()[0], tmp_path))
    made, step = inspection.histogram(matrix), matrix.layer.weight_scale.item()
    assert np.allclose(np.diff(made.edges), step, rtol=1e-6) and made.clipped is None
    kept = [row for row in range(32) if row not in matrix.dims]
    codes = (matrix.layer.dequantize()[kept] / step).round().int() + matrix.layer.weight_zero_point.int()
    assert set(codes.unique().tolist()) <= {*range(16)}
    at = {
        round(value / step) + matrix.layer.weight_zero_point.item(): count
        for value, count in zip(made.edges[:-1] + step / 2, made.codes, strict=True)
    }
    assert {code: count for code, count in at.items() if count} == {
        code.item(): (codes == code).sum().item() for code in codes.unique()
    }
    assert made.outliers.sum() == 2 * 64


def test_telling_matrices_are_the_extremes_and_the_median():
    found, _ = inspected()
    ranked = sorted((matrix.relative_error for matrix in found.matrices), reverse=True)
    assert [(title, matrix.relative_error) for title, matrix in inspection.telling(found.matrices)] == [
        ("largest error", ranked[0]),
        ("median", ranked[6]),
        ("least error", ranked[-1]),
    ]
    assert [title for title, _ in inspection.telling(found.matrices[:2])] == ["largest error", "least error"]
    assert [title for title, _ in inspection.telling(found.matrices[:1])] == ["largest error"]


# ---- tasks -----------------------------------------------------------------------------------------------------------


def task_file(model, path, name="sst2", **changes):
    """A task that adds ``changes`` to the outlier weights of single modules."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        for module, change in changes.items():
            tuned.get_submodule(module.replace("__", ".")).outlier_weight.add_(change)
    task.save_task(tuned, name, path, {"score": "0.5"})
    return path


def test_task_changes_are_norms_of_single_slices(tmp_path):
    found, _ = inspected()
    row, column = torch.zeros(2, 64), torch.zeros(32, 2)
    row[1, :4], column[:9, 0] = 3.0, 2.0
    names = {OUTPUT.replace(".", "__"): row, "bert__encoder__layer__0__attention__self__key": column}
    (change,) = inspection.task_changes(found, [task_file(found.model, tmp_path / "a.task", **names)])
    expected = {OUTPUT: (0.0, 6.0), "bert.encoder.layer.0.attention.self.key": (6.0, 0.0)}
    assert {matrix.row.name: own for matrix, own in zip(found.matrices, change.norms, strict=True) if any(own)} == {
        name: pytest.approx(norms, rel=1e-5) for name, norms in expected.items()
    }
    assert (change.name, change.file, change.metadata["score"], change.norm) == (
        "sst2",
        "a.task",
        "0.5",
        pytest.approx(math.sqrt(72), rel=1e-5),
    )
    weights = torch.cat([matrix.layer.outlier_weight.detach().flatten() for matrix in found.matrices])
    assert change.base_norm == pytest.approx(weights.norm().item(), rel=1e-5)


def test_a_task_of_a_classifier_fits_the_bare_backbone(tmp_path):
    classifier, _ = inspected()
    bare = inspection.inspect_float("tiny", tiny_model("bert").bert, PreQuantConfig(r=2))
    path = task_file(classifier.model, tmp_path / "a.task", **{OUTPUT.replace(".", "__"): 1.0})
    (change,) = inspection.task_changes(bare, [path])
    assert change.norms[-1] == pytest.approx((8.0, 8.0)) and change.norm == pytest.approx(math.sqrt(128))


def test_tasks_that_do_not_fit_are_refused(tmp_path):
    found, _ = inspected()
    other, _ = inspected(r=1)
    with pytest.raises(
        ValueError,
        match=f"was trained on the base {task.fingerprint(other.model)} but the model's base is "
        f"{task.fingerprint(found.model)}",
    ):
        inspection.task_changes(found, [task_file(other.model, tmp_path / "other.task")])
    with pytest.raises(FileNotFoundError, match="no task file at"):
        inspection.task_changes(found, [Path(tmp_path / "none.task")])
    metadata, tensors = task.read_task(task_file(found.model, tmp_path / "a.task"))
    key = f"{OUTPUT}.outlier_weight"
    save_file({name: tensor for name, tensor in tensors.items() if name != key}, tmp_path / "b.task", metadata)
    with pytest.raises(
        ValueError,
        match=r"encoder.layer.1.output.dense.outlier_weight must have shape \(2, 64\), but .*b.task has none",
    ):
        inspection.task_changes(found, [tmp_path / "b.task"])
    save_file(tensors | {key: torch.zeros(2, 63)}, tmp_path / "c.task", metadata)
    with pytest.raises(ValueError, match=r"must have shape \(2, 64\), but .*c.task has shape \(2, 63\)"):
        inspection.task_changes(found, [tmp_path / "c.task"])
