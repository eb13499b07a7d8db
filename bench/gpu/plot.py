"""The pictures of the rows from a GPU: the optimizer side as bars, whole iterations as stacked bars."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.gpu.iteration import STAGES, TWICE
from bench.gpu.rivals import EAGER, GRAPH, MODES, OURS
from bench.gpu.tables import ITERATION_TITLES, iteration_rows, step_rows, title
from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.plot import bars, draw_panels, mark, write
from bench.speed.shapes import TITLES

MODE_COLOURS = {EAGER: "#1f5fa8", GRAPH: "#e0903a"}
STAGE_COLOURS = {"forward": "#cfd8e3", "backward": "#9db2c9", "optimizer": "#1f5fa8"}


def draw_steps(rows: Sequence[Row], path: Path) -> bool:
    """Draw fp32, a panel per set, a pair of bars per variant; False, and no file, where there are no such rows."""
    panels: dict[str, list[Row]] = {}
    for row in step_rows(rows):
        if row["dtype"] == "fp32" and not row["failed"]:
            panels.setdefault(TITLES[row["set"]], []).append(row)
    words = "Optimizer side of a SAM step on a GPU, fp32: microseconds, called (blue) and in a CUDA graph (orange)"
    about = "Median, 20th to 80th percentile; dashed: a device copy of as many bytes"
    return draw_panels(panels, _step_panel, words, about, path)


def draw_iterations(rows: Sequence[Row], path: Path) -> bool:
    """Draw a panel per model and batch, a stacked bar per variant; False, and no file, where there are no such rows."""
    panels: dict[str, list[Row]] = {}
    for row in iteration_rows(rows):
        if not row["failed"]:
            panels.setdefault(f"{TITLES[row['model']]}, batch {row['batch']}", []).append(row)
    words = "Iterations on a GPU, bf16 autocast: milliseconds of forward, backward and optimizer"
    about = "Light to dark: forward, backward, optimizer; dashed: SGD with two passes"
    return draw_panels(panels, _iteration_panel, words, about, path)


def _step_panel(axes: Any, rows: Sequence[Row]) -> None:
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != FLOOR]
    height = 0.8 / len(MODES)
    for number, mode in enumerate(MODES):
        shown = [row for row in rows if row["mode"] == mode and row["variant"] != FLOOR]
        places = [names.index(row["variant"]) + (number - 0.5) * height for row in shown]
        bars(axes, places, shown, 1e6, height=height, color=MODE_COLOURS[mode], ours=OURS.values())
    for row in rows:
        if row["variant"] == FLOOR:
            mark(axes, row, 1e6)
    axes.set_yticks(range(len(names)), [title(name) for name in names])
    axes.set_xlim(0, 1.15e6 * max(row["p80_s"] for row in rows))


def _iteration_panel(axes: Any, rows: Sequence[Row]) -> None:
    for place, row in enumerate(rows):
        left = 0.0
        for stage in STAGES:
            width = 1e3 * row[f"{stage}_s"]
            axes.barh(place, width, left=left, color=STAGE_COLOURS[stage])
            left += width
        write(axes, 1e3 * row["median_s"], (left, place), row["variant"] in OURS.values())
        if row["variant"] == TWICE:
            mark(axes, row, 1e3)
    axes.set_yticks(range(len(rows)), [ITERATION_TITLES[row["variant"]] for row in rows])
    axes.set_xlim(0, 1.15e3 * max(row["median_s"] for row in rows))
