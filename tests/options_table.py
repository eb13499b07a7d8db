"""Write the tables of docs/options.md, which `fused_sam.options` determines: python tests/options_table.py"""

from __future__ import annotations

import inspect
from pathlib import Path

from fused_sam import FusedSAM
from fused_sam.options import CASES, EXCLUDES, RANGES

PAGE = Path(__file__).parent.parent / "docs" / "options.md"
START, END = "<!-- options:start -->\n", "<!-- options:end -->"
# What an option says of itself where it has no range.
FREE = {"backend": "`native`, `triton`, `eager` or None", "replay_rng": "True or False", "capturable": "True or False"}


def options() -> list[str]:
    rows = ["| option | default | must be |", "|---|---|---|"]
    for name, parameter in inspect.signature(FusedSAM).parameters.items():
        if name in RANGES or name in FREE:
            what = RANGES[name].text if name in RANGES else FREE[name]
            rows.append(f"| `{name}` | `{parameter.default!r}` | {what} |")
    return rows


def exclusions() -> list[str]:
    texts = {case.option: case.text for case in CASES}
    rows = ["| what | does not go with | why |", "|---|---|---|"]
    for option, other, reason in EXCLUDES:
        setting = f"`{other}`" if "=" in other or "(" in other else other
        rows.append(f"| {texts[option]} | {texts.get(other, setting)} | {reason} |")
    return rows


def block() -> str:
    return "\n".join([*options(), "", *exclusions()]) + "\n"


def with_block(page: str) -> str:
    head, rest = page.split(START)
    return head + START + block() + END + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(with_block(PAGE.read_text()))
