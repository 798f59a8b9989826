"""A process of the proof is over when its time is, with whatever it started; and how it ended is told."""

from __future__ import annotations

import io
import os
import signal
import sys
import tarfile
import time
from pathlib import Path

import pytest

from benchmarks.proof import __main__ as program
from benchmarks.proof.runner import Ended, Process
from benchmarks.proof.screen import Screen
from benchmarks.proof.stage import ROOT
from benchmarks.proof.state import Unusable


def ended(code: str, log: Path, **options) -> Ended:
    process = Process([sys.executable, "-c", code], log, **{"budget": 60, **options})
    while (found := process.poll()) is None:
        time.sleep(0.02)
    return found


def gone(pid: int) -> bool:
    """A zombie that waits for its parent is gone, too."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def wait_until(condition) -> bool:
    end = time.monotonic() + 30
    while not (done := condition()) and time.monotonic() < end:
        time.sleep(0.02)
    return done


def test_what_ends_by_itself(tmp_path):
    found = ended("print('hello'); raise SystemExit(7)", tmp_path / "log")
    assert (found.how, found.code, str(found)) == ("exit", 7, "exit code 7")
    assert (tmp_path / "log").read_text() == "hello\n"


def test_a_crash_is_told_by_its_name(tmp_path):
    found = ended("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", tmp_path / "log")
    assert found.how == "exit" and str(found).startswith("crashed: SIGSEGV (")


@pytest.mark.parametrize("ignore", ["", "signal.signal(signal.SIGTERM, signal.SIG_IGN)"])
def test_a_hanging_process_is_killed(tmp_path, ignore):
    code = f"import signal, time\n{ignore}\nprint('begun', flush=True)\ntime.sleep(600)"
    found = ended(code, tmp_path / "log", budget=0.5)
    assert found.how == "budget" and "budget was used up" in str(found) and found.seconds < 60
    assert found.code == -(signal.SIGKILL if ignore and "begun" in (tmp_path / "log").read_text() else signal.SIGTERM)


GRANDCHILD = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session={session})
print(child.pid, flush=True)
time.sleep({seconds})
"""


@pytest.mark.parametrize("session", [False, True])
@pytest.mark.parametrize(("seconds", "how"), [(0, "exit"), (600, "budget")])
def test_a_hanging_grandchild_is_killed(tmp_path, session, seconds, how):
    """Whether its parent hangs or has ended, and also where it left the group for a session of its own."""
    log = tmp_path / "log"
    process = Process([sys.executable, "-c", GRANDCHILD.format(session=session, seconds=seconds)], log, budget=60)
    assert wait_until(lambda: log.read_text().endswith("\n"))
    pid = int(log.read_text())
    assert wait_until(lambda: not gone(pid) or process.poll() is not None)
    if how == "budget":
        assert not gone(pid)
        found = process.stop("budget")
    else:
        assert wait_until(lambda: process.poll() is not None)
        found = process.stop("exit")
    assert found.how == how
    assert wait_until(lambda: gone(pid))


def test_a_process_that_says_nothing_is_taken_for_hung(tmp_path):
    found = ended("import time; time.sleep(600)", tmp_path / "log", patience=0.5)
    assert found.how == "stalled" and "it hung" in str(found)


def test_signs_of_life_count(tmp_path):
    """Neither what it prints nor what it writes elsewhere stops for longer than the patience."""
    code = "import time\nfor _ in range(70): print('.', flush=True); time.sleep(0.1)"
    assert ended(code, tmp_path / "log", patience=5).how == "exit"
    sign = iter(range(10**9))
    quiet = "import time; time.sleep(5)"
    assert ended(quiet, tmp_path / "log", patience=3, signs=lambda: next(sign)).how == "exit"


def test_no_such_program_and_no_room(tmp_path):
    with pytest.raises(FileNotFoundError, match="no-such-program"):
        Process(["no-such-program"], tmp_path / "log", budget=1)
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        Process([sys.executable, "-c", ""], tmp_path / "file" / "log", budget=1)


def test_it_sees_its_environment_and_folder(tmp_path):
    code = "import os; print(os.environ['GREETING'], os.getcwd())"
    assert ended(code, tmp_path / "log", environment={"GREETING": "hello"}, folder=tmp_path).code == 0
    assert (tmp_path / "log").read_text() == f"hello {os.path.realpath(tmp_path)}\n"


def test_a_report_that_fails_leaves_what_it_is_made_of(tmp_path, monkeypatch):
    """And it is told where the checkout's packages are, which need not be installed."""
    given = {}

    class Failing:
        def __init__(self, argv, log, **options):
            given.update(options)
            log.parent.mkdir(parents=True)
            log.write_text("the sky fell\n")

        def poll(self):
            return Ended("exit", 1, 0.1)

    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    monkeypatch.setattr(program, "Process", Failing)
    folder, out = tmp_path / "card", tmp_path / "out"
    (folder / "bench").mkdir(parents=True)
    (folder / "bench" / "rows-0.jsonl").write_text("rows")
    (folder / "bench" / "object.o").write_text("")
    with pytest.raises(Unusable, match=r"(?s)could not be written.*state\.tar\.gz.*the sky fell"):
        program.report(folder, out, False, Screen(io.StringIO()))
    with tarfile.open(out / "state.tar.gz") as archive:
        assert archive.getnames() == ["bench/rows-0.jsonl", "report/log-0.txt"]
    path = given["environment"]["PYTHONPATH"].split(os.pathsep)
    assert {str(ROOT), str(ROOT / "python")} <= {*path} and path[-1] == "/of/the/user"
