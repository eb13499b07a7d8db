"""The Python blocks of README.md and of every page in docs/, and what each takes as given."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fused_sam
from fused_sam import FusedSAM

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BATCH = 16
FENCE = re.compile(r"^```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
SILENT = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
Names = dict[str, Any]


class Block(NamedTuple):
    page: Path
    line: int
    code: str

    @property
    def name(self) -> str:
        """As pytest shows it."""
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"

    def run(self, names: Names) -> None:
        """Errors name the line of the page."""
        exec(compile("\n" * (self.line - 1) + self.code, str(self.page), "exec"), names)


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    for found in FENCE.finditer(text):
        yield Block(page, text.count("\n", 0, found.start(1)) + 1, found[1])


def net() -> nn.Sequential:
    torch.manual_seed(5)
    return nn.Sequential(nn.Linear(5, 7, bias=False), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3))


def data() -> TensorDataset:
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(3, (64,), generator=generator)
    return TensorDataset(torch.randn(64, 5, generator=generator), labels)


def closure_of(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        loss = F.cross_entropy(model(x), y)
        loss.backward()
        return loss

    return closure


def common(model: nn.Module) -> Names:
    """What any page may use without saying so."""
    x, y = data()[:BATCH]
    return {
        "torch": torch,
        "nn": nn,
        "fused_sam": fused_sam,
        "FusedSAM": FusedSAM,
        "model": model,
        "loss_fn": F.cross_entropy,
        "optimizer": FusedSAM(model.parameters(), lr=0.1, momentum=0.9, rho=0.05),
        "loader": DataLoader(data(), BATCH),
        "x": x,
        "y": y,
        "closure": closure_of(model, x, y),
    }


@contextlib.contextmanager
def one_rank(folder: Path, names: Names) -> Iterator[Names]:
    store = torch.distributed.FileStore(str(folder / "ranks"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield names | {"DistributedDataParallel": nn.parallel.DistributedDataParallel}
    finally:
        torch.distributed.destroy_process_group()


class Labelled(nn.Module):
    """As transformers wants models: from a dict of inputs, labels among them, to a dict with the loss."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": F.cross_entropy(self.body(x), labels)}


def for_transformers(folder: Path, names: Names) -> Names:
    arguments = pytest.importorskip("transformers").TrainingArguments(
        str(folder),
        per_device_train_batch_size=BATCH,
        gradient_accumulation_steps=2,
        max_steps=2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    examples = [{"x": x, "labels": y} for x, y in data()]
    return {**names, "model": Labelled(names["model"]), "arguments": arguments, "data": examples}


def for_lightning(folder: Path, names: Names) -> Names:
    lightning = pytest.importorskip("pytorch_lightning")
    quiet = functools.partial(lightning.Trainer, accelerator="cpu", devices=1, **dict.fromkeys(SILENT, False))
    return {**names, "LightningModule": lightning.LightningModule, "Trainer": quiet}


def for_accelerate(folder: Path, names: Names) -> Names:
    accelerator = pytest.importorskip("accelerate").Accelerator(cpu=True, gradient_accumulation_steps=2)
    scheduler = torch.optim.lr_scheduler.StepLR(names["optimizer"], 1, 0.5)
    return {**names, "accelerator": accelerator, "scheduler": scheduler}


def for_timm(folder: Path, names: Names) -> Names:
    pytest.importorskip("timm")
    loop = {"device": torch.device("cpu"), "amp_dtype": None, "amp_autocast": contextlib.nullcontext}
    return {**names, **loop, "accum_steps": 2}


TRAINERS = {
    "transformers": for_transformers,
    "lightning": for_lightning,
    "accelerate": for_accelerate,
    "timm": for_timm,
}


@contextlib.contextmanager
def given(block: Block, folder: Path, model: nn.Module) -> Iterator[Names]:
    """Nothing to a block that imports torch itself. Skips what this machine cannot run."""
    if re.search(r"^import torch$", block.code, re.MULTILINE):
        yield {}
        return
    names = common(model)
    if 'device="cuda"' in block.code:
        if not torch.cuda.is_available():
            pytest.skip("torch sees no CUDA device")
        x, y = (t.cuda() for t in (names["x"], names["y"]))
        model.cuda()
        names |= {"x": x, "y": y, "closure": closure_of(model, x, y)}
    if "scaler." in block.code:
        names["scaler"] = torch.amp.GradScaler("cpu")
    trainer = re.search(r"fused_sam\.integrations\.(\w+)", block.code)
    if trainer:
        names = TRAINERS[trainer[1]](folder, names)
    if block.page.name == "distributed.md":
        with one_rank(folder, names) as names:
            yield names
    else:
        yield names


def weights(model: nn.Module) -> list[Tensor]:
    return copy.deepcopy([p.detach() for p in model.parameters()])
