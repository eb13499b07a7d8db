"""The parameters of an optimizer as parallel lists: weights, gradients, state. All that collaborators see of it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from fused_sam.backends.interface import AscentGroup, InvalidTensor, TensorList
from fused_sam.backends.memory import require_disjoint
from fused_sam.ops.groups import host_number
from fused_sam.ops.lists import Gradients, lookup
from fused_sam.ops.masters import MASTER, Masters
from fused_sam.options import check_group


def listed(params: Any) -> Any:
    """Return the argument of an optimizer with lists for iterators, which can be read once only.

    Raises:
        ValueError: for a parameter that is there twice, as tied weights may be.
    """
    if isinstance(params, Tensor | dict | set):  # torch says what is wrong
        return params
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    seen: dict[int, tuple[int, str]] = {}
    for k, group in enumerate(groups):
        if isinstance(group["params"], set):
            continue
        group["params"] = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        names = group.get("param_names") or [f"{i} of group {k}" for i in range(len(group["params"]))]
        for name, entry in zip(names, group["params"]):
            name, p = entry if isinstance(entry, tuple) else (name, entry)
            if id(p) in seen:
                j, other = seen[id(p)]
                twice = "in its group twice, first" if j == k else f"in group {j} too,"
                raise ValueError(f"Invalid parameter {name}: it is {twice} as {other}. Must be in one group, once.")
            seen[id(p)] = k, name
    return params


def identity(tensors: TensorList) -> TensorList:
    """Return the tensors: this rank has the whole of each."""
    return tensors


@dataclass
class Parameters:
    """Made by `FusedSAM` from its groups, and by ZeRO from the slices that a rank updates.

    It never holds the list of gradients: a gradient lends its memory to w only where nothing else refers to it.

    Attributes:
        groups: torch's ``param_groups``.
        state: torch's ``state``.
        backend: the one that was asked for; None: the best for each device.
        masters: fp32 copies of 16-bit parameters; None without.
        local: returns what this rank has of each tensor: the tensors themselves, or the local parts of DTensors.
    """

    groups: list[dict[str, Any]]
    state: dict[Tensor, dict[str, Any]]
    backend: str | None = None
    masters: Masters | None = None
    local: Callable[[TensorList], TensorList] = identity

    def tensors(self) -> list[Tensor]:
        """Return the parameters of all groups, in order."""
        tensors: list[Tensor] = []
        for group in self.groups:
            tensors += group["params"]
        return tensors

    def on_this_rank(self, *lists: TensorList | None) -> tuple[Any, ...]:
        """Return what this rank has of the tensors in each list; None for none."""
        if self.local is identity:
            return lists
        return tuple(None if x is None else self.local(x) for x in lists)

    def gradients(self, tensors: list[Tensor]) -> TensorList:
        """Return ``p.grad`` of each, as they are now."""
        return Gradients(tensors)

    def begin(self, capturable: bool) -> None:
        """Prepare for a step that begins at w.

        Raises:
            RuntimeError: where its launches would go into a CUDA graph, without ``capturable``.
        """
        params = [] if capturable else self.groups[0]["params"]
        if params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("Capturing a step in a CUDA graph needs FusedSAM(..., capturable=True).")
        if self.masters is not None:
            self.refresh_masters()

    def entries(self, tensors: list[Tensor], key: str) -> TensorList:
        """Return what the state holds for each under a key, None where there is nothing."""
        return lookup(self.state, tensors, key)

    def blank_unperturbed(self, grads: TensorList) -> dict[int, Any]:
        """Set the gradients of the groups that stay at w to None in the list; return those, by index."""
        taken: dict[int, Any] = {}
        start = 0
        for group in self.groups:
            stop = start + len(group["params"])
            if not group["perturb"]:
                for i in range(start, stop):
                    taken[i], grads[i] = grads[i], None
            start = stop
        return taken

    def perturbed_groups(self) -> list[AscentGroup]:
        """Return how far each group moves: runs of scaled and of unscaled tensors where only weights are adaptive."""
        groups = []
        for group in self.groups:
            check_group(group)
            rho, eta, adaptive = group["rho"], float(group["eta"]), group["adaptive"]
            rho = rho if type(rho) is float else host_number(rho)
            decay = float(group["weight_decay"]) if group["decay_in_ascent"] else 0.0
            if group.get("maximize"):
                # The worst point of an objective to be maximised is where it is least. The base maximises
                # L - weight_decay / 2 ||w||^2.
                rho, decay = -rho, -decay
            if adaptive != "weights":
                groups.append(AscentGroup(len(group["params"]), rho, bool(adaptive), eta, decay))
                continue
            for scaled, run in itertools.groupby(p.dim() > 1 for p in group["params"]):
                groups.append(AscentGroup(len(list(run)), rho, scaled, eta, decay))
        return groups

    def masters_of(self, tensors: list[Tensor], grads: TensorList) -> TensorList | None:
        """Return the master of each 16-bit parameter that has one or now takes part, else None; None without any."""
        assert self.masters is not None
        found = self.masters.find_or_make(self.entries(tensors, MASTER), tensors, grads)
        return found if any(m is not None for m in found) else None

    def enter_masters(self, tensors: list[Tensor], masters: TensorList | None) -> None:
        """Enter the masters that `masters_of` has made in the state."""
        if self.masters is not None and masters is not None:
            self.masters.enter(self.state, tensors, masters)

    def refresh_masters(self) -> None:
        """Take over what was written into the parameters since the last step. To be called at w."""
        if self.masters is not None:
            tensors = self.tensors()
            self.masters.refresh(tensors, self.entries(tensors, MASTER))

    def note_masters(self) -> None:
        """Remember each parameter as its rounded master: they are at w."""
        if self.masters is not None:
            self.masters.note(self.tensors())

    def names(self) -> list[str]:
        """Return what the user knows each parameter by."""
        return [
            group["param_names"][i] if "param_names" in group else f"{i} of group {k}"
            for k, group in enumerate(self.groups)
            for i in range(len(group["params"]))
        ]

    def require_disjoint(self, local: Callable[[TensorList], TensorList]) -> None:
        """Refuse parameters that share memory, by their names. A lazy module's have none yet.

        ``local`` returns what this rank has of each.

        Raises:
            ValueError: naming two of them.
        """
        parts: list[Any] = local(self.tensors())
        there = [i for i, part in enumerate(parts) if not is_lazy(part) and part.layout == torch.strided]
        names = self.names()
        require_disjoint([parts[i] for i in there], [names[i] for i in there])

    def named(self, error: InvalidTensor) -> ValueError:
        """Return the refusal of a tensor, with the parameter named as the user knows it."""
        name, shape = self.names()[error.index], list(self.tensors()[error.index].shape)
        return ValueError(f"Invalid parameter {name} (shape {shape}): {error.reason}.")
