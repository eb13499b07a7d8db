"""The paper's hyperparameters and results, as data: one JSON file for each of its tables.

A file has a list of `columns` and rows of as many values; its other entries hold for every row. Checked when read.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from bench.paper import data

FOLDER = Path(__file__).parent
HYPERPARAMETERS = "hyperparameters"
RESULTS = tuple(sorted(path.stem for path in FOLDER.glob("*.json") if path.stem != HYPERPARAMETERS))

Row = dict[str, Any]

UNITS = ("%", "1")
SETS = ("cifar10", "cifar100", "svhn", "fashion-mnist", "imagenet")
FINETUNED = ("fgvc-aircraft", "flowers", "oxford-iiit-pets", "stanford-cars", "birdsnap", "food101")
METHODS = ("SGD", "SAM", "Mixup", "Bootstrap + Mixup", "Bootstrap + SAM")


def _count(value: Any) -> bool:
    return isinstance(value, int) and value >= 1


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and value >= 0


def _optional(check: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or check(value)


# What a column may hold; numbers are in the unit of the file, rates and parts in [0, 1].
COLUMNS: dict[str, Callable[[Any], bool]] = {
    "source": lambda value: isinstance(value, str),
    "dataset": lambda value: value in SETS + FINETUNED,
    "model": lambda value: isinstance(value, str),
    "augment": lambda value: value in data.AUGMENTATIONS,
    "method": lambda value: value in METHODS,
    "metric": lambda value: isinstance(value, str),
    "epoch": _count,
    "epochs": _optional(_count),
    "batch_size": _count,
    "ascent_steps": _count,
    "lr": _number,
    "weight_decay": _number,
    "rho": _number,
    "noise_rate": lambda value: _number(value) and value < 1,
    "mean": _number,
    "half": _optional(_number),
    "assumed": lambda value: set(value) <= set(COLUMNS),
}


@functools.cache
def _read(path: Path) -> tuple[Row, list[Row]]:
    """What a file says of all its rows, and the rows.

    Raises:
        ValueError: naming the file, the row and the rule that it breaks.
    """
    table = json.loads(path.read_text(encoding="utf-8"))
    columns, values = table.pop("columns"), table.pop("rows")
    unknown = [name for name in columns if name not in COLUMNS]
    if unknown:
        raise ValueError(f"Invalid columns {unknown} in {path.name}. Must be among {', '.join(COLUMNS)}.")
    if not isinstance(table.get("source"), str):
        raise ValueError(f"Invalid source={table.get('source')!r} in {path.name}. Must say where the values are from.")
    rows = []
    for number, row in enumerate(values, start=1):
        if len(row) != len(columns):
            raise ValueError(f"Invalid row {number} of {path.name}: {len(row)} values. Must be {len(columns)}.")
        for name, value in zip(columns, row):
            if not COLUMNS[name](value):
                raise ValueError(f"Invalid {name}={value!r} in row {number} of {path.name}.")
        rows.append(dict(zip(columns, row)))
    return table, rows


def published(name: str) -> list[Row]:
    """The paper's results of one table.

    Returns:
        For each value a dict with at least source, metric, unit and mean; half, where the paper gives an interval, with
        `spread` to say which; and what it belongs to: dataset, model, epochs, augment, method, noise_rate, rho.

    Raises:
        ValueError: a name that is not in `RESULTS`, or a damaged file.
    """
    if name not in RESULTS:
        raise ValueError(f"Invalid {name=}. Must be one of {', '.join(RESULTS)}.")
    shared, rows = _read(FOLDER / f"{name}.json")
    whole = [shared | row for row in rows]
    for row in whole:
        if row.get("unit") not in UNITS or "metric" not in row or "mean" not in row:
            raise ValueError(f"Invalid row {row}. Must have a mean, a metric, and a unit of {', '.join(UNITS)}.")
    return whole


def text(row: Row) -> str:
    """Write a result, and its interval where the paper gives one."""
    return f"{row['mean']}" if row["half"] is None else f"{row['mean']} ± {row['half']}"


def hyperparameters(dataset: str, model: str, *, epochs: int | None = None, noise_rate: float = 0.0) -> Row:
    """What the paper trains a network with (tables 6 and 7, section 3.3), as fields of a `Config`, and rho.

    Args:
        dataset: "cifar10", "cifar100" or "fashion-mnist".
        model: a name of `bench.paper.models`.
        epochs: where the paper has several lengths, that which is nearest in ratio is taken; by default the first.
        noise_rate: of the labels, likewise the nearest where the paper has noise, and none where it has none.

    Raises:
        ValueError: the paper does not train this network on these data.
    """
    shared, rows = _read(FOLDER / f"{HYPERPARAMETERS}.json")
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
        length = 1.0 if epochs is None else max(row["epochs"] / epochs, epochs / row["epochs"])
        return abs(row["noise_rate"] - noise_rate), length

    best = min(found, key=distance)
    kept = ("epochs", "batch_size", "lr", "weight_decay", "rho")
    values = {name: best[name] for name in kept if best[name] is not None}
    return {"train_size": shared["train_size"][dataset]} | shared["shared"] | values
