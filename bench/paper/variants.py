"""Variants of SAM's inner maximisation (appendix C.4 to C.6), with wrong training labels, which SAM is good against.

p-norm: the ball of the 2-norm, of the inf-norm, and a random direction of the same 2-norm instead of the gradient's.
Each has its own radii, of which the one with the lowest error on 10 % of the training images, held out, is taken.
Inner steps: one or several steps of projected ascent. Second order: the gradient with the term that SAM drops.
`test_error` of the rows is that of the images held out, `unseen_error` that of the test set.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bench.paper import figures, methods, runner, summary, tables
from bench.paper.config import Config
from bench.paper.runner import Experiment, Named
from bench.paper.training import Training
from bench.records import Row
from fused_sam import FusedSAM, analysis, batchnorm

NORMS = {"sam": "p = 2", "sam-inf": "p = inf", "random": "random direction"}
STEPS = (1, 2, 3, 5)  # with which the sharpness is measured, on so many batches:
BATCHES = 4


@methods.stepper("sam-inf")
def _largest(model: nn.Module, config: Config) -> methods.Stepper:
    """Return SAM with p = inf, which plain JSON has no number for."""
    return methods.Sharp(model, replace(config, options={**config.options, "p": math.inf}), torch.optim.SGD)


@methods.stepper("random")
class RandomDirection:
    """The gradient at w + e for e of length rho in a random direction: one pass, which has to count for BatchNorm."""

    def __init__(self, model: nn.Module, config: Config) -> None:
        options = methods.base_options(config, torch.optim.SGD) | {"max_grad_norm": config.clip or None}
        self.optimizer = FusedSAM(model.parameters(), **options, **config.options)
        self._params, self._config = list(model.parameters()), config

    def step(self, loss_of: methods.LossOf, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Train on a batch; the loss is that at w + e: there is none at w."""
        losses = []

        def draw() -> None:
            for p in self._params:
                p.grad = torch.randn_like(p)

        def closure() -> None:
            losses.append(loss_of(images, targets))
            methods.objective(losses[-1], self._params, self._config).backward()

        self.optimizer.step(closure, ascent=draw)
        return losses[-1].detach(), 1.0


