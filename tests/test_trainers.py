"""Without our helpers too a step in a trainer is what it is in a loop written by hand; with them: test_pages.py."""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import FusedSAM

BATCH, EPOCHS = 16, 2
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
Step = Callable[[FusedSAM, Callable[[], Tensor]], Any]


@pytest.fixture(scope="module", autouse=True)
def _torchvision() -> None:
    """Trainers import it where it is installed."""
    torchvision_ops.import_or_reason()


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


@functools.cache
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (64,), generator=generator)
    return TensorDataset(torch.randn(64, 5, generator=generator), labels)


def sam(model: nn.Module, **options: Any) -> FusedSAM:
    return FusedSAM(model.parameters(), lr=0.13, momentum=0.8, weight_decay=0.017, rho=0.07, **options)


def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5)


def by_hand(epochs: int = EPOCHS, **options: Any) -> list[float]:
    """All losses of both passes."""
    model, losses = net(), []
    optimizer = sam(model, **options)
    scheduler = schedule(optimizer)
    for _ in range(epochs):
        for x, y in DataLoader(data(), BATCH):

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                loss.backward()
                losses.append(loss.item())
                return loss

            optimizer.step(closure)
        scheduler.step()
    return losses


def lightning_losses(form: str = "automatic", **options: Any) -> list[float]:
    lightning = pytest.importorskip("pytorch_lightning")

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.losses = net(), []
            self.automatic_optimization = form == "automatic"

        def loss(self, batch: list[Tensor]) -> Tensor:
            loss = F.cross_entropy(self.net(batch[0]), batch[1])
            self.losses.append(loss.item())
            return loss

        def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
            if form == "automatic":
                return self.loss(batch)
            optimizer = self.optimizers()
            if form == "closure":
                optimizer.step(closure=lambda: self.manual_backward(self.loss(batch)))
                return None
            self.manual_backward(self.loss(batch))
            optimizer.first_step(zero_grad=True)
            self.manual_backward(self.loss(batch))
            if form == "second_step":
                optimizer.second_step(zero_grad=True)
                return None
            optimizer.step()
            optimizer.zero_grad()
            return None

        def on_train_epoch_end(self) -> None:
            if form != "automatic":
                self.lr_schedulers().step()

        def configure_optimizers(self) -> tuple[list[Any], list[Any]]:
            optimizer = sam(self)
            return [optimizer], [schedule(optimizer)]

    trainer = lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, **dict.fromkeys(SILENT, False), **options
    )
    module = Module()
    trainer.fit(module, DataLoader(data(), BATCH))
    if form != "automatic":
        assert trainer.global_step == len(module.losses) // 2
    return module.losses


@pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")
class TestLightning:
    def test_as_it_is(self) -> None:
        assert lightning_losses() == by_hand()

    @pytest.mark.parametrize("form", ["step", "second_step", "closure"])
    def test_manual_optimization(self, form: str) -> None:
        """Steps are counted as SAM makes them, and `max_steps` ends training."""
        assert lightning_losses(form) == by_hand()
        assert lightning_losses(form, max_steps=5) == by_hand()[:10]

    def test_clipping(self) -> None:
        losses = lightning_losses(gradient_clip_val=0.2)
        assert losses == pytest.approx(by_hand(max_grad_norm=0.2), rel=1e-5)
        assert losses != pytest.approx(by_hand(), rel=1e-3)

    def test_accumulation_that_would_lose_gradients_is_refused(self) -> None:
        with pytest.raises(RuntimeError, match="accumulate_grad_batches must be 1"):
            lightning_losses(accumulate_grad_batches=2)


@pytest.mark.parametrize("form", ["closure", "step", "second_step"])
def test_fabric(form: str) -> None:
    """Its wrapper has the optimizer's methods with a copy of its attributes."""
    fabric = pytest.importorskip("lightning_fabric").Fabric(accelerator="cpu", devices=1)
    model = net()
    model, optimizer = fabric.setup(model, sam(model))
    scheduler, losses = schedule(optimizer), []

    def closure(x: Tensor, y: Tensor) -> None:
        loss = F.cross_entropy(model(x), y)
        fabric.backward(loss)
        losses.append(loss.item())

    for _ in range(EPOCHS):
        for x, y in DataLoader(data(), BATCH):
            if form == "closure":
                optimizer.step(functools.partial(closure, x, y))
                continue
            closure(x, y)
            optimizer.first_step(zero_grad=True)
            closure(x, y)
            getattr(optimizer, form)()
            optimizer.zero_grad()
        scheduler.step()
    assert losses == by_hand()


@pytest.mark.parametrize("step", ["two calls", "closure"])
def test_accelerate(step: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    model = net()
    accelerator = accelerate.Accelerator(cpu=True)
    optimizer = sam(model)
    losses: list[float] = []
    model, optimizer, loader, scheduler = accelerator.prepare(
        model, optimizer, DataLoader(data(), BATCH), schedule(optimizer)
    )
    for _ in range(EPOCHS):
        for x, y in loader:

            def backward(x: Tensor = x, y: Tensor = y) -> Tensor:
                loss = F.cross_entropy(model(x), y)
                accelerator.backward(loss)
                losses.append(loss.item())
                return loss

            if step == "closure":
                optimizer.step(backward)
                continue
            backward()
            optimizer.optimizer.first_step(zero_grad=True)
            backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    assert losses == by_hand()


class TestLostGradients:
    """step(closure) warns, once, of gradients that it is about to drop."""

    def optimizer(self) -> tuple[FusedSAM, Callable[[], Tensor]]:
        model, (x, y) = net(), data()[:BATCH]

        def closure() -> Tensor:
            loss = F.cross_entropy(model(x), y)
            loss.backward()
            return loss

        return sam(model), closure

    def test_a_backward_after_zero_grad(self) -> None:
        optimizer, closure = self.optimizer()
        optimizer.step(closure)
        optimizer.zero_grad()
        closure()
        with pytest.warns(UserWarning, match="starts without gradients") as caught:
            optimizer.step(closure)
        assert caught[0].filename == __file__
        optimizer.zero_grad()
        closure()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            optimizer.step(closure)

    @pytest.mark.filterwarnings("error")
    def test_what_a_step_has_used_or_a_failed_closure_has_left_is_not_lost(self) -> None:
        optimizer, closure = self.optimizer()
        for _ in range(2):
            optimizer.step(closure)
        closure()
        optimizer.zero_grad()
        optimizer.step(closure)
        with pytest.warns(UserWarning, match="No parameter has a gradient"):  # the closure is of another model
            copy.deepcopy(optimizer).step(closure)
        optimizer.zero_grad(set_to_none=False)
        optimizer.step(closure)
        optimizer.zero_grad()
        closure()
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.step()
        optimizer.step(closure)

        def failing() -> None:
            closure()
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            optimizer.step(failing)
        optimizer.step(closure)
