"""The compiled kernels (``csrc/``), for CPU and CUDA tensors."""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
from torch import Tensor

import fused_sam._native as _native
from fused_sam.backends.interface import AccumulateGroup, AdamGroup, AscentGroup, Journal, SGDGroup, TensorList

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


def lacks_cuda() -> bool:
    """Return whether the build has no CUDA kernels, where torch's GPUs could run them."""
    return not torch.version.hip and not _native.cuda.architectures()


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
    kind, index = DEVICE_TYPES[device.type], device.index or 0
    return _native.Batch(params, grads, backups, states, masters, kind, index, True)


def batch(
    params: TensorList,
    grads: TensorList | None = None,
    backups: TensorList | Batch | None = None,
    *states: TensorList | None,
    masters: TensorList | None = None,
) -> Batch:
    if params[0].is_cpu:
        return Batch(False, params, grads, backups, *states, masters=masters)
    if reason := _why_not_device(params[0].device.index):
        raise RuntimeError(f"FusedSAM's CUDA kernels cannot be used: {reason}.")
    return Batch(True, params, grads, backups, *states, masters=masters)


class Batch:
    """The ops, by the kernels of the CPU or, ``for_gpu``, on the current stream of the tensors' device.

    Nothing waits for a device. The CUDA kernels take CPU tensors on the emulator of the tests alone.
    """

    joins_update = True

    def __init__(
        self,
        for_gpu: bool,
        params: TensorList,
        grads: TensorList | None,
        backups: TensorList | Batch | None,
        *states: TensorList | None,
        masters: TensorList | None = None,
    ) -> None:
        self.for_gpu = for_gpu
        self.params = params
        self.ascent = backups if isinstance(backups, Batch) else None
        self.stream = 0  # on which the backups were made
        moved: Any = backups if self.ascent is None else self.ascent.core
        self.device: torch.device = params[0].device
        self.on_host = is_on_host(self.device) if for_gpu else True
        kind, index = (DEVICE_TYPES[self.device.type], self.device.index or 0) if for_gpu else (DEVICE_TYPES["cpu"], 0)
        self.core: _native.Batch = _native.Batch(params, grads, moved, states, masters, kind, index, for_gpu)
        self.unsupported = self.core.unsupported

    def make_backups(self, owned: bool) -> None:
        self.core.make_backups(owned)

    def set_backups(self, backups: TensorList) -> None:
        self.core.set_backups(backups)

    @property
    def has_backup(self) -> list[bool | None]:
        return self.core.has_backup

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        if not self.for_gpu and q != math.inf:
            number: Tensor = _native.empty_number()  # torch.empty takes 2 to 3 % of a small step
            self._run(self.core.norm, None, groups, q, number)
            return number
        partials = self.core.norm_partials(groups, q)  # 0 on the CPU
        workspace = torch.empty(3 + partials, dtype=torch.float64, device=self.device)
        self._run(self.core.norm, None, groups, q, workspace)
        return workspace[:3] if q == math.inf else workspace[0]

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        if norm is not None and norm.dtype != torch.float64:
            norm = norm.double()
        if not self.on_host:
            self.stream = current_stream(self.device).cuda_stream
        self._run(self.core.perturb, None, norm, groups, q, last=(journal, self))

    def restore(self) -> None:
        self._run(self.core.restore, self, len(self.params))

    def restore_accumulate(self, restored: Any, groups: list[AccumulateGroup], journal: Journal) -> None:
        moved, size = (None, 0) if restored is None else (restored.core, len(restored.params))
        self._run(self.core.restore_accumulate, restored, moved, size, groups, last=(journal,))

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        scale = None if grad_scale is None else grad_scale.float()
        skip = None if found_inf is None else found_inf.float()
        self._run(self.core.sgd_update, self.ascent, groups, scale, skip, last=(journal,))

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        scale = None if grad_scale is None else grad_scale.float()
        skip = None if found_inf is None else found_inf.float()
        self._run(self.core.adam_update, self.ascent, groups, steps, scale, skip, last=(journal,))

    def _run(self, op: Any, ascent: Batch | None, *first: Any, last: tuple[Any, ...] = ()) -> None:
        """Call an op of the core, which may read the backups of an ascent."""
        if self.on_host:
            op(*first, torch.get_num_threads(), *last)
            return
        stream = current_stream(self.device)
        if ascent is not None and ascent.stream != stream.cuda_stream:
            # The memory would go back to the ascent's stream, and be used there while it is read here. A gradient's own
            # stream is that of its backward, and as with every optimizer the caller's to wait for.
            for memory in ascent.core.memory:
                memory.record_stream(stream)
        # The kernels' own CUDA runtime sets the device; torch's is told only where it has another one.
        if torch.cuda.current_device() == self.device.index:
            op(*first, stream.cuda_stream, *last)
        else:
            with torch.cuda.device(self.device):
                op(*first, stream.cuda_stream, *last)


def is_on_host(device: torch.device) -> bool:
    """Return whether a device's tensors are in the memory of the host."""
    return device.type == "cpu"


def current_stream(device: torch.device) -> Any:
    """Return torch's current stream of a CUDA device."""
    return torch.cuda.current_stream(device)
