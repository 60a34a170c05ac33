"""Time and memory of one training step of a BERT-like encoder: PreQuant beside full fine-tuning, BitFit, LoRA and
QLoRA.

    python bench/train_step.py                                   4 layers of 768, 16 sequences of 128
    python bench/train_step.py --only prequant bitfit --steps 3  methods with one of these words in their names, and
                                                                 full fine-tuning, which is the unit
    python bench/train_step.py --layers 12 --threads 1

Every method runs in a process of its own, so that its peak of resident memory is its own, above what its imports hold.
A round is one step of each in turn; the first is a warm-up. LoRA needs peft and QLoRA bitsandbytes: pip install
'prequant_ext[bench]'; a method that cannot run is listed with the reason.

The error is that of the logits, in eval mode before the first step, against the same float model's. A share of the
roofline counts the matrix products that the method needs: forward and input gradients, and for full fine-tuning the
weights' gradients.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any

import torch
from torch import nn

import reporting
import timing
from prequant_ext import PreQuantConfig, quantize_model, trainable_parameters
from prequant_ext.measure import MB, peak_bytes, resident_bytes
from reporting import say
from timing import Contender, Row, Samples

FULL = "full fp32"
LINEARS = ["query", "key", "value", "dense"]  # of the encoder
VOCABULARY = 1000  # small: the table of a real one would hide the encoder in the memory of full fine-tuning
LEARNING_RATE = 1e-4
RETAKES = 1  # of a step in which another process had the cores


@dataclass(frozen=True)
class Method:
    """``prepare`` turns the float model into the one that trains. products: of the size of the forward's, in a step."""

    prepare: Callable[[nn.Module], nn.Module]
    imports: tuple[str, ...] = ()
    products: int = 2
    precision: str = "highest"


def bitfit(model: nn.Module) -> nn.Module:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.endswith("bias") or "classifier" in name)
    return model


def lora(model: nn.Module, targets: list[str] = LINEARS) -> nn.Module:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules=targets, modules_to_save=["classifier"]))


def qlora(model: nn.Module) -> nn.Module:
    import bitsandbytes

    for name, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear) and "encoder" in name:
            layer = bitsandbytes.nn.Linear4bit(
                linear.in_features, linear.out_features, compute_dtype=torch.float32, quant_type="nf4"
            )
            layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data, requires_grad=False, quant_type="nf4")
            layer.bias.data = linear.bias.data
            model.set_submodule(name, layer.to("cpu"))
    model.is_loaded_in_4bit = True  # type: ignore[assignment]  # how peft tells
    return lora(model)


def prequant(**settings: Any) -> Callable[[nn.Module], nn.Module]:
    def prepare(model: nn.Module) -> nn.Module:
        quantize_model(model, PreQuantConfig(**settings))
        trainable_parameters(model)
        return model

    return prepare


METHODS: dict[str, Method] = {
    FULL: Method(lambda model: model, products=3),
    "bitfit fp32": Method(bitfit),
    "lora r=8 (query, value) fp32": Method(lambda model: lora(model, ["query", "value"]), ("peft",)),
    "lora r=8 (all linears) fp32": Method(lora, ("peft",)),
    "qlora nf4, r=8 (all linears) fp32": Method(qlora, ("peft", "bitsandbytes")),
    "prequant w4a8 hidden r=5, high": Method(prequant(r=5), precision="high"),
    "prequant w4a8 hidden r=5, highest": Method(prequant(r=5)),
    "prequant w4a8 input r=5, high": Method(prequant(r=5, axis="input"), precision="high"),
    "prequant w4a16 hidden r=5, high": Method(prequant(r=5, activation_bits=None), precision="high"),
}


# ---- a method's own process: one line of JSON when it is ready, then one for every line that it reads ----------------


