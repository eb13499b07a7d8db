"""Entries of the journal: what has been done to weights and state, and how it is undone."""

from __future__ import annotations

import itertools
from typing import Any, ClassVar

import torch
from torch import Tensor

from fused_sam.backends.interface import Journal, TensorList
from fused_sam.ops.lists import all_present, increment_version, is_list, presence


class Copies:
    """A journal entry for parameters of layouts that only torch can walk."""

    joins_update = False

    def __init__(self, params: TensorList, backups: TensorList) -> None:
        self.params = params
        self.backups = backups
        copy(params, backups)

    @property
    def has_backup(self) -> TensorList:
        """Return an entry for each parameter: None for those that are not displaced."""
        return self.backups

    def restore(self) -> None:
        """Copy back."""
        copy(self.backups, self.params)


class StateEntry:
    """A journal entry for something done to state, and for no weight. Entered before it is done."""

    joins_update = False
    params: ClassVar[TensorList] = []
    has_backup: ClassVar[TensorList] = []

    def restore(self) -> None:
        """Take it back."""
        raise NotImplementedError


class NewState(StateEntry):
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


class AdamStepEntry(StateEntry):
    """A journal entry for counts of steps on the host, tensors of one element, that have been advanced."""

    def __init__(self, counts: list[Tensor], before: list[float]) -> None:
        self.counts = counts
        self.before = before

    def restore(self) -> None:
        """Set them back."""
        for count, before in zip(self.counts, self.before):
            count.fill_(before)


def copy(sources: TensorList, targets: TensorList) -> None:
    """Write target = source wherever there are both."""
    for source, target in zip(sources, targets):
        if source is not None and target is not None:
            target.copy_(source)


def joint_backup(journal: Journal, count: int) -> Any | None:
    """Return the backups that `sgd_update` of ``count`` parameters can restore in its own pass.

    Where several calls moved the weights, or one that was not given all of them, restore them and return None.
    """
    moved = None
    for entry in journal:
        if not entry.params:
            continue
        if moved is not None or not entry.joins_update or len(entry.params) != count:
            restore_weights(journal)
            return None
        moved = entry
    return moved


def restore_weights(journal: Journal) -> None:
    """Restore w wherever the journal says that it is displaced.

    All stays entered: a base step that then fails half way is undone by `roll_back`, its weights from the same backups.
    """
    for entry in journal:
        if entry.params:
            _undo_one(entry)


def roll_back(journal: Journal) -> None:
    """Undo all that the journal says has been done."""
    with torch.no_grad():  # an interrupt on the way out of a closure comes while gradients are recorded
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
        if is_list(x) and all_present(x):
            increment_version(params)
            return
    given: list[Any] = [x for x in touched if x is not None]
    lists = [presence(x) if is_list(x) else x.has_backup for x in given]
    written = [p for p, *entries in itertools.zip_longest(params, *lists) if any(x is not None for x in entries)]
    increment_version(written)
