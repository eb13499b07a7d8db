"""Sharpness, Hessian spectra and loss landscapes of a model on a data set. See docs/analysis.md.

Needs torch; eigenvalues need scipy, and pictures matplotlib (``pip install '.[analysis]'``).
"""

from fused_sam.analysis.hessian import Hessian
from fused_sam.analysis.landscape import Landscape, difference, landscape, random_direction
from fused_sam.analysis.plots import plot_contours, plot_densities, plot_lines, plot_surfaces
from fused_sam.analysis.sharpness import Sharpness, sharpness
from fused_sam.analysis.spectrum import Density, Eigenvalues, Trace, density, eigenvalues, trace

__all__ = [
    "Density",
    "Eigenvalues",
    "Hessian",
    "Landscape",
    "Sharpness",
    "Trace",
    "density",
    "difference",
    "eigenvalues",
    "landscape",
    "plot_contours",
    "plot_densities",
    "plot_lines",
    "plot_surfaces",
    "random_direction",
    "sharpness",
    "trace",
]
