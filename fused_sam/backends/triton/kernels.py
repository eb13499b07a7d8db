"""The kernels, in Triton: one program per chunk of a tensor, no matter how many tensors there are.

Every address is an int64 in a table in device memory, and so is every hyperparameter: only dtypes are compiled in.
What changes between steps changes a table, never the code. Arithmetic is that of ``csrc/arithmetic.h``: each product
and each fused multiply-add is written out, and the launches forbid the compiler to fuse any other (`OPTIONS`).

Tables (int64, one entry per tensor of the op unless said otherwise; an address of 0 stands for "there is none"):

    chunks      [chunks]     tensor << 32 | number of the chunk within it
    sizes       elements
    groups      index of the group
    weights, grads, backups, momenta, exp_avgs, exp_avg_sqs, max_exp_avg_sqs, steps
                addresses (of parameters: an argument called "params" clashes with the code that Triton generates)
    moved       the address of the backup, written by the kernel that puts w there, and 0 before: true whenever Python
                is interrupted
    ascent      [groups, 5]  rho as the bits of a float64, or the address of a scalar, flags, then eta and decay as bits
    sgd         [groups, 6]  lr, momentum, 1 - dampening, weight_decay as bits, the address of lr or 0, and flags
    adam        [groups, 9]  lr, beta1, beta2, eps, weight_decay, 1 - beta1^t, sqrt(1 - beta2^t) as bits (0 where the
                             kernel reads the step), the address of lr or 0, and flags
    means       [groups, 2]  the weight as bits, and flags
"""

from __future__ import annotations

from typing import Any

from fused_sam.backends.triton.accumulate import restore_accumulate
from fused_sam.backends.triton.ascent import norm_partials, norm_total, perturb, restore
from fused_sam.backends.triton.descent import adam_update, sgd_update
from fused_sam.backends.triton.peak import peak_partials, peak_total

__all__ = [
    "adam_update",
    "norm_partials",
    "norm_total",
    "peak_partials",
    "peak_total",
    "perturb",
    "restore",
    "restore_accumulate",
    "sgd_update",
]

# Elements per program. The norm has one fp64 partial per chunk, whatever the GPU and the grid: its bits depend on this
# number and on TILE, and on nothing else.
CHUNK = 8192
# TILE: elements that a program has in flight at a time, 4 vectors of 16 bytes of each fp32 operand per thread.
# REST: the same where vectors do not fit, at the end of a tensor, and all along a misaligned one. It must differ from
# TILE: the compiler gives accesses of one shape one distribution over threads, and stores of the other size another. In
# the swap a thread must write where it has read itself.
TILES = {"TILE": 2048, "REST": 1024}
# For kernels of five tensors, or of places beside numbers in fp64: half the elements fill the registers.
NARROW_TILES = {"TILE": 1024, "REST": 512}
NARROW = (adam_update, peak_partials)
# Elements that the program which adds up the partials reads at a time, and the one which compares the peaks of chunks.
TOTAL_TILE = 8192
PEAK_TOTAL_TILE = 2048
# fp64 must not be contracted either: bits would depend on the vendor's compiler.
OPTIONS = {"num_warps": 4, "enable_fp_fusion": False}
TOTAL_OPTIONS = {"num_warps": 16, "enable_fp_fusion": False}

# Flags of a group.
WIDE = 1  # the scalar at the address is a float64, else a float32
ADAPTIVE = 2
NESTEROV = 2
MAXIMIZE = 4
FIRST = 8
MOMENTUM = 16
DECAY = 32
AMSGRAD = 64
DECOUPLED = 128


def tiles_of(kernel: Any) -> dict[str, int]:
    """Return TILE and REST of a kernel with one program per chunk."""
    return NARROW_TILES if kernel in NARROW else TILES
