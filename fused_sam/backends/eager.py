"""The op surface in plain torch: any device, any strides, no compiler. Never synchronises with the device.

It is also the interface that every backend has: `batch` gathers the tensors of one op, and the methods of what it
returns are the ops.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from fused_sam.ops import AscentGroup, Journal, SGDGroup
    from fused_sam.routing import TensorList

# Whether tensors of other layouts than dense ones must be replaced by contiguous stand-ins.
NEEDS_DENSE = False


def get_grads(params: TensorList) -> TensorList:
    """p.grad of every parameter."""
    return [p.grad for p in params]


def clear_grads(params: TensorList) -> None:
    """p.grad = None for every parameter."""
    for p in params:
        p.grad = None


def lookup(state: dict[Tensor, dict[str, Any]], params: TensorList, key: str) -> TensorList:
    """The entry of each parameter's state, None where there is none."""
    return [state[p].get(key) if p in state else None for p in params]


def why_not(device_type: str) -> str | None:
    """Why this backend cannot take tensors of a device type; None where it can."""
    return None


class Batch:
    """The tensors of one op. Arguments and results of the methods are those of the functions in `fused_sam.ops`."""

    def __init__(
        self,
        params: TensorList,
        grads: TensorList | None = None,
        backups: TensorList | Batch | None = None,
        momentum_buffers: TensorList | None = None,
    ) -> None:
        self.params = params
        self.grads: Any = grads
        self.backups: Any = backups.backups if isinstance(backups, Batch) else backups
        self.momentum_buffers = momentum_buffers

    @property
    def odd(self) -> list[int]:
        """Indices of tensors that want a look by `fused_sam.routing`: all, as torch copes with any that pass."""
        return list(range(len(self.params)))

    def make_backups(self, owned: bool) -> None:
        """Memory for w of each parameter with a gradient. ``owned`` gradients could lend theirs; only one kernel that
        reads and writes both makes that worth it."""
        self.backups = [None if g is None else torch.empty_like(p) for p, g in zip(self.params, self.grads)]

    def set_backups(self, backups: TensorList) -> None:
        self.backups = backups

    @property
    def kept(self) -> list[Any | None]:
        """None for each parameter without a backup."""
        return self.backups or [None] * len(self.params)

    def norm(self, groups: list[AscentGroup]) -> Tensor:
        norms = []
        for i, group in self._members(groups):
            g = self.grads[i]
            x = self.params[i].double() * g.double() if group.adaptive else g
            norms.append(torch.linalg.vector_norm(x, dtype=torch.float64))
        if not norms:
            return torch.zeros((), dtype=torch.float64, device=self.params[0].device)
        return torch.linalg.vector_norm(torch.stack(norms))

    def perturb(self, norm: Tensor, groups: list[AscentGroup], journal: Journal) -> None:
        perturbed = []
        for i, group in self._members(groups):
            w, g = _wide(self.params[i]), _wide(self.grads[i])
            pre, post, active = _ascent_factors(group.rho, norm, w.dtype)
            e = w * (w * (g * pre) * post) if group.adaptive else g * pre * post
            perturbed.append((i, torch.where(active, w + e, w)))
        # A backup may be the gradient itself, so all of w + e is formed before any backup is written.
        for i, _ in perturbed:
            self.backups[i].copy_(self.params[i])
        self.grads = None
        journal.append(self)
        for i, w in perturbed:
            self.params[i].copy_(w)

    def restore(self) -> None:
        pairs = [(p, b) for p, b in zip(self.params, self.backups or []) if b is not None]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [b for _, b in pairs])

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        self.restore()
        journal.clear()
        for i, group in self._members(groups):
            buffer = self.momentum_buffers[i] if self.momentum_buffers is not None and group.momentum != 0 else None
            _sgd_tensor(self.params[i], self.grads[i], buffer, group, grad_scale, found_inf)

    def _members(self, groups: list[Any]) -> Iterator[tuple[int, Any]]:
        """(index, group) of every tensor that has a gradient."""
        index = 0
        for group in groups:
            for _ in range(group.size):
                if self.grads[index] is not None:
                    yield index, group
                index += 1


batch = Batch


def _wide(x: Tensor) -> Tensor:
    """fp32 for 16-bit tensors, others as they are."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _ascent_factors(rho: float | Tensor, norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """(pre, post, active): e = post * (pre * g) where active, with pre a power of two that keeps post representable."""
    limit, shift = (900.0, 512.0) if dtype == torch.float64 else (100.0, 64.0)
    active = torch.isfinite(norm) & (norm > 0) & (rho != 0)
    exponent = torch.log2(norm)
    far = torch.where(exponent < -limit, shift, torch.where(exponent > limit, -shift, 0.0)).double()
    pre = torch.exp2(far)
    # A number divided by a tensor is rounded twice: torch multiplies by the reciprocal.
    radius = rho if isinstance(rho, Tensor) else torch.scalar_tensor(rho, dtype=torch.float64)
    return pre.to(dtype), (radius / (norm * pre)).to(dtype), active


def _sgd_tensor(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    group: SGDGroup,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """torch.optim.SGD's for-loop on one tensor, in fp32 for 16-bit data, skipped on the device if found_inf is set."""

    def write(target: Tensor, value: Tensor) -> None:
        target.copy_(value if found_inf is None else torch.where(found_inf != 0, _wide(target), value))

    if grad_scale is not None:
        # Out of place in fp32: a factor on a GPU would be rounded to the gradient's 16 bits first.
        grad.copy_(_wide(grad) * grad_scale.double().reciprocal().float())
    w, d = _wide(param), _wide(grad)
    if group.maximize:
        d = -d
    if group.weight_decay != 0:
        d = d.add(w, alpha=group.weight_decay)
    if buffer is not None:
        m = d if group.first else (_wide(buffer) * group.momentum).add(d, alpha=1 - group.dampening)
        d = d.add(m, alpha=group.momentum) if group.nesterov else m
        write(buffer, m)
    if isinstance(group.lr, Tensor):
        # Rounded once, like the fused multiply-add that alpha= stands for, which takes no tensor.
        lr = group.lr.to(w.dtype).double()
        write(param, (w.double() - d.double() * lr).to(w.dtype))
    else:
        write(param, w.add(d, alpha=-group.lr))
