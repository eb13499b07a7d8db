"""Options that several commands share, and checks that can be made before anything is computed."""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

PICTURES = (".pdf", ".png", ".svg")


def add_common(parser: argparse.ArgumentParser, picture: str | None = None) -> None:
    """Add TARGET, ``--seed``, ``--json`` and, with the name of what it draws, ``--plot``."""
    parser.add_argument("targets", nargs="+", metavar="TARGET", help="module:function returning (model, loss_fn, data)")
    parser.add_argument(
        "--seed", type=int, default=0, help="of torch before a TARGET is called, and of what is drawn (default: 0)"
    )
    add_json(parser)
    if picture is not None:
        parser.add_argument("--plot", type=picture_path, metavar="FILE", help=f"draw {picture} ({', '.join(PICTURES)})")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", type=output_path, metavar="FILE", help="write options and results, unrounded")


def whole(least: int) -> Callable[[str], int]:
    """Return the argparse type of an integer >= ``least``."""
    return _number(int, lambda x: x >= least, f"an integer >= {least}")


def real(least: float, *, above: bool = False) -> Callable[[str], float]:
    """Return the argparse type of a number >= ``least``, or > ``least``; inf is allowed."""
    rule = f"a number > {least:g}" if above else f"a number >= {least:g}"
    return _number(float, lambda x: x > least if above else x >= least, rule)


def _number(convert: Callable[[str], Any], holds: Callable[[Any], bool], rule: str) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = convert(text)
        except ValueError:
            value = None
        if value is None or not holds(value):
            raise argparse.ArgumentTypeError(f"invalid value {text!r}. Must be {rule}.")
        return value

    return parse


def output_path(text: str) -> Path:
    """Return the path of a file to be written; refuse it before the computation, not after it."""
    path = Path(text)
    if path.is_dir() or not path.parent.is_dir():
        raise argparse.ArgumentTypeError(f"invalid file {text!r}. Must be in a folder that exists.")
    return path


def picture_path(text: str) -> Path:
    """Return the path of a picture to be written."""
    if Path(text).suffix not in PICTURES:
        raise argparse.ArgumentTypeError(f"invalid picture {text!r}. Must end in one of {', '.join(PICTURES)}.")
    return output_path(text)


def require(*packages: str) -> None:
    """Refuse to start without what will be needed in the end.

    Raises:
        ModuleNotFoundError: with what to install.
    """
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"This needs {name}: pip install '.[analysis]'", name=name)
