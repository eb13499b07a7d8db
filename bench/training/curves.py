"""The picture of a training job: test error and training loss over forward-backward passes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.paper import figures

COLOURS = {"sgd": figures.SGD, "sam": figures.SAM}


def plot(results: Sequence[dict[str, Any]], title: str, subtitle: str, path: Path) -> None:
    """Write the PNG; each result has an optimizer, a label, its best epoch, and a history of passes, errors and losses.

    A ring is around the epoch whose error on the images held out is lowest.
    """
    with figures.canvas(title, subtitle, path, panels=2) as (left, right):
        _panel(left, results, "test_error", "Test error (%)")
        _panel(right, results, "train_loss", "Training loss")


def _panel(axes: Any, results: Sequence[dict[str, Any]], key: str, name: str) -> None:
    """Draw one quantity: a thin line per seed, a thick one for their mean, name and last value at its end."""
    error = key == "test_error"
    ends: list[tuple[float, str, str]] = []
    values: list[float] = []
    for kind, colour in COLOURS.items():
        runs = [r for r in results if r["optimizer"] == kind]
        if not runs:
            continue
        x = [point["passes"] for point in runs[0]["history"]]
        lines = [[point[key] for point in run["history"]] for run in runs]
        mean = [sum(column) / len(lines) for column in zip(*lines, strict=True)]
        if len(lines) > 1:
            for line in lines:
                axes.plot(x, line, color=colour, linewidth=0.7, alpha=0.4)
        axes.plot(x, mean, color=colour, linewidth=2, marker="o", markersize=3)
        text = f"{runs[0]['label']}\n" + (f"{mean[-1]:.1f} %" if error else f"{mean[-1]:.2f}")
        if error:
            best = [next(point for point in run["history"] if point["epoch"] == run["best_epoch"]) for run in runs]
            for point in best:
                axes.plot(point["passes"], point[key], "o", color=colour, markersize=11, fillstyle="none")
            text += f"\n(ring: {statistics.fmean(point[key] for point in best):.1f} %)"
        ends.append((mean[-1], text, colour))
        values += mean
    _limits(axes, values)
    _end_labels(axes, ends)
    figures.describe(axes, name, "Forward-backward passes over the training set")


def _limits(axes: Any, values: Sequence[float]) -> None:
    """Leave out the first, high values if they would flatten the rest."""
    ordered = sorted(values)
    low, high, usual = ordered[0], ordered[-1], ordered[(9 * len(ordered) - 1) // 10]
    top = min(high, low + 1.3 * (usual - low)) if len(ordered) >= 10 else high
    margin = 0.08 * (top - low) or 0.5
    axes.set_ylim(max(0.0, low - margin), top + margin)


def _end_labels(axes: Any, ends: Sequence[tuple[float, str, str]]) -> None:
    """Write the texts right of the last values, moved apart where they would overlap."""
    bottom, top = axes.get_ylim()
    gap = 0.19 * (top - bottom)
    height = float("-inf")
    for value, text, colour in sorted(ends):
        height = max(min(value, top), height + gap)
        at = {"xycoords": ("axes fraction", "data"), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(text, (1.0, height), (4, 0), va="center", color=colour, fontweight="bold", **at)
