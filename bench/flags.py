"""The command line of every tool here: `--help` says what an option is where it is not given."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


class _WithDefaults(argparse.RawDescriptionHelpFormatter):
    """Writes the default behind the help of an option, unless the help says it in words or there is nothing to say."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text, default = action.help, action.default
        says = default is not None and default is not False and default is not argparse.SUPPRESS
        if not says or not action.option_strings or text is None or "default:" in text:
            return text
        return f"{text} (default: {_shown(default)})"


def _shown(default: Any) -> str:
    if isinstance(default, Path) and default.is_relative_to(ROOT):
        default = default.relative_to(ROOT)
    if isinstance(default, list | tuple):
        default = " ".join(map(str, default)) or "none"
    return str(default).replace("%", "%%")


def parser(module: str, description: str | None, **options: Any) -> argparse.ArgumentParser:
    """Return a parser without options for `python -m bench.MODULE`; ``options`` are argparse's."""
    prog, layout = f"python -m bench.{module}", _WithDefaults
    return argparse.ArgumentParser(prog=prog, description=description, formatter_class=layout, **options)
