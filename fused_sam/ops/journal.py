"""What has been done to the weights, and how it is undone."""

from __future__ import annotations

import itertools
import operator
from typing import Any, TypeAlias

import torch

from fused_sam.routing import TensorList

# What perturb has done and restore or sgd_update have yet to undo: entries with ``params``, ``kept`` (None for each
# parameter that is not displaced), ``joins_update`` and ``restore()``. It is written by the code that touches the
# weights, at the moment it has: an interrupt finds it true.
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


def copy(sources: TensorList, targets: TensorList) -> None:
    """target = source wherever there are both."""
    for source, target in zip(sources, targets):
        if source is not None and target is not None:
            target.copy_(source)


def all_present(tensors: TensorList) -> bool:
    """Whether no entry is None. (``None in tensors`` would compare tensors.)"""
    return all(map(operator.is_not, tensors, itertools.repeat(None)))


def one_batch(journal: Journal, count: int) -> Any | None:
    """The backups that `sgd_update` of ``count`` parameters can restore in its own pass; where several calls moved the
    weights, or one that was not given all of them, undoes them."""
    if len(journal) == 1 and journal[0].joins_update and len(journal[0].params) == count:
        return journal[0]
    undo(journal)
    return None


def undo(journal: Journal) -> None:
    """Bring back w wherever the journal says that it is displaced."""
    for entry in journal:
        entry.restore()
        bump_versions(entry.params, entry)
    journal.clear()


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
