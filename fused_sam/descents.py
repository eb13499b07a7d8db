"""The second half of a step: from the gradients at w + e, by what changes them, to the base step at w.

Like `fused_sam.ascents`, the first half, it works closely with `FusedSAM`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fused_sam import clipping, looksam, masters, ops, param_groups, schedule
from fused_sam.dynamo import untraced
from fused_sam.telemetry import Report, measured

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


@untraced
def descend(optimizer: FusedSAM, report: Report | None = None) -> None:
    """The base step at w with the gradients there are, after a restore where the weights are perturbed."""
    ascent, journal = optimizer._ascent, optimizer._ascent.journal if optimizer._ascent else optimizer._journal
    grad_scale, found_inf = getattr(optimizer, "grad_scale", None), getattr(optimizer, "found_inf", None)
    if ascent is None:
        optimizer._require_capturable(optimizer._flat_params())
    try:
        optimizer._peers.average_second(optimizer)
        if found_inf is not None:
            # The scaler sets a plain 0 where there is no gradient to look at.
            overflow = None if ascent is None else ascent.overflow()
            found_inf = _either(found_inf if isinstance(found_inf, Tensor) else None, overflow)
            found_inf = optimizer._peers.any_overflow(found_inf, optimizer)
            if ascent is not None:
                param_groups.require_unscaled(optimizer.param_groups)
        report = measured(optimizer) if report is None else report
        if optimizer.reuse is not None and ascent is not None:
            looksam.keep(optimizer, ascent, found_inf, journal)
        elif optimizer.reuse is not None and not optimizer._schedule.is_over(optimizer.param_groups):
            looksam.apply(optimizer, optimizer.reuse)
        if optimizer.max_grad_norm is not None or optimizer.telemetry:
            norm = optimizer._peers.grad_norm(optimizer)
            report = report._replace(second_grad_norm=norm)
            if optimizer.max_grad_norm is not None:
                grad_scale = clipping.grad_scale(norm, optimizer.max_grad_norm, grad_scale)
        schedule.count(optimizer.param_groups, journal)
        optimizer._peers.base_step(optimizer, journal, grad_scale, found_inf)
    except ops.InvalidTensor as error:
        raise optimizer._named(error) from None
    finally:
        optimizer.restore()
    if ascent is None:
        masters.note(optimizer)
    optimizer.last = report
    optimizer._peers.after_step(optimizer)


def _either(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """The larger of two flags that may be absent."""
    if a is None or b is None:
        return b if a is None else a
    return torch.maximum(a, b.to(a))
