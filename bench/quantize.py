"""Quantizing the encoder of a BERT-base, 85 M weights: time of each operator and of quantize_model, memory, and whether
Python runs meanwhile.

    python bench/quantize.py                         72 matrices and the model, with torch's own number of threads and
                                                     with 1
    python bench/quantize.py --layers 2 --rounds 2   a smaller encoder

Three parts. Operators: statistics, outlier counts, selection of r = 5 dimensions, codes and packing, and the layout of
the device's kernels, over all matrices, beside a copy of the weights. Model: quantize_model as a whole. Both in
processes of their own. Interpreter: each operator on one large matrix with one thread, while a Python thread counts:
its longest pause is as long as the operator where that keeps the interpreter's lock.

Memory is the peak of the resident set above what was held before, less what the results themselves take. The error is
that of the 4-bit weights.
"""

import argparse
import copy
import ctypes
import itertools
import json
import math
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import reporting
import timing
from prequant_ext import PreQuantConfig, ops, quantize_model
from prequant_ext.measure import MB, peak_bytes, resident_bytes
from reporting import say
from timing import Contender, Row

BITS, R, SIGMAS, INPUT = 4, 5, 3.0, 1
TRIES = 3
TOO_SHORT = 0.01  # seconds: a thread may be kept from its core for as long, lock or not
COPY, TOTAL = "torch: copy of the weights", "all operators"


def encoder(layers: int, hidden: int) -> list[Tensor]:
    shapes = [(hidden, hidden)] * 4 + [(4 * hidden, hidden), (hidden, 4 * hidden)]
    return [
        torch.randn(shape, generator=torch.Generator().manual_seed(i)) * 0.02 for i, shape in enumerate(shapes * layers)
    ]


