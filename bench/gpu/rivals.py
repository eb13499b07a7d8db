"""The variants measured on a GPU: FusedSAM on each backend that works there, and its rivals.

torch's SGD takes its foreach form for CUDA tensors unless told otherwise, so `eager SAM + SGD` is what most code runs.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim import SGD

from bench.speed import rivals
from bench.speed.compiled import CompiledSAM, OutOfTime, time_limit
from bench.speed.rivals import RHO, SGD_OPTIONS, PlainSGD, TwoPass, Variant, eager_sam, foreach_sam
from fused_sam import FusedSAM, backends

EAGER, GRAPH = "eager", "graph"
MODES = (EAGER, GRAPH)
# Ours by backend, best first.
OURS = {"native": "fused_sam", "triton": "fused_sam_triton", "eager": "fused_sam_eager"}
SCALE = rivals.SCALE
FOREACH = "foreach_sgd_fused"
# The rivals of the short tables: what most code runs, and the best of torch; in a graph what comes nearest to them.
SHORT = {EAGER: ("eager_sgd", FOREACH), GRAPH: ("eager_copy_sgd", "foreach_nosync_sgd_fused")}
BYTES_EAGER_BACKEND = 128


@dataclass(frozen=True)
class GpuVariant(Variant):
    """`not_captured`: why a CUDA graph cannot hold it; `graph_only`: stands in for one of those there."""

    not_captured: str = ""
    graph_only: bool = False
    # Its first step runs a compiler.
    compiled: bool = False
    # Whether 16-bit tensors stay 16-bit inside, so that their bytes follow from those of fp32.
    scales: bool = True

    def moved(self, dtype: torch.dtype) -> float | None:
        """Return bytes its operations move per parameter; None where they were not counted."""
        return self.bytes_per_param(dtype) if self.scales or dtype == torch.float32 else None


def _fused_sam(backend: str, params: list[Tensor], **options: Any) -> TwoPass:
    return FusedSAM(params, SGD, rho=RHO, backend=backend, **SGD_OPTIONS, **options)


def _ours(device: str, mode: str) -> dict[str, GpuVariant]:
    states = backends.available(device)
    options = {"capturable": True} if mode == GRAPH else {}
    made = {}
    for backend, name in OURS.items():
        if states.get(backend) != "ok":
            continue
        title = "FusedSAM" if name == rivals.OURS else f"FusedSAM({backend})"
        moved = BYTES_EAGER_BACKEND if backend == "eager" else 40
        build = functools.partial(_fused_sam, backend, **options)
        made[name] = GpuVariant(title, build, moved, scales=backend != "eager")
    return made


REBINDS = "rebinds its parameters, so every replay would start from the same weights"
READS = "reads the norm on the host"
RIVALS: dict[str, GpuVariant] = {
    "eager_sgd": GpuVariant("eager SAM + SGD", eager_sam(), 92, not_captured=REBINDS),
    "eager_sgd_fused": GpuVariant("eager SAM + SGD(fused)", eager_sam(fused=True), 68, not_captured=REBINDS),
    "eager_copy_sgd": GpuVariant("eager SAM, restored by copy, + SGD", eager_sam(rebind=False), 100, graph_only=True),
    FOREACH: GpuVariant("foreach SAM + SGD(fused)", foreach_sam(fused=True), 52, not_captured=READS),
    "foreach_nosync_sgd_fused": GpuVariant(
        "foreach SAM, no host read, + SGD(fused)", foreach_sam(fused=True, sync=False), 60
    ),
    "pytorch_optimizer": GpuVariant(
        "pytorch_optimizer.SAM", rivals.VARIANTS["pytorch_optimizer"].build, 92, needs="pytorch_optimizer"
    ),
    "compiled": GpuVariant("torch.compile(foreach SAM + SGD)", CompiledSAM, 40, compiled=True),
    SCALE: GpuVariant("SGD(fused) alone", functools.partial(PlainSGD, **SGD_OPTIONS, fused=True), 20),
}
TITLES = {
    "fused_sam": "FusedSAM",
    "fused_sam_triton": "FusedSAM(triton)",
    "fused_sam_eager": "FusedSAM(eager)",
    **{name: variant.title for name, variant in RIVALS.items()},
}


def variants(device: str, mode: str) -> dict[str, GpuVariant]:
    """Return what is installed and works on the device, ours first."""
    fitting = {name: v for name, v in RIVALS.items() if v.available() and (mode == GRAPH or not v.graph_only)}
    return _ours(device, mode) | fitting


@dataclass
class CompileBudget:
    """Seconds that compiled variants may still take for their first steps, over a whole run."""

    left_s: float

    def run(self, variant: GpuVariant, work: Callable[[], Any]) -> Any:
        """Do what may make the variant compile."""
        if not variant.compiled:
            return work()
        if self.left_s <= 0:
            raise RuntimeError("no time left to compile")
        begin = time.monotonic()
        try:
            with time_limit(self.left_s):
                return work()
        except OutOfTime as error:
            torch._dynamo.reset()
            raise RuntimeError(f"compilation {error}") from None
        finally:
            self.left_s -= time.monotonic() - begin
