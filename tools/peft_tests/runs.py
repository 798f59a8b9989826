"""Runs files of PEFT's tests, each in a process of its own under one switch, and gathers what they wrote down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tools.peft_tests.suite import PREFIX, Suite

ROOT = Path(__file__).parents[2]
# pytest's exit codes of a run that came to its end: all passed, some failed, nothing was selected.
ENDED = (0, 1, 5)
# PEFT's own settings ask for coverage, which is not wanted here.
SETTINGS = "[pytest]\n"


class Test(NamedTuple):
    """One test's outcome under one switch."""

    test: str
    outcome: str
    message: str
    seconds: float
    calls: Mapping[str, int]
    """How many calls of layers ran in which way."""


class Broken(Exception):
    """A process did not come to its end. The text holds what it said last."""


class Run:
    """One file under one switch: a process, and what it has written so far."""

    def __init__(self, folder: Path, suite: Suite, switch: str, hub: str) -> None:
        self.suite, self.switch = suite, switch
        self.stem = folder / "outcomes" / f"{suite.file}-{switch}{'-part' if suite.only else ''}"
        self.stem.parent.mkdir(exist_ok=True)
        self.record, self.log = self.stem.with_suffix(".jsonl"), self.stem.with_suffix(".log")
        self.record.unlink(missing_ok=True)
        settings = folder / "pytest.ini"
        settings.write_text(SETTINGS)
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--tb=native",
            "-p",
            "tools.peft_tests.plugin",
            "-p",
            "no:cacheprovider",
        ]
        command += ["-c", str(settings), "--rootdir", str(folder), f"tests/{suite.file}.py"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                command, cwd=folder, env=self.environment(hub), stdout=log, stderr=subprocess.STDOUT
            )

    def environment(self, hub: str) -> dict[str, str]:
        """The library is that of this checkout, and the hub that of `hub`, whatever stands in the environment."""
        paths = [str(ROOT), str(ROOT / "python"), *filter(None, [os.environ.get("PYTHONPATH")])]
        options = {"SWITCH": self.switch, "RECORD": str(self.record.resolve()), "HUB": hub, "ONLY": self.suite.only}
        own = {PREFIX + name: value for name, value in options.items()} | {"PYTHONPATH": os.pathsep.join(paths)}
        return {name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"} | own

    def lines(self) -> list[dict[str, object]]:
        """What was written so far; a last line that is not whole is left for the next time."""
        text = self.record.read_text() if self.record.is_file() else ""
        return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]

    def collected(self) -> int:
        """How many tests were selected; 0 before that is known."""
        return next((int(str(line["collected"])) for line in self.lines() if "collected" in line), 0)

    def tests(self) -> list[Test]:
        return [Test(**line) for line in self.lines() if "test" in line]  # type: ignore[arg-type]

    def finished(self) -> list[Test]:
        """The outcomes of a process that has ended. Raises Broken where it did not come to its end."""
        tests = self.tests()
        if self.process.returncode not in ENDED or len(tests) != self.collected():
            last = "\n".join(self.log.read_text().splitlines()[-15:])
            raise Broken(
                f"{self.suite.file} ({self.switch}) ended with {self.process.returncode} after {len(tests)} of "
                f"{self.collected()} tests; {self.log} ends with\n{last}"
            )
        return tests


def run(
    folder: Path, wanted: Iterable[tuple[Suite, str]], hub: str, jobs: int, tell: Callable[[list[Run]], None]
) -> Iterator[Run]:
    """Every (file, switch), `jobs` at a time, each handed out when it has ended; `tell` sees all that run, twice a second.

    folder holds PEFT's tests/; hub is "open" or "closed".
    """
    waiting, running = list(wanted), list[Run]()
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                running.append(Run(folder, *waiting.pop(0), hub))
            tell(running)
            ended = [one for one in running if one.process.poll() is not None]
            for one in ended:
                running.remove(one)
                yield one
            if not ended:
                time.sleep(0.5)
    finally:
        for one in running:
            one.process.kill()


def counts(tests: Iterable[Test]) -> Counter[str]:
    return Counter(test.outcome for test in tests)
