"""What ranks send in one step is what docs/distributed.md says."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn

from bench.distributed import VARIANTS, WARM_UP, count

IMAGES = 2


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


def counts(variant: str) -> dict[str, list[int]]:
    torch.manual_seed(0)
    step = VARIANTS[variant](Small())
    torch.manual_seed(dist.get_rank())
    batches = [(torch.randn(IMAGES, 1, 28, 28), torch.randint(10, (IMAGES,))) for _ in range(4)]
    for _ in range(WARM_UP):
        step(batches)
    return count(lambda: step(batches))


@pytest.mark.parametrize(
    ("variant", "gradients"),
    [
        ("DDP, eager SAM", 2),
        ('DDP, FusedSAM "rank"', 1),
        ('DDP, FusedSAM "rank", 4 closures', 4),
        ('FusedSAM "rank"', 1),
        ("FusedSAM 2", 2),
        ('FusedSAM "rank", 4 closures', 1),
    ],
)
def test_how_many_gradients_a_step_sends(variant: str, gradients: int, four: Ranks) -> None:
    size = 7850 + (2 + 2 if variant.startswith("FusedSAM") else 0)  # with padding and flags
    for seen in four.run(counts, variant):
        assert set(seen) == {"all_reduce"}
        assert seen["all_reduce"][1] == gradients * size
