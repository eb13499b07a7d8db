"""The op surface in plain torch: any device, any strides, no compiler. Never synchronises with the device."""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fused_sam.backends.interface import AccumulateGroup, AdamGroup, AscentGroup, Journal, SGDGroup, TensorList
from fused_sam.backends.memory import ordered_sum, overlaps_itself, two_norm, wide

NEEDS_DENSE = False
BASE_STEPS = ("sgd_update", "adam_update")
TAKES_MASTERS = True
TAKES_POWERS = True


def why_not(device_type: str) -> str | None:
    return None


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
        self.masters = masters or [None] * len(params)
        self.weights = [p if m is None else m for p, m in zip(params, self.masters)]
        self.grads: Any = grads
        self.backups: Any = backups.backups if isinstance(backups, Batch) else backups
        self.states = states

    @property
    def unsupported(self) -> list[int]:
        # All, as torch copes with any that pass.
        return list(range(len(self.params)))

    def make_backups(self, owned: bool) -> None:
        # Owned gradients could lend their memory; only one kernel that reads and writes both makes that worth it.
        self.set_backups(
            [
                torch.empty_like(p) if m is None and g is not None else None
                for p, g, m in zip(self.params, self.grads, self.masters)
            ]
        )

    def set_backups(self, backups: TensorList) -> None:
        self.backups = [b if m is None or g is None else m for b, g, m in zip(backups, self.grads, self.masters)]

    @property
    def has_backup(self) -> list[Any | None]:
        return self.backups or [None] * len(self.params)

    def norm(self, groups: list[AscentGroup], q: float) -> Tensor:
        members = [(i, _scaled(self.weights[i], self.grads[i], group)) for i, group in self._members(groups)]
        members = [(i, x) for i, x in members if x.numel()]
        if not members:
            zeros = torch.zeros(3, dtype=torch.float64, device=self.params[0].device)
            return zeros if q == math.inf else zeros[0]
        if q == 2:
            return two_norm([x for _, x in members], far=any(self.grads[i].dtype == torch.float64 for i, _ in members))
        peaks = torch.stack([x.abs().amax().double() for _, x in members])
        if q == math.inf:
            first = peaks.argmax()  # of NaN and of equal ones the first
            # Filled where they are: a list is sent from the host, which waits for that.
            numbers = torch.stack([torch.full_like(peaks[0], i) for i, _ in members])
            elements = torch.stack([x.abs().flatten().argmax() for _, x in members])
            return torch.stack([peaks[first], numbers[first], elements[first].double()])
        peak = peaks.amax()
        powers = torch.stack([ordered_sum((x.abs().double() / peak) ** q) for _, x in members])
        usable = torch.isfinite(peak) & (peak > 0)
        return torch.where(usable, peak * powers.sum() ** (1 / q), peak)

    def perturb(self, norm: Tensor | None, groups: list[AscentGroup], q: float, journal: Journal) -> None:
        perturbed = [(i, self._perturbed(i, group, norm, q)) for i, group in self._members(groups)]
        # A backup may be the gradient itself, so all of w + e is formed before any backup is written.
        for i, _ in perturbed:
            if self.masters[i] is None:
                self.backups[i].copy_(self.params[i])
        self.grads = None
        journal.append(self)
        for i, w in perturbed:
            self.params[i].copy_(w)

    def _perturbed(self, i: int, group: AscentGroup, norm: Tensor | None, q: float) -> Tensor:
        """Return w + e of one tensor."""
        w = wide(self.weights[i])
        g = _decayed(w, wide(self.grads[i]), group)
        t = _neighbourhood(w, group) if group.adaptive else 1.0
        if norm is None:
            return w + t * (torch.nan_to_num(torch.sign(g), nan=0.0) * group.rho)
        if q == 2:
            pre, post, active = _ascent_factors(group.rho, norm, w.dtype)
            return torch.where(active, w + t * (t * (g * pre) * post), w)
        return self._perturbed_by_powers(i, group, norm, q)

    def _perturbed_by_powers(self, i: int, group: AscentGroup, norm: Tensor, q: float) -> Tensor:
        value, *place = norm.unbind() if q == math.inf else (norm,)
        w = self.weights[i].double()
        t = _neighbourhood(w, group)
        x = t * _decayed(w, self.grads[i].double(), group)
        active = torch.isfinite(value) & (value > 0) & (group.rho != 0)
        size = group.rho * t
        if q == math.inf:
            elements = torch.arange(w.numel(), device=w.device).view(w.shape)
            active = active & (place[0] == i) & (elements == place[1])
        else:
            size = size * (x.abs() / value) ** (q - 1)
        return torch.where(active, w + torch.copysign(torch.ones_like(x), x) * size, w)

    def restore(self) -> None:
        pairs = [(p, b) for p, b in zip(self.params, self.backups or []) if b is not None]
        if pairs:
            torch._foreach_copy_([p for p, _ in pairs], [b for _, b in pairs])

    def restore_accumulate(self, restored: Any, groups: list[AccumulateGroup], journal: Journal) -> None:
        members = itertools.groupby(self._members(groups), operator.itemgetter(1))
        for group, run in members:
            _accumulate([(self.params[i], self.grads[i]) for i, _ in run], group)
        if restored is not None:
            restored.restore()
        journal.clear()

    def sgd_update(
        self, groups: list[SGDGroup], grad_scale: Tensor | None, found_inf: Tensor | None, journal: Journal
    ) -> None:
        self.restore()
        for i, group in self._members(groups):
            buffer = self._state(0, i) if group.momentum != 0 else None
            _sgd_tensor(self.weights[i], self.grads[i], buffer, group, grad_scale, found_inf)
            self._round(i)
        journal.clear()

    def adam_update(
        self,
        groups: list[AdamGroup],
        steps: TensorList | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        journal: Journal,
    ) -> None:
        self.restore()
        for i, group in self._members(groups):
            state = self._state(0, i), self._state(1, i), self._state(2, i) if group.amsgrad else None
            step = None if steps is None else steps[i]
            _adam_tensor(self.weights[i], self.grads[i], *state, step, group, grad_scale, found_inf)
            self._round(i)
        journal.clear()

    def _round(self, index: int) -> None:
        """Round a master to its parameter."""
        if self.masters[index] is not None:
            self.params[index].copy_(self.masters[index])

    def _state(self, kind: int, index: int) -> Any:
        states = self.states[kind] if kind < len(self.states) else None
        return None if states is None else states[index]

    def _members(self, groups: list[Any]) -> Iterator[tuple[int, Any]]:
        """Yield (index, group) of every tensor that has a gradient."""
        index = 0
        for group in groups:
            for _ in range(group.size):
                if self.grads[index] is not None:
                    yield index, group
                index += 1


