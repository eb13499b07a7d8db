"""What the fused base steps share: new state, and runs of parameters with and without any."""

from __future__ import annotations

import itertools

from torch import Tensor

from fused_sam import ops
from fused_sam.backends.interface import Journal, TensorList
from fused_sam.parameters import Parameters


def skip_at_first(tensors: list[Tensor], found_inf: Tensor | None, journal: Journal, what: str) -> bool:
    """Return whether a step that would make state is skipped; the weights are restored then.

    State that is skipped must not come into being, and only the host can see to that.

    Raises:
        RuntimeError: where it would be made in a CUDA graph.
    """
    if ops.is_capturing(tensors):
        raise RuntimeError(f"{what} would be made in every replay: step once before capturing a CUDA graph.")
    if found_inf is None or not bool(found_inf):
        return False
    ops.restore_weights(journal)
    journal.clear()
    return True


def enter_state(
    parameters: Parameters, tensors: list[Tensor], fresh: set[int], state: dict[str, TensorList], journal: Journal
) -> None:
    """Enter new state of the parameters ``fresh``; it is taken out again unless the update is made that fills it."""
    entries = {
        tensors[i]: {key: values[i] for key, values in state.items() if values[i] is not None} for i in sorted(fresh)
    }
    new = ops.NewState(parameters.state, entries)
    journal.append(new)
    new.enter()


def weights_of(tensors: list[Tensor], masters: TensorList | None) -> TensorList:
    """Return what the base step updates: masters where there are any."""
    return tensors if masters is None else [p if m is None else m for p, m in zip(tensors, masters)]


def runs(size: int, start: int, fresh: set[int]) -> list[tuple[int, bool]]:
    """Return (length, first) for each run of a group's parameters, from index ``start`` on, with or without state."""
    if not fresh:
        return [(size, False)]
    flags = itertools.groupby(i in fresh for i in range(start, start + size))
    return [(len(list(run)), first) for first, run in flags]
