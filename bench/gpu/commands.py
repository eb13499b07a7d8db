"""Commands with a log and a limit of seconds, for bench.gpu: interrupted first, so that they write what they have."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import records

# Between SIGINT, on which pytest prints its failures and a benchmark writes its rows, and SIGKILL; and of what has
# nothing to write.
GRACE_S, SHORT_GRACE_S = 10.0, 2.0
LARGEST_LOG = 4 << 20


@dataclass(frozen=True)
class Runner:
    """Runs commands in the checkout and logs them to `out`. `rehearse`: steps do without a GPU what can be done."""

    out: Path
    environment: dict[str, str]
    rehearse: bool = False

    def run(
        self, command: Sequence[str], log: str, seconds: float, grace_s: float = GRACE_S, **environment: str
    ) -> tuple[int | None, str]:
        """Return the exit code, None past the limit, and the output; the log is appended to and kept short.

        The last `grace_s` of the seconds are between the two signals.
        """
        path = self.out / log
        begin = path.stat().st_size if path.exists() else 0
        with path.open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            process = subprocess.Popen(
                command,
                cwd=records.ROOT,
                env=self.environment | environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            code = _wait(process, seconds - grace_s, grace_s)
        output = path.read_bytes()[begin:].decode(errors="replace")
        _shorten(path)
        return code, output


def _wait(process: subprocess.Popen[bytes], seconds: float, grace_s: float) -> int | None:
    """Wait for the command, and end all that it started, which is a session of its own."""
    try:
        return process.wait(max(0.0, seconds))
    except subprocess.TimeoutExpired:
        _send(process, signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
        return None
    finally:
        _send(process, signal.SIGKILL)
        process.wait()


def _send(process: subprocess.Popen[bytes], number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def _shorten(path: Path) -> None:
    """Leave out the middle of a log that grew too long."""
    data = path.read_bytes()
    if len(data) > LARGEST_LOG:
        half = LARGEST_LOG // 2
        path.write_bytes(data[:half] + b"\n[...]\n" + data[-half:])