batch = Batch


def _accumulate(pairs: list[tuple[Tensor, Tensor]], group: AccumulateGroup) -> None:
    """Return mean + weight * (g - mean), or weight * g, for (mean, g) of one group."""
    alike = [(mean, g) for mean, g in pairs if mean.dtype == g.dtype]
    if alike and group.first:
        torch._foreach_copy_([m for m, _ in alike], torch._foreach_mul([g for _, g in alike], group.weight))
    elif alike:
        torch._foreach_lerp_([m for m, _ in alike], [g for _, g in alike], group.weight)
    for mean, g in pairs:
        if mean.dtype != g.dtype:
            x = wide(g)
            mean.copy_(x * group.weight if group.first else wide(mean).lerp(x, group.weight))


def _neighbourhood(w: Tensor, group: AscentGroup) -> Tensor:
    """Return T, by which gradient and displacement are scaled."""
    return w.abs() + group.eta if group.adaptive else torch.ones_like(w)


def _scaled(w: Tensor, g: Tensor, group: AscentGroup) -> Tensor:
    """Return T (g + decay w)"""
    if not group.adaptive and group.decay == 0:
        return g
    x = _decayed(w.double(), g.double(), group)
    return _neighbourhood(w.double(), group) * x if group.adaptive else x


def _decayed(w: Tensor, g: Tensor, group: AscentGroup) -> Tensor:
    """Return the gradient as the ascent takes it."""
    return g if group.decay == 0 else g.add(w, alpha=group.decay)


