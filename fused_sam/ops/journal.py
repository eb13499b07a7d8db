"""What has been done to the weights, and how it is undone."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar, TypeAlias

import torch
from torch import Tensor

from fused_sam.param_lists import all_present
from fused_sam.routing import TensorList

# What is to be undone if the step goes no further: entries with ``params``, ``kept`` (None for each parameter that is
# not displaced), ``joins_update`` and ``restore()``. What perturb has done to the weights is entered by the code that
# touches them, at the moment it has, and what a base step does to state before the weights follow; the update clears it
# all, at the moment it is made. An interrupt finds it true.
Journal: TypeAlias = list[Any]


class Copies:
    """A journal entry for parameters of layouts that only torch can walk."""

    joins_update = False

    def __init__(self, params: TensorList, backups: TensorList) -> None:
        self.params = params
        self.backups = backups
        copy(params, backups)

    @property
    def kept(self) -> TensorList:
        """None for each parameter that is not displaced."""
        return self.backups

    def restore(self) -> None:
        """Copy back."""
        copy(self.backups, self.params)


class Done:
    """A journal entry for something done to state, and for no weight. Entered before it is done."""

    joins_update = False
    params: ClassVar[TensorList] = []
    kept: ClassVar[TensorList] = []

    def restore(self) -> None:
        """Take it back."""
        raise NotImplementedError


class NewState(Done):
    """A journal entry for state that comes into being with the first update. Until then it holds nothing."""

    def __init__(self, state: dict[Tensor, dict[str, Any]], entries: dict[Tensor, dict[str, Any]]) -> None:
        self.state = state
        self.entries = entries

    def enter(self) -> None:
        """Put the entries into the state.

        Raises:
            TypeError: where something other than a dict is there.
        """
        for param, entry in self.entries.items():
            there = self.state[param]
            if not isinstance(there, dict):
                raise TypeError(f"Invalid state of a parameter, a {type(there).__name__}. Must be a dict.")
            there.update(entry)

    def restore(self) -> None:
        """Take them out."""
        for param, entry in self.entries.items():
            there = self.state.get(param, {})
            if not isinstance(there, dict):
                continue
            for key in entry:
                there.pop(key, None)
            if not there:
                self.state.pop(param, None)


class Counted(Done):
    """A journal entry for counts of steps on the host, tensors of one element, that have been advanced."""

    def __init__(self, counts: list[Tensor], before: list[float]) -> None:
        self.counts = counts
        self.before = before

    def restore(self) -> None:
        """Set them back."""
        for count, before in zip(self.counts, self.before):
            count.fill_(before)


def copy(sources: TensorList, targets: TensorList) -> None:
    """target = source wherever there are both."""
    for source, target in zip(sources, targets):
        if source is not None and target is not None:
            target.copy_(source)


def one_batch(journal: Journal, count: int) -> Any | None:
    """The backups that `sgd_update` of ``count`` parameters can restore in its own pass; where several calls moved the
    weights, or one that was not given all of them, they are brought back."""
    moves = [entry for entry in journal if entry.params]
    if len(moves) == 1 and moves[0].joins_update and len(moves[0].params) == count:
        return moves[0]
    bring_back(journal)
    return None


def bring_back(journal: Journal) -> None:
    """Bring back w wherever the journal says that it is displaced.

    All stays entered: a base step that then fails half way is undone by `undo`, its weights from the same backups.
    """
    for entry in journal:
        if entry.params:
            _undo_one(entry)


def undo(journal: Journal) -> None:
    """Undo all that the journal says has been done."""
    for entry in journal:
        _undo_one(entry)
    journal.clear()


def _undo_one(entry: Any) -> None:
    entry.restore()
    bump_versions(entry.params, entry)


def bump_versions(params: TensorList, *touched: TensorList | Any | None) -> None:
    """Tell autograd of writes through raw pointers, so that a backward through a stale graph raises.

    Written are the parameters that have an entry in one of the lists, or a backup in one of the journal entries.
    """
    for x in touched:
        if isinstance(x, list) and all_present(x):
            torch.autograd.graph.increment_version(params)
            return
    lists = [x if isinstance(x, list) else x.kept for x in touched if x is not None]
    written = [p for p, *entries in itertools.zip_longest(params, *lists) if any(x is not None for x in entries)]
    torch.autograd.graph.increment_version(written)
