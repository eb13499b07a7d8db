"""`fused_sam.integrations` under DistributedDataParallel: a step is that of a loop by hand, and sends as little."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch.distributed as dist
import torchvision_ops
from helpers import snapshot
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel
from trainer_loops import Case, Net, by_hand, sam, train

from fused_sam.distributed import data_parallel


@contextlib.contextmanager
def averages(opt: Any, own: bool) -> Iterator[list[int]]:
    """Count the buckets that DistributedDataParallel sends. ``own``: each rank has a perturbation of its own."""
    sent: list[int] = []
    init = DistributedDataParallel.__init__

    def average(state, bucket):  # DDP takes no annotations that are strings
        sent.append(bucket.index())
        work = dist.all_reduce(bucket.buffer().div_(dist.get_world_size()), async_op=True)
        return work.get_future().then(lambda future: future.value()[0])

    def counting(self: DistributedDataParallel, *args: Any, **kwargs: Any) -> None:
        init(self, *args, **kwargs)
        self.register_comm_hook(None, average)
        if own:
            data_parallel(self, opt)

    with mock.patch.object(DistributedDataParallel, "__init__", counting):
        yield sent


def as_by_hand_on_each_rank(trainer: str, own: bool, folder: Path) -> int:
    torchvision_ops.import_or_reason()
    rank = str(dist.get_rank())
    launched = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "GROUP_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "29500",
        "TORCHELASTIC_RUN_ID": "none",
    }
    case, net, twin = Case(5, folder=folder), Net(), Net()
    opt, by = sam(net), sam(twin)
    with mock.patch.dict(os.environ, launched), averages(opt, own) as sent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(trainer, net, opt, case)
    with averages(by, own) as expected:
        weights = by_hand(twin, by, case)
    assert snapshot(net.parameters()) == weights[-1] != weights[0]
    assert len(sent) == len(expected)
    return len(sent)


@pytest.mark.parametrize("trainer", ["transformers", "lightning", "accelerate", "timm"])
@pytest.mark.parametrize("own", [False, True])
def test_ranks_average_once_in_a_pass(trainer: str, own: bool, pair: Ranks, tmp_path: Path) -> None:
    if importlib.util.find_spec({"lightning": "pytorch_lightning"}.get(trainer, trainer)) is None:
        pytest.skip(f"no {trainer}")
    sent = pair.run(as_by_hand_on_each_rank, trainer, own, tmp_path)
    assert sent == [2 if own else 4] * 2  # two steps; a perturbation of its own needs no average
