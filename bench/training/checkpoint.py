"""The file that an interrupted run goes on from: whole at any time, and of one configuration."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fused_sam import rng


def save(state: Any, path: Path) -> None:
    """Save as torch does, but whenever it ends, by a full disk or a kill, the file is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_suffix(f".part{os.getpid()}")
    try:
        torch.save(state, aside)
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise


def load(path: Path, config: dict[str, Any]) -> dict[str, Any]:
    """Return a saved state, in the memory of the host."""
    if not path.exists():
        raise FileNotFoundError(f"No checkpoint to resume from: {path}.")
    state = torch.load(path, map_location="cpu", weights_only=True)
    for name, saved in state["config"].items():
        if saved != config[name]:
            raise ValueError(f"Invalid {name}={config[name]!r}. Must be {saved!r} as in {path}.")
    return state


def random_state(device: torch.device) -> list[torch.Tensor]:
    """Return the states of torch's generators on the host and on the device."""
    return list(rng.capture([device]).values())


def set_random_state(states: list[torch.Tensor], device: torch.device) -> None:
    """Go on from what `random_state` gave."""
    rng.replay(dict(zip(rng.capture([device]), states, strict=True)))


def state_of(run: Any, counts: Sequence[str]) -> dict[str, Any]:
    """Return the values of these names, the configuration, the model's state and the optimizer's."""
    kept = {name: getattr(run, name) for name in counts}
    states = {"model": run.model.state_dict(), "optimizer": run.optimizer.state_dict()}
    return kept | states | {"config": asdict(run.config)}


def restore(run: Any, state: dict[str, Any], counts: Sequence[str]) -> None:
    """Go on from what `state_of` gave."""
    run.model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    for name in counts:
        setattr(run, name, state[name])
