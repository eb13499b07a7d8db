"""Means over seeds with their 95 % interval, and tables of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from bench.records import Interval as Interval
from bench.records import Row
from bench.records import interval as interval
from bench.tables import caption as _machine
from bench.tables import table as table


def by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by values of theirs, or of their configuration, in the order of the first row of each group."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[n] if n in row else row["config"][n] for n in names), []).append(row)
    return groups


def by_option(rows: Iterable[Row], name: str, unused: Any = None) -> dict[Any, list[Row]]:
    """Group rows by an option of their optimizer, in the order of its values; `unused` is that of a run without it."""
    groups: dict[Any, list[Row]] = {}
    for row in rows:
        groups.setdefault(row["config"]["options"].get(name, unused), []).append(row)
    return dict(sorted(groups.items()))


def chosen(groups: Mapping[float, Sequence[Row]]) -> float:
    """Return the radius with the lowest mean error on the images held out; the smaller of two that are alike."""
    return min(groups, key=lambda rho: (of(groups[rho]).mean, rho))


def of(rows: Iterable[Row], name: str = "test_error") -> Interval:
    """Return the interval of one figure."""
    return interval([row[name] for row in rows])


def paired(rows: Iterable[Row], others: Iterable[Row], name: str = "test_error") -> Interval | None:
    """Return the interval of the first minus the second, seed by seed; None where they have no seed in common.

    Runs with the same seed have the same images, noise and first weights.
    """
    theirs = {row["seed"]: row[name] for row in others}
    differences = [row[name] - theirs[row["seed"]] for row in rows if row["seed"] in theirs]
    return interval(differences) if differences else None


def gain(rows: Sequence[Row], sam: Sequence[Row]) -> str:
    """Write by how many points SAM's error is below that of others, seed by seed; of its own rows nothing."""
    points = None if rows == sam else paired(rows, sam)
    return "" if points is None else str(points)


def errors(rows: Sequence[Row]) -> list[str]:
    """Return the cells of a table for the passes of some runs, and for their errors on test and training images."""
    return [f"{of(rows, 'passes').mean:.0f}", str(of(rows)), str(of(rows, "train_error"))]


def labels(rate: float) -> str:
    """Say how many labels are wrong."""
    return f"{rate:.0%} label noise" if rate else "clean labels"


def subtitle(rows: Sequence[Row], *more: str) -> str:
    """Say under a picture's title what was trained and what is drawn."""
    return f"{', '.join([task(rows[0]), *more])}; mean and 95 % interval of {len(by(rows, 'seed'))} seeds"


def task(row: Row) -> str:
    """Name data, network and length of a run."""
    config = row["config"]
    tested = f", {config['test_size']:,} of the test images" if config.get("test_size") else ""
    batch = f"batches of {config['batch_size']}"
    return f"{config['dataset']}, {config['train_size']:,} images, {config['model']}, {batch}{tested}"


def caption(rows: Sequence[Row]) -> str:
    """Return what stands under a table: the data and network of all rows, and the machine."""
    tasks = "; ".join(dict.fromkeys(task(row) for row in rows))
    seeds = len(by(rows, "seed"))
    spread = "One seed" if seeds == 1 else f"Mean and 95 % interval over {seeds} seeds"
    return f"{tasks}. {spread}.\n\n{_machine(rows)}"
