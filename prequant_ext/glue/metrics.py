"""The metrics of GLUE, and the paired bootstrap that compares two methods on the same examples."""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import numpy as np
from scipy import stats
from sklearn import metrics as sk


def _correlation(kind: Callable, labels: np.ndarray, predictions: np.ndarray) -> float:
    # Constant predictions (or labels) have no correlation; scipy says NaN, which would compare as neither better nor
    # worse.
    if np.ptp(labels) == 0 or np.ptp(predictions) == 0:
        return 0.0
    value = float(kind(labels, predictions).statistic)
    return value if math.isfinite(value) else 0.0


METRICS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "accuracy": lambda labels, predictions: float(sk.accuracy_score(labels, predictions)),
    "f1": lambda labels, predictions: float(sk.f1_score(labels, predictions, zero_division=0.0)),
    "matthews": lambda labels, predictions: float(sk.matthews_corrcoef(labels, predictions)),
    "spearman": lambda labels, predictions: _correlation(stats.spearmanr, labels, predictions),
    "pearson": lambda labels, predictions: _correlation(stats.pearsonr, labels, predictions),
}


def predictions_of(logits: np.ndarray, num_labels: int) -> np.ndarray:
    """Class indices (M,) of logits (M, num_labels), or the values themselves (M,) of a regression (num_labels 1).

    Raises ValueError where a logit is NaN or Inf: argmax would answer class 0.
    """
    if not np.isfinite(logits).all():
        raise ValueError("logits must be finite, got NaN or Inf: training diverged; try a smaller learning rate")
    return logits.reshape(len(logits)).astype(np.float64) if num_labels == 1 else logits.argmax(axis=-1)


def pack(values: Sequence[float] | np.ndarray, is_regression: bool) -> str:
    """One digit for each class index, or comma-separated numbers of a regression: predictions and labels inside a JSON
    line.
    """
    return (
        ",".join(f"{value:.4f}" for value in values) if is_regression else "".join(str(int(value)) for value in values)
    )


def unpack(packed: str, is_regression: bool) -> np.ndarray:
    """The inverse of :func:`pack`."""
    return (
        np.array([float(value) for value in packed.split(",")])
        if is_regression
        else np.array([int(digit) for digit in packed])
    )


def score(names: Sequence[str], labels: Sequence[float], predictions: Sequence[float] | np.ndarray) -> dict[str, float]:
    """Each named metric of ``predictions`` (M,) against ``labels`` (M,), as fractions of 1, not per cent.

    Raises ValueError where the lengths differ or nothing is there.
    """
    truth, answers = np.asarray(labels), np.asarray(predictions)
    if truth.shape != answers.shape or not truth.size:
        raise ValueError(
            f"predictions has shape {answers.shape} but labels has {truth.shape}; both must be (M,) with M > 0"
        )
    return {name: METRICS[name](truth, answers) for name in names}


def paired_bootstrap(
    first: np.ndarray, second: np.ndarray, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float, float]:
    """Mean of ``first - second`` over all seeds and examples, with its 95 % interval from resampling the examples.

    first, second   (seeds, examples) 0/1 correctness of two methods on the same examples: a seed's rows stay together
                    with their example, since the examples are the sample and the seeds are repeated looks at it

    Returns (difference, low, high). Raises ValueError where the shapes differ.
    """
    if first.shape != second.shape or first.ndim != 2 or not first.size:
        raise ValueError(f"first has shape {first.shape} but second has {second.shape}; both must be (seeds, examples)")
    difference = (first.astype(np.float64) - second.astype(np.float64)).mean(axis=0)
    means = _resampled(len(difference), resamples, seed) @ difference / len(difference)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(difference.mean()), float(low), float(high)


@lru_cache(maxsize=2)
def _resampled(examples: int, resamples: int, seed: int) -> np.ndarray:
    """How often each resample draws each example, (resamples, examples): a multinomial's counts are the same resampling
    as drawing indices.

    Kept, since the rows of a table compare on the same examples; a count is small, and the array is not.
    """
    drawn = np.random.default_rng(seed).multinomial(examples, np.full(examples, 1 / examples), size=resamples)
    return drawn.astype(np.int16)
