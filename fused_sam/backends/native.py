"""The compiled kernels (``csrc/``), for CPU tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_sam import _native

if TYPE_CHECKING:
    from fused_sam.ops import AscentGroup, Journal, SGDGroup
    from fused_sam.routing import TensorList

NEEDS_DENSE = True


def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else f"the native kernels are not for {device_type} tensors"


get_grads = _native.get_grads
clear_grads = _native.clear_grads
lookup = _native.lookup


class Batch:
    def __init__(
        self,
        params: TensorList,
        grads: TensorList | None = None,
        backups: TensorList | Batch | None = None,
        momentum_buffers: TensorList | None = None,
    ) -> None:
        self.params = params
        self._batch: _native.Batch
        kept = backups._batch if isinstance(backups, Batch) else backups
        self._batch = _native.Batch(params, grads, kept, momentum_buffers)

    @property
    def odd(self) -> list[int]:
        return self._batch.odd

    def make_backups(self, owned: bool) -> None:
        self._batch.make_backups(owned)

    def set_backups(self, backups: TensorList) -> None:
        self._batch.set_backups(backups)

    @property
    def kept(self) -> list[bool | None]:
        return self._batch.kept

    def norm(self, groups: list[AscentGroup]) -> Tensor:
        return torch.scalar_tensor(self._batch.norm(groups, torch.get_num_threads()), dtype=torch.float64)

    def perturb(self, norm: Tensor, groups: list[AscentGroup], journal: Journal) -> None:
        self._batch.perturb(norm.item(), groups, torch.get_num_threads(), journal, self)

    def restore(self) -> None:
        self._batch.restore(len(self.params), torch.get_num_threads())

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        if found_inf is not None and found_inf.item() != 0.0:
            self.restore()
            journal.clear()
            return
        # The reciprocal in fp64, rounded once, is what torch.amp.GradScaler multiplies by.
        multiplier = 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().item()
        self._batch.sgd_update(groups, multiplier, torch.get_num_threads(), journal)


batch = Batch
