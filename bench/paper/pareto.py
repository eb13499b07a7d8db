"""Points of price and error, and those that no other undercuts in both."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bench.paper import savings, summary
from bench.records import Row


class Point(NamedTuple):
    """A method at one length: what it costs and how good it gets, over seeds."""

    method: str
    epochs: int
    seconds: summary.Interval
    passes: summary.Interval
    error: summary.Interval  # of the test set, in percent


def points(rows: Sequence[Row]) -> list[Point]:
    """One for each method and length, in the order of savings.METHODS and the shortest first."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        groups.setdefault((savings.name_of(row), row["config"]["epochs"]), []).append(row)
    order = list(savings.METHODS)
    return [
        Point(*key, *(summary.of(groups[key], name) for name in ("seconds", "passes", "test_error")))
        for key in sorted(groups, key=lambda key: (order.index(key[0]), key[1]))
    ]


def front(found: Sequence[Point], price: str) -> list[Point]:
    """Those with a lower mean error than every point that costs no more, the cheapest first.

    Args:
        found: of one task.
        price: "seconds" or "passes".
    """
    best: list[Point] = []
    for point in sorted(found, key=lambda point: (getattr(point, price).mean, point.error.mean)):
        if not best or point.error.mean < best[-1].error.mean:
            best.append(point)
    return best
