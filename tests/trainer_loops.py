"""Training in each of the trainers that `fused_sam.integrations` is for, and in a loop written by hand."""

from __future__ import annotations

import contextlib
import functools
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import snapshot
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from fused_sam import FusedSAM

BATCH, BATCHES, EPOCHS, SCALE = 8, 5, 2, 2.0**10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Case(NamedTuple):
    """How a trainer trains; a short step ends each epoch of five micro-batches."""

    accumulate: int = 2
    clip: float | None = None
    precision: str = "fp32"
    scale: float = SCALE
    folder: Path = Path()

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", DTYPES[self.precision], enabled=self.precision != "fp32")

    def scaler(self) -> GradScaler:
        return GradScaler("cpu", init_scale=self.scale, enabled=self.precision == "fp16")


class FailureError(Exception):
    pass


class Net(nn.Module):
    """Keeps the loss of each pass. As transformers wants models: from inputs and labels to a dict with the loss.

    Each rank has inputs of its own.
    """

    def __init__(self, dropout: float = 0.0, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 3))
        self.losses: list[float] = []
        self.fail_at = fail_at
        self.rank = dist.get_rank() if dist.is_initialized() else 0

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.body(x + self.rank).float(), labels)
        self.losses.append(loss.item())
        if len(self.losses) == self.fail_at:
            raise FailureError
        return {"loss": loss}


@functools.cache
def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (BATCH * BATCHES,), generator=generator)
    return TensorDataset(torch.randn(BATCH * BATCHES, 5, generator=generator), labels)


def loader() -> DataLoader:
    return DataLoader(data(), BATCH)


def sam(model: nn.Module, **options: Any) -> FusedSAM:
    base = {} if "base_optimizer" in options else {"momentum": 0.8}
    return FusedSAM(model.parameters(), **{"lr": 0.13, "weight_decay": 0.017, "rho": 0.07} | base | options)


def by_hand(net: Net, opt: FusedSAM, case: Case, actual: bool = False) -> list[list[bytes]]:
    """Return the weights after each step. ``actual``: a short step takes the mean of the micro-batches it has."""
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    scaler, weights = case.scaler(), [snapshot(net.parameters())]
    for _ in range(EPOCHS):
        batches = list(loader())
        for start in range(0, len(batches), case.accumulate):
            window = batches[start : start + case.accumulate]

            def passes(window: list[Any] = window) -> None:
                for number, (x, y) in enumerate(window, start=1):
                    with no_sync() if number < len(window) else contextlib.nullcontext():
                        with case.autocast:
                            loss = model(x, y)["loss"]
                        scaler.scale(loss / (len(window) if actual else case.accumulate)).backward()

            if opt.direction == "momentum":
                if opt.perturb_next:
                    opt.first_step()
                passes()
            else:
                passes()
                while opt.perturb_next:
                    opt.first_step(zero_grad=True)
                    passes()
            if case.clip is not None:
                scaler.unscale_(opt)
                nn.utils.clip_grad_norm_(net.parameters(), case.clip)
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            weights.append(snapshot(net.parameters()))
    return weights


