"""The pictures of the rows from a GPU: the optimizer side as bars, whole iterations as stacked bars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench.gpu.iteration import STAGES, TWICE
from bench.gpu.rivals import EAGER, GRAPH, MODES, OURS
from bench.gpu.tables import ITERATION_TITLES, digits, iteration_rows, step_rows, title
from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.plot import INK
from bench.speed.shapes import TITLES

MODE_COLOURS = {EAGER: "#1f5fa8", GRAPH: "#e0903a"}
STAGE_COLOURS = {"forward": "#cfd8e3", "backward": "#9db2c9", "optimizer": "#1f5fa8"}
COLUMNS = 2
INCHES_PER_LINE, INCHES_PER_PANEL, INCHES_OF_TITLE = 0.27, 0.7, 0.8


def draw_steps(rows: Sequence[Row], path: Path) -> bool:
    """fp32, a panel per set, a pair of bars per variant; False, and no file, where there are no such rows."""
    shown = [row for row in step_rows(rows) if row["dtype"] == "fp32" and not row["failed"]]
    panels = {TITLES[name]: [r for r in shown if r["set"] == name] for name in dict.fromkeys(r["set"] for r in shown)}
    words = "Optimizer side of a SAM step on a GPU, fp32: microseconds, called (blue) and in a CUDA graph (orange)"
    return _draw(
        panels, _step_panel, words, "Median, 20th to 80th percentile; dashed: a device copy of as many bytes", path
    )


def draw_iterations(rows: Sequence[Row], path: Path) -> bool:
    """A panel per model and batch, a stacked bar per variant; False, and no file, where there are no such rows."""
    shown = [row for row in iteration_rows(rows) if not row["failed"]]
    panels: dict[str, list[Row]] = {}
    for row in shown:
        panels.setdefault(f"{TITLES[row['model']]}, batch {row['batch']}", []).append(row)
    words = "Iterations on a GPU, bf16 autocast: milliseconds of forward, backward and optimizer"
    return _draw(
        panels,
        _iteration_panel,
        words,
        "Light to dark: forward, backward, optimizer; dashed: SGD with two passes",
        path,
    )


def _draw(
    panels: dict[str, list[Row]], panel: Callable[[Any, list[Row]], None], words: str, legend: str, path: Path
) -> bool:
    if not panels:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}):
        lines = -(-len(panels) // COLUMNS)
        most = max(len({row["variant"] for row in rows}) for rows in panels.values())
        size = (11.5, lines * (most * INCHES_PER_LINE + INCHES_PER_PANEL) + INCHES_OF_TITLE)
        figure, grid = plt.subplots(lines, COLUMNS, figsize=size, dpi=150, squeeze=False)
        for axes, (name, shown) in zip(grid.flat, panels.items(), strict=False):
            panel(axes, shown)
            axes.set_title(name, loc="left")
            axes.invert_yaxis()
            axes.spines[["top", "right"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
        for axes in grid.flat[len(panels) :]:
            axes.axis("off")
        figure.suptitle(words, x=0.01, ha="left", fontsize=12, fontweight="bold")
        figure.text(0.01, 1 - 0.55 / size[1], legend, ha="left", va="center", color="#666666")
        figure.tight_layout(rect=(0, 0, 1, 1 - 0.65 / size[1]), w_pad=2.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return True


def _step_panel(axes: Any, rows: list[Row]) -> None:
    names = [name for name in dict.fromkeys(row["variant"] for row in rows) if name != FLOOR]
    height = 0.8 / len(MODES)
    for number, mode in enumerate(MODES):
        shown = [row for row in rows if row["mode"] == mode and row["variant"] != FLOOR]
        places = [names.index(row["variant"]) + (number - 0.5) * height for row in shown]
        middle = [1e6 * row["median_s"] for row in shown]
        below = [1e6 * (row["median_s"] - row["p20_s"]) for row in shown]
        above = [1e6 * (row["p80_s"] - row["median_s"]) for row in shown]
        style = {"ecolor": INK, "lw": 0.8}
        axes.barh(places, middle, height, xerr=[below, above], color=MODE_COLOURS[mode], error_kw=style)
        for place, value, row in zip(places, middle, shown, strict=True):
            bold = "bold" if row["variant"] in OURS.values() else "normal"
            text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center", "fontsize": 7}
            axes.annotate(digits(value), (1e6 * row["p80_s"], place), fontweight=bold, **text)
    for row in rows:
        if row["variant"] == FLOOR:
            axes.axvline(1e6 * row["median_s"], color=INK, linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(names)), [title(name) for name in names])
    axes.set_xlim(0, 1.15e6 * max(row["p80_s"] for row in rows))


def _iteration_panel(axes: Any, rows: list[Row]) -> None:
    for place, row in enumerate(rows):
        left = 0.0
        for stage in STAGES:
            width = 1e3 * row[f"{stage}_s"]
            axes.barh(place, width, left=left, color=STAGE_COLOURS[stage])
            left += width
        text = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
        bold = "bold" if row["variant"] in OURS.values() else "normal"
        axes.annotate(digits(1e3 * row["median_s"]), (left, place), fontweight=bold, **text)
        if row["variant"] == TWICE:
            axes.axvline(1e3 * row["median_s"], color=INK, linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(rows)), [ITERATION_TITLES[row["variant"]] for row in rows])
    axes.set_xlim(0, 1.15e3 * max(row["median_s"] for row in rows))
