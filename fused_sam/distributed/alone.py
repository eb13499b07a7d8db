"""A process that has been told of no others."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch import Tensor

from fused_sam.distributed.peers import Peers
from fused_sam.distributed.shards import Shards, is_sharded

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


class Alone(Peers):
    """Nobody has said that there are other ranks. If there are, the first perturbed step says what that means.

    DTensors do say it.
    """

    def __init__(self) -> None:
        self._said = False

    def adopt(self, params: list[Tensor]) -> Peers:
        return Shards() if any(map(is_sharded, params)) else self

    def copied(self) -> Peers:
        return Alone()

    def average_first(self, optimizer: FusedSAM) -> None:
        if self._said:
            return
        self._said = True
        if not (dist.is_available() and dist.is_initialized()):
            return
        if (ranks := dist.get_world_size()) > 1:
            logging.getLogger("fused_sam").warning(
                "There are %d ranks, and fused_sam.distributed.data_parallel(model, optimizer) has not been called: "
                "under DistributedDataParallel both gradients are averaged, so that all ranks share one perturbation; "
                "without it nothing is averaged.",
                ranks,
            )
