"""The benchmark's parameter sets are the models they are named after."""

from __future__ import annotations

import pytest

from bench.speed.shapes import GPU_SETS, SETS, TITLES, parameter_count

PUBLISHED = {
    "resnet50": (161, 25_557_032),
    "wrn28_10": (80, 36_479_194),
    "vit_b16": (152, 86_567_656),
    "vit_l16": (296, 304_326_632),
    "resnet20": (65, 272_474),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts(name: str) -> None:
    shapes = GPU_SETS[name]()
    assert (len(shapes), parameter_count(shapes)) == PUBLISHED[name]


@pytest.mark.parametrize(
    ("name", "first", "last"),
    [
        ("resnet50", (64, 3, 7, 7), (1000,)),
        ("wrn28_10", (16, 3, 3, 3), (10,)),
        ("vit_b16", (1, 1, 768), (1000,)),
        ("vit_l16", (1, 1, 1024), (1000,)),
        ("resnet20", (16, 3, 3, 3), (10,)),
    ],
)
def test_order_is_that_of_the_model(name: str, first: tuple[int, ...], last: tuple[int, ...]) -> None:
    shapes = GPU_SETS[name]()
    assert (shapes[0], shapes[-1]) == (first, last)


def test_every_set_has_a_title() -> None:
    assert GPU_SETS.keys() == TITLES.keys() == PUBLISHED.keys()
    assert SETS.items() <= GPU_SETS.items()