def _ascent_factors(rho: float | Tensor, norm: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Return (pre, post, active): e = post * (pre * g) where active; pre, a power of two, keeps post in range."""
    limit, shift = (900.0, 512.0) if dtype == torch.float64 else (100.0, 64.0)
    active = torch.isfinite(norm) & (norm > 0) & (rho != 0)
    exponent = torch.log2(norm)
    far = torch.where(exponent < -limit, shift, torch.where(exponent > limit, -shift, 0.0)).double()
    pre = torch.exp2(far)
    # A number divided by a tensor is rounded twice: torch multiplies by the reciprocal.
    radius = rho if isinstance(rho, Tensor) else torch.scalar_tensor(rho, dtype=torch.float64, device="cpu")
    return pre.to(dtype), (radius / (norm * pre)).to(dtype), active


def _sgd_tensor(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None,
    group: SGDGroup,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Do torch.optim.SGD's loop on one tensor, in fp32 for 16-bit data, skipped on the device if found_inf is set."""
    w, d = wide(param), _direction(grad, grad_scale, group.maximize)
    if group.weight_decay != 0:
        d = d.add(w, alpha=group.weight_decay)
    if buffer is not None:
        m = d if group.first else (wide(buffer) * group.momentum).add(d, alpha=1 - group.dampening)
        if buffer.dtype != param.dtype:
            m = m.to(buffer.dtype)  # as torch does, which goes on with what is stored
        d = d.add(m, alpha=group.momentum) if group.nesterov else m
        _write(buffer, m, found_inf)
    if isinstance(group.lr, Tensor):
        # Rounded once, like the fused multiply-add that alpha= stands for, which takes no tensor.
        lr = group.lr.to(w.dtype).double()
        _write(param, (w.double() - d.double() * lr).to(w.dtype), found_inf)
    else:
        _write(param, w.add(d, alpha=-group.lr), found_inf)


def _adam_tensor(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    max_exp_avg_sq: Tensor | None,
    step: Tensor | None,
    group: AdamGroup,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Do torch.optim.Adam's loop on one tensor, in fp32 for 16-bit data, skipped on the device if found_inf is set."""
    w, d = wide(param), _direction(grad, grad_scale, group.maximize)
    correction1: Any = group.correction1
    correction2_root: Any = group.correction2_root
    if correction1 == 0.0 and step is not None:
        t = step.double().reshape(()) + 1
        correction1 = 1 - group.beta1**t
        correction2_root = (1 - group.beta2**t).sqrt()
    step_size = group.lr / correction1
    if group.weight_decay != 0 and not group.decoupled:
        d = d.add(w, alpha=group.weight_decay)
    if group.weight_decay != 0 and group.decoupled:
        w = w * (1 - group.lr * group.weight_decay)
    zeros = torch.zeros_like(w) if group.first else None
    m = (wide(exp_avg) if zeros is None else zeros).lerp(d, 1 - group.beta1)
    v = ((wide(exp_avg_sq) if zeros is None else zeros) * group.beta2).addcmul(d, d, value=1 - group.beta2)
    _write(exp_avg, m, found_inf)
    _write(exp_avg_sq, v, found_inf)
    if max_exp_avg_sq is not None:
        v = torch.maximum(wide(max_exp_avg_sq) if zeros is None else zeros, v)
        _write(max_exp_avg_sq, v, found_inf)
    # A number is cut to the dtype of the tensor it meets; a tensor of no dimensions is not.
    if isinstance(correction2_root, Tensor):
        correction2_root = correction2_root.to(w.dtype)
    denominator = (v.sqrt() / correction2_root).add_(group.eps)
    if isinstance(step_size, Tensor):
        _write(param, w - step_size.to(w.dtype) * m / denominator, found_inf)
    else:
        _write(param, w.addcdiv(m, denominator, value=-step_size), found_inf)


def _direction(grad: Tensor, grad_scale: Tensor | None, maximize: bool) -> Tensor:
    """Unscale the gradient in place and return it as the base step takes it; an expanded one cannot be written."""
    g = wide(grad)
    if grad_scale is not None:
        # Out of place in fp32: a factor on a GPU would be rounded to the gradient's 16 bits first.
        g = g * grad_scale.double().reciprocal().float()
        if not overlaps_itself(grad):
            grad.copy_(g)
    return -g if maximize else g


def _write(target: Tensor, value: Tensor, found_inf: Tensor | None) -> None:
    target.copy_(value if found_inf is None else torch.where(found_inf != 0, wide(target), value))
