"""The steps behind the command line: from a model's name to a directory, a report, a score."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, PreTrainedModel

from prequant_ext import checkpoint, hf
from prequant_ext.baselines import METHODS
from prequant_ext.bit_allocation import Proposal, propose_layer_bits
from prequant_ext.cli.console import say
from prequant_ext.config import PreQuantConfig
from prequant_ext.export import OnnxFile, export_onnx
from prequant_ext.glue import train
from prequant_ext.glue.models import classifier_class, load_tokenizer, resolve_model
from prequant_ext.glue.run import RunSettings
from prequant_ext.glue.tasks import get_task, load_rows
from prequant_ext.linear import quantized_linears
from prequant_ext.model import PlanRow, Report, plan, quantize_model
from prequant_ext.pages.inspection import Inspection, inspect_float, inspect_quantized
from prequant_ext.pages.model_page import model_page
from prequant_ext.perplexity import exp_mean, token_losses, window_sizes
from prequant_ext.study.error_map import error_map, write_error_map
from prequant_ext.study.experiments import EXPERIMENTS
from prequant_ext.study.page import RUNS_FILE, Study, page
from prequant_ext.study.runner import SEARCH_TASK, SEEDS, Plan, progress, read_runs, run_all, scores_of
from prequant_ext.task import load_task, merge
from prequant_ext.task_file import read_task, write_atomically

# beside the weights: errors and outlier counts cannot be computed again once the float weights are gone
REPORT_FILE = "prequant_report.json"
CAUSAL_LM_HEADS = ("ForCausalLM", "LMHeadModel")
KEPT_CLASSES = (*CAUSAL_LM_HEADS, "ForConditionalGeneration", "EncoderModel")  # by the end of their name
# of a page's proposal: half-way between 2 and 4 bits, where blocks are told apart
DEFAULT_BUDGET = {"bits_per_weight": 3.0}
PLAN_TITLES = ("module", "shape", "axis", "bits", "r", "trained", "kB")


class _Companions:
    """A tokenizer (or none) and small text files, saved together with a model."""

    def __init__(self, tokenizer: Any, files: dict[str, str]) -> None:
        self.tokenizer, self.files = tokenizer, files

    def save_pretrained(self, folder: Path) -> None:
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        for name, text in self.files.items():
            (Path(folder) / name).write_text(text)


def model_config(path: str) -> Any:
    """transformers' config of a model. Raises FileNotFoundError where there is no such model."""
    try:
        return AutoConfig.from_pretrained(path)
    except OSError as error:
        reason = str(error).splitlines()[0]
        raise FileNotFoundError(
            f"no model at {path}: it is no directory with a config.json, and the hub did not give one ({reason})"
        ) from error


def is_quantized_directory(name: str) -> bool:
    return getattr(model_config(resolve_model(name)), "quantization_config", None) is not None


def _model_class(config: Any) -> Any:
    """The checkpoint's own class where its head is part of what it does (a language model, a finished classifier) or it
    lacks a decoder, else the backbone.

    A masked language model's head is dropped: task models would not use it, and loading through it drops the pooler,
    which they do.
    """
    name = next(iter(config.architectures or ()), "")
    if name.endswith("ForSequenceClassification"):
        return AutoModelForSequenceClassification  # which knows T5EncoderForSequenceClassification, too
    return getattr(transformers, name, AutoModel) if name.endswith(KEPT_CLASSES) else AutoModel


def _tokenizer(path: str) -> Any:
    """The model's tokenizer, or None where it has none: a model can be quantized without."""
    try:
        return load_tokenizer(path)
    except FileNotFoundError:
        return None


