"""The kernels in Triton, for GPUs of any vendor: no compiler of CUDA is needed where the package is installed.

The native core reads the tensors, and checks them, as it does for its own kernels.

The norm is two launches, perturb, restore and update are one each, for any number of tensors; as many times that as
there are pairs of parameter and gradient dtypes among them. Nothing waits for the device. For p other than 1, 2 and inf
an ascent runs in torch operations. On CPU tensors the kernels run in Triton's interpreter (``TRITON_INTERPRET=1``), for
tests.
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

try:
    from fused_sam.backends import native
except ImportError as error:
    raise ImportError(
        "the native core, which reads tensors for the Triton kernels, does not load", name="fused_sam.backends.native"
    ) from error

from fused_sam.backends.triton import kernels, launches, tables

if TYPE_CHECKING:
    import fused_sam._native as _native
    from fused_sam.backends.interface import AccumulateGroup, AdamGroup, AscentGroup, Journal, SGDGroup, TensorList

__all__ = [
    "BASE_STEPS",
    "NEEDS_DENSE",
    "TAKES_MASTERS",
    "TAKES_POWERS",
    "Batch",
    "batch",
    "why_not",
]

NEEDS_DENSE = True
BASE_STEPS = ("sgd_update", "adam_update")
TAKES_MASTERS = False
TAKES_POWERS = False

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
        masters: TensorList | None = None,
    ) -> None:
        self.params = params
        self._device: torch.device = params[0].device
        ascent = backups if isinstance(backups, Batch) else None
        if ascent is not None and len(ascent.params) != len(params):
            raise ValueError("Invalid backups. Must be of the same parameters.")
        kept: Any = backups if ascent is None else ascent.operands
        self.operands: _native.Batch = native.operands(self._device, params, grads, kept, states)
        #: The column of backups that the kernels have written, if this is an ascent, or of the ascent.
        self.moved: Tensor | None = None if ascent is None else ascent.moved

    @property
    def unsupported(self) -> list[int]:
        return self.operands.unsupported

    @property
    def has_backup(self) -> list[bool | None]:
        return self.operands.has_backup

    def make_backups(self, owned: bool) -> None:
        self.operands.make_backups(owned)

    def set_backups(self, backups: TensorList) -> None:
        self.operands.set_backups(backups)

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        plan = self.make_plan(_sizes(groups), with_grads=True)
        shape = [3] if q == math.inf else []
        if plan.total == 0:
            return torch.zeros(shape, dtype=torch.float64, device=self._device)
        with tables.on_device(self._device):
            columns = self._columns(plan, plan.groups, *self.addresses_of("grads"), tables.ascent_table(groups))
            return (launches.peak if q == math.inf else launches.sum_of_squares)(plan, columns)

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        groups = [group._replace(rho=tables.readable(group.rho)) for group in groups]
        plan = self.make_plan(_sizes(groups), with_grads=True)
        self.operands.require_backups(_sizes(groups))
        if plan.launches:
            with tables.on_device(self._device):
                self._move(plan, norm, groups, q, journal)
        self.operands.keep_backups()

    def _move(
        self, plan: tables.Plan, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal
    ) -> None:
        # The one element that p = 1 moves is computed in fp64.
        how = {"PEAK": True, "C": triton.language.float64} if q == math.inf else {"PEAK": False}
        addresses = self.addresses_of("grads", "backups")
        zeros = bytes(8 * len(self.params))
        columns = self._columns(plan, plan.groups, *addresses, tables.ascent_table(groups), zeros)
        moved = columns[-1] = self.moved = columns[-1].clone()
        norm = None if norm is None else norm.to(torch.float64).contiguous()
        # Entered first: a restore goes by what the kernels have written, which is nothing where none was launched.
        journal.append(self)
        try:
            for x in plan.launches:
                launches.launch(kernels.perturb, x, *columns, norm, x.first + x.programs - 1, **how)
        except BaseException:
            if not moved.any():
                journal.remove(self)
            raise

    def restore(self) -> None:
        self.operands.refresh()
        plan = self.make_plan([len(self.params)], with_backups=True)
        with tables.on_device(self._device):
            columns = self._columns(plan, self.operands.addresses("params"), self._backup_addresses())
            for x in plan.launches:
                launches.launch(kernels.restore, x, *columns, x.first)

    def restore_accumulate(self, restored: Any, groups: list[AccumulateGroup], journal: Journal) -> None:
        """Take the gradients into this batch's parameters, which are the means, and restore those of ``restored``."""
        sizes = _sizes(groups)
        plan = self.make_plan(sizes, with_grads=True)
        columns = [*self.addresses_of("grads"), bytes(8 * len(self.params))]
        if restored is not None:
            restored.operands.refresh()
            behind = restored.make_plan([len(restored.params)], with_backups=True)
            plan = tables.plan(plan.kinds + behind.kinds, plan.sizes + behind.sizes, (*sizes, len(restored.params)))
            weights, backups = restored.addresses_of("backups")
            columns = [x + y for x, y in zip(columns, (weights, bytes(len(weights)), backups))]
        with tables.on_device(self._device):
            arguments = self._columns(plan, plan.groups, *columns, tables.accumulate_table(groups))
            for x in plan.launches:
                launches.launch(kernels.restore_accumulate, x, *arguments, x.first)
            journal.clear()

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        groups = [group._replace(lr=tables.readable(group.lr)) for group in groups]
        columns = self._state_columns([[group.momentum != 0 for group in groups]], groups)
        columns.append(tables.sgd_table(groups))
        self._update(kernels.sgd_update, groups, columns, grad_scale, found_inf, journal)

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        groups = [group._replace(lr=tables.readable(group.lr)) for group in groups]
        always = [True] * len(groups)
        columns = self._state_columns([always, always, [group.amsgrad for group in groups]], groups)
        columns += [tables.addresses_of(steps, len(self.params)), tables.adam_table(groups)]
        self._update(kernels.adam_update, groups, columns, grad_scale, found_inf, journal)

    def _update(
        self,
        kernel: Any,
        groups: list[Any],
        columns: list[bytes],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        """Launch a base step, of which ``columns`` are the state and the hyperparameters."""
        plan = self.make_plan(_sizes(groups), with_grads=True, with_backups=True)
        with tables.on_device(self._device):
            arguments = self._columns(
                plan, plan.groups, *self.addresses_of("grads"), self._backup_addresses(), *columns
            )
            for x in plan.launches:
                launches.launch(kernel, x, *arguments, grad_scale, found_inf, x.first)
            journal.clear()

    def _state_columns(self, needs: list[list[bool]], groups: list[Any]) -> list[bytes]:
        """Return the addresses of each kind of state, of which every group says whether it needs it."""
        for k, needed in enumerate(needs):
            self.operands.require_state(_sizes(groups), k, needed)
        return [self.operands.state_addresses(k) for k in range(len(needs))]

    def make_plan(self, group_sizes: list[int], with_grads: bool = False, with_backups: bool = False) -> tables.Plan:
        """Return the launches for the tensors with a gradient, or a backup, if they may have their addresses."""
        self.operands.check(group_sizes)
        kinds, sizes = self.operands.kinds(with_grads, with_backups), self.operands.sizes()
        return tables.plan(kinds, sizes, tuple(group_sizes))

    def addresses_of(self, *others: str) -> tuple[bytes, ...]:
        """Return the columns of the parameters and of what else is named."""
        return tuple(self.operands.addresses(of) for of in ("params", *others))

    def _columns(self, plan: tables.Plan, *columns: bytes | Tensor) -> list[Any]:
        """Return the columns on the device, where a tensor is already."""
        if not plan.launches:
            return []
        columns = plan.chunks, plan.sizes, *columns
        sent = iter(_columns.on(self._device, [x for x in columns if isinstance(x, bytes)]))
        return [next(sent) if isinstance(x, bytes) else x for x in columns]

    def _backup_addresses(self) -> bytes | Tensor:
        """Return the column of backups to restore from."""
        return self.operands.addresses("backups") if self.moved is None else self.moved


batch = Batch


def _sizes(groups: list[Any]) -> list[int]:
    return [group.size for group in groups]
