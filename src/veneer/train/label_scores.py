"""Scores of whole-text labels and numbers, from arrays: accuracy, F1, Matthews, Pearson, Spearman."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["class_scores", "number_scores", "set_scores"]


def _f1(hits: Any, found: Any, wanted: Any) -> Any:
    """2 hits / (found + wanted) for each class; 0 where a class is neither found nor wanted."""
    return np.divide(2 * hits, found + wanted, out=np.zeros(len(hits)), where=found + wanted > 0)


def class_scores(wanted: Any, found: Any, classes: int) -> dict[str, float]:
    """Scores of one class a row, `wanted` and `found` (rows,) ints.

    `accuracy`; `f1`: the mean over the classes that occur on either side; `matthews_correlation`: for any number
    of classes, Gorodkin 2004, equation 8 (0 where either side holds one class only).
    """
    wanted, found = np.asarray(wanted), np.asarray(found)
    table = np.zeros((classes, classes))
    np.add.at(table, (wanted, found), 1)
    hits, have, want, rows = table.diagonal(), table.sum(0), table.sum(1), table.sum()
    present = have + want > 0
    spread = np.sqrt(float(rows**2 - have @ have)) * np.sqrt(float(rows**2 - want @ want))
    return {
        "accuracy": float(hits.sum() / rows),
        "f1": float(_f1(hits, have, want)[present].mean()),
        "matthews_correlation": float((hits.sum() * rows - have @ want) / spread) if spread else 0.0,
    }


def set_scores(wanted: Any, found: Any) -> dict[str, float]:
    """Scores of any number of classes a row, `wanted` and `found` (rows, classes) of 0 and 1.

    `f1` counts every (row, class) alike (micro), `f1_macro` is the mean over classes, `exact_match` the share of
    rows with every class right.
    """
    wanted, found = np.asarray(wanted, dtype=float), np.asarray(found, dtype=float)
    hits, have, want = (wanted * found).sum(0), found.sum(0), wanted.sum(0)
    return {
        "f1": float(_f1(*(total.sum(keepdims=True) for total in (hits, have, want)))[0]),
        "f1_macro": float(_f1(hits, have, want).mean()),
        "exact_match": float((wanted == found).all(1).mean()),
    }


def number_scores(wanted: Any, found: Any) -> dict[str, float]:
    """Pearson's and Spearman's correlation (0 where either side is constant) and the mean squared error."""
    wanted, found = np.asarray(wanted, dtype=float), np.asarray(found, dtype=float)
    return {
        "pearson": _pearson(wanted, found),
        "spearman": _pearson(_ranks(wanted), _ranks(found)),
        "mean_squared_error": float(np.mean((wanted - found) ** 2)),
    }


def _pearson(left: Any, right: Any) -> float:
    left, right = left - left.mean(), right - right.mean()
    spread = np.sqrt((left @ left) * (right @ right))
    return float(left @ right / spread) if spread > 0 else 0.0


def _ranks(values: Any) -> Any:
    """Ranks from 1, equal values sharing the mean of theirs."""
    _, places, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[places]
