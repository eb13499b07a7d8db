"""The picture of a training job: test error and training loss over forward-backward passes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

COLOURS = {"sgd": "#b5541c", "sam": "#1f5fa8"}
INK, GRID = "#333333", "#e4e4e4"


def plot(results: Sequence[dict[str, Any]], title: str, subtitle: str, path: Path) -> None:
    """Write the PNG.

    Args:
        results: one per run, with "optimizer", "label" and "history"; a history is a list of {"passes",
            "test_error", "train_loss"}.
        title: what was trained on what.
        subtitle: the budget rule.
        path: where the picture goes; its folder is made.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.4), dpi=150)
        _panel(left, results, "test_error", "Test error (%)")
        _panel(right, results, "train_loss", "Training loss")
        figure.suptitle(title, x=0.01, y=0.985, ha="left", fontsize=13, fontweight="bold")
        figure.text(0.01, 0.905, subtitle, ha="left", va="center", fontsize=9, color="#666666")
        figure.tight_layout(rect=(0, 0, 1, 0.94), w_pad=2.5)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
        plt.close(figure)


def _panel(axes: Any, results: Sequence[dict[str, Any]], key: str, name: str) -> None:
    """One quantity: a thin line per seed, a thick one for their mean, name and last value at its end."""
    form = "{}\n{:.1f} %" if key == "test_error" else "{}\n{:.2f}"
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
        ends.append((mean[-1], form.format(runs[0]["label"], mean[-1]), colour))
        values += mean
    _limits(axes, values)
    _end_labels(axes, ends)
    axes.set_xlabel("Forward-backward passes over the training set")
    axes.set_title(name, loc="left", fontsize=11)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


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
    gap = 0.13 * (top - bottom)
    height = float("-inf")
    for value, text, colour in sorted(ends):
        height = max(min(value, top), height + gap)
        axes.annotate(
            text,
            xy=(1.0, height),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=colour,
            fontweight="bold",
            annotation_clip=False,
        )
