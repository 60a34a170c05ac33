"""What the benchmarks of the CPU print and keep: the header that says what was measured on what, tables, JSON, common
options.

Tables and headers go to standard output, progress to standard error.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import prequant_ext
from prequant_ext import doctor
from timing import Peaks, Row

ROOT = Path(__file__).parent.parent
ERRORS = {"error": "error", "error_with_float_weights": "error with float weights"}


def say(message: str) -> None:
    print(message, file=sys.stderr, flush=True)


def mark(rows: Sequence[Row]) -> str:
    """An asterisk where more than half of the samples were disturbed."""
    return "*" if 2 * sum(row["noisy"] for row in rows) > sum(row["rounds"] for row in rows) else ""


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Markdown."""
    return "\n".join(["", *(f"| {' | '.join(cells)} |" for cells in (titles, ["---"] * len(titles), *rows))])


def means_table(rows: Sequence[Row], threads: int) -> str:
    """One row a contender, one column a token count: geometric means over the shapes, and the largest errors."""
    rows = [row for row in rows if row["threads"] == threads]
    tokens = sorted({row["M"] for row in rows})
    shapes = len({(row["N"], row["K"]) for row in rows})
    kinds = {key: title for key, title in ERRORS.items() if all(row[key] is not None for row in rows)}
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name]
        errors = [f"{max(row[key] for row in own):.1e}" for key in kinds]
        lines.append([name, *(_mean_cell([row for row in own if row["M"] == M], shapes) for M in tokens), *errors])
    return table([f"{threads} thread(s)", *(f"M = {M}" for M in tokens), *kinds.values()], lines)


def _mean_cell(rows: Sequence[Row], shapes: int) -> str:
    if not rows:
        return "–"
    speed, share = (statistics.geometric_mean(row[key] for row in rows) for key in ("speedup", "roofline_share"))
    # shapes: such a mean is of others than its neighbours'
    took = f" ({len(rows)} of {shapes})" if len(rows) < shapes else ""
    return f"{speed:.2f}× {100 * share:.0f} %{mark(rows)}{took}"


def missing_lines(missing: dict[str, str]) -> str:
    """A line for every contender that could not run."""
    return "".join(f"\nnot measured: {name}: {reason}" for name, reason in missing.items())


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")),
        platform.processor() or platform.machine(),
    )


def commit() -> str | None:
    """Of the checkout that this file is in, ``-dirty`` where its files differ."""
    if not (ROOT / ".git").exists():
        return None
    done = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True,
        text=True,
    )
    return done.stdout.strip() or None


def versions(packages: Iterable[str]) -> dict[str, str | None]:
    found: dict[str, str | None] = {}
    for package in packages:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def header(threads: Sequence[int], packages: Sequence[str] = ()) -> Row:
    """What produced a record: machine, instruction-set level, threads, versions, commit."""
    return {
        "script": Path(sys.argv[0]).name,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "isa": doctor.build_info()["isa"],
        "threads": list(threads),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "prequant_ext": prequant_ext.__version__,
            **versions(packages),
        },
        "commit": commit(),
        "sees_other_processes": Path("/proc/self/schedstat").exists(),
    }


def headline(about: Row) -> str:
    installed = ", ".join(f"{package} {version}" for package, version in about["versions"].items() if version)
    threads = " and ".join(map(str, about["threads"]))
    return (
        f"{about['cpu']}, {about['cores']} cores, level {about['isa']}, {threads} thread(s), {installed}, commit "
        f"{about['commit'] or 'unknown'}"
    )


def peaks_line(by_threads: dict[int, Peaks]) -> str:
    """What the shares are shares of."""
    each = "; ".join(
        f"{threads} thread(s): {peak.gigaflops:.0f} GFLOP/s, {peak.gigabytes_per_second:.1f} GB/s"
        for threads, peak in by_threads.items()
    )
    return (
        "%: share of the roofline, from this machine's own measured peaks of a float32 matrix product and of a "
        f"copy in memory ({each})"
    )


def record(about: Row, rows: Sequence[Row], by_threads: dict[int, Peaks], **more: Any) -> Row:
    return {
        "header": about,
        "peaks": {str(threads): vars(peak) for threads, peak in by_threads.items()},
        **more,
        "rows": list(rows),
    }


def write_json(path: Path | None, value: Row) -> None:
    """All of it or nothing: a run that is cut off leaves the file of the one before."""
    if path is None:
        return
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    partial.write_text(json.dumps(value, indent=1) + "\n")
    partial.replace(path)


# ---- options ---------------------------------------------------------------------------------------------------------


def shape(text: str) -> tuple[int, ...]:
    """Sizes of "3072x768"."""
    return tuple(int(size) for size in text.split("x"))


def options(description: str | None, rounds: int | None = None) -> argparse.ArgumentParser:
    """A parser with the options that every script has."""
    default = [torch.get_num_threads()]
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--threads", nargs="+", type=int, default=default, metavar="T", help=f"default: {' '.join(map(str, default))}"
    )
    if rounds is not None:
        parser.add_argument(
            "--rounds", type=int, default=rounds, help=f"at most, of all contenders in turn; default: {rounds}"
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the record there, too")
    return parser
