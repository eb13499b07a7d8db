"""The compiled kernels (``csrc/``), for CPU and CUDA tensors."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import fused_sam._native as _native
from fused_sam.backends.interface import AdamGroup, AscentGroup, Journal, MeanGroup, SGDGroup, TensorList

NEEDS_DENSE = True
BASE_STEPS = ("sgd_update", "adam_update")
TAKES_MASTERS = True
TAKES_POWERS = True


def why_not(device_type: str) -> str | None:
    if device_type == "cpu":
        return None
    if device_type != "cuda":
        return f"the native kernels are not for {device_type} tensors"
    if torch.version.hip:
        return "this torch is a ROCm build, and the native kernels are for NVIDIA GPUs"
    if not torch.cuda.is_available():
        return _native.cuda.why_not(-1) or "torch sees no CUDA device"
    return _why_not_device(torch.cuda.current_device())


@functools.cache
def _why_not_device(index: int) -> str | None:
    with torch.cuda.device(index):  # torch's own idea of the current device stays what it was
        return _native.cuda.why_not(index) or None


# DLPack's numbers of the kinds of devices whose tensors the core can read. AMD's are torch's "cuda", too.
DEVICE_TYPES = {"cpu": 1, "cuda": 10 if torch.version.hip else 2, "xpu": 14}


def operands(
    device: torch.device,
    params: TensorList,
    grads: TensorList | None,
    backups: TensorList | _native.Batch | None,
    states: tuple[TensorList | None, ...],
    masters: TensorList | None = None,
) -> _native.Batch:
    """Return the tensors of an op as kernels see them: addresses, checked. For backends of other kernels."""
    index = device.index or 0
    return _native.Batch(params, grads, backups, states, masters, DEVICE_TYPES[device.type], index)


def batch(
    params: TensorList,
    grads: TensorList | None = None,
    backups: TensorList | CPUBatch | None = None,
    *states: TensorList | None,
    masters: TensorList | None = None,
) -> CPUBatch:
    device = params[0].device
    if params[0].is_cpu:
        return CPUBatch(device, params, grads, backups, *states, masters=masters)
    if reason := _why_not_device(device.index):
        raise RuntimeError(f"FusedSAM's CUDA kernels cannot be used: {reason}.")
    return CUDABatch(device, params, grads, backups, *states, masters=masters)


class CPUBatch:
    joins_update = True

    def __init__(
        self,
        device: torch.device,
        params: TensorList,
        grads: TensorList | None,
        backups: TensorList | CPUBatch | None,
        *states: TensorList | None,
        masters: TensorList | None = None,
    ) -> None:
        self.device = device
        self.params = params
        moved: Any = backups.core if isinstance(backups, CPUBatch) else backups
        kind, index = 1 if params[0].is_cpu else DEVICE_TYPES[device.type], device.index or 0
        self.core: _native.Batch = _native.Batch(params, grads, moved, states, masters, kind, index)
        self.odd = self.core.odd

    def make_backups(self, owned: bool) -> None:
        self.core.make_backups(owned)

    def set_backups(self, backups: TensorList) -> None:
        self.core.set_backups(backups)

    @property
    def kept(self) -> list[bool | None]:
        return self.core.kept

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        value, tensor, element = self.core.norm(groups, q, torch.get_num_threads())
        if q == math.inf:
            return torch.tensor([value, tensor, element], dtype=torch.float64)
        return torch.full((), value, dtype=torch.float64)

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        numbers: Any = (0.0, -1.0, -1.0)
        if norm is not None:
            numbers = norm.tolist() if norm.dim() else (norm.item(), -1.0, -1.0)
        self.core.perturb(numbers, groups, q, torch.get_num_threads(), journal, self)

    def restore(self) -> None:
        self.core.restore(len(self.params), torch.get_num_threads())

    def restore_accumulate(self, restored: Any, groups: list[MeanGroup], journal: Journal) -> None:
        moved, size = _moved(restored)
        _native.restore_accumulate(self.core, moved, size, groups, torch.get_num_threads(), journal)

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        if found_inf is not None and self._skips(found_inf, journal):
            return
        multiplier = 1.0 if grad_scale is None else _multiplier(grad_scale)
        self.core.sgd_update(groups, multiplier, torch.get_num_threads(), journal)

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        if found_inf is not None and self._skips(found_inf, journal):
            return
        multiplier = 1.0 if grad_scale is None else _multiplier(grad_scale)
        self.core.adam_update(groups, steps, multiplier, torch.get_num_threads(), journal)

    def _skips(self, found_inf: Tensor, journal: Journal) -> bool:
        """Return whether there is only to restore, which is done then."""
        if found_inf.item() == 0.0:
            return False
        self.restore()
        journal.clear()
        return True


def _multiplier(grad_scale: Tensor) -> float:
    """Return what torch.amp.GradScaler multiplies by, the reciprocal in fp64, rounded once."""
    return grad_scale.double().reciprocal().float().item()


def _moved(restored: CPUBatch | None) -> tuple[_native.Batch | None, int]:
    """Return the core's view of an ascent, and of how many parameters it is."""
    return (None, 0) if restored is None else (restored.core, len(restored.params))


class CUDABatch(CPUBatch):
    """The ops as kernels on the current stream of the tensors' device. None of them waits for it.

    On CPU tensors, which `batch` never gives it, the same kernels are interpreted: the tests run them so.
    """

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        partials = _native.cuda.norm_partials(self.core, groups, q)
        workspace = torch.empty(3 + partials, dtype=torch.float64, device=self.device)
        with self._launching() as stream:
            _native.cuda.norm(self.core, groups, q, workspace, stream)
        return workspace[:3] if q == math.inf else workspace[0]

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        # The kernels for q other than 1 and 2 read three numbers, of which only infinite q has the last two.
        numbers = torch.zeros((), dtype=torch.float64, device=self.device) if norm is None else norm.double()
        if numbers.dim() == 0 and q != 1 and q != 2:
            numbers = numbers.expand(3).contiguous()
        with self._launching() as stream:
            _native.cuda.perturb(self.core, numbers, groups, q, stream, journal, self)

    def restore(self) -> None:
        with self._launching() as stream:
            _native.cuda.restore(self.core, len(self.params), stream)

    def restore_accumulate(self, restored: Any, groups: list[MeanGroup], journal: Journal) -> None:
        moved, size = _moved(restored)
        with self._launching() as stream:
            _native.cuda.restore_accumulate(self.core, moved, size, groups, stream, journal)

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        scale, skip = (None if x is None else x.float() for x in (grad_scale, found_inf))
        with self._launching() as stream:
            _native.cuda.sgd_update(self.core, groups, scale, skip, stream, journal)

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        scale, skip = (None if x is None else x.float() for x in (grad_scale, found_inf))
        with self._launching() as stream:
            _native.cuda.adam_update(self.core, groups, steps, scale, skip, stream, journal)

    def _launching(self) -> _Launching:
        return _Launching(self.device)


class _Launching:
    """The current stream of a device, as an integer. The device is the thread's current one inside the context.

    The kernels' own CUDA runtime sets the device; torch's is told only where it has another one, which saves time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.guard: torch.cuda.device | None = None

    def __enter__(self) -> int:
        if self.device.type == "cpu":
            return 0
        if torch.cuda.current_device() != self.device.index:
            self.guard = torch.cuda.device(self.device)
            self.guard.__enter__()
        return torch.cuda.current_stream(self.device).cuda_stream

    def __exit__(self, *error: object) -> None:
        if self.guard is not None:
            self.guard.__exit__(*error)