def resident_now() -> int | None:
    """Bytes that are held; the peak starts again from here. None where the system does not let it. What was freed is
    given back before: a later allocation that used it again would not be seen.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")
    except (OSError, AttributeError):  # no Linux, no glibc, no permission
        return None
    return resident_bytes()


# ---- the operators ---------------------------------------------------------------------------------------------------


def steps(mean: Tensor, std: Tensor) -> tuple[Tensor, Tensor]:
    """scale and zero_point of a range of six standard deviations about the mean."""
    scale = 6 * std / 2**BITS
    return scale.float(), (2 ** (BITS - 1) - mean / scale).round().clamp(0, 2**BITS - 1).to(torch.uint8)


def stages(weight: Tensor) -> list[tuple[str, Callable[[Any], Any]]]:
    """The operators that turn a weight into what a layer stores; each is given the results of those before it, by their
    names.
    """
    N, K = weight.shape

    def count(results: dict[str, Any]) -> Any:
        mean, std, *_ = results["weight_stats"]
        return ops.outlier_counts(weight, mean, std, SIGMAS)

    def select(results: dict[str, Any]) -> Tensor:
        counts, energy, *_ = results["outlier_counts"]
        return ops.select_outlier_dims(counts, energy, R)

    def quantize(results: dict[str, Any]) -> Tensor:
        scale, zero_point = results["steps"]
        return ops.quantize_pack(weight, scale, zero_point, BITS, results["select_outlier_dims"], INPUT)

    found: list[tuple[str, Callable[[Any], Any]]] = [
        ("weight_stats", lambda results: ops.weight_stats(weight, N * K)),
        ("outlier_counts", count),
        ("select_outlier_dims", select),
        ("quantize_pack", quantize),
        ("prepack", lambda results: ops.prepack(results["quantize_pack"], K, BITS)),
    ]
    return found if ops.reads_prepacked(weight) else found[:-1]


def run_all(weight: Tensor) -> dict[str, Any]:
    results: dict[str, Any] = {}
    for name, call in stages(weight):
        results[name] = call(results)
        if name == "weight_stats":
            results["steps"] = steps(*results[name][:2])
    return results


def operators(arguments: argparse.Namespace, threads: int) -> list[Row]:
    torch.set_num_threads(threads)
    weights = encoder(arguments.layers, arguments.hidden)
    last = list(stages(weights[0]))[-1][0]
    run_all(torch.randn(64, 64))  # what the first call of each loads is no memory of theirs
    before = resident_now()
    kept = [run_all(weight)[last] for weight in weights]  # before any other call has left memory behind to use again
    peak = None if before is None else peak_bytes() - before - sum(tensor.nbytes for tensor in kept)
    results = [run_all(weight) for weight in weights]
    read, packed = sum(weight.nbytes for weight in weights), sum(tensor.nbytes for tensor in kept)
    error = math.sqrt(
        sum(_squared_error(weight, result) for weight, result in zip(weights, results, strict=True))
        / sum(_squares(w) for w in weights)
    )
    del kept
    peaks = timing.peaks(threads)

    def over_all(call: Callable[[Tensor], Any]) -> Callable[[], None]:
        def run() -> None:
            for weight in weights:
                call(weight)

        return run

    def stage(index: int) -> Callable[[], None]:
        calls = [(stages(weight)[index][1], result) for weight, result in zip(weights, results, strict=True)]

        def run() -> None:
            for call, result in calls:
                call(result)

        return run

    moved = {"weight_stats": read, "outlier_counts": read, "quantize_pack": read + packed, "prepack": 2 * packed}
    contenders = [Contender(COPY, over_all(Tensor.clone), COPY, bytes=2 * read)]
    contenders += [
        Contender(name, stage(i), COPY, bytes=moved.get(name, 0)) for i, (name, _) in enumerate(stages(weights[0]))
    ]
    contenders += [Contender(TOTAL, over_all(run_all), COPY, bytes=3 * read + packed, error_with_float_weights=error)]
    rows = timing.measure(contenders, arguments.rounds, arguments.budget, threads, peaks)
    memory = {
        "peak_extra_mb": None if peak is None else peak / MB,
        "largest_matrix_mb": max(weight.nbytes for weight in weights) / MB,
    }
    sizes = {"weights": sum(weight.numel() for weight in weights), "matrices": len(weights)}
    return [
        {"part": "operators", "peaks": vars(peaks), **row, **sizes, **(memory if row["name"] == TOTAL else {})}
        for row in rows
    ]


def _squares(weight: Tensor) -> float:
    return weight.double().square().sum().item()


def _squared_error(weight: Tensor, result: dict[str, Any]) -> float:
    scale, zero_point = result["steps"]
    values = ops.dequantize(result["quantize_pack"], scale, zero_point, weight.shape[1], BITS, torch.float32)
    dims = result["select_outlier_dims"]
    values[:, dims] = weight[:, dims]
    return (values - weight).double().square().sum().item()


# ---- the whole model -------------------------------------------------------------------------------------------------


def model(arguments: argparse.Namespace, threads: int) -> list[Row]:
    from transformers import BertConfig, BertModel

    heads = max(1, arguments.hidden // 64)
    shape = {
        "num_hidden_layers": arguments.layers,
        "hidden_size": arguments.hidden,
        "num_attention_heads": heads,
        "intermediate_size": 4 * arguments.hidden,
    }
    base = BertModel(BertConfig(**shape)).eval()
    # imports
    quantize_model(
        BertModel(BertConfig(num_hidden_layers=1, hidden_size=32, num_attention_heads=1, intermediate_size=32)),
        PreQuantConfig(),
    )
    torch.set_num_threads(threads)
    tries, peak = timing.Samples(), None
    for turn in range(arguments.rounds):
        own = copy.deepcopy(base)
        before = resident_now()
        waited, begin = timing.waited_seconds(), time.perf_counter()
        report = quantize_model(own, PreQuantConfig())
        seconds = time.perf_counter() - begin
        lost = (timing.waited_seconds() - waited) / (seconds * threads)
        tries.seconds.append(seconds)
        tries.is_clean.append(lost <= timing.LOST)
        quantized = sum(row.bytes for row in report.rows)
        if turn == 0 and before is not None:
            peak = (peak_bytes() - before - quantized) / MB
    linears = [row for row in report.rows if row.kind == "linear"]
    norm = math.sqrt(sum(_squares(base.get_submodule(row.name).weight) for row in linears))
    return [
        {
            "part": "model",
            "name": "quantize_model",
            "threads": threads,
            "milliseconds": 1e3 * timing.median(tries),
            "rounds": len(tries.seconds),
            "noisy": tries.is_clean.count(False),
            "weights": sum(math.prod(row.shape) for row in report.rows),
            "matrices": len(linears),
            "peak_extra_mb": peak,
            "quantized_mb": quantized / MB,
            "largest_matrix_mb": 4 * max(math.prod(row.shape) for row in linears) / MB,
            "error_with_float_weights": report.l2_error / norm,
        }
    ]


# ---- the interpreter -------------------------------------------------------------------------------------------------


class Counter(threading.Thread):
    """Counts for as long as it is let, and notes its longest pause in seconds."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.count, self.longest_pause, self.is_wanted = 0, 0.0, True

    def run(self) -> None:
        last = time.perf_counter()
        for self.count in itertools.count(1):
            now = time.perf_counter()
            self.longest_pause, last = max(self.longest_pause, now - last), now
            if not self.is_wanted:
                return


