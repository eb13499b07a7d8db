"""Mistakes of the loop around a step that can be seen without waiting for the device. Each is warned of once."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fused_sam.backends.interface import TensorList

_LIBRARIES = tuple(str(Path(file).parent) for file in (__file__, torch.__file__))
NO_FIRST = (
    "No parameter has a gradient at first_step(): the weights stay at w, and the step is one of the base optimizer. "
    "Call loss.backward() before it, or in the closure."
)
NO_SECOND = (
    "No parameter has a gradient at w + e: the step updates nothing. Call loss.backward() between first_step() and "
    "step(), too."
)
SUM = (
    "The second gradients seem to have been added to the first: each was written once since first_step(). The step "
    "then takes g1 + g2. Call first_step(zero_grad=True), or zero_grad() after it."
)


class First(NamedTuple):
    """The gradients of the first pass: a parameter that had one, and what they would be if the second were added.

    ``sums`` has, for each parameter with a gradient that was left in p.grad, its identity and its version after one
    more write. It does not hold the gradients, whose memory may be wanted.
    """

    param: Tensor
    sums: list[tuple[int, int] | None]


def first_of(tensors: list[Tensor], grads: TensorList, left: bool) -> First | None:
    """Return what `look_at_second` compares with; None without any gradient."""
    for p, grad in zip(tensors, grads):
        if grad is not None:
            return First(p, [None if g is None else (id(g), g._version + 1) for g in grads] if left else [])
    return None


def look_at_second(first: First | None, groups: list[dict[str, Any]]) -> str | None:
    """Return what to warn of in the gradients of the second pass; None where there is nothing."""
    if first is None or first.param.grad is None:
        return None if any(p.grad is not None for group in groups for p in group["params"]) else NO_SECOND
    if not first.sums:
        return None
    # Cleared in place they would have been written twice. Several backwards, each of which writes once, hide it.
    grads = (p.grad for group in groups for p in group["params"])
    is_sum = all(s is None or (g is not None and (id(g), g._version) == s) for g, s in zip(grads, first.sums))
    return SUM if is_sum else None


def require_unscaled_second(passes: set[bool]) -> None:
    """Refuse gradients of which a GradScaler thinks that it has unscaled them: it does so once in a step.

    ``passes``: whether the weights were perturbed when it did. Where it was not seen nothing is refused.
    """
    if passes == {False}:
        raise RuntimeError(
            "The second gradients are still scaled: scaler.unscale_(optimizer) was called before first_step(). Call it "
            "after the second backward only: the perturbation does not depend on the scale."
        )


class Once:
    """Warnings that have been given."""

    def __init__(self) -> None:
        self.given: set[str] = set()

    def warn(self, message: str) -> None:
        """Give a warning at the line that has called us, also by way of torch; unless it has been given."""
        if message in self.given:
            return
        self.given.add(message)
        level, frame = 1, sys._getframe()
        while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
            level, frame = level + 1, frame.f_back
        warnings.warn(message, stacklevel=level)
