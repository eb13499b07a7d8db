"""The base step of SAM: what is done at w with the gradient taken at w + e.

A base has ``step(optimizer, journal, grad_scale, found_inf)``, which brings the weights back to w and updates them. It
works closely with `FusedSAM`, of whose state machine it is the last state.
"""

from __future__ import annotations

import inspect
import itertools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Optimizer

from fused_sam import clipping, ops

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


class FusedSGD:
    """torch.optim.SGD, restore and step in one pass over the weights."""

    def step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One `ops.sgd_update` over all groups; new momentum buffers enter the state once they hold something."""
        params, host = optimizer._flat_params(), optimizer._host()
        grads = host.get_grads(params)
        buffers: list[Any] | None = None
        fresh: set[int] = set()
        if any(group["momentum"] for group in optimizer.param_groups):
            buffers = host.lookup(optimizer.state, params, "momentum_buffer")
            if not ops.all_present(buffers):
                fresh = _make_buffers(optimizer.param_groups, params, grads, buffers)
        if fresh and ops.is_capturing(params):
            raise RuntimeError(
                "A momentum buffer would be made in every replay: step once before capturing a CUDA graph."
            )
        if fresh and found_inf is not None and bool(found_inf):
            # A buffer that is skipped must not come into being, and only the host can see to that.
            ops.undo(journal)
            return
        ops.sgd_update(
            params,
            grads,
            ops.one_batch(journal),
            buffers,
            _sgd_groups(optimizer.param_groups, fresh),
            grad_scale,
            found_inf,
            optimizer.backend,
            journal,
        )
        if buffers is not None:
            for i in fresh:
                optimizer.state[params[i]]["momentum_buffer"] = buffers[i]


def _make_buffers(
    param_groups: list[dict], params: list[Tensor], grads: list[Tensor | None], buffers: list[Tensor | None]
) -> set[int]:
    """Fill in an uninitialised momentum buffer for every parameter that needs one; the indices of those."""
    momenta = [group["momentum"] for group in param_groups for _ in group["params"]]
    fresh = {i for i, m in enumerate(momenta) if m != 0 and buffers[i] is None and grads[i] is not None}
    for i in fresh:
        buffers[i] = torch.empty_like(params[i])
    return fresh


def _sgd_groups(param_groups: list[dict], fresh: set[int]) -> list[ops.SGDGroup]:
    """Hyperparameters as the op takes them: one entry per run of parameters with, or without, a buffer to read."""
    groups, start = [], 0
    for group in param_groups:
        size = len(group["params"])
        runs = [(False, size)]
        if fresh:
            flags = (i in fresh for i in range(start, start + size))
            runs = [(flag, len(list(run))) for flag, run in itertools.groupby(flags)]
        for first, length in runs:
            groups.append(
                ops.SGDGroup(
                    length,
                    ops.host_number(group["lr"]),
                    group["momentum"],
                    group["dampening"],
                    float(group["weight_decay"]),
                    group["nesterov"],
                    group["maximize"],
                    first,
                )
            )
        start += size
    return groups


class AnyBase:
    """Any other torch.optim.Optimizer: restored by us, stepped by itself. It shares our groups and state."""

    def __init__(self, inner: Optimizer) -> None:
        closure = inspect.signature(inner.step).parameters.get("closure")
        if closure is not None and closure.default is inspect.Parameter.empty:
            raise ValueError(
                f"Invalid base_optimizer={type(inner).__name__}. Must not need a closure of its own: SAM fixes the two "
                "points at which the loss is evaluated."
            )
        self.inner = inner

    def step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Restore, unscale or skip as a GradScaler would, and let the base step."""
        ops.undo(journal)
        if found_inf is not None and bool(found_inf):
            return
        grads = [p.grad for p in optimizer._flat_params() if p.grad is not None]
        if grad_scale is not None and grads:
            clipping.unscale(grads, grad_scale)
        self.inner.param_groups, self.inner.state = optimizer.param_groups, optimizer.state
        step: Any = type(self.inner).step
        # torch wraps `step` to call the hooks; they fire once per SAM step, for the FusedSAM around this optimizer.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        step(self.inner)


def make_base(inner: Optimizer) -> FusedSGD | AnyBase:
    """The fused counterpart of an optimizer where there is one. Subclasses may step in ways of their own: not fused."""
    return FusedSGD() if type(inner) is SGD else AnyBase(inner)
