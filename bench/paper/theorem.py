"""Theorem 1 of the paper, with its constants: how much the loss can rise from training images to unseen ones.

With probability 1 - delta over the draw of n training examples, for weights w of dimension k and a radius rho,

    L(w) <= max over |e| <= rho of L_train(w + e) + h(|w|^2 / rho^2),

    h = sqrt((k log(1 + |w|^2 / rho^2 (1 + sqrt(log n / k))^2) + 4 log(n / delta) + 8 log(6 n + 3 k)) / (n - 1)).

The theorem (appendix A.1) is of a loss in [0, 1], such as the error, and assumes that noise on w does not lower L. Its
main text leaves h open, "a strictly increasing function"; the last term is what it writes as O(1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor

from bench.paper import summary
from bench.paper.training import Training
from bench.records import Row
from fused_sam import analysis

DELTA = 0.05
RADII = (0.05, 0.5)  # SAM's usual one, and the largest that is tried, where h is lowest
ASCENT_STEPS = 5


def h(squared_norm: float, rho: float, parameters: int, examples: int, delta: float = DELTA) -> float:
    """Return the theorem's last term.

    Args:
        squared_norm: |w|^2.
        rho: radius, > 0.
        parameters: k.
        examples: n, > 1.
        delta: the probability that the bound does not hold.
    """
    wide = squared_norm / rho**2 * (1 + math.sqrt(math.log(examples) / parameters)) ** 2
    complexity = parameters * math.log1p(wide)
    confidence = 4 * math.log(examples / delta) + 8 * math.log(6 * examples + 3 * parameters)
    return math.sqrt((complexity + confidence) / (examples - 1))


def observe(training: Training) -> Row:
    """Measure what the theorem is about: k, n, |w|^2, and how much the training loss rises within each radius.

    The rise is the highest of several ascent steps, so a lower bound of the maximum; the network is in evaluation mode.
    """
    weights = [p.detach() for p in training.model.parameters()]
    examples = len(training.images.train.labels)
    batch = training.examples(examples)
    training.model.eval()
    rises = []
    for rho in RADII:
        found = analysis.sharpness(training.model, F.cross_entropy, batch, rho=rho, steps=ASCENT_STEPS)
        rises.append({"rho": rho, "sharpness": found.sharpness})
    return {
        "parameters": sum(p.numel() for p in weights),
        "examples": examples,
        "squared_norm": sum(_square(p) for p in weights),
        "rises": rises,
    }


def _square(x: Tensor) -> float:
    return float(x.double().square().sum())


def bound(row: Row, rho: float) -> Row:
    """Return the terms of the theorem for a run."""
    rise = next(known["sharpness"] for known in row["rises"] if known["rho"] == rho)
    last = h(row["squared_norm"], rho, row["parameters"], row["examples"])
    return {"rise": rise, "h": last, "bound": row["train_loss"] + rise + last}


def table(
    networks: Mapping[str, Sequence[Row]], methods: Callable[[Sequence[Row]], Mapping[str, Sequence[Row]]]
) -> str:
    """Write a line for each method of each network: |w|, the rise of the loss within each radius, and the bound."""
    lines = []
    for model, rows in networks.items():
        for name, runs in methods(rows).items():
            terms = {rho: [bound(row, rho) for row in runs] for rho in RADII}
            norm = summary.interval([math.sqrt(row["squared_norm"]) for row in runs])
            rises = [summary.of(terms[rho], "rise").text(3) for rho in RADII]
            best = min(RADII, key=lambda rho, known=terms: summary.of(known[rho], "bound").mean)
            last, whole = (f"{summary.of(terms[best], part).mean:.1f}" for part in ("h", "bound"))
            losses = [summary.of(runs, loss).text(3) for loss in ("train_loss", "unseen_loss")]
            lines.append([model, name, norm.text(1), losses[0], *rises, f"{last} ({best:g})", whole, losses[1]])
    risen = [f"rise within {rho:g}" for rho in RADII]
    heads = ["network", "method", "length of w", "training loss", *risen, "h (radius)", "bound", "test loss"]
    return summary.table(heads, lines)
