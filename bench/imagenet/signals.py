"""The signals that interrupt a run."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):
    """The run has been asked to stop, and is saved."""

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Requests:
    """Signals that ask the run to stop, which it does at the end of the step.

    Attributes:
        signum: the last that came, 0 for none.
    """

    def __init__(self) -> None:
        self.signum = 0

    @contextlib.contextmanager
    def heard(self) -> Iterator[None]:
        """Note the signals inside the block, where they do nothing else."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum
