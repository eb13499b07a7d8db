"""`fused_sam.integrations`: a step in each trainer is what it is in a loop written by hand, of the same micro-batches."""

from __future__ import annotations

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
import torchvision_ops
from helpers import snapshot
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.utils.data import DataLoader, SequentialSampler, TensorDataset

from fused_sam import FusedSAM

BATCH, BATCHES, EPOCHS, SCALE = 8, 5, 2, 2.0**10
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
TRAINERS = ["transformers", "lightning", "accelerate", "timm"]
every_trainer = pytest.mark.parametrize("trainer", TRAINERS)
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:pytorch_lightning", "ignore::FutureWarning")


class Case(NamedTuple):
    """How a trainer trains; a short step ends each epoch of five micro-batches."""

    accumulate: int = 2
    clip: float | None = None
    precision: str = "fp32"
    folder: Path = Path()

    @property
    def autocast(self) -> torch.autocast:
        return torch.autocast("cpu", DTYPES[self.precision], enabled=self.precision != "fp32")

    def scaler(self) -> GradScaler:
        return GradScaler("cpu", init_scale=SCALE, enabled=self.precision == "fp16")


class FailureError(Exception):
    pass


class Net(nn.Module):
    """Keeps the loss of each pass. As transformers wants models: from inputs and labels to a dict with the loss."""

    def __init__(self, dropout: float = 0.0, fail_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.body = nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Dropout(dropout), nn.Linear(7, 3))
        self.losses: list[float] = []
        self.fail_at = fail_at

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        loss = F.cross_entropy(self.body(x).float(), labels)
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
    scaler, weights = case.scaler(), [snapshot(net.parameters())]
    for _ in range(EPOCHS):
        batches = list(loader())
        for start in range(0, len(batches), case.accumulate):
            window = batches[start : start + case.accumulate]

            def passes(window: list[Any] = window) -> None:
                for x, y in window:
                    with case.autocast:
                        loss = net(x, y)["loss"]
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
    from pytorch_lightning.plugins.precision import MixedPrecision

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
            assert self.optimizers().perturbed is False
            seen.append(outputs["loss"].item() * case.accumulate)

        def configure_optimizers(self) -> FusedSAM:
            return opt

    silent = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    # fp16 on the CPU is had by the plugin alone.
    plugins = MixedPrecision(f"{case.precision[2:]}-mixed" if case.precision == "fp16" else "bf16-mixed", "cpu",
                             case.scaler() if case.precision == "fp16" else None)
    trainer = pytorch_lightning.Trainer(
        max_epochs=EPOCHS, accelerator="cpu", devices=1, **dict.fromkeys(silent, False),
        accumulate_grad_batches=case.accumulate, gradient_clip_val=case.clip,
        plugins=[] if case.precision == "fp32" else [plugins],
    )
    trainer.fit(Module(), loader())
    assert trainer.global_step == EPOCHS * -(-BATCHES // case.accumulate)
    assert trainer.callback_metrics["loss"].item() == pytest.approx(sum(seen[BATCHES:]) / BATCHES, rel=1e-5)
    return seen


def with_accelerate(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    import accelerate

    from fused_sam.integrations.accelerate import SAMStep

    accelerator = accelerate.Accelerator(
        cpu=True, gradient_accumulation_steps=case.accumulate, mixed_precision={"fp32": "no"}.get(case.precision, case.precision)
    )
    give_scaler(accelerator, case)
    model, optimizer, batches = accelerator.prepare(net, opt, loader())
    step = SAMStep(accelerator, model, optimizer, lambda model, batch: model(*batch)["loss"], case.clip)
    return [step(batch).item() for _ in range(EPOCHS) for batch in batches]


def give_scaler(accelerator: Any, case: Case) -> None:
    """Accelerate has no GradScaler on the CPU."""
    if case.precision == "fp16":
        accelerator.scaler, accelerator.native_amp = case.scaler(), True


def with_transformers(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    import transformers

    from fused_sam.integrations.transformers import SAMTrainer

    seen: list[float] = []

    class Trainer(SAMTrainer):
        def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
            loss = super().training_step(*args, **kwargs)
            seen.append(loss.item() * self.current_gradient_accumulation_steps)
            return loss

        def _get_train_sampler(self, *args: Any) -> SequentialSampler:
            return SequentialSampler(self.train_dataset)

    arguments = transformers.TrainingArguments(
        str(case.folder), per_device_train_batch_size=BATCH, num_train_epochs=EPOCHS, use_cpu=True,
        gradient_accumulation_steps=case.accumulate, max_grad_norm=case.clip or 0.0,
        fp16=case.precision == "fp16", bf16=case.precision == "bf16",
        save_strategy="no", report_to=[], disable_tqdm=True,
    )
    constant = torch.optim.lr_scheduler.ConstantLR(opt, 1.0)
    examples = [{"x": x, "labels": y} for x, y in data()]
    trainer = Trainer(net, arguments, train_dataset=examples, optimizers=(opt, constant))
    give_scaler(trainer.accelerator, case)
    trainer.train()
    return seen


def with_timm(net: Net, opt: FusedSAM, case: Case) -> list[float]:
    from fused_sam.integrations.timm import SAMScaler

    seen: list[float] = []
    scaler = SAMScaler("cpu", enabled=case.precision == "fp16")
    scaler.load_state_dict(case.scaler().state_dict())
    for _ in range(EPOCHS):
        for number, (x, y) in enumerate(loader(), start=1):

            def forward(x: Tensor = x, y: Tensor = y) -> Tensor:
                with case.autocast:
                    return net(x, y)["loss"] / case.accumulate

            loss = forward()
            update = number % case.accumulate == 0 or number == BATCHES
            scaler(loss, opt, case.clip, parameters=net.parameters(), need_update=update, forward=forward)
            seen.append(loss.item() * case.accumulate)
            if update:
                opt.zero_grad()
    return seen


def train(trainer: str, net: Net, opt: FusedSAM, case: Case) -> list[float]:
    """Return the losses that the loop sees."""
    pytest.importorskip({"lightning": "pytorch_lightning"}.get(trainer, trainer))
    return globals()[f"with_{trainer}"](net, opt, case)


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
