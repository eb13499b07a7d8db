"""One look for the pictures of the study."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import GREY as GREY
from bench.figures import canvas as canvas
from bench.paper.summary import Interval, by, interval, of, subtitle
from bench.records import Row

SAM, SGD = "#1f5fa8", "#b5541c"
# Methods that are compared with them: apart in hue and in lightness.
OTHERS = ("#2f8f6b", "#8a4fa3", "#c2991f", "#5b6670", "#d06a93", "#4fa7c4")


def colours(labels: list[str]) -> dict[str, str]:
    """Return a colour for each method: plain SGD and plain SAM have theirs in every picture."""
    fixed = {"SGD": SGD, "SAM": SAM}
    others = [label for label in labels if label not in fixed]
    return fixed | {label: OTHERS[place % len(OTHERS)] for place, label in enumerate(others)}


def describe(axes: Any, title: str, x: str) -> None:
    """Write the title of a panel and what its x axis is."""
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)


def line(
    axes: Any, points: Iterable[tuple[float, Interval]], label: str, colour: str, style: str = "-", ring: Any = None
) -> None:
    """Draw means over x, with their intervals as whiskers, and a ring around the point at x = `ring`."""
    points = sorted(points)
    x, spreads = [x for x, _ in points], [spread for _, spread in points]
    whiskers = [0.0 if math.isnan(spread.half) else spread.half for spread in spreads]
    look = {"color": colour, "linewidth": 1.8, "marker": "o", "markersize": 4, "capsize": 3, "elinewidth": 1.0}
    axes.errorbar(x, [spread.mean for spread in spreads], yerr=whiskers, label=label, linestyle=style, **look)
    if ring is not None:
        axes.plot([ring], [dict(points)[ring].mean], "o", color=colour, markersize=11, fillstyle="none")


def level(axes: Any, rows: Sequence[Row], name: str = "test_error", label: str = "SGD", style: str = "--") -> None:
    """Draw the mean of SGD's runs, if there are any, across the panel."""
    if rows:
        axes.axhline(of(rows, name).mean, color=SGD, linestyle=style, linewidth=1.2, label=label)


def radii(axes: Any, rhos: Sequence[float]) -> None:
    """Make x the radius, on a logarithmic scale with marks at these."""
    axes.set_xscale("log")
    axes.set_xticks(rhos, [f"{rho:g}" for rho in rhos])
    axes.minorticks_off()


def legend(axes: Any, columns: int = 2) -> None:
    """Explain the colours of a panel below it, where no data is."""
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17), ncols=columns, fontsize=8)


def errors(title: str, height: float) -> Callable[[Sequence[Row], Path], None]:
    """Return what draws the test error of each run, and the intervals of the methods."""

    def draw(rows: Sequence[Row], path: Path) -> None:
        with canvas(title, subtitle(rows), path, height=height) as (axes,):
            dots(axes, rows)

    return draw


def dots(axes: Any, rows: Sequence[Row]) -> None:
    """Draw a line per method, from the top: each run's error as a dot, the mean with its interval under them."""
    values = {label: [row["test_error"] for row in same] for (label,), same in by(rows, "method").items()}
    known = colours(list(values))
    axes.set_xlabel("Test error (%)")
    for place, (label, runs) in enumerate(values.items()):
        spread = interval(runs)
        whisker = 0.0 if math.isnan(spread.half) else spread.half
        axes.plot(runs, [place - 0.15] * len(runs), "o", color=known[label], markersize=5, alpha=0.5)
        axes.errorbar(spread.mean, place + 0.15, xerr=whisker, color=known[label], fmt="D", markersize=6, capsize=4)
        text = {"textcoords": "offset points", "ha": "center", "va": "top", "fontweight": "bold"}
        axes.annotate(f"{spread.mean:.2f}", (spread.mean, place + 0.15), (0, -6), color=known[label], **text)
    axes.set_yticks(range(len(values)), list(values))
    axes.set_ylim(len(values) - 0.4, -0.6)
