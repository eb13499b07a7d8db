"""torch.optim.Adam and AdamW, restore and step in one pass over the weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fused_sam import backends, ops
from fused_sam.backends.interface import AdamGroup, Journal, TensorList
from fused_sam.descent.state import enter_state, runs, skip_at_first, weights_of
from fused_sam.descent.unfused import AnyBase
from fused_sam.ops.groups import host_number
from fused_sam.parameters import Parameters

KEYS = ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")


class FusedAdam(AnyBase):
    """One `ops.adam_update` over all groups; new state stays in the optimizer's only if it is made.

    As in torch the steps of ``capturable`` and ``fused`` groups are counted on the device of the parameter, others on
    the host. Only the latter need the host to know whether a GradScaler skips.
    """

    elementwise = True

    def require_loadable(self, state_dict: dict[str, Any]) -> None:
        """Refuse averages of an unknown number of steps, as in apex's checkpoints."""
        for index, entry in state_dict["state"].items():
            if "exp_avg" in entry and "step" not in entry:
                raise ValueError(f"Invalid state of parameter {index}: {sorted(entry)}. Must have a step for each.")

    def update(
        self, parameters: Parameters, journal: Journal, grad_scale: Tensor | None, found_inf: Tensor | None
    ) -> None:
        """Restore and step; as torch does itself where the kernels cannot."""
        tensors, local = parameters.tensors(), parameters.local
        if not _is_fusable(parameters, tensors):
            if parameters.masters is not None:
                raise RuntimeError("master_weights=True needs betas that are numbers, and capturable=False on a CPU.")
            super().update(parameters, journal, grad_scale, found_inf)
            return
        grads = parameters.gradients(tensors)
        masters = None if parameters.masters is None else parameters.masters_of(tensors, grads)
        state = {key: parameters.entries(tensors, key) for key in KEYS}
        steps = state["step"]
        fresh = {i for i, (t, g) in enumerate(zip(steps, grads)) if t is None and g is not None}
        if fresh and skip_at_first(tensors, found_inf, journal, "State of Adam"):
            return
        backups = ops.joint_backup(journal, len(tensors))
        if fresh:
            _make_state(parameters.groups, weights_of(tensors, masters), fresh, state)
            enter_state(parameters, tensors, fresh, state, journal)
        ops.adam_update(
            local(tensors),
            local(grads),
            backups,
            local(state["exp_avg"]),
            local(state["exp_avg_sq"]),
            local(state["max_exp_avg_sq"]) if any(group["amsgrad"] for group in parameters.groups) else None,
            local(steps),
            self._groups(parameters.groups, fresh),
            grad_scale,
            found_inf,
            parameters.backend,
            journal,
            capturable=not any(isinstance(t, Tensor) and t.is_cpu for t in steps),
            masters=masters if masters is None else local(masters),
        )
        if masters is not None:
            parameters.enter_masters(tensors, masters)

    def _groups(self, groups: list[dict[str, Any]], fresh: set[int]) -> list[AdamGroup]:
        converted, start = [], 0
        for group in groups:
            size = len(group["params"])
            same = (
                host_number(group["lr"]),
                float(group["betas"][0]),
                float(group["betas"][1]),
                float(group["eps"]),
                float(group["weight_decay"]),
                self.is_decoupled(group),
                bool(group["amsgrad"]),
                bool(group["maximize"]),
            )
            for length, first in runs(size, start, fresh):
                converted.append(AdamGroup(length, *same, first))
            start += size
        return converted


def _is_fusable(parameters: Parameters, tensors: list[Tensor]) -> bool:
    """Return whether every backend concerned has the step, and every hyperparameter but lr can be read without
    waiting."""
    for device_type in {p.device.type for p in tensors}:
        backend = backends.for_device(device_type, parameters.backend)
        if "adam_update" not in backend.BASE_STEPS and parameters.masters is None:
            return False
        if device_type == "cpu" and any(group["capturable"] for group in parameters.groups):
            return False  # torch's own step says why it refuses
    return not any(isinstance(beta, Tensor) for group in parameters.groups for beta in group["betas"])


def _make_state(
    groups: list[dict[str, Any]], weights: TensorList, fresh: set[int], state: dict[str, TensorList]
) -> None:
    """Fill in what torch.optim.Adam keeps, but for uninitialised averages, which the first step writes."""
    number = torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32
    of_tensor = (group for group in groups for _ in group["params"])
    for i, (w, group) in enumerate(zip(weights, of_tensor)):
        if i not in fresh:
            continue
        if group["capturable"] or group["fused"]:
            state["step"][i] = torch.zeros((), dtype=torch.float32, device=w.device)
        else:
            state["step"][i] = torch.zeros((), dtype=number, device="cpu")
        for key in KEYS[1 : 4 if group["amsgrad"] else 3]:
            state[key][i] = torch.empty_like(w)
