"""The canvas of every picture."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

INK, GRID, GREY = "#333333", "#e4e4e4", "#666666"


@contextlib.contextmanager
def canvas(
    title: str,
    about: str,
    path: Path,
    *,
    panels: int = 1,
    rows: int = 1,
    width: float | None = None,
    height: float = 4.4,
    grid: bool = True,
) -> Iterator[list[Any]]:
    """Yield panels to draw on, left to right and then down; the PNG is written at the end.

    Args:
        title: what was measured.
        about: data, length and number of seeds, or what is drawn.
        path: where the picture goes; its folder is made.
        panels: number of them.
        rows: in as many rows.
        width: inches, of the whole; by default by the number of columns.
        height: likewise.
        grid: draw lines at the marks of the y axis.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    look = {"font.size": 10, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}
    with plt.rc_context(look | {"xtick.color": INK, "ytick.color": INK, "legend.frameon": False}):
        columns = -(-panels // rows)
        size = (width or {1: 7.0, 2: 10.0}.get(columns, 13.0), height)
        figure, table = plt.subplots(rows, columns, figsize=size, dpi=150, squeeze=False)
        axes = list(table.flat)
        for panel in axes[panels:]:
            panel.axis("off")
        try:
            yield axes[:panels]
            for panel in axes[:panels]:
                if grid:
                    panel.grid(axis="y", color=GRID)
                panel.set_axisbelow(True)
                panel.spines[["top", "right"]].set_visible(False)
            figure.text(0.01, 1 - 0.07 / height, title, ha="left", va="top", fontsize=13, fontweight="bold")
            figure.text(0.01, 1 - 0.42 / height, about, ha="left", va="center", fontsize=9, color=GREY)
            figure.tight_layout(rect=(0, 0, 1, 1 - 0.55 / height), w_pad=2.5)
            path.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(path, metadata={"Software": None})
        finally:
            plt.close(figure)
