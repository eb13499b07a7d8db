"""How a method makes a step: its optimizer, and how many forward-backward passes over the batch it takes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from bench.paper.config import Config
from bench.paper.models.shake import Noise
from bench.records import Row
from fused_sam import FusedSAM, batchnorm

LossOf: TypeAlias = Callable[[Tensor, Tensor], Tensor]  # of images and targets, at the weights of the moment


class Stepper(Protocol):
    """One optimizer and its step."""

    optimizer: Optimizer

    def step(self, loss_of: LossOf, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        """Train on a batch; the loss, 0-dim, and the passes over the batch that it took."""
        ...


Factory: TypeAlias = Callable[[nn.Module, Config], Stepper]
STEPPERS: dict[str, Factory] = {}


def stepper(name: str) -> Callable[[Factory], Factory]:
    """Make a factory known as `Config.optimizer`."""

    def known(factory: Factory) -> Factory:
        STEPPERS[name] = factory
        return factory

    return known


def make(model: nn.Module, config: Config) -> Stepper:
    """Return the stepper of a run."""
    if config.optimizer not in STEPPERS:
        raise ValueError(f"Invalid optimizer={config.optimizer!r}. Must be one of {', '.join(sorted(STEPPERS))}.")
    return STEPPERS[config.optimizer](model, config)


def base_options(config: Config, base: type[Optimizer]) -> dict[str, Any]:
    """Return arguments of the base optimizer."""
    shared = {"lr": config.lr, "weight_decay": 0.0 if config.decay_in_loss else config.weight_decay}
    if issubclass(base, torch.optim.SGD):
        return shared | {"momentum": config.momentum, "nesterov": config.nesterov}
    return shared


def objective(loss: Tensor, params: Sequence[Tensor], config: Config) -> Tensor:
    """Return the loss, with the L2 term where that is part of it."""
    if not config.decay_in_loss:
        return loss
    return loss + config.weight_decay / 2 * torch.stack([p.square().sum() for p in params]).sum()


class Plain:
    """One gradient, one step. Micro-batches are added up; BatchNorm sees one at a time."""

    def __init__(self, model: nn.Module, config: Config, base: type[Optimizer]) -> None:
        self.optimizer = base(model.parameters(), **base_options(config, base), **config.options)
        self._params, self._config = list(model.parameters()), config

    def step(self, loss_of: LossOf, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        self.optimizer.zero_grad()
        size = self._config.micro_batch or len(images)
        groups = list(zip(images.split(size), targets.split(size), strict=True))
        losses = []
        for group in groups:
            loss = loss_of(*group)
            (objective(loss, self._params, self._config) / len(groups)).backward()
            losses.append(loss.detach())
        if self._config.clip:
            nn.utils.clip_grad_norm_(self._params, self._config.clip)
        self.optimizer.step()
        return torch.stack(losses).mean(), 1.0


class Sharp:
    """FusedSAM in the closure form, with all of its options; BatchNorm statistics from the first pass only.

    Shake-Shake and ShakeDrop draw the same shares in both passes, as in the code that the paper's authors released. As
    there, the first gradient is that of the output (`Config.true_gradient`).
    """

    def __init__(self, model: nn.Module, config: Config, base: type[Optimizer]) -> None:
        options = {"replay_rng": "shake" in config.model, "max_grad_norm": config.clip or None} | config.options
        self.optimizer = FusedSAM(model.parameters(), base, **base_options(config, base), **options)
        self._params, self._config = list(model.parameters()), config
        self._part, self._micro = config.ascent, config.micro_batch
        self._ascent_steps = config.options.get("ascent_steps", 1)
        self._noise = [module for module in model.modules() if isinstance(module, Noise) and config.true_gradient]
        batchnorm.first_pass_only(model, self.optimizer)

    def step(self, loss_of: LossOf, images: Tensor, targets: Tensor) -> tuple[Tensor, float]:
        passes = self._passes()

        def closure(images: Tensor = images, targets: Tensor = targets) -> Tensor:
            for layer in self._noise:
                layer.true_gradient = self.optimizer.perturb_next and not self.optimizer.perturbed
            loss = loss_of(images, targets)
            if self.optimizer.second_order:
                _backward_with_graph(objective(loss, self._params, self._config))
            else:
                objective(loss, self._params, self._config).backward()
            return loss.detach()

        if self._micro is not None:
            groups = zip(images.split(self._micro), targets.split(self._micro), strict=True)
            loss = self.optimizer.step([lambda group=group: closure(*group) for group in groups])
        elif self._part is not None:
            seen = max(1, round(self._part * len(images)))
            loss = self.optimizer.step(closure, ascent=lambda: closure(images[:seen], targets[:seen]))
        else:
            loss = self.optimizer.step(closure)
        return loss, passes

    def _passes(self) -> float:
        """Return those of the next step. The product with the Hessian in the second-order term counts as a pass."""
        sam = self.optimizer
        if sam.direction == "momentum" or not sam.perturb_next:
            return 1.0
        part = 1.0 if self._part is None else self._part
        return 1.0 + part * self._ascent_steps + float(sam.second_order)


def _backward_with_graph(loss: Tensor) -> None:
    """Take the gradient for the second-order term; FusedSAM breaks the cycle that torch warns of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"Using backward\(\) with create_graph=True")
        loss.backward(create_graph=True)


@stepper("sgd")
def _sgd(model: nn.Module, config: Config) -> Stepper:
    return Plain(model, config, torch.optim.SGD)


@stepper("adam")
def _adam(model: nn.Module, config: Config) -> Stepper:
    return Plain(model, config, torch.optim.Adam)


@stepper("sam")
def _sam(model: nn.Module, config: Config) -> Stepper:
    return Sharp(model, config, torch.optim.SGD)


@stepper("sam-adam")
def _sam_adam(model: nn.Module, config: Config) -> Stepper:
    return Sharp(model, config, torch.optim.Adam)


# SGD, SAM, and the ways to make SAM cheaper, by the names that tables and pictures use


@dataclass(frozen=True)
class Method:
    """Says how a method makes its steps.

    Args:
        optimizer: a name in methods.STEPPERS.
        options: of FusedSAM, besides rho.
        ascent: the part of each batch that e is made from.
    """

    optimizer: str = "sam"
    options: dict[str, Any] = field(default_factory=dict)
    ascent: float | None = None

    def configure(self, base: Config, rho: float) -> Config:
        """Return a run with this method and radius, which SGD does without."""
        if self.optimizer == "sgd":
            return base
        return replace(base, optimizer=self.optimizer, options={"rho": rho} | self.options, ascent=self.ascent)


METHODS = {
    "SGD": Method("sgd"),
    "SAM": Method(),
    "SAM, e from a quarter": Method(ascent=0.25),
    "SAM, every 2nd step": Method(options={"interval": 2}),
    "SAM, every 5th step": Method(options={"interval": 5}),
    "LookSAM, every 5th step": Method(options={"interval": 5, "looksam_alpha": 0.7}),
    "MSAM": Method(options={"direction": "momentum"}),
}


def name_of(row: Row) -> str:
    """Return the method of a row, whatever its radius."""
    config = row["config"]
    # Rows from before looksam_alpha had this name call it reuse.
    renamed = {"looksam_alpha" if name == "reuse" else name: value for name, value in config["options"].items()}
    options = {name: value for name, value in renamed.items() if name != "rho"}
    for name, method in METHODS.items():
        if (config["optimizer"], options, config["ascent"]) == (method.optimizer, method.options, method.ascent):
            return name
    raise ValueError(f"Invalid row with optimizer={config['optimizer']!r}, {options=}. Must be of methods.METHODS.")