def _float_model(name: str) -> PreTrainedModel:
    """Raises FileNotFoundError; ValueError where it is quantized."""
    path = resolve_model(name)
    own_config = model_config(path)
    if getattr(own_config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized already; quantize its float checkpoint")
    return _model_class(own_config).from_pretrained(path)


def quantized(name: str, config: PreQuantConfig) -> tuple[PreTrainedModel, Any, Report]:
    """(model, tokenizer, report) of a float model, quantized. Raises FileNotFoundError;
    ValueError as quantize_model.
    """
    model = _float_model(name)
    return model, _tokenizer(resolve_model(name)), quantize_model(model, config)


def quantize_directory(name: str, config: PreQuantConfig, out: Path) -> Report:
    """Quantize the model called ``name`` into the directory ``out``,
    which appears when it is complete or not at all.
    """
    model, tokenizer, report = quantized(name, config)
    hf.save_model_dir(model, _Companions(tokenizer, {REPORT_FILE: json.dumps(report.to_dict())}), out)
    return report


def plan_of(name: str, config: PreQuantConfig) -> list[PlanRow]:
    """What quantization would do. Reads the model's config only."""
    own_config = model_config(resolve_model(name))
    model_class = _model_class(own_config)
    with torch.device("meta"):
        model = getattr(model_class, "from_config", model_class)(own_config)
    return plan(model, config)


def stored_report(name: str) -> Report:
    """The report that quantize_directory left. Raises FileNotFoundError where there is none."""
    path = Path(name) / REPORT_FILE
    if not path.is_file():
        raise FileNotFoundError(
            f"no {path}: {name} was not written by prequant quantize, and errors cannot be computed without the float "
            "weights"
        )
    try:
        return Report.from_dict(json.loads(path.read_text()))
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error


def inspected(name: str, config: PreQuantConfig) -> Inspection:
    """A quantized directory with its stored report, or a float model, measured and quantized in memory. Raises as
    stored_report and inspect_float.
    """
    if not is_quantized_directory(name):
        return inspect_float(name, _float_model(name), config)
    report = stored_report(name)
    return inspect_quantized(name, _model_class(model_config(name)).from_pretrained(name), report)


def proposed(inspection: Inspection, budget: Mapping[str, float] | None) -> Proposal | None:
    """Bits of blocks within ``budget`` (of propose_layer_bits). Without one DEFAULT_BUDGET, or None where nothing can
    be proposed.

    Raises ValueError as propose_layer_bits, and for a budget where there are no float weights.
    """
    if inspection.measured is None:
        if budget is not None:
            raise ValueError(
                f"--budget needs float weights, to measure other widths, but {inspection.name} is quantized already"
            )
        return None
    if budget is None and any(matrix.block is None for matrix in inspection.measured.matrices):
        return None
    return propose_layer_bits(inspection.measured, **(DEFAULT_BUDGET if budget is None else budget))


def write_model_page(
    inspection: Inspection, proposal: Proposal | None, task_files: Sequence[Path], runs: Path | None, out: Path
) -> None:
    """Raises as model_page; OUT is whole or as it was."""
    write_atomically(out, model_page(inspection, proposal, task_files, runs).encode())


def plan_table(plan_rows: Sequence[PlanRow]) -> tuple[Sequence[str], list[Sequence[str]], str]:
    """Titles, rows and caption for console.show."""
    rows: list[Sequence[str]] = []
    for row in plan_rows:
        shape, size = f"{row.shape[0]} x {row.shape[1]}", f"{row.bytes / 1e3:,.1f}"
        rows.append(
            (row.name, shape, row.axis or "-", str(row.bits), str(row.outlier_slices), f"{row.trainable:,}", size)
        )
    trained, total = sum(row.trainable for row in plan_rows), sum(row.bytes for row in plan_rows)
    return (
        PLAN_TITLES,
        rows,
        f"{len(rows)} modules, {total / 1e6:,.2f} MB, {trained:,} outlier weights or scales to train",
    )


def load_with_task(name: str, task_file: Path | None, num_labels: int) -> tuple[PreTrainedModel, dict[str, str]]:
    """A task model on the base ``name``, and the metadata of the task file that was put into it.

    Raises ValueError if the base has no trained head and no file brings one, or as load_task.
    """
    model_config(name)
    model_class = AutoModelForSequenceClassification if task_file is None else classifier_class(name)
    brings_head = task_file is not None  # of a shape that the directory's own need not have
    model, loading = model_class.from_pretrained(
        name, num_labels=num_labels, dtype=torch.float32, ignore_mismatched_sizes=brings_head, output_loading_info=True
    )
    if task_file is not None:
        return model, load_task(model, task_file)
    if loading["missing_keys"]:
        raise ValueError(
            f"{name} has no trained head ({', '.join(sorted(loading['missing_keys'])[:3])}): name a task file with "
            "--task-file"
        )
    return model, {}


def evaluate_directory(
    name: str, task_name: str, task_file: Path | None, data_dir: str | None, source: str, max_length: int | None
) -> tuple[dict[str, float], int]:
    """(scores, max_length) on the validation rows; ``max_length`` None: that of training, from the task file or the
    directory's results.
    """
    task = get_task(task_name)
    if task_file is not None:
        held = read_task(task_file)[0]["name"]
        if held != task_name:
            raise ValueError(f"{task_file} holds the task {held!r}, wanted {task_name!r}")
    model, metadata = load_with_task(name, task_file, task.num_labels)
    tokenizer = load_tokenizer(name)
    if model.config.pad_token_id is None:
        model.config.pad_token_id = tokenizer.pad_token_id
    recorded = metadata.get("max_length") or _recorded_length(Path(name), task_name)
    length = max_length or int(recorded or RunSettings(name, task_name).max_length)
    settings = RunSettings(name, task_name, data=source, data_dir=data_dir, max_length=length)
    return train.evaluate(model, tokenizer, settings), length


def _recorded_length(folder: Path, task_name: str) -> int | None:
    path = folder / "results.json"
    return json.loads(path.read_text()).get(task_name, {}).get("max_length") if path.is_file() else None


def _load_quantized(name: str, task_file: Path | None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A quantized directory's model, with a task or as it is; ``dtype`` None: as the files have it (a task model is
    float32).

    Raises ValueError for a float model, or as load_task.
    """
    own_config = model_config(name)
    if getattr(own_config, "quantization_config", None) is None:
        raise ValueError(f"{name} is a float model: there is nothing to merge or export")
    if task_file is None:
        model = _model_class(own_config).from_pretrained(name, dtype=dtype or "auto")
    else:
        metadata, _ = read_task(task_file)
        model, _ = load_with_task(name, task_file, int(metadata.get("num_labels", own_config.num_labels)))
    if not any(quantized_linears(model)):
        raise ValueError(f"{name} holds no PreQuant layers")
    return model


def merge_directory(name: str, task_file: Path | None, out: Path) -> int:
    """Write the float twin of a quantized directory, with a task merged in or not;
    returns the bytes of its parameters.
    """
    model = _load_quantized(name, task_file)
    merge(model)
    checkpoint.save_model_dir(model, _tokenizer(name), out)
    return sum(parameter.nbytes for parameter in model.parameters())


def export_onnx_directory(name: str, task_file: Path | None, out: Path) -> OnnxFile:
    """Write a quantized directory, with a task or not, as the ONNX file ``out``. Raises as export_onnx."""
    return export_onnx(_load_quantized(name, task_file, torch.float32), out)


# ---- language models -------------------------------------------------------------------------------------------------


def language_model(name: str, task_file: Path | None) -> tuple[PreTrainedModel, Any]:
    """(model, tokenizer) of a causal language model, float or quantized, with a task in it where a file is named.

    Raises FileNotFoundError where there is none, or no tokenizer beside it; ValueError where it is another kind of
    model, or as load_task.
    """
    path = resolve_model(name)
    own_config = model_config(path)
    architecture = next(iter(own_config.architectures or ()), "none")
    if not architecture.endswith(CAUSAL_LM_HEADS):
        raise ValueError(
            f"{name} must be a causal language model, but its config.json names the architecture {architecture}"
        )
    tokenizer = load_tokenizer(path)
    model = _model_class(own_config).from_pretrained(path)
    if task_file is not None:
        load_task(model, task_file)
    return model, tokenizer


def perplexities(
    name: str,
    task_file: Path | None,
    other: str | None,
    text_file: Path,
    max_length: int | None,
    stride: int | None,
    max_tokens: int | None,
) -> dict[str, Any]:
    """Perplexity of the model ``name`` on a text, of the model ``other`` beside it, and over which windows.
    ``max_tokens``: only the first of the text.

    Raises ValueError where the two take the text for different tokens: perplexities are per token, and would not
    compare.
    """
    try:
        text = text_file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_file} must be a text in UTF-8: {error}") from error
    model, tokenizer = language_model(name, task_file)
    tokens = tokenizer(text)["input_ids"][:max_tokens]
    max_length, stride = window_sizes(model, max_length, stride)
    losses = token_losses(model, tokens, max_length=max_length, stride=stride)
    result: dict[str, Any] = {
        "model": name,
        "perplexity": exp_mean(losses),
        "predicted_tokens": len(losses),
        "max_length": max_length,
        "stride": stride,
    }
    if other is not None:
        del model  # one at a time in memory
        model, tokenizer = language_model(other, None)
        if tokenizer(text)["input_ids"][:max_tokens] != tokens:
            raise ValueError(
                f"{name} and {other} must have the same tokenizer, but make different tokens of {text_file}"
            )
        result["compared"] = {
            "model": other,
            "perplexity": exp_mean(token_losses(model, tokens, max_length=max_length, stride=stride)),
        }
    return result


# ---- experiments -----------------------------------------------------------------------------------------------------


def plan_experiment(
    name: str,
    model: str,
    task_names: str | None,
    seeds: str | None,
    search: str,
    data: str,
    data_dir: str | None,
    epochs: int,
    max_train: int | None,
    rates: str | None,
) -> tuple[Study, str]:
    """The study, and the folder of ``model``. Without names of tasks those of the experiment, without seeds SEEDS; of a
    quick one the first of each.

    Raises ValueError for wrong settings, and FileNotFoundError where a task's data is missing: now, and not after an
    hour.
    """
    given, path = _rates(rates), resolve_model(model)
    blocks = getattr(model_config(path), "num_hidden_layers", 0)
    experiment = EXPERIMENTS[name](blocks)
    count = 1 if search == "quick" else None
    chosen = tuple(task_names.split(",")) if task_names else experiment.tasks[:count]
    try:
        numbers = sorted({int(seed) for seed in seeds.split(",")}) if seeds else list(SEEDS[:count])
    except ValueError:
        raise ValueError(f"seeds must be integers separated by commas, got {seeds!r}") from None
    needed = {*chosen, *((SEARCH_TASK,) if search == "once" else ())}
    for task in sorted(needed):
        for split in ("train", "validation"):
            load_rows(get_task(task), split, data_dir, data)
    settled = Plan(experiment, model, chosen, numbers, search, data, epochs, max_train, given)
    return Study(name, blocks, settled), path


def _rates(text: str | None) -> dict[str, float]:
    """[TASK/]METHOD -> learning rate of [TASK/]METHOD=RATE, separated by commas."""
    pairs = [pair.partition("=")[::2] for pair in text.split(",")] if text else []
    try:
        rates: dict[str, float] | None = {name: float(rate) for name, rate in pairs}
    except ValueError:
        rates = None
    if rates is None or not all(
        0 < rate < math.inf and name.rpartition("/")[2] in METHODS for name, rate in rates.items()
    ):
        raise ValueError(
            f"rates must be like ft=1e-4,mrpc/prequant=5e-3, of the methods {', '.join(METHODS)}, got {text!r}"
        )
    for name in rates:
        if "/" in name:
            get_task(name.rpartition("/")[0])
    return rates


def list_experiment(study: Study, out: Path, jobs: int) -> None:
    """Print the runs that are missing and can start."""
    finished = study.own(read_runs(out / RUNS_FILE))
    done, possible = set(scores_of(finished)), {run.identity: run for run in study.plan.possible(finished)}
    for key, run in possible.items():
        if key not in done:
            print(run.describe())
    say(f"{progress(study.plan, finished, jobs)}; the list has those that can start now")


def run_experiment(
    study: Study, path: str, out: Path, data_dir: str | None, threads: int, jobs: int, processes: int
) -> list[str]:
    """Run what is missing, then print the table and write it to OUT/NAME.md; what failed comes back as messages.
    ``path``: the model's folder.
    """
    out.mkdir(parents=True, exist_ok=True)
    shown = study.joined(out)
    shown.write(out)
    failed = run_all(study.plan, out / RUNS_FILE, path, data_dir, threads, jobs, say, processes)
    table = shown.table(read_runs(out / RUNS_FILE))
    write_atomically(out / f"{study.name}.md", table.encode())
    print(table, end="")
    return failed


def measure_errors(model: str, out: Path) -> None:
    """Write the error map of a float model to OUT."""
    loaded = AutoModel.from_pretrained(resolve_model(model), dtype=torch.float32)
    write_error_map(out, model, error_map(loaded))


def write_report(folder: Path, out: Path) -> None:
    """The page of the experiments in ``folder``. Raises FileNotFoundError where there are none."""
    write_atomically(out, page(folder).encode())
