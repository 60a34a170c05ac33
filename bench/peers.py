"""Other libraries' linear layers on the CPU beside PreQuantLinear and torch float32, in the same rounds: int4, int8 and
bfloat16.

    python bench/peers.py                                            three shapes, four token counts
    python bench/peers.py --shapes 4096x4096 --tokens 1 --only openvino prequant
    pip install 'prequant_ext[bench]'                                the libraries; none is required, and those that are
                                                                     missing are listed

Each is given float32 or bfloat16 x, whichever it takes, and does its own quantization of activations within the time
that is measured. Int4 weights are rounded to the nearest code in groups of 32 wherever the library takes codes. The
error is that against the float64 product with the float weights; most of it is the weights' rounding. A library that
reads its number of threads when it loads makes one process for each number of threads necessary.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import reporting
import timing
from peer_layers import BASELINE, PACKAGES, PEERS, Call
from reporting import say
from timing import ERROR_ROWS, Contender, Row, float64_product, relative_error

SLOW = 10  # times as slow as torch float32 and 50 ms: not timed again


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def installed(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Peers whose packages can be imported, and why the others cannot."""
    absent: dict[str, str] = {}
    for package in dict.fromkeys(package for name in names for package in PEERS[name].packages):
        try:
            importlib.import_module(PACKAGES[package])
        except Exception as error:  # also one that is installed and fails to load here: a peer must not end the run
            absent[package] = reason(error)
    missing = {name: absent[package] for name in names for package in PEERS[name].packages if package in absent}
    return [name for name in names if name not in missing], missing


def made(weight: Tensor, names: Sequence[str], threads: int, missing: dict[str, str]) -> dict[str, Call]:
    found = {}
    for name in names:
        try:
            found[name] = PEERS[name].make(weight, threads)
        except Exception as error:  # it refuses the shape, or this CPU
            _note(missing, name, weight, error)
    return found


def _note(missing: dict[str, str], name: str, weight: Tensor, error: Exception) -> None:
    if name == BASELINE or name.startswith("prequant"):
        raise error
    missing.setdefault(f"{name}, {' x '.join(map(str, weight.shape))}", reason(error))


def rows_of(
    weight: Tensor,
    calls: dict[str, Call],
    M: int,
    threads: int,
    peaks: timing.Peaks,
    arguments: Any,
    missing: dict[str, str],
) -> list[Row]:
    N, K = weight.shape
    x = torch.randn(M, K, generator=torch.Generator().manual_seed(1))
    exact = float64_product(x[:ERROR_ROWS], weight)
    contenders, unit = [], 0.0
    for name, call in list(calls.items()):
        peer = PEERS[name]
        torch.set_float32_matmul_precision(peer.precision)
        x_ = x.to(peer.dtype)
        run = lambda call=call, x_=x_: call(x_)  # noqa: E731
        try:
            error = relative_error(run()[: len(exact)], exact)
            seconds = timing.timed(run)
        except Exception as refusal:
            _note(missing, name, weight, refusal)
            del calls[name]  # nor with more tokens
            continue
        unit = seconds if name == BASELINE else unit
        if seconds > max(SLOW * unit, 0.05) and not name.startswith(("prequant", BASELINE)):
            missing[f"{name}, {N} x {K}, M >= {M}"] = (
                f"{1e3 * seconds:.0f} ms a call, torch float32 {1e3 * unit:.0f} ms"
            )
            del calls[name]
            continue
        flops, moved = 2.0 * M * N * K, N * K * peer.bits / 8 + x_.nbytes + x_.element_size() * M * N
        contenders.append(
            Contender(name, run, BASELINE, flops, moved, error_with_float_weights=error, precision=peer.precision)
        )
    rows = timing.measure(contenders, arguments.rounds, arguments.budget, threads, peaks)
    best = sorted(rows, key=lambda row: row["milliseconds"])[:4]
    say(
        f"{threads} thread(s), {N} x {K}, M = {M}: " + ", ".join(f"{row['name']} {row['speedup']:.2f}×" for row in best)
    )
    return [{**row, "N": N, "K": K, "M": M} for row in rows]


def measured(arguments: Any, threads: int) -> Row:
    """Everything that one process measures."""
    warnings.filterwarnings("ignore")
    torch.set_num_threads(threads)
    peaks, rows = timing.peaks(threads), []
    names, missing = installed(
        [
            name
            for name in PEERS
            if not arguments.only or name == BASELINE or any(word in name for word in arguments.only)
        ]
    )
    for N, K in arguments.shapes:
        weight = torch.randn(N, K, generator=torch.Generator().manual_seed(0)) * 0.02
        calls = made(weight, names, threads, missing)
        for M in arguments.tokens:
            rows += rows_of(weight, calls, M, threads, peaks, arguments, missing)
    return {"rows": rows, "missing": missing, "peaks": vars(peaks)}


@torch.no_grad()
def main() -> None:
    parser = reporting.options(__doc__, rounds=15)
    parser.add_argument(
        "--shapes", nargs="+", type=reporting.shape, default=[(768, 768), (3072, 768), (4096, 4096)], metavar="NxK"
    )
    parser.add_argument(
        "--tokens", nargs="+", type=int, default=[1, 16, 128, 512], metavar="M", help="default: 1 16 128 512"
    )
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="WORD",
        help=f"those with one of these words in their names, of: {'; '.join(PEERS)}",
    )
    parser.add_argument(
        "--budget", type=float, default=1.5, help="seconds for the rounds of one shape and token count; default: 1.5"
    )
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        # a line of its own: libraries greet on standard output
        print("\n" + json.dumps(measured(arguments, arguments.threads[0])))
        return
    about = reporting.header(arguments.threads, list(PACKAGES))
    rows: list[Row] = []
    by_threads: dict[int, timing.Peaks] = {}
    missing: dict[str, str] = {}
    for threads in arguments.threads:
        command = [sys.executable, *sys.argv, "--worker", "--threads", str(threads)]
        done = subprocess.run(
            command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ | {"OMP_NUM_THREADS": str(threads)}
        )
        answer = json.loads(done.stdout.splitlines()[-1])
        rows += answer["rows"]
        missing |= answer["missing"]
        by_threads[threads] = timing.Peaks(**answer["peaks"])
    reporting.write_json(arguments.json, reporting.record(about, rows, by_threads, missing=missing))
    print(reporting.headline(about))
    print(
        f"×: speed of {BASELINE} in the same rounds, geometric mean over the shapes that it took. "
        f"{reporting.peaks_line(by_threads)}. *: noisy"
    )
    for threads in arguments.threads:
        print(reporting.means_table(rows, threads))
    print(reporting.missing_lines(missing))


if __name__ == "__main__":
    main()
