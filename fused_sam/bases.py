"""The base step of SAM: what is done at w with the gradient taken at w + e.

A base has ``step(optimizer, journal, grad_scale, found_inf)``, which brings the weights back to w and updates them. It
works closely with `FusedSAM`, of whose state machine it is the last state.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from fused_sam import backends, clipping, looksam, masters, ops
from fused_sam.ops import lists

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM


class FusedSGD:
    """torch.optim.SGD, restore and step in one pass over the weights."""

    def step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One `ops.sgd_update` over all groups; new momentum buffers stay in the state only if it is made."""
        params, local = optimizer._flat_params(), optimizer._peers.local
        grads = lists.get_grads(params)
        copies = masters.of(optimizer, params, grads)
        buffers: list[Any] | None = None
        fresh: set[int] = set()
        if any(group["momentum"] for group in optimizer.param_groups):
            buffers = lists.lookup(optimizer.state, params, "momentum_buffer")
            if not lists.all_present(buffers):
                fresh = _make_buffers(optimizer.param_groups, _weights(params, copies), grads, buffers)
        if fresh and ops.is_capturing(params):
            raise RuntimeError(
                "A momentum buffer would be made in every replay: step once before capturing a CUDA graph."
            )
        if fresh and found_inf is not None and bool(found_inf):
            # A buffer that is skipped must not come into being, and only the host can see to that.
            ops.restore_weights(journal)
            journal.clear()
            return
        backups = ops.joint_backup(journal, len(params))
        if buffers is not None and fresh:
            _enter(optimizer, params, fresh, {"momentum_buffer": buffers}, journal)
        groups = _sgd_groups(optimizer.param_groups, fresh)
        ops.sgd_update(
            local(params),
            local(grads),
            backups,
            buffers if buffers is None else local(buffers),
            groups,
            grad_scale,
            found_inf,
            optimizer.backend,
            journal,
            copies if copies is None else local(copies),
        )
        masters.enter(optimizer, params, copies)


def _enter(
    optimizer: FusedSAM, params: list[Tensor], fresh: set[int], state: dict[str, list[Any]], journal: ops.Journal
) -> None:
    """New state of the parameters ``fresh``, taken out again unless the update is made that fills it."""
    entries = {
        params[i]: {key: values[i] for key, values in state.items() if values[i] is not None} for i in sorted(fresh)
    }
    new = ops.NewState(optimizer.state, entries)
    journal.append(new)
    new.enter()


def _weights(params: list[Tensor], copies: list[Any] | None) -> list[Tensor]:
    """What the base step updates: masters where there are any."""
    return params if copies is None else [p if m is None else m for p, m in zip(params, copies)]


def _make_buffers(
    param_groups: list[dict], weights: list[Tensor], grads: list[Tensor | None], buffers: list[Tensor | None]
) -> set[int]:
    """Fill in an uninitialised momentum buffer for every parameter that needs one; the indices of those."""
    momenta = [group["momentum"] for group in param_groups for _ in group["params"]]
    fresh = {i for i, m in enumerate(momenta) if m != 0 and buffers[i] is None and grads[i] is not None}
    for i in fresh:
        buffers[i] = torch.empty_like(weights[i])
    return fresh


def _sgd_groups(param_groups: list[dict], fresh: set[int]) -> list[ops.SGDGroup]:
    """Hyperparameters as the op takes them, each of its type: a checkpoint may hold anything."""
    return [
        ops.SGDGroup(
            length,
            ops.host_number(group["lr"]),
            float(group["momentum"]),
            float(group["dampening"]),
            float(group["weight_decay"]),
            bool(group["nesterov"]),
            bool(group["maximize"]),
            first,
        )
        for group, length, first in _runs(param_groups, fresh)
    ]


def _runs(param_groups: list[dict], fresh: set[int]) -> Iterator[tuple[dict, int, bool]]:
    """(group, length, first): one for each run of parameters with, or without, state to read."""
    start = 0
    for group in param_groups:
        size = len(group["params"])
        if not fresh:
            yield group, size, False
            continue
        for first, run in itertools.groupby(i in fresh for i in range(start, start + size)):
            yield group, len(list(run)), first
        start += size


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
        ops.restore_weights(journal)
        if found_inf is not None and bool(found_inf):
            journal.clear()
            return
        if grad_scale is not None:
            clipping.unscale(optimizer, grad_scale)
        self.inner.param_groups, self.inner.state = optimizer.param_groups, optimizer.state
        step: Any = type(self.inner).step
        # torch wraps `step` to call the hooks; they fire once per SAM step, for the FusedSAM around this optimizer.
        step = step.__wrapped__ if getattr(step, "hooked", False) else step
        with looksam.out_of_sight(optimizer):
            step(self.inner)
        journal.clear()


