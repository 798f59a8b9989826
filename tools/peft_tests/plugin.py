"""What pytest does differently while it runs PEFT's tests: a switch is on, and every test's outcome is written down.

Loaded by `-p tools.peft_tests.plugin`; the options come by the environment, since PEFT's own files define pytest's.
"""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

import pytest

from tools.peft_tests import hub, switches
from tools.peft_tests.suite import PREFIX

MARKERS = ("single_gpu_tests", "multi_gpu_tests", "regression", "bitsandbytes")
# PEFT's tests do not ask again for what they asked for before, and then fail so.
UNREACHED = re.compile(r"couldn't connect to 'https://huggingface\.co'|LocalEntryNotFoundError|OfflineModeIsEnabled")
# The worst of a test's three parts is its outcome.
ORDER = ("passed", "xfailed", "skipped", "unreachable", "failed")


def option(name: str) -> str:
    return os.environ[PREFIX + name]


class Recorder:
    """Writes a line of JSON for every test: its outcome, its message where it did not pass, its fused calls."""

    def __init__(self, path: Path, switch: switches.Switch, closed: hub.Closed | None) -> None:
        self.file = path.open("w")
        self.switch, self.closed = switch, closed
        self.outcome, self.message, self.start = "passed", "", 0.0

    def write(self, **fields: Any) -> None:
        self.file.write(json.dumps(fields) + "\n")
        self.file.flush()

    @pytest.hookimpl(tryfirst=True)
    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        switches.keep_plain_lora(metafunc.definition.iter_markers("parametrize"))

    @pytest.hookimpl(trylast=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
        """What concerns other tuners alone is left out, and what is not wanted."""
        wanted = [item for item in items if switches.concerns(item) and re.search(option("ONLY"), item.nodeid)]
        config.hook.pytest_deselected(items=list(set(items) - set(wanted)))
        items[:] = wanted
        self.write(collected=len(items))

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Any:
        self.outcome, self.message, self.start = "passed", "", time.perf_counter()
        self.switch.begin()
        if self.closed:
            self.closed.asked = False
        result = yield
        self.write(
            test=self.switch.name(item.nodeid),
            outcome=self.outcome,
            message=self.message,
            seconds=round(time.perf_counter() - self.start, 3),
            calls=self.switch.end(),
        )
        return result

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome = "xfailed" if report.skipped and hasattr(report, "wasxfail") else str(report.outcome)
        if outcome == "failed" and self.closed and (self.closed.asked or UNREACHED.search(str(report.longrepr))):
            outcome = "unreachable"
        if ORDER.index(outcome) > ORDER.index(self.outcome):
            self.outcome, self.message = outcome, said(report)


def said(report: pytest.TestReport) -> str:
    """What a report says in a line or two."""
    if isinstance(report.longrepr, tuple):
        return report.longrepr[2]
    crash = getattr(report.longrepr, "reprcrash", None)
    return str(crash.message if crash else report.longrepr or "")[:2000]


def pytest_configure(config: pytest.Config) -> None:
    for marker in MARKERS:
        config.addinivalue_line("markers", f"{marker}: a marker of PEFT's tests")
    closed = hub.Closed() if option("HUB") == "closed" else None
    switch = switches.SWITCHES[option("SWITCH")]()
    config.pluginmanager.register(Recorder(Path(option("RECORD")), switch, closed))
