"""Hyperparameters and results of the paper, and of the Keras report, as data: one JSON file for each table.

A file has a list of `columns` and rows of as many values; its other entries hold for every row. Numbers are in the unit
of the file, rates and parts in [0, 1].
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
HYPERPARAMETERS = "hyperparameters"
RESULTS = tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != HYPERPARAMETERS))

Row = dict[str, Any]


@functools.cache
def _read(name: str) -> tuple[Row, list[Row]]:
    """Return what a file says of all its rows, and the rows."""
    table = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    columns, values = table.pop("columns"), table.pop("rows")
    return table, [dict(zip(columns, row, strict=True)) for row in values]


def published(name: str) -> list[Row]:
    """Return the paper's results of one table.

    Each has at least source, metric, unit and mean; half, where the paper gives an interval, with `spread` to say
    which; and what it belongs to: dataset, model, epochs, augment, method, noise_rate, rho.
    """
    shared, rows = _read(name)
    return [shared | row for row in rows]


def text(row: Row) -> str:
    """Write a result, and its interval where the paper gives one."""
    return f"{row['mean']}" if row["half"] is None else f"{row['mean']} ± {row['half']}"


def hyperparameters(dataset: str, model: str, *, epochs: int | None = None, noise_rate: float = 0.0) -> Row:
    """Return what a network is trained with: fields of a `Config`, rho, accelerators.

    By the paper (tables 6, 7; section 3.3); the network of the Keras report by that report.

    Args:
        dataset: "cifar10", "cifar100", "svhn" or "fashion-mnist".
        model: a name of `bench.paper.models`.
        epochs: where the paper has several lengths, that which is nearest in ratio is taken; by default the first.
        noise_rate: of the labels, likewise the nearest where the paper has noise, and none where it has none.
    """
    shared, rows = _read(HYPERPARAMETERS)
    found = [row for row in rows if (row["dataset"], row["model"]) == (dataset, model)]
    found = [row for row in found if bool(row["noise_rate"]) == bool(noise_rate)]
    if not found:
        known = sorted({row["model"] for row in rows if row["dataset"] == dataset})
        noisy = f" with {noise_rate=}" if noise_rate else ""
        raise ValueError(
            f"Invalid model={model!r} for the paper's hyperparameters on {dataset}{noisy}. "
            f"Must be one of {', '.join(known) or 'none'}."
        )

    def distance(row: Row) -> tuple[float, float]:
        unknown = epochs is None or row["epochs"] is None
        length = 1.0 if unknown else max(row["epochs"] / epochs, epochs / row["epochs"])
        return abs(row["noise_rate"] - noise_rate), length

    best = min(found, key=distance)
    kept = ("epochs", "batch_size", "lr", "weight_decay", "rho")
    values = {name: best[name] for name in kept if best[name] is not None}
    return {"train_size": shared["train_size"][dataset]} | shared.get(best["source"], shared["shared"]) | values
