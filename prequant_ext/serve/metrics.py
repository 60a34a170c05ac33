"""Counts of a server in the text format that Prometheus reads."""

import threading
from bisect import bisect_left
from collections.abc import Mapping

COUNTERS = {
    "prequant_requests_total": "HTTP requests, by method, path and status.",
    "prequant_rows_total": "Texts answered, by task.",
    "prequant_failed_rows_total": "Texts that got an error from the model in the place of an answer.",
}
HISTOGRAMS = {
    "prequant_batch_rows": ("Texts in one forward of the model.", (1, 2, 4, 8, 16, 32, 64, 128)),
    "prequant_batch_tasks": ("Different tasks in one forward of the model.", (1, 2, 4, 8, 16, 32)),
    "prequant_predict_seconds": (
        "From a prediction's request to the start of its response.",
        (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5),
    ),
}
GAUGES = {
    "prequant_queue_rows": "Texts that wait for the model.",
    "prequant_tasks": "Tasks in the model.",
}
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters and histograms of the names above; any thread may add to them."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.counts: dict[str, dict[str, int]] = {name: {} for name in COUNTERS}
        self.buckets = {name: [0] * (len(bounds) + 1) for name, (_, bounds) in HISTOGRAMS.items()}
        self.sums = dict.fromkeys(HISTOGRAMS, 0.0)
        self.count("prequant_failed_rows_total", 0)  # has no labels: its first failure must be a step, not a beginning

    def count(self, name: str, amount: int = 1, **labels: str) -> None:
        key = ",".join(f'{label}="{_escaped(value)}"' for label, value in labels.items())
        with self.lock:
            self.counts[name][key] = self.counts[name].get(key, 0) + amount

    def observe(self, name: str, value: float) -> None:
        with self.lock:
            self.buckets[name][bisect_left(HISTOGRAMS[name][1], value)] += 1
            self.sums[name] += value

    def text(self, gauges: Mapping[str, float]) -> str:
        """Everything counted so far, and ``gauges``: a value for each name of GAUGES."""
        lines = []
        with self.lock:
            for name, meaning in COUNTERS.items():
                lines += _head(name, "counter", meaning)
                lines += [
                    f"{name}{{{labels}}} {value}" if labels else f"{name} {value}"
                    for labels, value in self.counts[name].items()
                ]
            for name, (meaning, bounds) in HISTOGRAMS.items():
                lines += _head(name, "histogram", meaning)
                total = 0
                for bound, count in zip((*bounds, "+Inf"), self.buckets[name], strict=True):
                    total += count
                    lines.append(f'{name}_bucket{{le="{bound}"}} {total}')
                lines += [f"{name}_sum {self.sums[name]:.17g}", f"{name}_count {total}"]
        for name, meaning in GAUGES.items():
            lines += [*_head(name, "gauge", meaning), f"{name} {gauges[name]:.17g}"]
        return "\n".join(lines) + "\n"


def _head(name: str, kind: str, meaning: str) -> list[str]:
    return [f"# HELP {name} {meaning}", f"# TYPE {name} {kind}"]


def _escaped(value: str) -> str:
    return value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")
