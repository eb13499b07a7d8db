"""What a backend is: its functions, the batch that it makes of the tensors of an op, and what both are given.

It imports nothing of the package. mypy compares every backend with `Backend`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, TypeAlias

import torch
from torch import Tensor

TensorList: TypeAlias = list[Any]  # of Tensor | None

# What to undo if the step goes no further: entries with ``params``, ``has_backup`` (None for each parameter that is not
# displaced), ``joins_update`` and ``restore()``. The code that perturbs the weights enters them at that moment; a base
# step enters what it does to its state before the weights follow. The update clears the journal at the moment at which
# it is made, so that an interrupt always finds the journal accurate.
Journal: TypeAlias = list[Any]

SIXTEEN_BIT = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, torch.float64, *SIXTEEN_BIT)


class InvalidTensor(ValueError):
    """A tensor that no op can take. ``index`` is its place in the lists, ``reason`` one clause that says why."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"Invalid tensor at index {index}: {reason}.")
        self.index = index
        self.reason = reason


def can_mix(param: torch.dtype, grad: torch.dtype) -> bool:
    """Return whether a parameter of one dtype can have a gradient of the other: the same, or fp32 beside 16 bits."""
    return param == grad or {param, grad} in ({torch.float32, x} for x in SIXTEEN_BIT)


# Hyperparameters: one group for each run of tensors that share them. The second field, rho or lr, may be a tensor.


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
        """Return |rho|, a number or a tensor."""
        return abs(self.rho)

    def on(self, device: torch.device, size: int) -> AscentGroup:
        """Return the group for ``size`` tensors on a device."""
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
        """Return the group for ``size`` tensors on a device."""
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
        """Return the group for ``size`` tensors on a device."""
        return self._replace(size=size, lr=_scalar_on(device, self.lr))

    def at(self, size: int, step: float) -> AdamGroup:
        """Return the group for ``size`` tensors at a step, with the corrections as torch.optim.Adam computes them."""
        root = (1 - self.beta2**step) ** 0.5
        return self._replace(size=size, correction1=1 - self.beta1**step, correction2_root=root)


class AccumulateGroup(NamedTuple):
    """How much of the next ``size`` gradients their running means take in; ``first``: the means hold nothing yet."""

    size: int
    weight: float
    first: bool

    def on(self, device: torch.device, size: int) -> AccumulateGroup:
        """Return the group for ``size`` tensors."""
        return self._replace(size=size)


def _scalar_on(device: torch.device, value: float | Tensor) -> float | Tensor:
    return value.detach().reshape(()).to(device) if isinstance(value, Tensor) else value


class Batch(Protocol):
    """The tensors of one op, read once. The methods are the ops of `fused_sam.ops`, with its arguments and results.

    An ascent's batch is an entry of the journal: it knows which parameters it has displaced, and where their w is.
    """

    params: TensorList

    @property
    def joins_update(self) -> bool:
        """Return whether an update by the same backend can restore what this has perturbed."""

    @property
    def unsupported(self) -> Sequence[int]:
        """Return the indices of tensors that `fused_sam.ops.routing` must look at before an op may take them."""

    @property
    def has_backup(self) -> TensorList:
        """Return an entry for each parameter: None for those without a backup."""

    def make_backups(self, owned: bool) -> None:
        """Find memory for w of each parameter with a gradient: the gradient's own where that is ``owned`` alone."""

    def set_backups(self, backups: TensorList) -> None:
        """Take these for the backups."""

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        """Return ||T g||_q on the device."""

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        """Back up w, write w + e, and enter this batch in the journal."""

    def restore(self) -> None:
        """Write w back."""

    def restore_accumulate(self, restored: Any, groups: list[AccumulateGroup], journal: Journal) -> None:
        """Restore an ascent's batch, if given, and update the running means that are this batch's parameters."""

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        """Restore w and step; ``states`` of the batch are the momentum buffers."""

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        """Restore w and step; ``states`` are exp_avgs, exp_avg_sqs and max_exp_avg_sqs. ``steps`` done before are read
        where the groups do not hold the corrections; None if none is."""


class Backend(Protocol):
    """A module that implements the ops."""

    @property
    def NEEDS_DENSE(self) -> bool:
        """Return whether tensors of other layouts than dense ones must be replaced by contiguous stand-ins."""

    @property
    def BASE_STEPS(self) -> tuple[str, ...]:
        """Return the base steps that a batch has."""

    @property
    def TAKES_MASTERS(self) -> bool:
        """Return whether a batch takes masters."""

    @property
    def TAKES_POWERS(self) -> bool:
        """Return whether a batch has the ascents of p other than 1, 2 and inf."""

    def why_not(self, device_type: str) -> str | None:
        """Return why this backend cannot take tensors of a device type; None where it can."""

    def batch(
        self,
        params: TensorList,
        grads: TensorList | None = None,
        backups: Any = None,
        *states: TensorList | None,
        masters: TensorList | None = None,
    ) -> Batch:
        """Return the tensors of an op as a batch.

        ``backups`` is a list, or the batch of the ascent whose backups are to be restored. ``states``: what the base
        step keeps. ``masters``: w in fp32 of 16-bit parameters, which hold it rounded; None for the others.
        """
