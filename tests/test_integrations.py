"""`fused_sam.integrations`: a step in each trainer is what it is in a loop by hand, of the same micro-batches."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
import torchvision_ops
from helpers import snapshot
from ranks import Ranks
from torch.nn.parallel import DistributedDataParallel
from trainer_loops import Case, FailureError, Net, by_hand, sam, train

from fused_sam.distributed import data_parallel

TRAINERS = ["transformers", "lightning", "accelerate", "timm"]
every_trainer = pytest.mark.parametrize("trainer", TRAINERS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    """Trainers import it where it is installed."""
    torchvision_ops.import_or_reason()


@pytest.fixture(autouse=True)
def _one_precision_for_each() -> Iterator[None]:
    """Accelerate keeps it for the process."""
    yield
    with contextlib.suppress(ImportError):
        from accelerate.state import AcceleratorState, GradientState

        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


STEPS: dict[str, tuple[dict[str, Any], Case]] = {
    "one micro-batch": ({}, Case(1)),
    "two micro-batches": ({}, Case(2)),
    "three micro-batches": ({"adaptive": True, "eta": 0.01}, Case(3)),
    "Adam": ({"base_optimizer": torch.optim.AdamW, "lr": 0.03}, Case(2)),
    "interval": ({"interval": 2, "start": 1}, Case(2)),
    "momentum": ({"direction": "momentum"}, Case(3)),
    "momentum, interval": ({"direction": "momentum", "interval": 2}, Case(2)),
    "three ascents": ({"ascent_steps": 3}, Case(2)),
    "LookSAM": ({"looksam_alpha": 0.7, "interval": 2}, Case(2)),
    "clipped": ({}, Case(3, clip=0.2)),
    "clipped, interval": ({"interval": 2}, Case(2, clip=0.2)),
    "bf16": ({}, Case(2, precision="bf16")),
    "fp16": ({}, Case(2, precision="fp16")),
    "fp16, clipped": ({}, Case(3, clip=0.2, precision="fp16")),
    "fp16, interval": ({"interval": 2}, Case(2, precision="fp16")),
    "fp16, momentum": ({"direction": "momentum"}, Case(2, clip=0.2, precision="fp16")),
}


@every_trainer
@pytest.mark.parametrize("step", STEPS)
def test_a_step_is_that_of_a_loop_by_hand(trainer: str, step: str, tmp_path: Path) -> None:
    options, case = STEPS[step]
    if trainer == "lightning" and case.precision == "fp16":  # it clips no gradients that its optimizer unscales
        options, case = {**options, "max_grad_norm": case.clip}, case._replace(clip=None)
    net, twin = Net(), Net()
    seen = train(trainer, net, sam(net, **options), case._replace(folder=tmp_path))
    weights = by_hand(twin, sam(twin, **options), case, actual=trainer == "transformers")
    # timm's loop makes a forward at w whatever the direction.
    of_passes = net.losses[1::2] if trainer == "timm" and "direction" in options else net.losses
    assert of_passes == twin.losses
    assert snapshot(net.parameters()) == weights[-1] != weights[0]
    if step == "three micro-batches":
        at_w = [loss for start in (0, 6, 10, 16) for loss in net.losses[start : start + (3 if start in (0, 10) else 2)]]
        assert seen == pytest.approx(at_w, rel=1e-6)  # divided and multiplied by three


@every_trainer
@pytest.mark.parametrize("direction", ["gradient", "momentum"])
def test_an_exception_in_any_pass_leaves_the_weights_at_w(trainer: str, direction: str, tmp_path: Path) -> None:
    case, forwards = Case(2, folder=tmp_path), 4 if direction == "gradient" or trainer == "timm" else 2
    twin = Net()
    weights = by_hand(twin, sam(twin, direction=direction), case, actual=trainer == "transformers")
    for forward in range(forwards):
        net = Net(fail_at=forwards + forward + 1)
        opt = sam(net, direction=direction)
        with pytest.raises(FailureError):
            train(trainer, net, opt, case)
        assert not opt.perturbed
        assert snapshot(net.parameters()) == weights[1]
        assert trainer == "timm" or all(p.grad is None for p in net.parameters())  # a forward of the loop's own


@pytest.mark.parametrize("trainer", ["transformers", "lightning", "accelerate"])
def test_dropout_is_the_same_in_both_passes(trainer: str, tmp_path: Path) -> None:
    for replay_rng in (True, False):
        net = Net(dropout=0.5)
        train(trainer, net, sam(net, rho=0.0, replay_rng=replay_rng), Case(3, folder=tmp_path))
        assert (net.losses[:3] == net.losses[3:6]) == replay_rng
        assert (net.losses[6:8] == net.losses[8:10]) == replay_rng


@every_trainer
def test_another_optimizer_is_refused(trainer: str, tmp_path: Path) -> None:
    net = Net()
    with pytest.raises(TypeError, match=r"^Invalid optimizer of class \w+\. Must be a FusedSAM\.$"):
        train(trainer, net, torch.optim.SGD(net.parameters(), lr=0.1), Case(folder=tmp_path))


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


def as_by_hand_on_each_rank(trainer: str, own: bool, options: dict[str, Any], folder: Path) -> int:
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
    opt, by = sam(net, **options), sam(twin, **options)
    with mock.patch.dict(os.environ, launched), averages(opt, own) as sent, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(trainer, net, opt, case)
    with averages(by, own) as expected:
        weights = by_hand(twin, by, case)
    assert snapshot(net.parameters()) == weights[-1] != weights[0]
    assert len(sent) == len(expected)
    return len(sent)


@every_trainer
@pytest.mark.parametrize("own", [False, True])
def test_ranks_average_once_in_a_pass(trainer: str, own: bool, pair: Ranks, tmp_path: Path) -> None:
    pytest.importorskip({"lightning": "pytorch_lightning"}.get(trainer, trainer))
    sent = pair.run(as_by_hand_on_each_rank, trainer, own, {}, tmp_path)
    assert sent == [2 if own else 4] * 2  # two steps; a perturbation of its own needs no average
