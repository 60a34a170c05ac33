"""Runs of experiments for tests: a small plan, and what its runs would have come to."""

from dataclasses import replace

from prequant_ext.glue.run import FinishedRun, RunResult, RunSettings
from prequant_ext.study.experiments import Arm, Experiment
from prequant_ext.study.runner import Plan

SMALL = Experiment("two arms", (Arm("full", "ft"), Arm("ours", "prequant", {"r": 3})), ("sst2",))


def plan(search="quick", **changes) -> Plan:
    return replace(Plan(SMALL, "tiny", ("sst2", "mrpc"), (0, 1), search), **changes)


def result(settings: RunSettings, score=0.8, **changes) -> RunResult:
    """As the worker would have given it."""
    right = round(50 * score)
    values = {
        "score": score,
        "scores": {"accuracy": score},
        "best_epoch": 1,
        "epoch_scores": [score],
        "lr": settings.learning_rate,
        "n_train": 100,
        "n_validation": 50,
        "trainable_parameters": 10,
        "seconds": 1.0,
        "peak_memory_mb": 1.0,
        "model_bytes": 2_000_000,
        "task_bytes": 1000,
        "environment": {},
        "labels": "1" * 50,
        "predictions": "1" * right + "0" * (50 - right),
    }
    own = ("task", "method", "seed", "epochs", "batch_size", "max_length", "model", "data", "quantization")
    return RunResult(**values | {name: getattr(settings, name) for name in own} | changes)


def finished(settings: RunSettings, score=0.8, **changes) -> FinishedRun:
    return FinishedRun(settings, result(settings, score, **changes))
