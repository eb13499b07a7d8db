"""Pictures of what a command shows at the end."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

pytest.importorskip("rich")
from bench import screenshot

SHOWN = r"print('\x1b[31mred\x1b[0m\n1 of 2\r2 of 2\nup\n\x1b[1A\x1b[2Kover')"


def test_a_picture_has_the_last_of_each_line_and_fetches_nothing(tmp_path: Path) -> None:
    picture = tmp_path / "shown.svg"
    assert screenshot.main([str(picture), sys.executable, "-c", SHOWN]) == 0
    drawn = picture.read_text()
    texts = [text.replace("&#160;", " ") for text in re.findall(r"<text[^>]*>(.*?)</text>", drawn)]
    assert [text.strip() for text in texts if text.strip()][1:] == ["red", "2 of 2", "over"]
    assert "@font-face" not in drawn


def test_a_command_that_fails_makes_no_picture(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="exit status 3: no picture"):
        screenshot.main([str(tmp_path / "shown.svg"), sys.executable, "-c", "raise SystemExit(3)"])
    assert not list(tmp_path.iterdir())
