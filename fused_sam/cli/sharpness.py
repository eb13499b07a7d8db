"""m-sharpness: how far the loss rises within radius rho.

The mean over disjoint groups of m examples of max L(w + e) - L(w) over ||e||_p <= rho (Foret et al. 2021, section 4.1).
With one step, e is the one that SAM takes; with more, projected ascent climbs further. See docs/analysis.md.
"""

from __future__ import annotations

import argparse

from fused_sam.cli import arguments, output, target


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `fused_sam.analysis.sharpness`; several radii make several rows."""
    parser.add_argument(
        "--rho", nargs="+", type=arguments.real(0), default=[0.05], help="radius, or several (default: 0.05)"
    )
    parser.add_argument("--m", type=arguments.whole(1), help="examples in a group (default: all in one)")
    parser.add_argument("--p", type=arguments.real(1), default=2.0, help="of the norm, 1 to inf (default: 2)")
    parser.add_argument(
        "--adaptive", choices=["all", "weights"], help="scale by |w| + eta: all tensors, or those of two dimensions on"
    )
    parser.add_argument("--eta", type=arguments.real(0), default=0.0, help="default: 0")
    parser.add_argument("--steps", type=arguments.whole(1), default=1, help="of the ascent (default: 1)")
    parser.add_argument(
        "--step-size", type=arguments.real(0, above=True), help="of one of them (default: rho / sqrt(steps))"
    )
    arguments.add_common(parser)


def run(options: argparse.Namespace) -> int:
    """Measure each target at each radius."""
    from fused_sam import analysis

    results = []
    for spec in options.targets:
        subject = target.load(spec, options.seed)
        for rho in options.rho:
            passes = options.steps + 1 if options.m is None else 1
            with output.watched(subject.data, f"{spec} rho={rho:g}", passes) as data:
                found = analysis.sharpness(
                    subject.model,
                    subject.loss_fn,
                    data,
                    rho=rho,
                    m=options.m,
                    p=options.p,
                    adaptive=options.adaptive == "all" or (options.adaptive or False),
                    eta=options.eta,
                    steps=options.steps,
                    step_size=options.step_size,
                )
            results.append({"target": spec, "rho": rho, **found._asdict()})
    print(output.table(list(results[0]), [list(row.values()) for row in results]))
    if options.json:
        output.write_json(options.json, options, results)
    return 0