def add_arguments(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    radii = {"type": float, "nargs": "+", "metavar": "RHO"}
    add("--rhos", **radii, default=[0.1, 0.2], help="radii for p = 2, besides --rho")
    add("--inf-rhos", **radii, default=[5e-4, 1e-3], help="for p = inf")
    add("--random-rhos", **radii, default=[2.0], help="for random directions")
    add("--steps", type=int, nargs="+", default=[5], help="of the ascent, with --rho, besides 1")
    add("--noise-rate", type=float, default=0.2, metavar="P", help="of the training labels are wrong")
    add("--validation", type=float, default=0.1, metavar="PART", help="of the training images is held out")
    add("--cosines", type=int, default=6, metavar="N", help="points at which the two gradients are compared")


def grid(args: argparse.Namespace, base: Config) -> list[Named]:
    """Return SGD, every norm with its radii, the numbers of steps, and the second-order term."""
    base = replace(base, noise_rate=args.noise_rate, validation=args.validation)
    compared = replace(base, optimizer="sam", measurements=args.cosines, extra={"rho": args.rho})
    runs = [("SGD", base)]
    for rho in sorted({*args.rhos, args.rho}):
        plain = replace(compared if rho == args.rho else base, optimizer="sam", options={"rho": rho})
        runs.append((f"SAM rho={rho:g}", plain))
    for name, label, rhos in (("sam-inf", "p=inf", args.inf_rhos), ("random", "random", args.random_rhos)):
        runs += [(f"{label} rho={rho:g}", replace(base, optimizer=name, options={"rho": rho})) for rho in rhos]
    for steps in args.steps:
        options = {"rho": args.rho, "ascent_steps": steps}
        runs.append((f"{steps} ascent steps", replace(compared, options=options)))
    options = {"rho": args.rho, "second_order": True}
    return [*runs, ("second order", replace(compared, options=options))]


def observe(training: Training) -> Row:
    """Measure the error on the test set; and, with --rho, the rise of the loss of a batch that 1, 2, ... steps find."""
    found: Row = {"unseen_error": training.evaluate(training.images.unseen)[0]}
    rho, size = training.config.extra.get("rho"), training.config.batch_size
    if rho is not None:
        # Batches of the size trained with and in training mode: the loss that SAM's steps see.
        batch, model = training.examples(BATCHES * size), training.model.train()
        rises = [analysis.sharpness(model, F.cross_entropy, batch, rho=rho, m=size, steps=k) for k in STEPS]
        found["sharpness"] = [rise.sharpness for rise in rises]
    return found


def observe_during(training: Training) -> Row:
    """Measure the cosine of SAM's gradient with and without the second-order term."""
    rho = training.config.extra.get("rho")
    if rho is None:
        return {}
    x, y = training.examples(training.config.batch_size)
    return {"cosine": cosine(training.model.train(), x, y, rho)}


def cosine(
    model: nn.Module,
    x: Tensor,  # [B, ...]
    y: Tensor,  # [B]
    rho: float,
) -> float:
    """Return the cosine of v = grad L(w + e) and of the gradient of w -> L(w + e(w)), for p = 2:

        v + (de/dw)^T v = v + rho / ||g|| H (v - u (u . v)),    u = g / ||g||,  e = rho u,

    with g and H the gradient and the Hessian of the mean cross-entropy at w. The model runs in the mode it is in;
    nothing of it is changed.
    """
    params = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    with batchnorm.frozen_statistics(model):
        gradients = _gradient(model, params, x, y)
        g = _flat(gradients)
        moved = {name: p + rho / g.norm() * gradients[name] for name, p in params.items()}
        v = _flat(_gradient(model, moved, x, y))
    u = g / g.norm()
    # Of one batch, in the order of the parameters.
    product = analysis.Hessian(model, F.cross_entropy, (x, y)).hvp(v - u * (u @ v))
    return float(F.cosine_similarity(v.double(), v.double() + rho / g.norm() * product, dim=0))


def _gradient(model: nn.Module, params: dict[str, Tensor], x: Tensor, y: Tensor) -> dict[str, Tensor]:
    leaves = {name: p.detach().requires_grad_() for name, p in params.items()}
    loss = F.cross_entropy(functional_call(model, leaves, (x,)), y)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def _flat(gradients: dict[str, Tensor]) -> Tensor:
    return torch.cat([g.flatten() for g in gradients.values()])


def norms(rows: Sequence[Row]) -> dict[str, dict[float, list[Row]]]:
    """Group the rows of each norm by radius: those of one step and without the second-order term."""
    groups = {}
    for name, label in NORMS.items():
        own = [row for row in rows if row["config"]["optimizer"] == name and set(row["config"]["options"]) == {"rho"}]
        groups[label] = summary.by_option(own, "rho")
    return {label: group for label, group in groups.items() if group}


def inner(rows: Sequence[Row]) -> dict[int, list[Row]]:
    """Group the rows with the same radius by the number of ascent steps."""
    compared = [row for row in rows if row["config"]["extra"] and "second_order" not in row["config"]["options"]]
    return summary.by_option(compared, "ascent_steps", 1)


def orders(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Return the rows that were trained without and with the second-order term, all with the same radius."""
    second = [row for row in rows if "second_order" in row["config"]["options"]]
    return {"without the term": inner(rows).get(1, []), "with the term": second}


def sgd(rows: Sequence[Row]) -> list[Row]:
    """Return the rows without a perturbation."""
    return [row for row in rows if row["config"]["optimizer"] == "sgd"]


def figure(rows: Sequence[Row], path: Path) -> None:
    """Draw test error over the radius by norm, and over the steps; and the cosine of the gradients in training."""
    subtitle = summary.subtitle(rows, f"{rows[0]['config']['noise_rate']:.0%} label noise")
    with figures.canvas("Variants of the inner maximisation", subtitle, path, panels=3) as panels:
        _norms(panels[0], rows)
        _inner(panels[1], rows)
        _cosines(panels[2], rows)
        for axes in panels:
            figures.legend(axes)


def _norms(axes: Any, rows: Sequence[Row]) -> None:
    groups = norms(rows)
    colours = figures.colours(list(groups)) | {NORMS["sam"]: figures.SAM}
    for label, group in groups.items():
        points = [(rho, summary.of(same, "unseen_error")) for rho, same in group.items()]
        figures.line(axes, points, label, colours[label], ring=summary.chosen(group))
    figures.level(axes, sgd(rows), "unseen_error")
    axes.set_xscale("log")
    figures.describe(axes, "Test error (%) by norm", "rho; rings: chosen on images held out")


def _inner(axes: Any, rows: Sequence[Row]) -> None:
    groups = inner(rows)
    points = [(steps, summary.of(same, "unseen_error")) for steps, same in groups.items()]
    figures.line(axes, points, "SAM", figures.SAM)
    figures.level(axes, sgd(rows), "unseen_error")
    axes.set_xticks(list(groups))
    figures.describe(axes, "Test error (%) by ascent steps", "ascent steps")


def _cosines(axes: Any, rows: Sequence[Row]) -> None:
    groups = orders(rows)
    colours = figures.colours(list(groups))
    for label, same in groups.items():
        points = summary.by([point for row in same for point in row["history"]], "epoch")
        line = [(epoch, summary.of(group, "cosine")) for (epoch,), group in points.items()]
        if line:
            figures.line(axes, line, f"trained {label}", colours[label])
    figures.describe(axes, "Cosine of the two gradients", "epoch")


def section(rows: Sequence[Row]) -> str:
    """Write a table for each of the three questions."""
    return "\n\n".join([_norm_table(rows), _inner_table(rows), _order_table(rows), summary.caption(rows)])


def _norm_table(rows: Sequence[Row]) -> str:
    """Write a line for each norm and radius, the chosen ones in bold."""
    names = ("test_error", "unseen_error")
    plain = sgd(rows)
    lines = [["none (SGD)", "", *(str(summary.of(plain, name)) for name in names)]] if plain else []
    for label, group in norms(rows).items():
        for rho, same in group.items():
            cells = [str(summary.of(same, name)) for name in names]
            lines.append([label, f"{rho:g}", *(f"**{x}**" if rho == summary.chosen(group) else x for x in cells)])
    return summary.table(["perturbation", "rho", "held out: error, %", "test error, %"], lines)


def _inner_table(rows: Sequence[Row]) -> str:
    """Write a line for each number of steps, beside the paper's."""
    paper = {
        (row["ascent_steps"], row["metric"]): row["mean"]
        for row in tables.published("inner_steps")
        if row["dataset"] == "cifar10"
    }
    lines = []
    for steps, same in inner(rows).items():
        rises = [summary.interval(column) for column in zip(*(row["sharpness"] for row in same), strict=True)]
        theirs = [str(paper.get((steps, metric), "")) for metric in ("test error", "estimated sharpness")]
        lines.append([str(steps), str(summary.of(same, "unseen_error")), *map(str, rises), *theirs])
    found = [f"rise of the loss in {k} step{'s' * (k > 1)}" for k in STEPS]
    heads = ["ascent steps in training", "test error, %", *found, "paper: test error, %", "paper: rise of the error, %"]
    return summary.table(heads, lines)


def _order_table(rows: Sequence[Row]) -> str:
    """Write a line for training without and with the term."""
    lines = []
    for label, same in orders(rows).items():
        if not same:
            continue
        ends = [summary.interval([row["history"][place]["cosine"] for row in same]) for place in (0, -1)]
        spreads = [summary.of(same, name) for name in ("unseen_error", "train_error", "seconds")]
        lines.append([label, *map(str, spreads), *(end.text(3) for end in ends)])
    heads = ["second order", "test error, %", "training error, %", "CPU seconds", "cosine, first point", "at the end"]
    return summary.table(heads, lines)


EXPERIMENT = Experiment(
    "variants",
    __doc__,
    grid,
    figure,
    section,
    add_arguments=add_arguments,
    defaults={"rho": 0.2, "epochs": 15, "augment": "none", "micro_batch": None},  # a random direction has no parts
    observe=observe,
    observe_during=observe_during,
)


if __name__ == "__main__":
    raise SystemExit(runner.main(EXPERIMENT))
