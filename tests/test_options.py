"""The options, what excludes what, and the page that says so."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from helpers import leaves, quadratic
from options_table import PAGE, with_block

from fused_sam import FusedSAM
from fused_sam.options import CASES, EXCLUDES, Options, refuse

# A value with which each case holds.
IN_FORCE = {
    "second_order": True,
    "ascent_steps": 2,
    "looksam_alpha": 0.3,
    "direction": "momentum",
    "master_weights": True,
    "telemetry": True,
    "capturable": True,
    "decay_in_ascent": True,
    "replay_rng": True,
    "p": 3.0,
    "interval": 2,
    "start": 1,
    "stop": 9,
    "base_optimizer": torch.optim.NAdam,
}
OUT_OF_RANGE: dict[str, list[Any]] = {
    "rho": [-0.1, -1e-30, math.nan, math.inf, -math.inf, torch.tensor(-1.0)],
    "adaptive": ["bias"],
    "eta": [-0.1, math.inf],
    "decay_in_ascent": [1],
    "p": [0.99, 0, -1, math.nan],
    "max_grad_norm": [0, 0.0, -1.0, math.nan, math.inf],
    "interval": [0, -1, 1.5, "2", None, True],
    "start": [-1, 0.5, None, False],
    "stop": [-1, 0, 2.5, "9", True],
    "direction": ["sideways"],
    "ascent_steps": [0, -1, 1.5, True, "2", None],
    "second_order": ["yes"],
    "looksam_alpha": [0.0, -1.0, math.nan, math.inf],
    "master_weights": [1],
    "telemetry": [1, None, "yes"],
}
OF_GROUPS = ("rho", "adaptive", "eta", "decay_in_ascent")
NO_NUMBERS: dict[str, list[Any]] = {
    "rho": ["0.05", None, [0.1], torch.ones(2), torch.ones(0)],
    "max_grad_norm": ["1", [1.0], True, torch.tensor(1.0)],
    "looksam_alpha": ["a lot"],
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_a_value_out_of_range_is_refused_by_name(name: str) -> None:
    opt = FusedSAM(leaves(3), lr=0.1, momentum=0.9)
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(ValueError, match=rf"^Invalid {name}=.*\. Must be .*\.$"):
            FusedSAM(leaves(3), lr=0.1, momentum=0.9, **{name: value})
        if name in OF_GROUPS:
            with pytest.raises(ValueError, match=f"Invalid {name}="):
                FusedSAM([{"params": leaves(3), name: value}], lr=0.1)
            with pytest.raises(ValueError, match=f"Invalid {name}="):
                opt.add_param_group({"params": leaves(3), name: value})
            assert len(opt.param_groups) == 1


@pytest.mark.parametrize("name", NO_NUMBERS)
def test_what_is_no_number_is_refused_by_name(name: str) -> None:
    for value in NO_NUMBERS[name]:
        with pytest.raises(TypeError, match=rf"^Invalid {name}=.*\. Must be a number.*\.$"):
            FusedSAM(leaves(3), lr=0.1, **{name: value})


class Mine(torch.optim.SGD):
    """Its step may be another."""


def test_what_depends_on_two_values_or_on_the_base() -> None:
    with pytest.raises(ValueError, match=r"Invalid stop=4\. Must be None or an integer > start=4: no step"):
        FusedSAM(leaves(3), start=4, stop=4)
    with pytest.raises(ValueError, match="Invalid master_weights=True with base_optimizer=Mine"):
        FusedSAM(leaves(3), Mine, lr=0.1, master_weights=True)
    with pytest.raises(ValueError, match="Invalid direction='momentum' with momentum=0"):
        FusedSAM(leaves(3), lr=0.1, direction="momentum")
    params = leaves(3)
    opt = FusedSAM(params, lr=0.1, momentum=0.9, direction="momentum")
    with pytest.raises(ValueError, match="Invalid direction='momentum' with a closure for the ascent"):
        opt.step(quadratic(params), ascent=quadratic(params))


def test_the_page_has_the_tables() -> None:
    """To write them anew: python tests/options_table.py"""
    page = PAGE.read_text()
    assert with_block(page) == page


@pytest.mark.parametrize("rule", EXCLUDES, ids=lambda rule: f"{rule.option} and {rule.other}")
def test_what_does_not_go_together_is_refused_by_name(rule) -> None:
    given = {name: IN_FORCE[name] for name in (rule.option, rule.other) if name in IN_FORCE}
    if (rule.option == "looksam_alpha" and rule.other != "interval=1") or rule.other == "looksam_alpha":
        given["interval"] = 2
    with pytest.raises(ValueError, match=f"^Invalid {rule.option}=.* with ") as refused:
        refuse(Options(**given), rule.other)
    assert str(refused.value).endswith(rule.reason)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.option)
def test_an_option_alone_is_not_refused(case) -> None:
    alone = {case.option: IN_FORCE[case.option]}
    if case.option == "looksam_alpha":
        alone["interval"] = 2
    assert case.holds(Options(**alone))
    assert not case.holds(Options())