def with_lightning(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    import pytorch_lightning

    from fused_sam.integrations.lightning import SAMModule

    seen: list[float] = []

    class Module(SAMModule, pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = net

        def training_step(self, batch: list[Tensor]) -> Tensor:
            loss = self.net(*batch)["loss"]
            self.log("loss", loss, on_step=False, on_epoch=True)
            return loss

        def on_train_batch_end(self, outputs: Any, *args: Any) -> None:
            seen.append(outputs["loss"].item() * case.accumulate)

        def configure_optimizers(self) -> FusedSAM:
            return opt

    trainer = lightning_trainer(case)
    trainer.fit(Module(), loader())
    assert trainer.global_step == EPOCHS * -(-BATCHES // case.accumulate)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(seen[BATCHES:]) / BATCHES, rel=1e-5)
    return seen


def lightning_trainer(case: Case, **options: Any) -> Any:
    import pytorch_lightning
    from pytorch_lightning.plugins.precision import MixedPrecision

    # With precision="16-mixed" it takes bf16 on the CPU.
    precision = {"fp16": "16-mixed", "bf16": "bf16-mixed"}.get(case.precision)
    scaler = case.scaler() if case.precision == "fp16" else None
    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    return pytorch_lightning.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        devices=2 if dist.is_initialized() else 1,
        strategy="ddp" if dist.is_initialized() else "auto",
        use_distributed_sampler=False,
        accumulate_grad_batches=case.accumulate,
        gradient_clip_val=case.clip,
        plugins=[] if precision is None else [MixedPrecision(precision, "cpu", scaler)],
        **dict.fromkeys(silent, False),
        **options,
    )


def with_accelerate(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    import accelerate

    from fused_sam.integrations.accelerate import SAMStep

    precision = {"fp32": "no"}.get(case.precision, case.precision)
    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=case.accumulate, mixed_precision=precision
    )
    give_scaler(accelerator, case)
    model, optimizer, batches = accelerator.prepare(net, opt, loader())
    if dist.is_initialized():
        batches = loader()
    step = SAMStep(accelerator, model, optimizer, lambda model, batch: model(*batch)["loss"], case.clip)
    return [step(batch).item() for _ in range(EPOCHS) for batch in batches]


def give_scaler(accelerator: Any, case: Case) -> None:
    """Accelerate has no GradScaler on the CPU."""
    if case.precision == "fp16":
        accelerator.scaler, accelerator.native_amp = case.scaler(), True


def with_transformers(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    constant = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    trainer = transformers_trainer(net, case, optimizers=(opt, constant))
    trainer.train()
    return trainer.seen


def transformers_trainer(net: nn.Module, case: Case, **options: Any) -> Any:
    import transformers

    from fused_sam.integrations.transformers import SAMTrainer

    class Trainer(SAMTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            self.seen.append(loss.item() * self.current_gradient_accumulation_steps)
            return loss

        def get_train_dataloader(self) -> Any:
            return [{"x": x, "labels": y} for x, y in loader()]

    arguments = transformers.TrainingArguments(
        str(case.folder),
        per_device_train_batch_size=BATCH,
        num_train_epochs=EPOCHS,
        use_cpu=True,
        gradient_accumulation_steps=case.accumulate,
        max_grad_norm=case.clip or 0.0,
        fp16=case.precision == "fp16",
        bf16=case.precision == "bf16",
        lr_scheduler_type="constant",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    trainer = Trainer(net, arguments, train_dataset=[{"x": x, "labels": y} for x, y in data()], **options)
    trainer.seen = []
    give_scaler(trainer.accelerator, case)
    return trainer


def with_timm(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    from fused_sam.integrations.timm import SAMScaler

    seen: list[float] = []
    model = DistributedDataParallel(net) if dist.is_initialized() else net
    no_sync = getattr(model, "no_sync", contextlib.nullcontext)
    scaler = SAMScaler("cpu", enabled=case.precision == "fp16", no_sync=no_sync)
    scaler.load_state_dict(case.scaler().state_dict())
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(loader(), start=1):

            def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
                with case.autocast:
                    return model(x, y)["loss"] / case.accumulate

            update = number % case.accumulate == 0 or number == BATCHES
            with contextlib.nullcontext() if update else no_sync():
                loss = forward()
                scaler(loss, opt, case.clip, parameters=net.parameters(), need_update=update, forward=forward)
            seen.append(loss.item() * case.accumulate)
            if update:
                opt.zero_grad()
    return seen


def train(trainer: str, net: Net, opt: FusedSAM, case: Case) -> list[float]:
    """Return the losses that the loop sees."""
    pytest.importorskip({"lightning": "pytorch_lightning"}.get(trainer, trainer))
    return globals()[f"with_{trainer}"](net, opt, case)
