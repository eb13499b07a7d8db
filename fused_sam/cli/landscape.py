"""Loss landscape around the weights, on a line or a plane of random directions.

Directions are filter-normalised (Li et al. 2018), so that pictures of several models can be compared: at distance 1
every filter has moved by its own length. See docs/analysis.md.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from fused_sam.cli import arguments, output, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fused_sam.analysis.landscape` and of the pictures."""
    parser.add_argument("--dim", type=int, choices=[1, 2], default=2, help="a line or a plane (default: 2)")
    parser.add_argument("--points", type=arguments.whole(1), default=21, help="on each axis (default: 21)")
    parser.add_argument(
        "--span", type=arguments.real(0, above=True), default=1.0, help="axes go from -span to span (default: 1)"
    )
    parser.add_argument(
        "--vectors", action="store_true", help="move biases and parameters of normalisation layers, too"
    )
    parser.add_argument(
        "--style", choices=["surface", "contour"], default="surface", help="of a picture of planes (default: surface)"
    )
    parser.add_argument("--ceiling", type=float, help="cut pictures of planes off above this loss")
    arguments.add_common(parser, "all targets, on one scale")


def run(options: argparse.Namespace) -> int:
    """Evaluate each target, with the same draw of directions."""
    if options.plot:
        arguments.require("matplotlib")
    found = {spec: _measure(target.load(spec, options.seed), options) for spec in options.targets}
    rows = [[spec, float(r.loss.min()), float(r.loss.max()), r.loss.numel()] for spec, r in found.items()]
    print(output.table(["target", "lowest loss", "highest loss", "points"], rows))
    if options.plot:
        _draw(found, options)
    if options.json:
        results = [{"target": spec, **r._asdict()} for spec, r in found.items()]
        output.write_json(options.json, options, results)
    return 0


def _measure(subject: target.Target, options: argparse.Namespace) -> Any:
    from fused_sam import analysis

    params = [p for p in subject.model.parameters() if p.requires_grad]
    seeds = range(options.dim * options.seed, options.dim * (options.seed + 1))
    directions = [analysis.random_direction(params, seed=s, vectors=options.vectors) for s in seeds]
    # From the middle, so that it is 0 exactly where the number of points is odd.
    axis = (torch.arange(options.points, dtype=torch.float64) - (options.points - 1) / 2) * 2 * options.span
    axis /= max(1, options.points - 1)
    with output.watched(subject.data, subject.name, options.points**options.dim) as data:
        return analysis.landscape(subject.model, subject.loss_fn, data, directions, [axis] * options.dim)


def _draw(found: dict[str, Any], options: argparse.Namespace) -> None:
    from fused_sam import analysis

    if options.dim == 1:
        figure = analysis.plot_lines(found)
    elif options.style == "surface":
        figure = analysis.plot_surfaces(found, options.ceiling)
    else:
        figure = analysis.plot_contours(found, options.ceiling)
    figure.savefig(options.plot)
