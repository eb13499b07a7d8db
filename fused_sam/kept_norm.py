"""||m||_2 of the momentum as the last update left it, for the MSAM step that begins there.

The update writes m, so its kernel can add up the squares as it goes: the step then needs no norm of its own, and reads
m once less. The number holds for as long as nobody has touched m since, which the versions that autograd counts tell.
An assignment through ``m.data[...] = x`` does not count there, and neither does the replay of a CUDA graph: with
``capturable`` every step takes the norm anew.
"""

from __future__ import annotations

import operator
from typing import TYPE_CHECKING, Any

from torch import Tensor

if TYPE_CHECKING:
    from fused_sam.optimizer import FusedSAM
    from fused_sam.routing import TensorList


class KeptNorm:
    """A norm, and what it is of: the momentum of every parameter, None where it does not count."""

    def __init__(self) -> None:
        self.forget()

    def __reduce__(self) -> tuple[type[KeptNorm], tuple[()]]:
        return KeptNorm, ()  # copies have momenta of their own

    def forget(self) -> None:
        """There is none."""
        self._norm: Tensor | None = None
        self._momenta: TensorList = []
        self._versions: list[int] = []

    def is_wanted(self, optimizer: FusedSAM) -> bool:
        """To be called before an update: what was kept holds no more. Whether that update is to measure the momentum.

        Not where T of adaptive groups would have to be watched as well, ranks have a part of each tensor, or the next
        step is not perturbed.
        """
        self.forget()
        groups = optimizer.param_groups
        return (
            not optimizer.capturable
            and optimizer._peers.has_whole_tensors
            and optimizer._schedule.due(groups)  # this step is counted already
            and not any(group["adaptive"] for group in groups)
        )

    def keep(self, norm: Tensor | None, groups: list[Any], momenta: TensorList, grads: TensorList) -> None:
        """What the update has found: the norm of the momenta of the ``measured`` groups that have a gradient."""
        if norm is None:
            return
        counted = [group.measured for group in groups for _ in range(group.size)]
        kept = [m if c and g is not None else None for m, c, g in zip(momenta, counted, grads)]
        try:
            self._versions = _versions(kept)
        except RuntimeError:  # made in inference mode: they have none
            return
        self._norm, self._momenta = norm, kept

    def of(self, momenta: TensorList, groups: list[Any]) -> Tensor | None:
        """The norm, if it is what these momenta have now and T = 1; else None."""
        if self._norm is None or len(momenta) != len(self._momenta) or any(group.adaptive for group in groups):
            return None
        if not all(map(operator.is_, momenta, self._momenta)) or _versions(momenta) != self._versions:
            return None
        return self._norm


def _versions(tensors: TensorList) -> list[int]:
    return [x._version for x in tensors if x is not None]
