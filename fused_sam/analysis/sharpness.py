"""m-sharpness: how much the loss rises within radius rho, in the mean over groups of m examples."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fused_sam import rng
from fused_sam.analysis.neighbourhood import Climb, Neighbourhood
from fused_sam.analysis.objective import Batch, LossFn, Objective, require_examples


class Sharpness(NamedTuple):
    """What `sharpness` measured.

    Attributes:
        sharpness: the mean rise of the loss; NaN if a loss is.
        loss: L(w), the mean over all examples.
        groups: how many groups the examples were cut into.
        examples: how many there were.
    """

    sharpness: float
    loss: float
    groups: int
    examples: int


@torch.no_grad()
def sharpness(
    model: nn.Module,
    loss_fn: LossFn,
    data: Any,
    *,
    rho: float = 0.05,
    m: int | None = None,
    p: float = 2.0,
    adaptive: bool | str = False,
    eta: float = 0.0,
    steps: int = 1,
    step_size: float | None = None,
    params: Iterable[Tensor] | None = None,
    replay_rng: bool = True,
    process_group: dist.ProcessGroup | None = None,
    backend: str | None = None,
) -> Sharpness:
    r"""Return the m-sharpness of Foret et al. 2021, section 4.1: over disjoint groups S of m examples, the mean of

    .. math:: \max_{\lVert T^{-1} \epsilon \rVert_p \le \rho} L_S(w + \epsilon) - L_S(w).

    With ``steps=1`` the maximum is taken to be at the :math:`\epsilon` of eq. 2, as SAM does, so the result may be
    negative. With more, projected steepest ascent climbs from there, :math:`T` staying that of w:

    .. math:: \epsilon_{k+1} = \Pi\big(\epsilon_k + \alpha \, T \, \mathrm{sign}(x)
        (|x| / \lVert x \rVert_q)^{q-1}\big), \quad x = T \nabla L_S(w + \epsilon_k), \quad \tfrac1p + \tfrac1q = 1,

    and the highest loss met on the way counts. :math:`\Pi` brings :math:`T^{-1} \epsilon` back into the ball: by
    scaling for p = 2 and by clamping for p = inf, which both give the nearest point, and by scaling for any other p,
    which does not. A group whose gradient is zero or not finite stays where it is in that step.

    Each group takes ``steps`` forward-backward passes and one forward pass. Weights come back bit for bit, also after
    an exception; modes, running statistics and ``p.grad`` are not touched. The model runs in the mode it is in: for one
    that ends in evaluation mode, call ``model.eval()`` first.

    Args:
        model: called as ``model(x)``.
        loss_fn: called as ``loss_fn(output, y)``; returns the mean over the batch.
        data: batches ``(x, y)`` that can be gone over more than once, or one pair of tensors, the whole data set.
        rho: radius, >= 0.
        m: examples in a group, >= 1. Each batch is cut into groups; what remains at its end is a smaller group and
            counts by its examples. None: all examples are one group with one epsilon.
        p: 1 <= p <= inf, of the norm in which the radius is measured.
        adaptive: True for T = abs(w) + eta elementwise (ASAM, Kwon et al. 2021), ``"weights"`` for tensors of two and
            more dimensions only, False for T = 1.
        eta: >= 0.
        steps: of the ascent, >= 1.
        step_size: alpha, > 0; None for ``rho / sqrt(steps)``, the step of the subgradient method that leaves room to
            turn on the sphere. The first step never exceeds rho.
        params: the weights that may move; None for all that require a gradient.
        replay_rng: evaluate a group from one random state, so that all see the same dropout masks, and leave the
            generators as they were found.
        process_group: add up over the processes of this group, each of which has examples of its own. With ``m=None``
            they share one epsilon.
        backend: of the ops, as in `FusedSAM`.

    Raises:
        ValueError: for a value out of range, a first batch of fewer than m examples, or data without examples.
        TypeError: for data that is not iterable, or only once.
        InvalidTensor: for a parameter that the ops do not take (one that overlaps itself in memory).
    """
    neighbourhood = Neighbourhood(rho, p, adaptive, eta)
    _check(m, steps, step_size)
    objective = Objective(model, loss_fn, data, params, replay_rng)
    if step_size is None:
        step_size = rho / math.sqrt(steps)
    sums = torch.zeros(4, dtype=torch.float64, device=objective.device)
    with objective.untouched():
        for group in _groups(objective, m, process_group):
            loss, highest = _climb(group, Climb(objective.params, neighbourhood, step_size, backend), steps)
            sums += torch.stack([(highest - loss) * group.size, loss * group.size, group.size, torch.ones_like(loss)])
    if m is not None:
        _add_up([sums], process_group)
    rise, loss, examples, groups = sums.tolist()
    require_examples(int(examples))
    return Sharpness(rise / examples, loss / examples, int(groups), int(examples))


def _check(m: int | None, steps: int, step_size: float | None) -> None:
    if m is not None and not (isinstance(m, int) and m >= 1):
        raise ValueError(f"Invalid {m=}. Must be an integer >= 1, or None.")
    if not (isinstance(steps, int) and steps >= 1):
        raise ValueError(f"Invalid {steps=}. Must be an integer >= 1.")
    if step_size is not None and not 0 < step_size < math.inf:
        raise ValueError(f"Invalid {step_size=}. Must be > 0 and finite.")


class _Group:
    """Examples that share an epsilon: their mean loss and its gradient at the present weights."""

    def __init__(
        self, objective: Objective, batches: Iterable[Batch], process_group: dist.ProcessGroup | None = None
    ) -> None:
        self._objective = objective
        self._batches = batches
        self._process_group = process_group
        self._random_state = objective.random_state()
        self.size = torch.zeros((), dtype=torch.float64, device=objective.device)

    def loss(self) -> Tensor:
        """Return the mean loss; fp64, shape [], on the device."""
        return self._evaluate(None)

    def loss_and_gradient(self) -> tuple[Tensor, list[Tensor]]:
        """Return the loss, and a gradient for each parameter, in its dtype or fp32 if that is wider."""
        params = self._objective.params
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in params]
        loss = self._evaluate(sums)
        wide = [torch.promote_types(p.dtype, torch.float32) for p in params]
        return loss, [(g / self.size.to(g.device)).to(dtype) for g, dtype in zip(sums, wide)]

    def _evaluate(self, sums: list[Tensor] | None) -> Tensor:
        """Return the mean loss and add the gradients of all examples to ``sums``."""
        if self._random_state is not None:
            rng.replay(self._random_state)
        total, size = (torch.zeros((), dtype=torch.float64, device=self._objective.device) for _ in range(2))
        for batch in self._batches:
            with torch.set_grad_enabled(sums is not None):
                loss = self._objective.loss(batch)
                if sums is not None:
                    grads = torch.autograd.grad(loss, self._objective.params, allow_unused=True, materialize_grads=True)
                    for s, g in zip(sums, grads):
                        s.add_(g, alpha=batch.size)
            total += loss.detach().to(total) * batch.size
            size += batch.size
        _add_up([total, size, *(sums or [])], self._process_group)
        self.size = size
        return total / size


def _groups(objective: Objective, m: int | None, process_group: dist.ProcessGroup | None) -> Iterator[_Group]:
    if m is None:
        yield _Group(objective, objective, process_group)
        return
    for number, batch in enumerate(objective):
        if number == 0 and batch.size < m:
            raise ValueError(f"Invalid {m=}. Must be at most the size of a batch; the first has {batch.size} examples.")
        for piece in batch.cut(m):
            yield _Group(objective, [piece])


def _climb(group: _Group, climb: Climb, steps: int) -> tuple[Tensor, Tensor]:
    """Return the loss at w, and the highest at w + epsilon_1, w + epsilon_2, ...; the weights are back at w then."""
    loss, grads = group.loss_and_gradient()
    highest = torch.full_like(loss, -math.inf)
    try:
        climb.start(grads)
        for _ in range(steps - 1):
            there, grads = group.loss_and_gradient()
            highest = torch.maximum(highest, there)  # which keeps a NaN
            climb.go_on(grads)
        highest = torch.maximum(highest, group.loss())
    finally:
        climb.undo()
    return loss, highest


def _add_up(tensors: list[Tensor], process_group: dist.ProcessGroup | None) -> None:
    """Add up over the processes of the group, in place."""
    if process_group is not None:
        for x in tensors:
            dist.all_reduce(x, group=process_group)
