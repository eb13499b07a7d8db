"""A pytest plugin for a run that may be ended at any moment: python -m pytest -p bench.gpu.pytest_plugin

Failures are appended at once to the file that FUSED_SAM_FAILURES names. A test that takes longer than
FUSED_SAM_TEST_SECONDS ends its process, even where that waits for a kernel, and leaves its stacks there; a failure
after which the device is lost to its process ends it too. Where pytest-xdist hands out tests, another takes the next.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Generator

import pytest

LONGEST_REPORT = 4000


def _failures() -> str:
    return os.environ["FUSED_SAM_FAILURES"]


class Failures:
    """Writes reports; with pytest-xdist those of all processes arrive in the first."""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Write what a part of a test reports, if it failed."""
        self.write(report, report.when)

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        """Write why a module could not be collected."""
        self.write(report, "collection")

    def write(self, report: pytest.TestReport | pytest.CollectReport, when: str) -> None:
        """Append a report of a failure."""
        if report.failed:
            with open(_failures(), "a", encoding="utf-8") as file:
                file.write(f"{report.nodeid} ({when})\n{report.longreprtext[-LONGEST_REPORT:]}\n\n")


def pytest_configure(config: pytest.Config) -> None:
    """Write in the first process only; the others end at SIGINT, which it would wait for ten seconds otherwise."""
    if hasattr(config, "workerinput"):
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    else:
        config.pluginmanager.register(Failures())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Limit a test's time, and leave a process whose device is lost."""
    failed = item.session.testsfailed
    with open(_failures(), "a", encoding="utf-8") as file:
        faulthandler.dump_traceback_later(float(os.environ["FUSED_SAM_TEST_SECONDS"]), exit=True, file=file)
        try:
            result = yield
        finally:
            faulthandler.cancel_dump_traceback_later()
    if item.session.testsfailed > failed and _device_is_lost():
        if hasattr(item.config, "workerinput"):
            os._exit(1)
        item.session.shouldstop = "the device is lost to this process"
    return result


def _device_is_lost() -> bool:
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
