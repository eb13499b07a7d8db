"""The compiled kernels (``csrc/``), for CPU and CUDA tensors."""

from __future__ import annotations

import functools
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fused_sam import _native

if TYPE_CHECKING:
    from fused_sam.ops import AdamGroup, AscentGroup, Journal, MeanGroup, SGDGroup
    from fused_sam.routing import TensorList

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
    """The tensors of an op as kernels see them: addresses, checked."""
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
    if device.type == "cpu":
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
        kept: Any = backups._batch if isinstance(backups, CPUBatch) else backups
        self._batch: _native.Batch = operands(device, params, grads, kept, states, masters)

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

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        value, tensor, element = self._batch.norm(groups, q, torch.get_num_threads())
        if q == math.inf:
            return torch.tensor([value, tensor, element], dtype=torch.float64)
        return torch.scalar_tensor(value, dtype=torch.float64)

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        value, tensor, element = (0.0, -1.0, -1.0) if norm is None else _numbers(norm)
        self._batch.perturb((value, tensor, element), groups, q, torch.get_num_threads(), journal, self)

    def restore(self) -> None:
        self._batch.restore(len(self.params), torch.get_num_threads())

    def restore_accumulate(self, restored: CPUBatch | None, groups: list[MeanGroup], journal: Journal) -> None:
        moved, size = _moved(restored)
        _native.restore_accumulate(self._batch, moved, size, groups, torch.get_num_threads(), journal)

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        if self._skips(found_inf, journal):
            return
        self._batch.sgd_update(groups, _multiplier(grad_scale), torch.get_num_threads(), journal)

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        if self._skips(found_inf, journal):
            return
        self._batch.adam_update(groups, steps, _multiplier(grad_scale), torch.get_num_threads(), journal)

    def _skips(self, found_inf: Tensor | None, journal: Journal) -> bool:
        """Whether there is only to restore, which is done then."""
        if found_inf is None or found_inf.item() == 0.0:
            return False
        self.restore()
        journal.clear()
        return True


def _multiplier(grad_scale: Tensor | None) -> float:
    """The reciprocal in fp64, rounded once, is what torch.amp.GradScaler multiplies by."""
    return 1.0 if grad_scale is None else grad_scale.double().reciprocal().float().item()


def _moved(restored: CPUBatch | None) -> tuple[_native.Batch | None, int]:
    """The core's view of an ascent, and of how many parameters it is."""
    return (None, 0) if restored is None else (restored._batch, len(restored.params))


def _numbers(norm: Tensor) -> list[float]:
    return norm.tolist() if norm.dim() else [norm.item(), -1.0, -1.0]


class CUDABatch(CPUBatch):
    """The ops as kernels on the current stream of the tensors' device. None of them waits for it.

    On CPU tensors, which `batch` never gives it, the same kernels are interpreted: the tests run them so.
    """

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        partials = _native.cuda.norm_partials(self._batch, groups, q)
        workspace = torch.empty(3 + partials, dtype=torch.float64, device=self.device)
        with self._launching() as stream:
            _native.cuda.norm(self._batch, groups, q, workspace, stream)
        return workspace[:3] if q == math.inf else workspace[0]

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        # The kernels for q other than 1 and 2 read three numbers, of which only infinite q has the last two.
        numbers = torch.zeros((), dtype=torch.float64, device=self.device) if norm is None else norm.double()
        if numbers.dim() == 0 and q != 1 and q != 2:
            numbers = numbers.expand(3).contiguous()
        with self._launching() as stream:
            _native.cuda.perturb(self._batch, numbers, groups, q, stream, journal, self)

    def restore(self) -> None:
        with self._launching() as stream:
            _native.cuda.restore(self._batch, len(self.params), stream)

    def restore_accumulate(self, restored: CPUBatch | None, groups: list[MeanGroup], journal: Journal) -> None:
        moved, size = _moved(restored)
        with self._launching() as stream:
            _native.cuda.restore_accumulate(self._batch, moved, size, groups, stream, journal)

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        scale, skip = (None if x is None else x.float() for x in (grad_scale, found_inf))
        with self._launching() as stream:
            _native.cuda.sgd_update(self._batch, groups, scale, skip, stream, journal)

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
            _native.cuda.adam_update(self._batch, groups, steps, scale, skip, stream, journal)

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
