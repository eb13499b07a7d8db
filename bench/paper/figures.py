"""One look for the pictures of the study."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from bench.paper.summary import Interval, interval
from bench.training.curves import GRID, INK

SAM, SGD = "#1f5fa8", "#b5541c"
# Methods that are compared with them: apart in hue and in lightness.
OTHERS = ("#2f8f6b", "#8a4fa3", "#c2991f", "#5b6670", "#d06a93", "#4fa7c4")
GREY = "#666666"


def colours(labels: list[str]) -> dict[str, str]:
    """A colour for each method: plain SGD and plain SAM have theirs in every picture."""
    fixed = {"SGD": SGD, "SAM": SAM}
    others = [label for label in labels if label not in fixed]
    return fixed | {label: OTHERS[place % len(OTHERS)] for place, label in enumerate(others)}


def line(axes: Any, points: Sequence[tuple[float, Interval]], label: str, colour: str) -> None:
    """Means over x, with their intervals as whiskers."""
    points = sorted(points)
    x, spreads = [x for x, _ in points], [spread for _, spread in points]
    whiskers = [0.0 if math.isnan(spread.half) else spread.half for spread in spreads]
    look = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 1.0}
    axes.errorbar(x, [spread.mean for spread in spreads], yerr=whiskers, label=label, **look)


def dots(axes: Any, values: Mapping[str, Sequence[float]]) -> None:
    """A line per method, from the top: each run as a dot, the mean with its interval under them."""
    known = colours(list(values))
    for place, (label, runs) in enumerate(values.items()):
        spread = interval(runs)
        whisker = 0.0 if math.isnan(spread.half) else spread.half
        axes.plot(runs, [place - 0.15] * len(runs), "o", color=known[label], markersize=5, alpha=0.5)
        axes.errorbar(spread.mean, place + 0.15, xerr=whisker, color=known[label], fmt="D", markersize=6, capsize=4)
        text = {"textcoords": "offset points", "ha": "center", "va": "top", "fontweight": "bold"}
        axes.annotate(f"{spread.mean:.2f}", (spread.mean, place + 0.15), (0, -6), color=known[label], **text)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)


@contextlib.contextmanager
def canvas(
    title: str, subtitle: str, path: Path, *, panels: int = 1, rows: int = 1, height: float = 4.4
) -> Iterator[list[Any]]:
    """Panels to draw on, left to right and then down; the PNG is written at the end.

    Args:
        title: what was measured.
        subtitle: data, length and number of seeds.
        path: where the picture goes; its folder is made.
        panels: number of them.
        rows: in as many rows.
        height: inches, of the whole.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    with plt.rc_context(look | {"xtick.color": INK, "ytick.color": INK, "legend.frameon": False}):
        columns = -(-panels // rows)
        width = {1: 7.0, 2: 10.0}.get(columns, 13.0)
        figure, grid = plt.subplots(rows, columns, figsize=(width, height), dpi=150, squeeze=False)
        axes = list(grid.flat)
        for panel in axes[panels:]:
            panel.axis("off")
        try:
            yield axes[:panels]
            for panel in axes[:panels]:
                panel.grid(axis="y", color=GRID)
                panel.set_axisbelow(True)
                panel.spines[["top", "right"]].set_visible(False)
            figure.text(0.01, 1 - 0.07 / height, title, ha="left", va="top", fontsize=13, fontweight="bold")
            figure.text(0.01, 1 - 0.42 / height, subtitle, ha="left", va="center", fontsize=9, color=GREY)
            figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / height), w_pad=2.5)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Software": None})
        finally:
            plt.close(figure)
