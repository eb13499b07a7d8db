"""The file that an interrupted run goes on from, and the signals that interrupt one."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from bench.training.run import save_whole
from fused_sam import rng

NAME = "checkpoint.pt"
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
        """Inside the block the signals are noted and do nothing else."""
        before = {number: signal.signal(number, self._note) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.signum = signum


def save(state: dict[str, Any], path: Path) -> None:
    """Written aside and renamed: at any time there is a whole file under the name, or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_whole(state, path)


def load(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """A saved state, in the memory of the host.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for one that was saved under another configuration, naming the first value that differs.
    """
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint to resume from: {path}.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, saved in state["config"].items():
        if saved != config[name]:
            raise ValueError(f"Invalid {name}={config[name]!r}. Must be {saved!r} as in {path}.")
    return state


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Of torch's generators on the host and on the device."""
    return list(rng.capture([device]).values())


def set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Go on from what `random_state` gave."""
    rng.replay(dict(zip(rng.capture([device]), states, strict=True)))
