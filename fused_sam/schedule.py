"""Which steps are perturbed: every k-th, from one step until another. The others are the base optimizer's alone.

The number of steps made is in the first parameter group, under a key of its own: there a checkpoint, also one that has
been through `torch.optim.SGD`, and every copy take it along.
"""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Any

from fused_sam import ops

KEY = "sam_step"


@dataclass(frozen=True)
class Schedule:
    """Perturbed are the steps start, start + interval, start + 2 interval, ... before ``stop``, counted from 0.

    Raises:
        ValueError: for what is not an integer, or out of range.
    """

    interval: int = 1
    start: int = 0
    stop: int | None = None

    def __post_init__(self) -> None:
        interval, start, stop = self.interval, self.start, self.stop
        if not _is_integer(interval) or interval < 1:
            raise ValueError(f"Invalid {interval=}. Must be an integer >= 1.")
        if not _is_integer(start) or start < 0:
            raise ValueError(f"Invalid {start=}. Must be an integer >= 0.")
        if stop is not None and (not _is_integer(stop) or stop <= start):
            raise ValueError(f"Invalid {stop=}. Must be None or an integer > {start=}: no step would be perturbed.")

    @property
    def always(self) -> bool:
        """Whether every step is perturbed, so that there is nothing to count."""
        return self == Schedule()

    def due(self, param_groups: list[dict[str, Any]], ahead: int = 0) -> bool:
        """Whether the step that comes next is perturbed; with ``ahead``, the one so many steps later."""
        step = param_groups[0].get(KEY, 0) + ahead - self.start
        return step >= 0 and step % self.interval == 0 and (self.stop is None or step < self.stop - self.start)

    def is_over(self, param_groups: list[dict[str, Any]]) -> bool:
        """Whether no step is perturbed any more."""
        return self.stop is not None and param_groups[0].get(KEY, 0) >= self.stop


class Counted(ops.StateEntry):
    """A journal entry for the count, which an interrupted step does not advance."""

    def __init__(self, group: dict[str, Any]) -> None:
        self.group = group
        self.before = group[KEY]

    def restore(self) -> None:
        """Set it back."""
        self.group[KEY] = self.before


def count(param_groups: list[dict[str, Any]], journal: ops.Journal) -> None:
    """The step that now is made is one more. Where nobody counts, nobody starts."""
    if KEY in param_groups[0]:
        journal.append(Counted(param_groups[0]))
        param_groups[0][KEY] += 1


def _is_integer(x: Any) -> bool:
    return isinstance(x, numbers.Integral) and not isinstance(x, bool)