def work(name: str, arguments: argparse.Namespace) -> None:
    warnings.filterwarnings("ignore")
    torch.set_num_threads(arguments.threads[0])
    method = METHODS[name]
    torch.set_float32_matmul_precision(method.precision)
    from transformers import BertConfig, BertForSequenceClassification

    for module in method.imports:
        importlib.import_module(module)
    heads = max(1, arguments.hidden // 64)
    shape = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * arguments.hidden,
    }
    config = BertConfig(vocab_size=VOCABULARY, max_position_embeddings=max(512, arguments.seq), **shape)
    imported = resident_bytes()
    torch.manual_seed(0)
    model = BertForSequenceClassification(config)
    ids, labels = (
        torch.randint(0, VOCABULARY, (arguments.batch, arguments.seq)),
        torch.randint(0, 2, (arguments.batch,)),
    )
    model = method.prepare(model).eval()
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    model.train()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE)
    print(
        json.dumps({"logits": logits.flatten().tolist(), "trainable": sum(parameter.numel() for parameter in trained)}),
        flush=True,
    )

    for _ in sys.stdin:
        waited, times = timing.waited_seconds(), [time.perf_counter()]
        loss = model(input_ids=ids, labels=labels).loss
        times.append(time.perf_counter())
        loss.backward()
        times.append(time.perf_counter())
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter())
        seconds = times[3] - times[0]
        lost = (timing.waited_seconds() - waited) / (seconds * arguments.threads[0])
        parts = {
            part: end - begin
            for part, begin, end in zip(("forward", "backward", "optimizer"), times, times[1:], strict=False)
        }
        peak = (peak_bytes() - imported) / MB
        print(
            json.dumps({"seconds": seconds, "lost": lost, **parts, "loss": loss.item(), "peak_mb_above_imports": peak}),
            flush=True,
        )


