"""Pictures of landscapes and spectra. Each returns a `matplotlib.figure.Figure`; ``figure.savefig("name.png")`` draws
it.

Several results, by name, are drawn side by side on the same scale, as in figure 1 of Foret et al. 2021.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from fused_sam.analysis.landscape import Landscape
from fused_sam.analysis.spectrum import Density

PANEL = 4.2  # inches
LEVELS = 20
# A spectrum has its bulk at 0 and single eigenvalues far out; below this share of the peak nothing is drawn.
DENSITY_FLOOR = 1e-6


def plot_surfaces(landscapes: Mapping[str, Landscape], ceiling: float | None = None) -> Any:
    """Draw surfaces in three dimensions over planes, with a common vertical axis.

    Args:
        landscapes: results of two directions each, by name.
        ceiling: cut off what lies above, where the loss explodes far from w; None for no cut.

    Raises:
        ValueError: without landscapes, or for one of another number of directions.
    """
    _require_directions(landscapes, 2)
    low, high = _range(landscapes, ceiling)

    def draw(axes: Any, result: Landscape) -> None:
        x, y, loss = _mesh(result)
        axes.plot_surface(x, y, loss.clamp(max=high).numpy(), cmap="viridis", vmin=low, vmax=high, rstride=1, cstride=1)
        axes.set_zlim(low, high)
        axes.locator_params(nbins=4)
        axes.set_box_aspect(None, zoom=0.8)  # or labels are cut off
        axes.set(xlabel="$c_1$", ylabel="$c_2$", zlabel="loss")

    return _panels(landscapes, draw, projection="3d")


def plot_contours(landscapes: Mapping[str, Landscape], ceiling: float | None = None) -> Any:
    """Draw contours over planes, with the same levels in each. Arguments and errors are those of `plot_surfaces`."""
    _require_directions(landscapes, 2)
    low, high = _range(landscapes, ceiling)
    levels = torch.linspace(low, high, LEVELS).numpy()

    def draw(axes: Any, result: Landscape) -> None:
        x, y, loss = _mesh(result)
        axes.contourf(x, y, loss.numpy(), levels=levels, cmap="viridis", extend="max")
        axes.plot(0, 0, marker="+", color="white")
        axes.set_aspect("equal")
        axes.set(xlabel="$c_1$", ylabel="$c_2$")

    return _panels(landscapes, draw)


def plot_lines(landscapes: Mapping[str, Landscape]) -> Any:
    """Draw losses along lines, in one pair of axes.

    Raises:
        ValueError: without landscapes, or for one of another number of directions than one.
    """
    _require_directions(landscapes, 1)
    figure, axes = _one_panel()
    for name, result in landscapes.items():
        axes.plot(result.coordinates[0].numpy(), result.loss.numpy(), label=name)
    axes.set(xlabel="$c_1$", ylabel="loss")
    axes.legend()
    return figure


def plot_densities(densities: Mapping[str, Density]) -> Any:
    """Draw spectral densities on a logarithmic axis, in one pair of axes.

    Raises:
        ValueError: without densities.
    """
    if not densities:
        raise ValueError("Invalid densities={}. Must hold at least one.")
    figure, axes = _one_panel()
    for name, result in densities.items():
        axes.semilogy(result.grid.numpy(), result.density.numpy(), label=name)
    peak = max(float(result.density.max()) for result in densities.values())
    axes.set(xlabel="eigenvalue", ylabel="density", ylim=(DENSITY_FLOOR * peak, 2 * peak))
    axes.legend()
    return figure


def _require_directions(landscapes: Mapping[str, Landscape], wanted: int) -> None:
    if not landscapes:
        raise ValueError("Invalid landscapes={}. Must hold at least one.")
    for name, result in landscapes.items():
        if result.loss.dim() != wanted:
            raise ValueError(f"Invalid landscape {name!r} of {result.loss.dim()} directions. Must be of {wanted}.")


def _range(landscapes: Mapping[str, Landscape], ceiling: float | None) -> tuple[float, float]:
    """Return the range of all finite losses together, up to the ceiling; it is never empty."""
    values = torch.cat([result.loss.flatten() for result in landscapes.values()])
    values = values[values.isfinite()]
    if not len(values):
        raise ValueError("Invalid landscapes without a finite loss.")
    low, high = float(values.min()), float(values.max())
    high = high if ceiling is None else min(high, ceiling)
    return low, high if high > low else low + 1.0


def _mesh(result: Landscape) -> tuple[Any, Any, Tensor]:
    x, y = torch.meshgrid(*result.coordinates, indexing="ij")
    return x.numpy(), y.numpy(), result.loss


def _panels(results: Mapping[str, Any], draw: Callable[[Any, Any], None], projection: str | None = None) -> Any:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(PANEL * len(results), PANEL), layout="constrained")
    for number, (name, result) in enumerate(results.items(), start=1):
        axes = figure.add_subplot(1, len(results), number, projection=projection)
        axes.set_title(name)
        draw(axes, result)
    return figure


def _one_panel() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.4 * PANEL, PANEL), layout="constrained")
    return figure, figure.add_subplot()
