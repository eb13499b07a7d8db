"""The kernels in Triton, for GPUs of any vendor: no compiler of CUDA or C++ is needed where the package is installed.

The norm is two launches (for p other than 2 and 1 four), perturb, restore and update are one each, for any number of
tensors; as many times that as there are pairs of parameter and gradient dtypes among them. Nothing waits for the
device. On CPU tensors the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), for tests.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if importlib.util.find_spec("triton") is None:
    raise ImportError("Triton is not installed")

import triton

from fused_sam.backends.triton import kernels, launches, tables
from fused_sam.backends.triton.operands import Seen, is_param, is_sole_owner, look, matches, require_disjoint

if TYPE_CHECKING:
    from fused_sam.ops import AdamGroup, AscentGroup, Journal, MeanGroup, SGDGroup
    from fused_sam.routing import TensorList

__all__ = [
    "BASE_STEPS",
    "NEEDS_DENSE",
    "TAKES_MASTERS",
    "Batch",
    "batch",
    "why_not",
]

NEEDS_DENSE = True
BASE_STEPS = ("sgd_update", "adam_update")
TAKES_MASTERS = False

# Backups of tensors smaller than this share one allocation: asking who owns a gradient costs more than the memory.
SMALL_BYTES = 4096
ALIGNMENT = 64

_columns = tables.Columns()


def why_not(device_type: str) -> str | None:
    if device_type in ("cuda", "xpu"):
        compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
        return (
            None if compiler else "Triton finds no C compiler, gcc or clang, with which it builds what launches kernels"
        )
    if device_type == "cpu":
        compiled = isinstance(kernels.perturb, triton.JITFunction)
        return "the Triton kernels need a GPU (or TRITON_INTERPRET=1, for tests)" if compiled else None
    return f"the Triton kernels are not for {device_type} tensors"


class Batch:
    joins_update = True

    def __init__(
        self,
        params: TensorList,
        grads: TensorList | None = None,
        backups: TensorList | Batch | None = None,
        *states: TensorList | None,
    ) -> None:
        self.params = params
        self._device: torch.device = params[0].device
        nothing: TensorList = [None] * len(params)
        listed = backups if isinstance(backups, list) else nothing
        self._grads = tuple(grads or ())
        self._p, self._g = look(params), look(grads or nothing)
        self._states = [look(state or nothing) for state in states]
        kept = look(listed)
        self._sizes = tuple(p.numel for p in self._p)
        self._bytes = [size * p.traits[0].itemsize for size, p in zip(self._sizes, self._p)]
        self.odd = [i for i, b in enumerate(kept) if not self._takes(i, b)]
        self._backups = [0 if b is None else b.address for b in kept]
        self._listed = listed is not nothing
        self._memory: list[Any] = [listed]  # what the backups lie in
        self._moved: Tensor | None = None  # the column of those that the kernels have written, if this is an ascent
        if isinstance(backups, Batch):
            self._adopt(backups)

    def _takes(self, i: int, backup: Seen | None) -> bool:
        p, g = self._p[i], self._g[i]
        if g is None and backup is None:
            return True
        written = backup, *(state[i] for state in self._states)
        return is_param(p, self._device) and matches(g, p, True) and all(matches(x, p) for x in written)

    def _adopt(self, ascent: Batch) -> None:
        """A parameter that the ascent moved and that has no gradient now takes part too: it is restored."""
        if len(ascent.params) != len(self.params):
            raise ValueError("Invalid backups. Must be of the same parameters.")
        self._moved = ascent._moved
        self._memory.append(ascent._memory)
        for i, address in enumerate(ascent._backups):
            if address != 0:
                if self.params[i] is not ascent.params[i]:
                    raise _changed(i)
                _require_same(i, ascent._p[i], self._p[i])
                self._backups[i] = address

    def make_backups(self, owned: bool) -> None:
        there = [i for i, (g, size) in enumerate(zip(self._g, self._bytes)) if g is not None and size > 0]
        places = {i: -(-self._bytes[i] // ALIGNMENT) * ALIGNMENT for i in there if self._bytes[i] < SMALL_BYTES}
        pool = torch.empty(sum(places.values()), dtype=torch.uint8, device=self._device)
        self._memory.append(pool)
        address = pool.data_ptr()
        for i in there:
            if i in places:
                self._backups[i] = address
                address += places[i]
            elif owned and self._g[i].traits[0] == self._p[i].traits[0] and is_sole_owner(self._grads, i):
                self._backups[i] = self._g[i].address
            else:
                memory = torch.empty_like(self.params[i])
                self._memory.append(memory)
                self._backups[i] = memory.data_ptr()

    def set_backups(self, backups: TensorList) -> None:
        for i, (b, tensor) in enumerate(zip(look(backups), backups)):
            swap = tensor is not None and tensor is self._grads[i] and matches(b, self._p[i])
            if not swap and ((b is None) != (self._g[i] is None) or not self._takes(i, b)):
                raise ValueError(
                    f"Invalid backup at index {i}. Must match its parameter in dtype, shape and memory layout."
                )
            self._backups[i] = 0 if b is None else b.address
        self._listed = True
        self._memory.append(backups)

    @property
    def kept(self) -> list[bool | None]:
        return [True if address else None for address in self._backups]

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        plan = self._plan([group.size for group in groups], self._pairs())
        shape = [3] if q == math.inf else []
        if plan.total == 0:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)
        with tables.on_device(self._device):
            table = tables.ascent_table(groups, q)
            columns = self._columns(plan, plan.groups, _addresses(self._p), _addresses(self._g), table)
            if q == 2:
                return launches.sum_of_squares(plan, columns)
            peak = launches.peak(plan, columns)
            return peak if q == math.inf else launches.sum_of_powers(plan, columns, peak)

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        groups = [group._replace(rho=tables.readable(group.rho)) for group in groups]
        plan = self._plan([group.size for group in groups], self._pairs())
        self._require_disjoint()
        if any(self._backups[i] == 0 for x in plan.launches for i in x.rows):
            raise ValueError("Invalid backups. A parameter with a gradient must have one.")
        self._memory.extend(tensor for tensor, g, b in zip(self._grads, self._g, self._backups) if b and b == g.address)
        if plan.launches:
            with tables.on_device(self._device):
                self._move(plan, norm, groups, q, journal)
        self._grads, self._g = (), [None] * len(self.params)

    def _move(
        self, plan: tables.Plan, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal
    ) -> None:
        kernel, how = kernels.perturb, {}
        if q not in (1, 2):
            kernel, how = kernels.perturb_by_powers, {"PEAK": q == math.inf}
        addresses = _addresses(self._p), _addresses(self._g), tables.column(self._backups)
        zeros = tables.column([0] * len(self.params))
        columns = self._columns(plan, plan.groups, *addresses, tables.ascent_table(groups, q), zeros)
        moved = columns[-1] = self._moved = columns[-1].clone()
        norm = None if norm is None else norm.to(torch.float64).contiguous()
        # Entered first: a restore goes by what the kernels have written, which is nothing where none was launched.
        journal.append(self)
        try:
            for x in plan.launches:
                launches.launch(kernel, x, *columns, norm, x.first + x.programs - 1, **how)
        except BaseException:
            if not moved.any():
                journal.remove(self)
            raise

    def restore(self) -> None:
        self._look_again()
        plan = self._plan([len(self.params)], self._pairs_of_backups())
        self._require_disjoint()
        with tables.on_device(self._device):
            columns = self._columns(plan, _addresses(self._p), self._kept_at())
            for x in plan.launches:
                launches.launch(kernels.restore, x, *columns, x.first)

    def _look_again(self) -> None:
        """Between two calls the parameters may have been given other memory."""
        now = look(self.params)
        for i, address in enumerate(self._backups):
            if address != 0:
                _require_same(i, self._p[i], now[i])
        self._p = now

    def restore_accumulate(self, restored: Batch | None, groups: list[MeanGroup], journal: Journal) -> None:
        """The parameters of this batch are the means; those to restore are ``restored``'s, an ascent's, if any."""
        sizes = [group.size for group in groups]
        pairs, numels = self._pairs(), self._sizes
        self._plan(sizes, pairs)  # refuses what does not fit
        self._require_disjoint()
        weights, grads, backups = self._p, self._g, [0] * len(self._p)
        if restored is not None:
            restored._look_again()
            weights, grads = weights + restored._p, grads + [None] * len(restored._p)
            backups, numels = backups + restored._backups, numels + restored._sizes
            pairs, sizes = pairs + restored._pairs_of_backups(), [*sizes, len(restored._p)]
        plan = tables.plan(tuple(pairs), numels, tuple(sizes))
        with tables.on_device(self._device):
            addresses = _addresses(weights), _addresses(grads), tables.column(backups)
            columns = self._columns(plan, plan.groups, *addresses, tables.mean_table(groups))
            for x in plan.launches:
                launches.launch(kernels.restore_accumulate, x, *columns, x.first)
            journal.clear()

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> Tensor | None:
        groups = [group._replace(lr=tables.readable(group.lr)) for group in groups]
        columns = self._state_columns([("momentum_buffers", [group.momentum != 0 for group in groups])], groups)
        columns.append(tables.sgd_table(groups))
        return self._update(kernels.sgd_update, groups, columns, grad_scale, found_inf, journal)

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> Tensor | None:
        groups = [group._replace(lr=tables.readable(group.lr)) for group in groups]
        always = [True] * len(groups)
        needs = [("exp_avgs", always), ("exp_avg_sqs", always), ("max_exp_avg_sqs", [x.amsgrad for x in groups])]
        columns = self._state_columns(needs, groups)
        columns += [_addresses(look(steps or [None] * len(self.params))), tables.adam_table(groups)]
        return self._update(kernels.adam_update, groups, columns, grad_scale, found_inf, journal)

    def _update(
        self,
        kernel: Any,
        groups: list[Any],
        columns: list[bytes],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> Tensor | None:
        """A base step, of which ``columns`` are the state and the hyperparameters; the norm of its momentum if any
        group counts in it."""
        pairs = [of_grad or of_backup for of_grad, of_backup in zip(self._pairs(), self._pairs_of_backups())]
        plan = self._plan([group.size for group in groups], pairs)
        self._require_disjoint()
        places, partials = self._measured(groups)
        with tables.on_device(self._device):
            tensors = _addresses(self._p), _addresses(self._g), self._kept_at()
            arguments = self._columns(plan, plan.groups, *tensors, *columns, places)
            for x in plan.launches:
                launches.launch(kernel, x, *arguments, grad_scale, found_inf, partials, x.first)
            journal.clear()
            return None if partials is None else launches.root_of(partials)

    def _measured(self, groups: list[Any]) -> tuple[bytes | None, Tensor | None]:
        """(column, partials): where each tensor's sums of squares of momentum are to go, where they would go in `norm`
        of it; -1 for those that do not count. None if none does."""
        if not any(group.measured for group in groups):
            return None, None
        counted = [group.measured for group in groups for _ in range(group.size)]
        pairs = [(p.traits[0],) * 2 if g and c else None for p, g, c in zip(self._p, self._g, counted)]
        plan = tables.plan(tuple(pairs), self._sizes, (len(self.params),))
        return plan.places(self._sizes), launches.float64(self._device, plan.total)

    def _state_columns(self, needs: list[tuple[str, list[bool]]], groups: list[Any]) -> list[bytes]:
        """The addresses of each kind of state, of which every group says whether it needs it."""
        columns = []
        for k, (name, needed) in enumerate(needs):
            state = self._states[k] if k < len(self._states) else [None] * len(self.params)
            wanted = [need for need, group in zip(needed, groups) for _ in range(group.size)]
            if None in state and any(x is None and g and need for x, g, need in zip(state, self._g, wanted)):
                raise ValueError(f"Invalid {name}. Must have an entry for every gradient of a group that uses them.")
            columns.append(_addresses(state))
        return columns

    def _pairs(self) -> list[tables.Dtypes | None]:
        """(dtype of the parameter, dtype of the gradient) of every parameter that has a gradient."""
        return [None if g is None else (p.traits[0], g.traits[0]) for p, g in zip(self._p, self._g)]

    def _pairs_of_backups(self) -> list[tables.Dtypes | None]:
        return [(p.traits[0], p.traits[0]) if b else None for p, b in zip(self._p, self._backups)]

    def _plan(self, group_sizes: list[int], pairs: list[tables.Dtypes | None]) -> tables.Plan:
        if sum(group_sizes) != len(self.params) or any(size < 0 for size in group_sizes):
            raise ValueError(
                f"Invalid group sizes: their sum is {sum(group_sizes)}. Must be len(params)={len(self.params)}."
            )
        if self.odd:
            raise ValueError(
                f"Invalid tensor at index {self.odd[0]}. Parameter, gradient, backup and state must be dense "
                f"{self._device} tensors of one shape and memory layout and of dtypes that mix."
            )
        return tables.plan(tuple(pairs), self._sizes, tuple(group_sizes))

    def _columns(self, plan: tables.Plan, *columns: bytes | Tensor | None) -> list[Any]:
        """The columns on the device, where a tensor is already; None for one that there is not."""
        if not plan.launches:
            return []
        columns = plan.chunks, plan.sizes, *columns
        sent = iter(_columns.on(self._device, [x for x in columns if isinstance(x, bytes)]))
        return [next(sent) if isinstance(x, bytes) else x for x in columns]

    def _kept_at(self) -> bytes | Tensor:
        """The column of backups to restore from."""
        return tables.column(self._backups) if self._moved is None else self._moved

    def _require_disjoint(self) -> None:
        """Two written tensors on the same memory would be updated in no particular order."""
        spans = []
        for i, (p, g, b, size) in enumerate(zip(self._p, self._g, self._backups, self._bytes)):
            if g is not None or b != 0:
                spans.append((p.address, size))
                spans.extend((state[i].address, size) for state in self._states if state[i] is not None)
                if self._listed and b != 0:  # those made here overlap nothing
                    spans.append((b, size))
        require_disjoint(tuple(spans))


batch = Batch


def _addresses(seen: list[Seen | None]) -> bytes:
    return tables.column(0 if x is None else x.address for x in seen)


def _require_same(index: int, before: Seen, now: Seen) -> None:
    """Refuse a parameter that no longer lies as it did when its backup was made."""
    if before[1:] != now[1:]:
        raise _changed(index)


def _changed(index: int) -> ValueError:
    return ValueError(
        f"Invalid params. Parameter {index} has been replaced, or has changed in size, dtype or memory layout, while "
        "perturbed."
    )
