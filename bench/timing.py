"""How the benchmarks of the CPU measure: interleaved rounds, the machine's own peaks, errors against float64.

A round calls every contender, in an order that turns by one; a speed is a ratio of two times of the same round, and the
figure is the median over the rounds. So a clock that drifts, or another program that comes and goes, meets all
contenders alike. A sample in which our threads waited for a core (schedstat) is taken again; what could not be had
undisturbed is counted as noisy.

The roofline is measured, not looked up: float32 FMA through a large matrix product, memory through a large copy, with
the threads of the run. A share is the time that the work would take at these peaks over the time that it took. It can
pass 100 %: integer units are faster than float32 ones, caches than memory.
"""

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHAPES = [(768, 768), (1024, 1024), (3072, 768), (768, 3072), (4096, 1024), (4096, 4096), (11008, 4096)]  # N, K
TOKENS = [1, 4, 16, 64, 128, 512, 1024]

SAMPLE_SECONDS = 0.003  # a sample repeats a call until it is about this long
RETAKE_SECONDS = 0.3  # spent on one sample before a disturbed one is kept
RETAKES = 6
LOST = 0.02  # of a sample's core seconds may be spent waiting for a core
IDLE_SECONDS = 0.02  # before a sample: the last contender's workers stop spinning
MIN_ROUNDS = 3
ERROR_ROWS = 64  # of a product are compared with float64

Row = dict[str, Any]  # of a record: JSON-ready


@dataclass(frozen=True)
class Contender:
    """One way to a result.

    baseline   the contender that its speed is a multiple of
    flops      that the result needs, and bytes that must at least be moved, for its share of the roofline
    error      relative, in the 2-norm, against the float64 product of its own weights; error_with_float_weights: of the
               weights before they were quantized
    precision  torch.set_float32_matmul_precision while it runs
    """

    name: str
    call: Callable[[], object]
    baseline: str
    flops: float = 0.0
    bytes: float = 0.0
    error: float | None = None
    error_with_float_weights: float | None = None
    precision: str = "highest"


@dataclass
class Samples:
    """Seconds of a contender's calls, one a round, and whether nothing else had the cores."""

    seconds: list[float] = field(default_factory=list)
    is_clean: list[bool] = field(default_factory=list)


@dataclass(frozen=True)
class Peaks:
    gigaflops: float
    gigabytes_per_second: float

    def share(self, flops: float, moved: float, seconds: float) -> float:
        return max(flops / self.gigaflops, moved / self.gigabytes_per_second) / 1e9 / seconds


# ---- measuring -------------------------------------------------------------------------------------------------------


def waited_seconds() -> float:
    """How long this process's threads stood ready without a core so far: it grows while others use the cores. 0 where
    the system does not say.
    """
    total = 0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        try:
            total += int(path.read_text().split()[1])
        except (OSError, IndexError):  # the thread has ended; the kernel keeps no such statistics
            continue
    return total * 1e-9


def timed(call: Callable[[], object], calls: int = 1) -> float:
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def undisturbed(call: Callable[[], object], calls: int, threads: int, retakes: int = RETAKES) -> tuple[float, bool]:
    """(seconds of a call, whether nothing else had the cores), the least disturbed of a few tries."""
    best, least, spent = math.inf, math.inf, 0.0
    for _ in range(1 + retakes):
        waited = waited_seconds()
        seconds = timed(call, calls)
        lost = (waited_seconds() - waited) / (seconds * calls * threads)
        if lost < least:
            best, least = seconds, lost
        spent += seconds * calls
        if least < LOST or spent > RETAKE_SECONDS:
            break
    return best, least < LOST


