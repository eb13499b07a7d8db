"""The same random numbers in both passes, so that they see the same dropout masks.

The difference of the two gradients is then due to the perturbation alone (the official implementation passes the same
key to both). ``FusedSAM(replay_rng=True)`` does this in the closure form; the two-call form does it by hand::

    state = fused_sam.rng.capture()
    loss(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    fused_sam.rng.replay(state)
    loss(model(x), y).backward()
    optimizer.step()
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

RNGState = dict[torch.device, Tensor]

_CPU = torch.device("cpu")


def capture(devices: Iterable[torch.device | str] = ()) -> RNGState:
    """Return the state of torch's CPU generator and of the default generators of the given accelerator devices."""
    state = {_CPU: torch.get_rng_state()}
    for device in {torch.device(d) for d in devices}:
        if device.type != "cpu":
            state[device] = torch.get_device_module(device).get_rng_state(device)
    return state


def replay(state: RNGState) -> None:
    """Set the generators back to a captured state."""
    for device, generator_state in state.items():
        if device == _CPU:
            torch.set_rng_state(generator_state)
        else:
            torch.get_device_module(device).set_rng_state(generator_state, device)
