"""Fixtures of the pytest-benchmark entries."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(params=[1, 2], ids=lambda count: f"{count}T")
def thread_count(request: pytest.FixtureRequest) -> Iterator[int]:
    """Run torch, and FusedSAM with it, on that many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)
