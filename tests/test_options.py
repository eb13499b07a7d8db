"""The options, what excludes what, and the page that says so."""

from __future__ import annotations

import pytest
import torch
from options_table import GUIDE, with_block

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
    "p": 3.0,
    "interval": 2,
    "start": 1,
    "stop": 9,
    "base_optimizer": torch.optim.NAdam,
}


def test_the_guide_has_the_tables() -> None:
    """To write them anew: python tests/options_table.py"""
    page = GUIDE.read_text()
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
