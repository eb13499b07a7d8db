"""The CUDA kernels as a backend for CPU tensors, in a process whose core is that on the emulator."""

from __future__ import annotations

from fused_sam.backends import Candidate, native
from fused_sam.backends.interface import TensorList
from fused_sam.backends.native import Batch

__all__ = [
    "BACKEND",
    "BASE_STEPS",
    "NEEDS_DENSE",
    "TAKES_MASTERS",
    "TAKES_POWERS",
    "batch",
    "why_not",
]

NEEDS_DENSE = native.NEEDS_DENSE
BASE_STEPS = native.BASE_STEPS
TAKES_MASTERS = native.TAKES_MASTERS
TAKES_POWERS = native.TAKES_POWERS
BACKEND = Candidate("emulated", "ptx.backend", "nothing: it is for the tests only")


def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else "the emulator is for CPU tensors"


def batch(
    params: TensorList,
    grads: TensorList | None = None,
    backups: TensorList | Batch | None = None,
    *states: TensorList | None,
    masters: TensorList | None = None,
) -> Batch:
    return Batch(True, params, grads, backups, *states, masters=masters)
