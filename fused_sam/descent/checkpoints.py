"""Checkpoints of others: of the base optimizer alone, and of the two-call class that is in common use."""

from __future__ import annotations

from typing import Any

COPY_OF_W = "old_p"  # which the two-call class keeps in its state, from one step to the next


def adapted(state_dict: dict[str, Any], param_groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the checkpoint without copies of w, and with what its groups lack (rho, ...) as our groups have it now."""
    state = {
        key: {name: x for name, x in entry.items() if name != COPY_OF_W} if isinstance(entry, dict) else entry
        for key, entry in state_dict["state"].items()
    }
    state_dict = {**state_dict, "state": {key: entry for key, entry in state.items() if entry != {}}}
    groups = state_dict["param_groups"]
    if len(groups) != len(param_groups):
        return state_dict  # torch says what is wrong
    missing = [{k: v for k, v in ours.items() if k not in ("params", "param_names")} for ours in param_groups]
    return {**state_dict, "param_groups": [{**ours, **saved} for ours, saved in zip(missing, groups)]}
