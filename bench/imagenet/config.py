"""What decides the figures of a run, and the model and the optimizer that it asks for."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import nn

import fused_sam
from bench import records
from bench.imagenet import finetune
from bench.training.run import cosine

TWO_HEADED = ("googlenet", "inception_v3")  # in training they have a second loss
DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# Arguments of FusedSAM that SGD has no use for. They are None with SGD, and so are the other flags of a SAM step.
SAM_ONLY = ("rho", "adaptive", "eta", "p", "interval", "looksam_alpha", "direction", "decay_in_ascent")
SAM_OPTIONS = (*SAM_ONLY, "max_grad_norm")
SAM_FLAGS = (*SAM_ONLY, "backend", "m_sharpness", "ascent_part")


@dataclass(frozen=True)
class Config:
    """Everything that decides the figures; a checkpoint is continued under the same values only."""

    dataset: str
    augment: str
    model: str
    weights: str | None
    freeze_batchnorm: bool
    image_size: int
    classes: int
    train_images: int
    ranks: int
    batch_size: int
    micro_batches: int
    epochs: int
    warmup: float
    lr: float
    momentum: float
    nesterov: bool
    weight_decay: float
    label_smoothing: float
    ema: float | None
    amp: str
    seed: int
    device: str
    optimizer: str
    rho: float | None
    adaptive: bool | str | None
    eta: float | None
    p: float | None
    interval: int | None
    looksam_alpha: float | None
    direction: str | None
    decay_in_ascent: bool | None
    max_grad_norm: float | None
    backend: str | None
    m_sharpness: str | int | None
    ascent_part: float | None

    @classmethod
    def of(cls, flags: dict[str, Any], **found: Any) -> Config:
        """Return it from the command line and what was found beside it; refuse values that do not go together."""
        given = {field.name: flags[field.name] for field in fields(cls) if field.name in flags} | found
        if given["optimizer"] == "sgd":
            given |= dict.fromkeys(SAM_FLAGS)
        config = cls(**given)
        config._check()
        return config

    def _check(self) -> None:
        if isinstance(self.m_sharpness, int) and self.ranks % self.m_sharpness:
            raise ValueError(f"Invalid m_sharpness={self.m_sharpness}. Must divide the number of ranks, {self.ranks}.")
        if self.amp == "fp16" and self.m_sharpness == "micro":
            raise ValueError("Invalid m_sharpness='micro' with amp='fp16'. A GradScaler cannot go with closures.")
        if self.amp == "fp16" and self.decay_in_ascent:
            raise ValueError("Invalid decay_in_ascent=True with amp='fp16'. The decay has not the scale of the loss.")
        if self.looksam_alpha is not None and self.m_sharpness == "micro":
            given = f"looksam_alpha={self.looksam_alpha}"
            raise ValueError(f"Invalid {given} with m_sharpness='micro'. Must have one perturbation on a rank.")
        if self.direction == "momentum" and self.ascent_part != 1:
            raise ValueError(f"Invalid ascent_part={self.ascent_part} with direction='momentum'. No gradient is taken.")

    def learning_rate(self, epochs: float) -> float:
        """Return the rate after so many epochs: a line up to ``lr``, then half a cosine down to 0."""
        if epochs < self.warmup:
            return self.lr * epochs / self.warmup
        return self.lr * cosine((epochs - self.warmup) / (self.epochs - self.warmup))


def make_model(config: Config) -> nn.Module:
    """Return a classifier with one loss from torchvision, with random weights or those to start from."""
    models = records.torchvision("bench.imagenet").models
    model = _random(models, config)
    if config.weights is not None:
        finetune.start(model, finetune.weights_of(models, config.model, config.weights))
    return model


def _random(models: Any, config: Config) -> nn.Module:
    if config.model == finetune.L2:
        return finetune.efficientnet_l2(models, config.classes)
    if config.model not in models.list_models(module=models) or config.model in TWO_HEADED:
        raise ValueError(f"Invalid model={config.model!r}. Must be a classifier in torchvision.models, with one head.")
    size = {"image_size": config.image_size} if config.model.startswith("vit") else {}
    return models.get_model(config.model, weights=None, num_classes=config.classes, **size)


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """Return SGD, or FusedSAM around it."""
    options: dict[str, Any] = {
        "params": model.parameters(),
        "lr": config.lr,
        "momentum": config.momentum,
        "weight_decay": config.weight_decay,
        "nesterov": config.nesterov,
    }
    if config.optimizer == "sgd":
        return torch.optim.SGD(**options)
    ascent = {name: getattr(config, name) for name in SAM_OPTIONS}
    sam = fused_sam.FusedSAM(**options, **ascent, backend=config.backend, replay_rng=True)
    fused_sam.batchnorm.first_pass_only(model, sam)
    return sam
