"""The parts of a step by name in profiles: FusedSAM.ascent, in it .norm and .perturb, then .update.

`torch.profiler` and NVTX show them. Nothing here is called where there is no profiler.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, cast

from torch.autograd.profiler import record_function

P = TypeVar("P")  # what takes the norm: the peers of a step


class _LabelledNorm:
    """Peers whose norm has a label; what follows it in an ascent is the perturbation, which gets another."""

    def __init__(self, peers: Any, labels: contextlib.ExitStack) -> None:
        self._peers = peers
        self._labels = labels

    def norm(self, *args: Any) -> Any:
        with record_function("FusedSAM.norm"):
            norm = self._peers.norm(*args)
        self._labels.enter_context(record_function("FusedSAM.perturb"))
        return norm

    def __getattr__(self, name: str) -> Any:
        return getattr(self._peers, name)


@contextlib.contextmanager
def ascent(peers: P) -> Iterator[P]:
    """Label the block; give it peers that label the norm, and what comes after it."""
    with contextlib.ExitStack() as labels:
        labels.enter_context(record_function("FusedSAM.ascent"))
        yield cast(P, _LabelledNorm(peers, labels))


def update(base_step: Callable[..., None]) -> Callable[..., None]:
    """Return a base step with a label."""

    def labelled(*args: Any) -> None:
        with record_function("FusedSAM.update"):
            base_step(*args)

    return labelled
