"""sharpness over the processes of a group: what one process finds on all of the data."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from helpers import small_net, snapshot
from torch import Tensor, nn

from fused_sam.analysis import Sharpness, sharpness

WORLD = 2
CASES = {"groups of 3": {"m": 3}, "one group": {}, "one group, 3 steps": {"steps": 3, "p": float("inf"), "rho": 0.01}}

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without torch.distributed")


def problem() -> tuple[nn.Module, list[tuple[Tensor, Tensor]]]:
    """A network, and batches that make unequal shares for the processes."""
    torch.manual_seed(3)
    return small_net(), [(torch.randn(n, 3, 4, 4, dtype=torch.float64), torch.randint(4, (n,))) for n in (6, 5, 3)]


def worker(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=WORLD)
    net, batches = problem()
    w, share = snapshot(net.parameters()), batches[rank::WORLD]
    world = dist.group.WORLD
    found = {
        name: tuple(sharpness(net, F.cross_entropy, share, process_group=world, **options))
        for name, options in CASES.items()
    }
    assert snapshot(net.parameters()) == w
    with pytest.raises(ValueError, match="without examples"):
        sharpness(net, F.cross_entropy, [], process_group=world)
    torch.save(found, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_all_processes_find_what_one_finds_on_all_of_the_data(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    mp.spawn(worker, args=(port, str(tmp_path)), nprocs=WORLD)
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in range(WORLD)]
    assert found[0] == found[1]
    net, batches = problem()
    for name, options in CASES.items():
        together, expected = Sharpness(*found[0][name]), sharpness(net, F.cross_entropy, batches, **options)
        assert together == pytest.approx(expected, rel=1e-9), name
        assert together.sharpness > 1e-3