class FusedAdam(AnyBase):
    """torch.optim.Adam and AdamW, restore and step in one pass over the weights.

    As in torch the steps of ``capturable`` and ``fused`` groups are counted on the device of the parameter, others on
    the host. Only the latter need the host to know whether a GradScaler skips.
    """

    def step(
        self, optimizer: FusedSAM, journal: ops.Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """One `ops.adam_update` over all groups; new state stays in the optimizer's only if it is made."""
        params, local = optimizer._flat_params(), optimizer._peers.local
        if not self._is_fusable(optimizer, params):
            if optimizer._masters is not None:
                raise RuntimeError("master_weights=True needs betas that are numbers, and capturable=False on a CPU.")
            super().step(optimizer, journal, grad_scale, found_inf)
            return
        grads = lists.get_grads(params)
        copies = masters.of(optimizer, params, grads)
        state = {key: lists.lookup(optimizer.state, params, key) for key in _ADAM_STATE}
        steps = state["step"]
        fresh = {i for i, (t, g) in enumerate(zip(steps, grads)) if t is None and g is not None}
        if fresh and ops.is_capturing(params):
            raise RuntimeError("State of Adam would be made in every replay: step once before capturing a CUDA graph.")
        if fresh and found_inf is not None and bool(found_inf):
            # State that is skipped must not come into being, and only the host can see to that.
            ops.restore_weights(journal)
            journal.clear()
            return
        backups = ops.joint_backup(journal, len(params))
        if fresh:
            _make_adam_state(optimizer.param_groups, _weights(params, copies), fresh, state)
            _enter(optimizer, params, fresh, state, journal)
        groups = self._groups(optimizer.param_groups, fresh)
        ops.adam_update(
            local(params),
            local(grads),
            backups,
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            local(state["max_exp_avg_sq"]) if any(group["amsgrad"] for group in optimizer.param_groups) else None,
            local(steps),
            groups,
            grad_scale,
            found_inf,
            optimizer.backend,
            journal,
            capturable=not any(isinstance(t, Tensor) and t.is_cpu for t in steps),
            masters=copies if copies is None else local(copies),
        )
        masters.enter(optimizer, params, copies)

    def _is_fusable(self, optimizer: FusedSAM, params: list[Tensor]) -> bool:
        """Whether every backend concerned has the step, and every hyperparameter but lr can be read without waiting."""
        for device_type in {p.device.type for p in params}:
            backend = backends.for_device(device_type, optimizer.backend)
            if "adam_update" not in backend.BASE_STEPS and optimizer._masters is None:
                return False
            if device_type == "cpu" and any(group["capturable"] for group in optimizer.param_groups):
                return False  # torch's own step says why it refuses
        return not any(isinstance(beta, Tensor) for group in optimizer.param_groups for beta in group["betas"])

    def _groups(self, param_groups: list[dict], fresh: set[int]) -> list[ops.AdamGroup]:
        return [
            ops.AdamGroup(
                length,
                ops.host_number(group["lr"]),
                float(group["betas"][0]),
                float(group["betas"][1]),
                float(group["eps"]),
                float(group["weight_decay"]),
                bool(is_decoupled(self, group)),
                bool(group["amsgrad"]),
                bool(group["maximize"]),
                first,
            )
            for group, length, first in _runs(param_groups, fresh)
        ]


def is_decoupled(base: FusedSGD | AnyBase, group: dict) -> bool:
    """Whether the weight decay of a group is no part of the gradient, as in AdamW."""
    # Before torch 2.7 the groups do not say, and an AdamW is one whatever checkpoint it has loaded.
    is_adamw = isinstance(base, AnyBase) and isinstance(base.inner, AdamW)
    return is_adamw or group.get("decoupled_weight_decay", False)


_ADAM_STATE = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


def _make_adam_state(
    param_groups: list[dict], weights: list[Tensor], fresh: set[int], state: dict[str, list[Any]]
) -> None:
    """Fill in what torch.optim.Adam keeps, but for uninitialised averages, which the first step writes."""
    number = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    groups = (group for group in param_groups for _ in group["params"])
    for i, (w, group) in enumerate(zip(weights, groups)):
        if i not in fresh:
            continue
        if group["capturable"] or group["fused"]:
            state["step"][i] = torch.zeros((), dtype=torch.float32, device=w.device)
        else:
            state["step"][i] = torch.zeros((), dtype=number, device="cpu")
        for key in _ADAM_STATE[1 : 4 if group["amsgrad"] else 3]:
            state[key][i] = torch.empty_like(w)


def make_base(inner: Optimizer) -> FusedSGD | AnyBase:
    """The fused counterpart of an optimizer where there is one. Subclasses may step in ways of their own: not fused."""
    if type(inner) is SGD:
        return FusedSGD()
    return FusedAdam(inner) if type(inner) in (Adam, AdamW) else AnyBase(inner)


def make_masters(base: FusedSGD | AnyBase, master_weights: Any) -> masters.Masters | None:
    """fp32 weights behind 16-bit ones, if wanted.

    Raises:
        ValueError: for what is not a bool, or a base whose own step would update the 16-bit weights.
    """
    if not isinstance(master_weights, bool):
        raise ValueError(f"Invalid {master_weights=}. Must be True or False.")
    if master_weights and not isinstance(base, FusedSGD | FusedAdam):
        raise ValueError(
            f"Invalid {master_weights=} with base_optimizer={type(base.inner).__name__}. Must be torch.optim.SGD, Adam "
            "or AdamW: any other steps the 16-bit weights itself."
        )
    return masters.Masters() if master_weights else None
