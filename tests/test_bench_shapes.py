"""The benchmark's parameter sets are the models they are named after."""

from __future__ import annotations

import pytest

from bench.speed.shapes import GPU_SETS, SETS, TITLES, parameter_count

# Tensors, values, and the first and the last shape.
PUBLISHED = {
    "resnet50": (161, 25_557_032, (64, 3, 7, 7), (1000,)),
    "wrn28_10": (80, 36_479_194, (16, 3, 3, 3), (10,)),
    "vit_b16": (152, 86_567_656, (1, 1, 768), (1000,)),
    "vit_l16": (296, 304_326_632, (1, 1, 1024), (1000,)),
    "resnet20": (65, 272_474, (16, 3, 3, 3), (10,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_sets_are_the_published_models(name: str) -> None:
    shapes = GPU_SETS[name]()
    assert (len(shapes), parameter_count(shapes), shapes[0], shapes[-1]) == PUBLISHED[name]
    assert GPU_SETS.keys() == TITLES.keys() == PUBLISHED.keys()
    assert SETS.items() <= GPU_SETS.items()
