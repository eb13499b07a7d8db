"""Means over seeds with their 95 % interval, and tables of them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from bench.records import Row
from bench.tables import caption as _machine
from bench.tables import table

__all__ = ["Interval", "by", "caption", "interval", "of", "table", "task"]


class Interval(NamedTuple):
    """A mean, and half the width of its 95 % interval: NaN for one value, of which nothing is known."""

    mean: float
    half: float
    count: int

    def __str__(self) -> str:
        return self.text(2)

    def text(self, digits: int) -> str:
        """The mean, and the interval if there is one, with so many digits behind the point."""
        return f"{self.mean:.{digits}f}" + ("" if self.count < 2 else f" ± {self.half:.{digits}f}")


def interval(values: Sequence[float]) -> Interval:
    """Of at least one value, taken as independent and normal: mean ± t s / sqrt(n), t of Student's, n - 1 degrees."""
    if not values:
        raise ValueError(f"Invalid {values=}. Must hold at least one.")
    count, mean = len(values), statistics.fmean(values)
    if count == 1:
        return Interval(mean, math.nan, 1)
    from scipy import stats

    half = float(stats.t.ppf(0.975, count - 1)) * statistics.stdev(values) / math.sqrt(count)
    return Interval(mean, half, count)


def by(rows: Iterable[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows grouped by values of theirs, or of their configuration; groups in the order of their first row."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[n] if n in row else row["config"][n] for n in names), []).append(row)
    return groups


def of(rows: Iterable[Row], name: str = "test_error") -> Interval:
    """The interval of one figure."""
    return interval([row[name] for row in rows])


def task(row: Row) -> str:
    """Data, network and length of a run, in words."""
    config = row["config"]
    tested = f", {config['test_size']:,} of the test images" if config.get("test_size") else ""
    batch = f"batches of {config['batch_size']}"
    return f"{config['dataset']}, {config['train_size']:,} images, {config['model']}, {batch}{tested}"


def caption(rows: Sequence[Row]) -> str:
    """What stands under a table: the data and network of all rows, and the machine."""
    tasks = "; ".join(dict.fromkeys(task(row) for row in rows))
    seeds = len(by(rows, "seed"))
    return f"{tasks}. Mean and 95 % interval over {seeds} seed{'s' if seeds > 1 else ''}.\n\n{_machine(rows)}"