@dataclass
class Worker:
    process: "subprocess.Popen[str]"
    errors: IO[str]

    def answer(self, is_asked: bool = True) -> Row:
        """Its next line; RuntimeError with its last word where it has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            if is_asked:
                self.process.stdin.write("\n")
                self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())
        except (ValueError, BrokenPipeError):
            self.process.wait()
            self.errors.seek(0)
            raise RuntimeError((self.errors.read().strip().splitlines() or ["no word"])[-1]) from None

    def step(self) -> Row:
        """A step; once more if it was disturbed, and then the less disturbed one."""
        tries = [self.answer()]
        while tries[-1]["lost"] > timing.LOST and len(tries) <= RETAKES:
            tries.append(self.answer())
        return min(tries, key=lambda one: one["lost"])

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def start(name: str, threads: int) -> Worker:
    errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  lives as long as the worker
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, *sys.argv, "--threads", str(threads), "--worker", name]
    return Worker(
        subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
        ),
        errors,
    )


# ---- all of them -----------------------------------------------------------------------------------------------------


def compare(
    names: list[str], threads: int, arguments: argparse.Namespace, peaks: timing.Peaks
) -> tuple[list[Row], dict[str, str]]:
    """A row for every method, and the reasons of those that could not run."""
    workers: dict[str, Worker] = {}
    ready: dict[str, Row] = {}
    missing: dict[str, str] = {}
    steps: dict[str, list[Row]] = {name: [] for name in names}
    for name in names:
        absent = [module for module in METHODS[name].imports if importlib.util.find_spec(module) is None]
        if absent:
            missing[name] = f"{' and '.join(absent)} not installed"
    # one after the other: two that load at once would wait for each other's cores
    for name in [name for name in names if name not in missing]:
        say(f"{threads} thread(s): loading {name}")
        workers[name] = start(name, threads)
        try:
            ready[name] = workers[name].answer(is_asked=False)
        except RuntimeError as error:
            missing[name] = str(error)
    for turn in range(arguments.steps + 1):
        for name in ready:
            if name not in missing:
                try:
                    steps[name].append(workers[name].step())
                except RuntimeError as error:
                    missing[name] = str(error)
        say(
            f"round {turn} of {arguments.steps}: "
            + ", ".join(f"{name} {taken[-1]['seconds']:.2f} s" for name, taken in steps.items() if taken)
        )
    for worker in workers.values():
        worker.end()
    if FULL in missing:
        sys.exit(f"{FULL}, the unit of all others, failed: {missing[FULL]}")

    measured = {name: taken[1:] for name, taken in steps.items() if name not in missing}
    samples = {
        name: Samples([step["seconds"] for step in taken], [step["lost"] <= timing.LOST for step in taken])
        for name, taken in measured.items()
    }
    exact = torch.tensor(ready[FULL]["logits"], dtype=torch.float64)
    rows = []
    for name, taken in measured.items():
        flops = METHODS[name].products * timing.encoder_flops(
            arguments.layers, arguments.hidden, arguments.batch, arguments.seq
        )
        off = timing.relative_error(torch.tensor(ready[name]["logits"]), exact)
        contender = Contender(
            name, lambda: None, FULL, flops, error_with_float_weights=off, precision=METHODS[name].precision
        )
        row = timing.row(contender, samples[name], samples[FULL], threads, peaks)
        medians = {
            f"{part}_milliseconds": 1e3 * torch.tensor([step[part] for step in taken]).median().item()
            for part in ("forward", "backward", "optimizer")
        }
        last = taken[-1]
        rows.append(
            row
            | medians
            | {key: last[key] for key in ("loss", "peak_mb_above_imports")}
            | {"trainable": ready[name]["trainable"]}
        )
    return rows, missing


def results_table(rows: list[Row], threads: int) -> str:
    parts = ["step ms", "forward", "backward", "optimizer"]
    titles = [
        f"{threads} thread(s)",
        *parts,
        "×",
        "%",
        "peak MB above imports",
        "trained",
        "error of the logits",
        "loss",
    ]
    return reporting.table(
        titles,
        (
            [
                row["name"],
                *(
                    f"{row[key]:.0f}"
                    for key in (
                        "milliseconds",
                        "forward_milliseconds",
                        "backward_milliseconds",
                        "optimizer_milliseconds",
                    )
                ),
                f"{row['speedup']:.2f}{reporting.mark([row])}",
                f"{100 * row['roofline_share']:.0f}",
                f"{row['peak_mb_above_imports']:.0f}",
                f"{row['trainable']:,}",
                f"{row['error_with_float_weights']:.1e}",
                f"{row['loss']:.3f}",
            ]
            for row in rows
            if row["threads"] == threads
        ),
    )


def main() -> None:
    parser = reporting.options(__doc__, rounds=None)
    parser.add_argument("--steps", type=int, default=5, help="rounds after the warm-up; default: 5")
    for name, default in (("layers", 4), ("hidden", 768), ("seq", 128), ("batch", 16)):
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help=f"methods with one of these words in their names, of: {'; '.join(METHODS)}",
    )
    parser.add_argument("--worker", choices=METHODS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments)
        return
    names = [
        name for name in METHODS if not arguments.only or name == FULL or any(word in name for word in arguments.only)
    ]
    about = reporting.header(arguments.threads, ["transformers", "peft", "bitsandbytes"])
    by_threads = {threads: timing.peaks(threads) for threads in arguments.threads}
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for threads, peak in by_threads.items():
        measured, absent = compare(names, threads, arguments, peak)
        rows += measured
        missing |= absent
    model = {key: getattr(arguments, key) for key in ("layers", "hidden", "seq", "batch")}
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, model=model, missing=missing))
    print(reporting.headline(about))
    print(
        "BERT of {layers} layers of {hidden}, batch {batch} x {seq}, AdamW. ".format(**model)
        + f"×: speed of {FULL} in the same rounds. *: noisy"
    )
    print(reporting.peaks_line(by_threads))
    for threads in arguments.threads:
        print(results_table(rows, threads))
    print(reporting.missing_lines(missing))


if __name__ == "__main__":
    main()
