"""This process among those that torchrun has started, and the few things they do together."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class Ranks:
    """One process, alone unless torchrun has started several.

    Attributes:
        rank: the number of this process, counted over all machines.
        size: how many there are.
        device: the one that belongs to this process.
    """

    def __init__(self, rank: int, size: int, device: torch.device, hosts: dist.ProcessGroup | None = None) -> None:
        self.rank, self.size, self.device = rank, size, device
        self._hosts = hosts  # over the CPU, so that nothing that goes through it waits for a device

    def mean_(self, tensors: list[Tensor]) -> None:
        """Make each floating-point tensor its mean over the ranks."""
        for x in tensors if self.size > 1 else ():
            if x.is_floating_point():
                dist.all_reduce(x.div_(self.size))

    def sum_(self, x: Tensor) -> Tensor:
        """Return the tensor, which becomes its sum over the ranks."""
        if self.size > 1:
            dist.all_reduce(x)
        return x

    def largest(self, number: int) -> int:
        """Return the largest over the ranks. Waits for their hosts and not for their devices."""
        if self.size == 1:
            return number
        found = torch.tensor(number)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self._hosts)
        return int(found)

    def gather(self, thing: Any) -> list[Any]:
        """Return what each rank has, on all of them."""
        things: list[Any] = [thing] * self.size
        if self.size > 1:
            dist.all_gather_object(things, thing, group=self._hosts)
        return things

    def wait(self) -> None:
        """Wait until all have come here."""
        self.largest(0)


@contextlib.contextmanager
def joined(device: str) -> Iterator[Ranks]:
    """Join the processes that torchrun has started.

    Args:
        device: "cpu" or "cuda", of which a rank takes the one with its number on this machine.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local = torch.device(device, int(os.environ.get("LOCAL_RANK", "0"))) if device == "cuda" else torch.device(device)
    if local.type == "cuda":
        torch.cuda.set_device(local)
    if size == 1:
        yield Ranks(0, 1, local)
        return
    if local.type == "cuda":
        dist.init_process_group("nccl", device_id=local)
    else:
        dist.init_process_group("gloo")
    yield Ranks(dist.get_rank(), size, local, dist.new_group(backend="gloo"))
    # Not after an exception: the others may be in a collective, and to wait for them would keep torchrun from hearing.
    dist.destroy_process_group()


def ranks_on_this_machine() -> int:
    """Return how many processes torchrun has started here."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
