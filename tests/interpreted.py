"""The CUDA kernels as a backend for CPU tensors: the functions that CUDA threads call, called lane by lane.

Everything but the launch itself is what a GPU runs: the cutting of tensor lists into launches, units and packs, the
arithmetic, the order of the sums.
"""

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
BACKEND = Candidate("interpreted", "interpreted", "nothing: it is for the tests only")


def why_not(device_type: str) -> str | None:
    return None if device_type == "cpu" else "the interpreter is for CPU tensors"


def batch(
    params: TensorList,
    grads: TensorList | None = None,
    backups: TensorList | Batch | None = None,
    *states: TensorList | None,
    masters: TensorList | None = None,
) -> Batch:
    return Batch(True, params, grads, backups, *states, masters=masters)
