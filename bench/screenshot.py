"""Run a command in a terminal of its own and draw what it shows at the end: python -m bench.screenshot FILE COMMAND"""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import struct
import sys
import termios
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

from bench import flags

COLUMNS, ROWS = 110, 60
CLEAR_LINE, UP, MODE = re.compile(r"\x1b\[2?K"), re.compile(r"\x1b\[(\d*)A"), re.compile(r"\x1b\[\?\d+[hl]")
# rich's pictures fetch their letters from another machine; a picture in a page must not.
FETCHED = re.compile(r"@font-face \{.*?\}\s*", re.DOTALL)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Return the command line's options."""
    parser = flags.parser("screenshot", __doc__)
    parser.add_argument("picture", type=Path, help="the SVG to write")
    parser.add_argument("--title", help="the title of its window (default: the command)")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what to run")
    return parser.parse_args(arguments)


def recorded(command: Sequence[str]) -> str:
    """Run the command in a terminal, pass on what it writes, and return it."""
    written = io.BytesIO()

    def read(terminal: int) -> bytes:
        fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", ROWS, COLUMNS, 0, 0))
        data = os.read(terminal, 1 << 16)
        written.write(data)
        return data

    os.environ.update(TERM="xterm-256color", COLUMNS=str(COLUMNS), LINES=str(ROWS))
    if status := os.waitstatus_to_exitcode(pty.spawn(list(command), read)):
        sys.exit(f"{command[0]} ended with exit status {status}: no picture.")
    return written.getvalue().decode("utf-8", "replace")


def at_the_end(written: str) -> str:
    """Return the lines that stay on the screen: those that a progress bar wrote anew are its last."""
    lines = [""]
    for piece in re.split(r"(\r\n|\n|\r|\x1b\[\d*A)", MODE.sub("", written)):
        if piece in ("\n", "\r\n"):
            lines.append("")
        elif piece == "\r":
            lines[-1] += "\r"
        elif found := UP.fullmatch(piece):
            del lines[len(lines) - int(found[1] or 1) :]
        else:
            kept = "" if CLEAR_LINE.search(piece) or (lines[-1].endswith("\r") and piece) else lines[-1]
            lines[-1] = kept + CLEAR_LINE.sub("", piece)
    return "\n".join(line.rstrip("\r") for line in lines).strip("\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, and draw."""
    options = parse_arguments(arguments)
    draw(recorded(options.command), options.title or " ".join(options.command), options.picture)
    return 0


def draw(written: str, title: str, path: Path) -> None:
    """Draw what a command has written, with paths as seen from here."""
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text.from_ansi(at_the_end(written).replace(f"{Path.cwd()}/", "")))
    picture = console.export_svg(title=title, theme=MONOKAI)
    path.write_text(FETCHED.sub("", picture), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
