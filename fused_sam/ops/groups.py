"""Hyperparameters of the ops: one entry for each run of tensors that share them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sam.routing import TensorList


class AscentGroup(NamedTuple):
    """How far the next ``size`` tensors are displaced; with ``rho`` < 0 the other way.

    ``rho`` may be a tensor of one element, read on the device. ``decay``: the ascent takes g + decay * w for the
    gradient, that of the loss plus decay / 2 ||w||^2.
    """

    size: int
    rho: float | Tensor
    adaptive: bool
    eta: float = 0.0
    decay: float = 0.0

    @property
    def distance(self) -> Any:
        """|rho|, a number or a tensor."""
        return abs(self.rho)

    def on(self, device: torch.device, size: int) -> AscentGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.rho, Tensor):
            return self
        return self._replace(size=size, rho=_scalar_on(device, self.rho))


class SGDGroup(NamedTuple):
    """torch.optim.SGD's hyperparameters for the next ``size`` tensors; ``first``: their buffers hold nothing yet.

    ``lr`` may be a tensor of one element, read on the device.
    """

    size: int
    lr: float | Tensor
    momentum: float
    dampening: float
    weight_decay: float
    nesterov: bool
    maximize: bool
    first: bool

    def on(self, device: torch.device, size: int) -> SGDGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.lr, Tensor):
            return self
        return self._replace(size=size, lr=_scalar_on(device, self.lr))


class AdamGroup(NamedTuple):
    """torch.optim.Adam's hyperparameters for the next ``size`` tensors; ``first``: their state holds nothing yet.

    ``lr`` may be a tensor of one element, read on the device. ``decoupled``: weight decay as in AdamW. The corrections,
    1 - beta1^t and sqrt(1 - beta2^t) at step t, are `adam_update`'s to fill in; 0 where the device reads the step.
    """

    size: int
    lr: float | Tensor
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    decoupled: bool
    amsgrad: bool
    maximize: bool
    first: bool
    correction1: float = 0.0
    correction2_root: float = 0.0

    def on(self, device: torch.device, size: int) -> AdamGroup:
        """The same for ``size`` tensors on a device."""
        if size == self.size and not isinstance(self.lr, Tensor):
            return self
        return self._replace(size=size, lr=_scalar_on(device, self.lr))

    def at(self, size: int, step: float) -> AdamGroup:
        """The same for ``size`` tensors at a step, with the corrections as torch.optim.Adam computes them."""
        root = (1 - self.beta2**step) ** 0.5
        return self._replace(size=size, correction1=1 - self.beta1**step, correction2_root=root)


class MeanGroup(NamedTuple):
    """How much of the next ``size`` gradients their running means take in; ``first``: the means hold nothing yet."""

    size: int
    weight: float
    first: bool

    def on(self, device: torch.device, size: int) -> MeanGroup:
        """The same for ``size`` tensors."""
        return self._replace(size=size)


def _scalar_on(device: torch.device, value: float | Tensor) -> float | Tensor:
    return value.detach().reshape(()).to(device) if isinstance(value, Tensor) else value


def is_capturing(params: TensorList) -> bool:
    """Whether what is launched now for these parameters goes into a CUDA graph."""
    return bool(params) and params[0].is_cuda and torch.cuda.is_current_stream_capturing()


def host_number(value: Any) -> float | Tensor:
    """A number, or the tensor itself where reading it would wait for its device."""
    return value if isinstance(value, Tensor) and value.device.type != "cpu" else float(value)


def dual_exponent(p: float) -> float:
    """q of 1/p + 1/q = 1.

    Raises:
        ValueError: unless 1 <= p <= inf.
    """
    if not p >= 1:
        raise ValueError(f"Invalid {p=}. Must be >= 1, possibly inf.")
    return math.inf if p == 1 else 1.0 if p == math.inf else p / (p - 1)


def require_sizes(params: TensorList, groups: Sequence[Any]) -> None:
    """Refuse groups that do not cover the parameters."""
    covered = sum(group.size for group in groups)
    if covered != len(params) or any(group.size < 0 for group in groups):
        raise ValueError(f"Invalid groups, of {covered} tensors. Must cover len(params)={len(params)}, each size >= 0.")
