"""A plugin of pytest (-p benchmarks.proof.recorder): every test into the ledger as it ends.

Tests that have ended are not run again; none begins once time is up; and where a test has broken the card's context, in
which every later test would fail too, the process exits and the rest goes on in a new one.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .ledger import Ledger, Row
from .worker import LEDGER, START_AGAIN, TIME_IS_UP, Deadline

LONGEST_DETAIL = 4000


def pytest_configure(config: pytest.Config) -> None:
    if LEDGER in os.environ:
        config.pluginmanager.register(Recorder(Ledger(Path(os.environ[LEDGER]))))


class Recorder:
    """Makes a row of the reports of a test's setup, call and teardown."""

    def __init__(self, ledger: Ledger) -> None:
        self.ledger, self.deadline = ledger, Deadline()
        self.session: Any = None
        self.row = Row("", "passed")
        self.late = False

    def pytest_sessionstart(self, session: pytest.Session) -> None:
        self.session = session

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.ledger.finish(Row(f"{report.nodeid} (collection)", "failed", detail=tail(report.longreprtext)))
        elif report.skipped:
            self.ledger.finish(Row(f"{report.nodeid} (collection)", "missing", detail=reason(report)))

    @pytest.hookimpl(wrapper=True)
    def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> Iterator[None]:
        """After -k, -m and shards have selected, so that each shard is the same in every start."""
        yield
        done = self.ledger.done()
        config.hook.pytest_deselected(items=[item for item in items if item.nodeid in done])
        items[:] = [item for item in items if item.nodeid not in done]

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.row = Row(nodeid, "passed")
        self.ledger.start(nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        outcome, detail = self.row.outcome, self.row.detail
        if report.failed:
            outcome, detail = "failed", f"{detail}\n{report.when}: {tail(report.longreprtext)}".strip()
        elif report.skipped and outcome == "passed":
            expected = getattr(report, "wasxfail", None)
            # A test that is expected to fail has been run; one that is skipped has not.
            outcome, detail = ("missing", reason(report)) if expected is None else ("passed", f"fails: {expected}")
        self.row = Row(self.row.name, outcome, self.row.seconds + report.duration, detail)

    def pytest_runtest_logfinish(self, nodeid: str) -> None:
        self.ledger.finish(self.row)
        if self.row.outcome == "failed" and context_is_broken():
            print(f"\n{nodeid} broke the card's context: the rest goes on in a new process", flush=True)
            sys.stderr.flush()
            os._exit(START_AGAIN)
        if self.deadline.left <= 0:
            self.late, self.session.shouldstop = True, "time is up"

    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        if self.late:
            session.exitstatus = TIME_IS_UP


def tail(text: str) -> str:
    return text[-LONGEST_DETAIL:]


def reason(report: pytest.TestReport | pytest.CollectReport) -> str:
    return str(report.longrepr[2]) if isinstance(report.longrepr, tuple) else tail(report.longreprtext)


def context_is_broken() -> bool:
    """After an illegal access every call of CUDA fails, until the process ends."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
    except RuntimeError:
        return True
    return False
