"""Launches over the chunks of an op, and the norms that take several."""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor

from fused_sam.backends.triton import kernels, tables

_LANGUAGE = {
    torch.float32: triton.language.float32,
    torch.float64: triton.language.float64,
    torch.bfloat16: triton.language.bfloat16,
    torch.float16: triton.language.float16,
}


def launch(kernel: Any, what: tables.Launch, *arguments: Any, **constants: Any) -> None:
    """Launch a kernel with one program per chunk."""
    kernel[(what.programs,)](*arguments, **_constants(kernel, what.dtypes, tuple(constants.items())))


@functools.cache
def _constants(kernel: Any, dtypes: tables.Dtypes, more: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    """Return what is compiled in: the dtypes, in memory and of the arithmetic, and the division of the work."""
    param, grad = dtypes
    computed = torch.float64 if param == torch.float64 else torch.float32
    constants = {"P": _LANGUAGE[param], "G": _LANGUAGE[grad], "C": _LANGUAGE[computed], **dict(more)}
    constants |= {"CHUNK": kernels.CHUNK, **kernels.tiles_of(kernel)}
    return {name: x for name, x in constants.items() if name in kernel.arg_names} | kernels.OPTIONS


def float64(device: torch.device, *size: int) -> Tensor:
    """Return an uninitialised fp64 tensor."""
    return torch.empty(size, dtype=torch.float64, device=device)


def sum_of_squares(plan: tables.Plan, columns: list[Tensor]) -> Tensor:
    """Return ||x||_2, shape []."""
    partials, result = float64(columns[0].device, plan.total), float64(columns[0].device)
    options: dict[str, Any] = {"TILE": kernels.TOTAL_TILE, **kernels.TOTAL_OPTIONS}
    # Squares of fp64 may leave its range, which only the device knows. Elsewhere a second look is over at once.
    for again in (False, True) if any(torch.float64 in x.dtypes for x in plan.launches) else (False,):
        for x in plan.launches:
            launch(kernels.norm_partials, x, *columns, partials, result, x.first, AGAIN=again)
        kernels.norm_total[(1,)](partials, result, plan.total, AGAIN=again, **options)
    return result


def peak(plan: tables.Plan, columns: list[Tensor]) -> Tensor:
    """Return the largest |x|, the number of its tensor, and its place in that tensor; shape [3]."""
    device = columns[0].device
    peaks, elements = torch.empty(2, plan.total, dtype=torch.int64, device=device)
    result = float64(device, 3)
    for x in plan.launches:
        launch(kernels.peak_partials, x, *columns, peaks, elements, x.first)
    kernels.peak_total[(1,)](
        columns[0], peaks, elements, result, plan.total, TILE=kernels.PEAK_TOTAL_TILE, **kernels.TOTAL_OPTIONS
    )
    return result
