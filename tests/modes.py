"""Every option that changes what a step does, each away from its neutral value, and bases to combine them with."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import RHO, leaves
from torch import Tensor

from fused_sam import FusedSAM

MODES: dict[str, dict[str, Any]] = {
    "plain": {},
    "adaptive weights": {"adaptive": "weights", "eta": 0.03},
    "p=1.5, adaptive, decay": {"p": 1.5, "adaptive": True, "eta": 0.03, "decay_in_ascent": True},
    "p=1": {"p": 1.0},
    "p=inf": {"p": math.inf},
    "clipping": {"max_grad_norm": 0.3},
    "three ascent steps": {"ascent_steps": 3},
    "two ascent steps, p=3": {"ascent_steps": 2, "p": 3.0},
    "second order": {"second_order": True},
    "interval": {"interval": 2, "start": 1},
    "LookSAM": {"interval": 2, "looksam_alpha": 0.37},
    "MSAM": {"direction": "momentum"},
    "masters": {"master_weights": True},
    "telemetry": {"telemetry": True, "replay_rng": True},
}
BASES: dict[str, tuple[type[torch.optim.Optimizer], dict[str, Any]]] = {
    "SGD": (torch.optim.SGD, {"lr": 0.13, "momentum": 0.87, "nesterov": True, "weight_decay": 0.017}),
    "Adam": (torch.optim.Adam, {"lr": 0.013, "weight_decay": 0.017}),
    "AdamW": (torch.optim.AdamW, {"lr": 0.013, "weight_decay": 0.17, "amsgrad": True}),
    "NAdam": (torch.optim.NAdam, {"lr": 0.013, "weight_decay": 0.017}),
}
# Each option with SGD and, in turn, with one of the other bases, and each base alone. All combinations take minutes:
# make soak.
_OTHERS = [base for base in BASES if base != "SGD"]
_IN_TURN = {mode: _OTHERS[i % len(_OTHERS)] for i, mode in enumerate(MODES)}
COMBINED = [
    pytest.param(mode, base, id=f"{base}-{mode}")
    for base in BASES
    for mode in MODES
    if not (mode == "masters" and base == "NAdam")  # needs a fused base
    and not ("decay" in mode and base == "AdamW")  # whose decay is no part of the loss
    and ("FUSED_SAM_SOAK" in os.environ or base == "SGD" or mode == "plain" or _IN_TURN[mode] == base)
]
every_mode = pytest.mark.parametrize(("mode", "base"), COMBINED)


def dtype_of(mode: str, plain: torch.dtype = torch.float32) -> torch.dtype:
    return torch.bfloat16 if mode == "masters" else plain


def make(mode: str, base: str, backend: str, device: str, large: int = 1031) -> FusedSAM:
    """Of a vector, a matrix, a large vector and a parameter that never has a gradient."""
    params = leaves(9, 12, large, 5, device=device, dtype=dtype_of(mode))
    params[1] = params[1].detach().view(3, 4).requires_grad_()
    return optimizer_of(params, mode, base, backend)


def optimizer_of(params: Any, mode: str, base: str, backend: str, **changed: Any) -> FusedSAM:
    base_class, options = BASES[base]
    return FusedSAM(params, base_class, **{"rho": RHO, "backend": backend, **options, **MODES[mode], **changed})


def step(opt: FusedSAM, batches: int = 1, before: Callable[[], None] = lambda: None) -> int:
    """A whole step on a loss of all but the last parameter. How often closures were called; ``before`` each."""
    params = opt.param_groups[0]["params"]
    calls = 0

    def closure(batch: int) -> Tensor:
        nonlocal calls
        calls += 1
        before()
        loss = sum((0.3 + i + batch) * (p * p).sum() + p.sin().sum() for i, p in enumerate(params[:-1]))
        loss.backward(create_graph=opt.second_order)
        return loss

    closures = [lambda k=k: closure(k) for k in range(batches)]
    opt.step(closures if batches > 1 else closures[0])
    opt.zero_grad()  # second_order leaves a cycle of graphs otherwise
    return calls


def after(opt: FusedSAM, steps: int) -> FusedSAM:
    for _ in range(steps):
        step(opt)
    return copy.deepcopy(opt)
