"""sharpness over the processes of a group: what one process finds on all of the data."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import small_net, snapshot
from ranks import Ranks
from torch import Tensor, nn

from fused_sam.analysis import Sharpness, sharpness

CASES = {"groups of 3": {"m": 3}, "one group": {}, "one group, 3 steps": {"steps": 3, "p": float("inf"), "rho": 0.01}}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network, and batches that make unequal shares for the processes."""
    torch.manual_seed(3)
    return small_net(), [(torch.randn(n, 3, 4, 4, dtype=torch.float64), torch.randint(4, (n,))) for n in (6, 5, 3)]


def measured_by_each() -> dict[str, tuple[float, ...]]:
    """What a rank finds with its share of the batches."""
    rank, size = dist.get_rank(), dist.get_world_size()
    net, batches = problem()
    w, share = snapshot(net.parameters()), batches[rank::size]
    world = dist.group.WORLD
    found = {
        name: tuple(sharpness(net, F.cross_entropy, share, process_group=world, **options))
        for name, options in CASES.items()
    }
    assert snapshot(net.parameters()) == w
    with pytest.raises(ValueError, match="without examples"):
        sharpness(net, F.cross_entropy, [], process_group=world)
    return found


def test_all_processes_find_what_one_finds_on_all_of_the_data(pair: Ranks) -> None:
    first, second = pair.run(measured_by_each)
    assert first == second
    net, batches = problem()
    for name, options in CASES.items():
        together, expected = Sharpness(*first[name]), sharpness(net, F.cross_entropy, batches, **options)
        assert together == pytest.approx(expected, rel=1e-9), name
        assert together.sharpness > 1e-3
