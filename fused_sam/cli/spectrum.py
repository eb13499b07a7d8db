"""Hessian of the loss: largest eigenvalues, trace and spectral density.

lambda_1 / lambda_5 is the measure of figure 3 of Foret et al. 2021. The trace is Hutchinson's estimate with its
standard error, the density that of stochastic Lanczos quadrature. See docs/analysis.md, also for what they cost.
"""

from __future__ import annotations

import argparse
from typing import Any

from fused_sam.cli import arguments, output, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fused_sam.analysis.eigenvalues`, `trace` and `density`."""
    parser.add_argument("--k", type=arguments.whole(1), default=5, help="number of eigenvalues (default: 5)")
    parser.add_argument(
        "--which", choices=["LA", "LM"], default="LA", help="algebraically largest, or largest in magnitude"
    )
    parser.add_argument("--tol", type=arguments.real(0), default=1e-4, help="relative residual (default: 1e-4)")
    parser.add_argument(
        "--max-products", type=arguments.whole(1), default=1000, help="with the Hessian, for them (default: 1000)"
    )
    parser.add_argument(
        "--probes", type=arguments.whole(2), default=10, help="vectors for the trace, and for the density (default: 10)"
    )
    parser.add_argument("--density", action="store_true", help="compute the density too; --plot implies it")
    parser.add_argument(
        "--lanczos-steps", type=arguments.whole(1), default=64, help="products for each of the latter (default: 64)"
    )
    arguments.add_common(parser, "the density")


def run(options: argparse.Namespace) -> int:
    """Measure each target."""
    arguments.require("scipy", *(["matplotlib"] if options.plot else []))
    from fused_sam import analysis

    results = [_measure(target.load(spec, options.seed), options) for spec in options.targets]
    header = ["target", *(f"lambda_{i + 1}" for i in range(options.k)), "lambda_1/lambda_5", "trace", "+-", "products"]
    rows = [
        [
            row["target"],
            *row["eigenvalues"].tolist(),
            "-" if row["ratio"] is None else row["ratio"],
            row["trace"],
            row["trace_standard_error"],
            row["products"],
        ]
        for row in results
    ]
    print(output.table(header, rows))
    if options.plot:
        densities = {row["target"]: analysis.Density(**row["density"]) for row in results}
        analysis.plot_densities(densities).savefig(options.plot)
    if options.json:
        output.write_json(options.json, options, results)
    return 0


def _measure(subject: target.Target, options: argparse.Namespace) -> dict[str, Any]:
    from fused_sam import analysis

    with output.watched(subject.data, subject.name) as data:
        hessian = analysis.Hessian(subject.model, subject.loss_fn, data)
        found = analysis.eigenvalues(
            hessian,
            options.k,
            which=options.which,
            tol=options.tol,
            max_products=options.max_products,
            seed=options.seed,
        )
        trace = analysis.trace(hessian, options.probes, seed=options.seed)
        row = {
            "target": subject.name,
            "weights": hessian.size,
            "eigenvalues": found.values,
            "ratio": found.ratio,
            "trace": trace.trace,
            "trace_standard_error": trace.standard_error,
        }
        if options.density or options.plot:
            density = analysis.density(hessian, options.probes, steps=options.lanczos_steps, seed=options.seed)
            row["density"] = density._asdict()
        row["products"] = hessian.products
    return row
