"""Pictures of times: a panel per parameter set, a bar per variant."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.figures import INK, canvas
from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.rivals import OURS, SCALE, TWICE, VARIANTS
from bench.speed.shapes import SETS, TITLES, parameter_count

COLOURS = {OURS: "#1f5fa8", SCALE: "#dddddd", TWICE: "#dddddd"}
RIVAL = "#a9a9a9"
COLUMNS = 2
INCHES_PER_BAR, INCHES_PER_PANEL, INCHES_OF_TITLE = 0.22, 0.75, 0.6

Panel = Callable[[Any, Sequence[Row]], None]


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw fp32 at the smallest thread count measured; False, and no file, where there are no such rows."""
    steps = [row for row in rows if row["kind"] == "step" and row["dtype"] == "fp32"]
    threads = min((row["threads"] for row in steps), default=0)
    panels = {}
    for name, make in SETS.items():
        own = [row for row in steps if (row["threads"], row["set"]) == (threads, name)]
        size = f"{parameter_count(make()) / 1e6:.3g} M in {len(make())} tensors"
        panels[f"{TITLES[name]}: {size}"] = own
    words = f"Optimizer side of a SAM step, fp32, {threads} thread{'s' if threads > 1 else ''}: milliseconds"
    about = "Median, 20th to 80th percentile; dashed: a copy of as many bytes as FusedSAM moves"
    return draw_panels(panels, _panel, words, about, path)


def draw_panels(panels: dict[str, Sequence[Row]], panel: Panel, words: str, about: str, path: Path) -> bool:
    """Draw a panel for each name with rows, its bars from the top; False, and no file, where there are none."""
    panels = {name: rows for name, rows in panels.items() if rows}
    if not panels:
        return False
    lines = -(-len(panels) // COLUMNS)
    most = max(len({row["variant"] for row in rows}) for rows in panels.values())
    height = lines * (most * INCHES_PER_BAR + INCHES_PER_PANEL) + INCHES_OF_TITLE
    # Two columns even for one panel: the second stays empty.
    shape = {"panels": COLUMNS * lines, "rows": lines, "width": 11.5, "height": height, "grid": False}
    with canvas(words, about, path, **shape) as axes:
        for place, (name, rows) in zip(axes, panels.items(), strict=False):
            panel(place, rows)
            place.set_title(name, loc="left", fontsize=10)
            place.invert_yaxis()
            place.tick_params(axis="y", length=0)
        for place in axes[len(panels) :]:
            place.axis("off")
    return True


def bars(axes: Any, places: Sequence[float], rows: Sequence[Row], scale: float, **look: Any) -> None:
    """Draw the medians of rows as bars at these places, with whiskers and numbers; those of `ours` in bold."""
    ours = look.pop("ours")
    middle, low, high = ([scale * row[name] for row in rows] for name in ("median_s", "p20_s", "p80_s"))
    whiskers = [[m - x for m, x in zip(middle, low)], [x - m for m, x in zip(middle, high)]]
    axes.barh(places, middle, xerr=whiskers, error_kw={"ecolor": INK, "lw": 0.8}, **look)
    for place, value, end, row in zip(places, middle, high, rows, strict=True):
        write(axes, value, (end, place), row["variant"] in ours)


def write(axes: Any, value: float, at: tuple[float, float], bold: bool) -> None:
    """Write a number right of a point."""
    text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 8}
    axes.annotate(digits(value), at, fontweight="bold" if bold else "normal", **text)


def digits(value: float) -> str:
    """Write three digits, or all before the point."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def mark(axes: Any, row: Row, scale: float) -> None:
    """Draw the time of a row across the panel."""
    axes.axvline(scale * row["median_s"], color=INK, linestyle="--", linewidth=0.9)


def _panel(axes: Any, rows: Sequence[Row]) -> None:
    by_variant = {row["variant"]: row for row in rows}
    shown = [by_variant[name] for name in VARIANTS if name in by_variant]
    colours = [COLOURS.get(row["variant"], RIVAL) for row in shown]
    bars(axes, range(len(shown)), shown, 1e3, color=colours, ours=(OURS,))
    if FLOOR in by_variant:
        mark(axes, by_variant[FLOOR], 1e3)
    axes.set_yticks(range(len(shown)), [VARIANTS[row["variant"]].title for row in shown])
    axes.set_xlim(0, 1.15e3 * max(row["p80_s"] for row in shown))
