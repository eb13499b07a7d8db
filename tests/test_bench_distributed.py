"""What ranks send in one step is what docs/distributed.md says; steps of ranks over links of a limited rate."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
import torch.distributed as dist
from ranks import Ranks
from torch import nn

from bench import records, tables
from bench.ranks import links, overlap
from bench.ranks.counts import VARIANTS, WARM_UP, count

IMAGES = 2


class Small(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Flatten(), nn.Linear(784, 10))


def counts(variant: str) -> dict[str, list[int]]:
    torch.manual_seed(0)
    step = VARIANTS[variant](Small())
    torch.manual_seed(dist.get_rank())
    batches = [(torch.randn(IMAGES, 1, 28, 28), torch.randint(10, (IMAGES,))) for _ in range(4)]
    for _ in range(WARM_UP):
        step(batches)
    return count(lambda: step(batches))


@pytest.mark.parametrize(
    ("variant", "gradients"),
    [
        ("DDP, eager SAM", 2),
        ('DDP, FusedSAM "rank"', 1),
        ('DDP, FusedSAM "rank", 4 closures', 4),
        ('FusedSAM "rank"', 1),
        ("FusedSAM 2", 2),
        ('FusedSAM "rank", 4 closures', 1),
    ],
)
def test_how_many_gradients_a_step_sends(variant: str, gradients: int, four: Ranks) -> None:
    size = 7850 + (2 + 2 if variant.startswith("FusedSAM") else 0)  # with padding and flags
    for seen in four.run(counts, variant):
        assert set(seen) == {"all_reduce"}
        assert seen["all_reduce"][1] == gradients * size


def test_a_sharded_step_gathers_each_weight_once(four: Ranks) -> None:
    for seen in four.run(counts, 'FusedSAM "rank", shard_state'):
        # 7850 in shares of a multiple of four elements.
        assert seen["all_gather"] == [1, 1964]


def test_rows_and_table_of_steps_over_limited_links() -> None:
    options = overlap.parse_arguments(["--ranks", "4", "--megabits", "200"])
    seconds = {name: [2.0, 3.0, 4.0] for name in overlap.VARIANTS}
    seconds |= {overlap.SILENT: [1.0, 2.0, 2.0], overlap.LATE: [4.0, 4.0, 5.0]}
    rows = overlap.rows(options, seconds, dict.fromkeys(seconds, 2.5e6))
    shown = {row["variant"]: row for row in rows}["FusedSAM"]
    assert shown["ratio_to_silent"]["median"] == 2.0
    assert shown["ratio_to_late"]["median"] == 0.75
    line = next(line for line in tables.overlap(rows).splitlines() if "| FusedSAM |" in line)
    assert line.startswith("| 4 | 200 | FusedSAM | 3e+03 (2.4e+03 to 3.6e+03) | **2.00** (1.70 to 2.00) | **0.75** (")
    assert line.endswith("| 2.5 |")
    assert tables.overlap([]) == ""


SENDER = """
import socket, sys, time
sys.path.insert(0, {root!r})
from bench.ranks import links
with socket.create_server(("10.0.0.1", 7007)) as server:
    print("ready", flush=True)
    other, _ = server.accept()
    before, start = links.sent_bytes(), time.monotonic()
    other.sendall(bytes({size}))
    other.shutdown(socket.SHUT_WR)
    other.recv(1)
    print(time.monotonic() - start, links.sent_bytes() - before)
"""
RECEIVER = """
import socket
with socket.create_connection(("10.0.0.1", 7007)) as sender:
    while sender.recv(1 << 16):
        pass
"""


def test_a_link_limits_the_rate_and_counts_what_is_sent() -> None:
    size = 2_000_000
    try:
        with links.links(2, 20.0) as names:
            script = SENDER.format(root=str(records.ROOT), size=size)
            command = links.inside(names[0], sys.executable, "-c", script)
            with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
                assert sender.stdout is not None
                assert sender.stdout.readline() == "ready\n"
                subprocess.run(links.inside(names[1], sys.executable, "-c", RECEIVER), check=True)
                seconds, sent = map(float, sender.stdout.read().split())
    except RuntimeError as error:
        pytest.skip(str(error))
    assert sent >= size
    # No load makes a link faster; what a bucket holds goes out at once.
    assert seconds >= (size - 4 * links.BURST_BYTES) * 8 / 20e6
    assert names[0] not in subprocess.run(["ip", "netns", "list"], capture_output=True, text=True).stdout
