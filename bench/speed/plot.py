"""The picture of the step times: a panel per parameter set, a bar per variant."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.records import Row
from bench.speed.harness import FLOOR
from bench.speed.rivals import OURS, SCALE, VARIANTS
from bench.speed.shapes import SETS, TITLES, parameter_count

COLOURS = {OURS: "#1f5fa8", SCALE: "#dddddd"}
RIVAL, INK = "#a9a9a9", "#333333"


def draw(rows: Sequence[Row], path: Path) -> bool:
    """Draw fp32 at the smallest thread count measured; False, and no file, where there are no such rows."""
    steps = [row for row in rows if row["kind"] == "step" and row["dtype"] == "fp32"]
    if not steps:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    threads = min(row["threads"] for row in steps)
    steps = [row for row in steps if row["threads"] == threads]
    sets = [name for name in SETS if any(row["set"] == name for row in steps)]
    with plt.rc_context({"font.size": 9, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}):
        height = 2.6 * ((len(sets) + 1) // 2) + 0.8
        figure, grid = plt.subplots((len(sets) + 1) // 2, 2, figsize=(10.5, height), dpi=150, squeeze=False)
        for panel, name in zip(grid.flat, sets, strict=False):
            _panel(panel, name, [row for row in steps if row["set"] == name])
        for panel in grid.flat[len(sets) :]:
            panel.axis("off")
        text = f"Optimizer side of a SAM step, fp32, {threads} thread{'s' if threads > 1 else ''}: milliseconds"
        figure.suptitle(text, x=0.01, ha="left", fontsize=12, fontweight="bold")
        legend = "Median, 20th to 80th percentile; dashed: a copy of as many bytes as FusedSAM moves"
        figure.text(0.01, 0.93, legend, ha="left", va="center", color="#666666")
        figure.tight_layout(rect=(0, 0, 1, 0.92), w_pad=2.0)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, metadata={"Software": None})
        plt.close(figure)
    return True


def _panel(axes: Any, set_name: str, rows: Sequence[Row]) -> None:
    """Medians as bars, 20th to 80th percentile as whiskers, the copy of as many bytes as a dashed line."""
    by_variant = {row["variant"]: row for row in rows}
    shown = [by_variant[name] for name in VARIANTS if name in by_variant]
    milliseconds = [1e3 * row["median_s"] for row in shown]
    whiskers = [
        [1e3 * (row["median_s"] - row["p20_s"]) for row in shown],
        [1e3 * (row["p80_s"] - row["median_s"]) for row in shown],
    ]
    colours = [COLOURS.get(row["variant"], RIVAL) for row in shown]
    axes.barh(range(len(shown)), milliseconds, xerr=whiskers, color=colours, error_kw={"ecolor": INK, "lw": 0.8})
    for place, row in enumerate(shown):
        axes.annotate(
            f"{1e3 * row['median_s']:.3g}",
            (1e3 * row["p80_s"], place),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontweight="bold" if row["variant"] == OURS else "normal",
        )
    if FLOOR in by_variant:
        axes.axvline(1e3 * by_variant[FLOOR]["median_s"], color=INK, linestyle="--", linewidth=0.9)
    axes.set_yticks(range(len(shown)), [VARIANTS[row["variant"]].title for row in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, 1.15e3 * max(row["p80_s"] for row in shown))
    shapes = SETS[set_name]()
    size = f"{parameter_count(shapes) / 1e6:.3g} M in {len(shapes)} tensors"
    axes.set_title(f"{TITLES[set_name]}: {size}", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
