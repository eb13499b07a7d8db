"""For pytest -p ptx.plugin: the CUDA kernels take CPU tensors through their PTX, and a report fails its test."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from ptx import emulator as loader

EMULATOR = loader.load()


def pytest_configure() -> None:
    if "PTX_NATIVE" in os.environ:
        from ptx import bounds

        bounds.watch_native(EMULATOR)
    if "PTX_TRITON" in os.environ:
        from ptx import bounds, triton_driver

        triton_driver.install(EMULATOR, int(os.environ["PTX_TRITON"]))
        bounds.watch_triton(EMULATOR)


@pytest.fixture(autouse=True)
def _nothing_to_report(_reproducible: None) -> Iterator[None]:
    EMULATOR.take_reports()
    yield
    reports = EMULATOR.take_reports()
    assert not reports, "\n".join(reports[:10])


def pytest_sessionfinish() -> None:
    if "PTX_LAUNCHES" in os.environ:
        lines = [f"{count} {name}\n" for name, count in sorted(EMULATOR.launches().items())]
        Path(os.environ["PTX_LAUNCHES"]).write_text("".join(lines))