def interleaved(contenders: Sequence[Contender], rounds: int, budget: float, threads: int) -> dict[str, Samples]:
    """Samples of each contender by its name: as many rounds as ``budget`` seconds allow, at least MIN_ROUNDS and at
    most ``rounds``.
    """
    calls, round_seconds = {}, 0.0
    for contender in contenders:
        torch.set_float32_matmul_precision(contender.precision)
        known = timed(contender.call)  # the first call may still prepare something
        known = known if known > RETAKE_SECONDS else timed(contender.call)
        calls[contender.name] = max(1, min(200, int(SAMPLE_SECONDS / known)))
        round_seconds += known * calls[contender.name] + IDLE_SECONDS * (threads > 1)
    samples = {contender.name: Samples() for contender in contenders}
    for turn in range(min(rounds, max(MIN_ROUNDS, int(budget / round_seconds)))):
        for index in range(len(contenders)):
            contender = contenders[(index + turn) % len(contenders)]
            torch.set_float32_matmul_precision(contender.precision)
            if threads > 1:
                time.sleep(IDLE_SECONDS)
            if calls[contender.name] > 1:
                contender.call()  # a core that has slept is slow, and so is a cold cache
            seconds, is_clean = undisturbed(contender.call, calls[contender.name], threads)
            samples[contender.name].seconds.append(seconds)
            samples[contender.name].is_clean.append(is_clean)
    torch.set_float32_matmul_precision("highest")
    return samples


def median(samples: Samples) -> float:
    """Seconds, over the undisturbed samples where there are any."""
    clean = [seconds for seconds, is_clean in zip(samples.seconds, samples.is_clean, strict=True) if is_clean]
    return statistics.median(clean or samples.seconds)


def speedup(baseline: Samples, samples: Samples) -> float:
    """How many times as fast as the baseline in the same round, over the rounds in which both ran undisturbed where
    there are any.
    """
    pairs = list(zip(baseline.seconds, samples.seconds, baseline.is_clean, samples.is_clean, strict=True))
    clean = [base / own for base, own, *is_clean in pairs if all(is_clean)]
    return statistics.median(clean or [base / own for base, own, *_ in pairs])


def row(contender: Contender, own: Samples, baseline: Samples, threads: int, peaks: Peaks) -> Row:
    seconds = median(own)
    return {
        "name": contender.name,
        "baseline": contender.baseline,
        "precision": contender.precision,
        "threads": threads,
        "milliseconds": seconds * 1e3,
        "speedup": speedup(baseline, own),
        "roofline_share": peaks.share(contender.flops, contender.bytes, seconds),
        "error": contender.error,
        "error_with_float_weights": contender.error_with_float_weights,
        "rounds": len(own.seconds),
        "noisy": own.is_clean.count(False),
    }


def measure(contenders: Sequence[Contender], rounds: int, budget: float, threads: int, peaks: Peaks) -> list[Row]:
    """A row for each contender, all of them timed in the same rounds."""
    samples = interleaved(contenders, rounds, budget, threads)
    return [
        row(contender, samples[contender.name], samples[contender.baseline], threads, peaks) for contender in contenders
    ]


def peaks(threads: int, side: int = 1536, megabytes: int = 128) -> Peaks:
    """The best of a few large matrix products and copies: what this machine does at most, with so many threads."""
    torch.set_num_threads(threads)
    a, b, product = (torch.ones(side, side) for _ in range(3))
    source, copy = (torch.ones(megabytes * 10**6 // 4) for _ in range(2))
    multiply = min(timed(lambda: torch.mm(a, b, out=product)) for _ in range(6))
    move = min(timed(lambda: copy.copy_(source)) for _ in range(6))
    return Peaks(2 * side**3 / multiply / 1e9, (source.nbytes + copy.nbytes) / move / 1e9)


def encoder_flops(layers: int, hidden: int, batch: int, seq: int) -> float:
    """Of the matrix products of a BERT encoder's forward: twelve weight matrices of hidden x hidden a layer, and
    attention's two products.
    """
    return 2.0 * layers * batch * seq * (12 * hidden**2 + 2 * seq * hidden)


# ---- accuracy --------------------------------------------------------------------------------------------------------


def float64_product(x: Tensor, weight: Tensor) -> Tensor:
    """``x weight^T``, a strip of weight at a time:
    a float64 copy of a large one would take more memory than all else.
    """
    return torch.cat([x.double() @ rows.double().T for rows in weight.split(1024)], 1)


def relative_error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())