def interpreter(arguments: argparse.Namespace) -> list[Row]:
    torch.set_num_threads(1)  # the counting thread needs a core, too
    weight, rows = torch.randn(reporting.shape(arguments.matrix)), []
    results = run_all(weight)
    usual = sys.getswitchinterval()
    # seconds: how long an operator that is done may wait for the lock, which is counted as its own time
    sys.setswitchinterval(1e-4)
    for name, call in stages(weight):
        tries = [counted_meanwhile(partial(call, results)) for _ in range(TRIES)]
        # A core that was taken away lengthens a pause; nothing shortens it while the lock is kept. So the shortest of
        # all is the one to believe.
        seconds, pause = (min(one[index] for one in tries) for index in (0, 1))
        figures = {
            "milliseconds": 1e3 * seconds,
            "counted": max(one[2] for one in tries),
            "longest_pause_milliseconds": 1e3 * pause,
        }
        is_released = pause < seconds / 2 if seconds > TOO_SHORT else None
        rows.append(
            {
                "part": "interpreter",
                "name": name,
                "threads": 1,
                "matrix": list(weight.shape),
                **figures,
                "is_released": is_released,
            }
        )
    sys.setswitchinterval(usual)
    return rows


def counted_meanwhile(call: Callable[[], object]) -> tuple[float, float, int]:
    """Seconds of the call, the longest pause of a thread that counts meanwhile, and how far it came."""
    counter = Counter()
    counter.start()
    time.sleep(0.02)
    counter.longest_pause, counted, begin = 0.0, counter.count, time.perf_counter()
    call()
    seconds = time.perf_counter() - begin
    counted = counter.count - counted
    counter.is_wanted = False
    counter.join()
    return seconds, counter.longest_pause, counted


PARTS: dict[str, Callable[[argparse.Namespace, int], list[Row]]] = {"operators": operators, "model": model}


def in_its_own_process(part: str, threads: int) -> list[Row]:
    say(f"{part}, {threads} thread(s)")
    command = [sys.executable, *sys.argv, "--part", part, "--threads", str(threads)]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


# ---- what is printed -------------------------------------------------------------------------------------------------


def results_table(rows: list[Row]) -> str:
    titles = [
        "what",
        "threads",
        "ms",
        "time of a copy",
        "%",
        "error of the weights",
        "extra MB at the peak",
        "largest matrix MB",
    ]
    return reporting.table(
        titles,
        (
            [
                f"{row['name']}{reporting.mark([row])}",
                str(row["threads"]),
                f"{row['milliseconds']:.1f}",
                _or_dash(row, "speedup", lambda speed: f"{1 / speed:.2f}×"),
                _or_dash(row, "roofline_share", lambda share: f"{100 * share:.0f}"),
                _or_dash(row, "error_with_float_weights", "{:.3f}".format),
                _or_dash(row, "peak_extra_mb", "{:.1f}".format),
                _or_dash(row, "largest_matrix_mb", "{:.1f}".format),
            ]
            for row in rows
            if row["part"] != "interpreter"
        ),
    )


def _or_dash(row: Row, key: str, text: Callable[[float], str]) -> str:
    return "–" if row.get(key) is None else text(row[key])


def interpreter_table(rows: list[Row]) -> str:
    verdicts = {True: "runs", False: "waits", None: "too short to tell"}
    titles = ["operator, one thread", "matrix", "ms", "counted meanwhile", "longest pause ms", "Python"]
    return reporting.table(
        titles,
        (
            [
                row["name"],
                " x ".join(map(str, row["matrix"])),
                f"{row['milliseconds']:.1f}",
                f"{row['counted']:,}",
                f"{row['longest_pause_milliseconds']:.1f}",
                verdicts[row["is_released"]],
            ]
            for row in rows
            if row["part"] == "interpreter"
        ),
    )


@torch.no_grad()
def main() -> None:
    parser = reporting.options(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=12, help="default: 12")
    parser.add_argument("--hidden", type=int, default=768, help="default: 768")
    parser.add_argument(
        "--matrix", default="8192x4096", metavar="NxK", help="for the interpreter's part; default: 8192x4096"
    )
    parser.add_argument(
        "--budget", type=float, default=20.0, help="seconds for the rounds of the operators; default: 20"
    )
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](arguments, arguments.threads[0])))
        return
    about = reporting.header(arguments.threads, ["transformers"])
    rows = [
        row
        for part in ("operators", "model")
        for threads in arguments.threads
        for row in in_its_own_process(part, threads)
    ]
    by_threads = {row["threads"]: timing.Peaks(**row.pop("peaks")) for row in rows if "peaks" in row}
    rows += interpreter(arguments)
    reporting.write_json(
        arguments.json, reporting.record(about, rows, by_threads, layers=arguments.layers, hidden=arguments.hidden)
    )
    print(reporting.headline(about))
    print(
        f"BERT of {arguments.layers} layers of {arguments.hidden}; an encoder of {rows[0]['weights']:,} weights. *: "
        "noisy"
    )
    print(reporting.peaks_line(by_threads))
    print(results_table(rows))
    print(interpreter_table(rows))


if __name__ == "__main__":
    main()
