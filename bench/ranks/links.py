"""Network namespaces joined by links of a limited rate: sending takes time on them, and next to nothing of a core.

Debian's iproute2, and root. Every namespace has one end of a veth pair, whose other end is a port of a bridge; a token
bucket (tc-tbf) limits what either end sends.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

DEVICE = "eth0"
# One packet as large as the kernel makes them, and what may wait for the link: less than TCP ever has under way.
BURST_BYTES = 128 << 10
QUEUE_BYTES = 8 << 20


def why_not() -> str | None:
    """Return what is missing, if anything."""
    if os.geteuid():
        return "network namespaces need root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    return f"{' and '.join(missing)} not found: apt-get install iproute2" if missing else None


@contextlib.contextmanager
def links(count: int, megabits: float) -> Iterator[list[str]]:
    """Yield the names of ``count`` namespaces, each with an address in one network and a link of that rate each way."""
    if reason := why_not():
        raise RuntimeError(f"No limited links: {reason}.")
    prefix = f"fused-sam-{os.getpid()}"
    hub, names = f"{prefix}-hub", [f"{prefix}-{i}" for i in range(count)]
    try:
        for name in (hub, *names):
            _run("ip", "netns", "add", name)
        _run("ip", "-n", hub, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", hub, "link", "set", "bridge", "up")
        for i, name in enumerate(names):
            port = f"port{i}"
            _run("ip", "-n", hub, "link", "add", port, "type", "veth", "peer", "name", DEVICE, "netns", name)
            _run("ip", "-n", name, "addr", "add", f"10.0.0.{i + 1}/24", "dev", DEVICE)
            _run("ip", "-n", name, "link", "set", "lo", "up")
            _run("ip", "-n", hub, "link", "set", port, "master", "bridge")
            for namespace, device in ((name, DEVICE), (hub, port)):
                _run("ip", "-n", namespace, "link", "set", device, "up")
                limit = ("rate", f"{megabits}mbit", "burst", str(BURST_BYTES), "limit", str(QUEUE_BYTES))
                _run("tc", "-n", namespace, "qdisc", "add", "dev", device, "root", "tbf", *limit)
        yield names
    finally:
        for name in (hub, *names):
            subprocess.run(["ip", "netns", "del", name], capture_output=True, check=False)


def inside(name: str, *command: str) -> list[str]:
    """Return a command in a namespace."""
    return ["ip", "netns", "exec", name, *command]


def sent_bytes() -> int:
    """Return what this namespace has sent so far."""
    return int(Path(f"/sys/class/net/{DEVICE}/statistics/tx_bytes").read_text(encoding="ascii"))


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"No limited links: {' '.join(command)}: {done.stderr.strip()}.")
