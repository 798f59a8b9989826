"""Decompositions beside training: in a process that runs nothing of the script, and never in its way."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import threading
import time

import loradash
import pytest
import torch
from loradash import BackgroundDecomposition, DashConfig, SpectralCache, apply_dash, prelaunch
from loradash.background import LENGTH_BYTES
from safetensors.torch import save
from torch import nn


@pytest.fixture
def cache(tmp_path):
    return SpectralCache(tmp_path / "spectra")


def adapted(*widths):
    torch.manual_seed(0)
    layers = [nn.Linear(k, n) for k, n in itertools.pairwise(widths)]
    return apply_dash(nn.Sequential(*layers), DashConfig(r=2, directions=3))


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_takes_the_share_that_launch_gives_it(cache, monkeypatch, rank):
    """Two processes decompose every weight once between them, and launch reads its own share from disk."""
    model = adapted(24, 40, 24, 8, 32)
    for layer in model:
        nn.init.normal_(layer.lora_b)
    monkeypatch.setattr("loradash.cache.place", lambda group: (rank, 2))
    assert cache.start(model).wait()
    names = [name for name, layer in loradash.dash_layers(model).items() if cache.has(layer.weight)]
    monkeypatch.setitem(prelaunch.__globals__, "place", lambda group: (rank, 2))
    monkeypatch.setitem(prelaunch.__globals__, "check_same_layers", lambda shapes, group: None)
    seen = []

    def find(finder, shares, ours, bar, group):
        seen.append(shares[ours])
        raise KeyboardInterrupt

    monkeypatch.setitem(prelaunch.__globals__, "_find", find)
    with pytest.raises(KeyboardInterrupt):
        prelaunch(model, progress=False, cache=cache)
    assert sorted(*seen) == sorted(names) and 0 < len(names) < 4


def until(happened, seconds=300):
    """Waits: on a busy machine what runs at the lowest priority may have to."""
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.02)


def alive(pid):
    """Neither gone nor a zombie."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def environment(pid):
    with open(f"/proc/{pid}/environ") as file:
        return file.read().split("\0")


def ignores(pid, number):
    with open(f"/proc/{pid}/status") as file:
        mask = next(line for line in file if line.startswith("SigIgn"))
    return bool(int(mask.split()[1], 16) >> (number - 1) & 1)


linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def test_fills_the_cache(cache, monkeypatch):
    model = adapted(48, 64, 64, 8)
    work = cache.start(model)
    assert work.wait(600) and work.remaining == 0
    layers = loradash.dash_layers(model).values()
    assert all(cache.has(layer.weight_nk()) for layer in layers)
    assert not alive(work._worker.pid)
    again = cache.start(model)
    # Everything was there, so no process was started.
    assert again.wait(600) and again._worker is None
    for name in ("decompose_to_keep", "task_specific_directions"):
        monkeypatch.setattr(f"loradash.cache.{name}", None)
    for layer in layers:
        nn.init.normal_(layer.lora_b)
    prelaunch(model, progress=False, cache=cache)
    assert all(layer.launched for layer in layers)


@linux
def test_lowest_priority_one_thread_and_cancel(cache):
    """What is hashed is hashed in another thread than the caller's, of the lowest priority too."""
    threads = []
    # So large a weight is not decomposed before it is cancelled.
    large = torch.randn(3000, 5000)

    def weight():
        threads.append((threading.get_ident(), os.getpriority(os.PRIO_PROCESS, threading.get_native_id())))
        return large

    work = BackgroundDecomposition(cache, [weight, weight])
    until(lambda: work._worker is not None)
    pid = work._worker.pid
    until(lambda: os.getpriority(os.PRIO_PROCESS, pid) == 19)
    # A process that is just being started shows an empty environment for a moment.
    until(lambda: "OMP_NUM_THREADS=1" in environment(pid))
    work.cancel()
    assert not alive(pid) and not work._thread.is_alive()
    # To be cancelled is no failure.
    assert not work.wait() and work.remaining == 2
    assert threads == [(work._thread.ident, 19)] and work._thread.ident != threading.get_ident()
    assert os.getpriority(os.PRIO_PROCESS, 0) < 19


def test_cancelled_before_it_starts(cache):
    gate = threading.Event()

    def weight():
        gate.wait()
        return torch.randn(8, 8)

    work = BackgroundDecomposition(cache, [weight])
    threading.Timer(0.2, gate.set).start()
    work.cancel()
    assert work._worker is None and work.remaining == 1 and cache.size() == 0


def test_cancelled_while_it_looks_for_files(cache, monkeypatch):
    gate, asked = threading.Event(), []
    monkeypatch.setattr(cache, "has", lambda _: gate.wait())
    work = BackgroundDecomposition(cache, [lambda: asked.append(1) or torch.zeros(2, 2)] * 50)
    threading.Timer(0.2, gate.set).start()
    work.cancel()
    assert len(asked) == 1 and work.remaining == 49


def no_weight():
    raise KeyError("the weight is gone")


FAILURES = {
    "values": ([lambda: torch.full((4, 4), torch.nan)], "ValueError: weight has values that are not finite"),
    "weights": ([no_weight], "KeyError: 'the weight is gone'"),
    "meta": ([lambda: torch.empty(4, 4, device="meta")], "background decomposition failed"),
    "shape": ([lambda: torch.zeros(4)], "wanted \\(N, K\\)"),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_failures_are_reported_by_wait(cache, kind, recwarn):
    weights, message = FAILURES[kind]
    work = BackgroundDecomposition(cache, [*weights, lambda: torch.zeros(2, 2)])
    with pytest.raises(RuntimeError, match=message):
        work.wait(600)
    assert work.remaining == 2 and not recwarn.list
    work.cancel()


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(RuntimeError, match=r"(Not a directory|File exists|NotADirectory|FileExists)"):
        SpectralCache(tmp_path / "file" / "cache").start(adapted(8, 8)).wait(600)


@linux
def test_a_process_that_is_killed(cache):
    work = BackgroundDecomposition(cache, [lambda: torch.randn(1500, 2500)])
    until(lambda: work._worker is not None)
    os.kill(work._worker.pid, signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended with code -9"):
        work.wait(600)


@pytest.mark.parametrize("how", ["frozen", "none", "missing"])
def test_programs_without_an_interpreter(cache, monkeypatch, how):
    if how == "frozen":
        monkeypatch.setattr(sys, "frozen", True, raising=False)
    else:
        monkeypatch.setattr("loradash.background.get_executable", lambda: None if how == "none" else b"/nowhere/python")
    with pytest.raises(RuntimeError, match="nowhere" if how == "missing" else "no Python interpreter to start"):
        cache.start(adapted(8, 8)).wait(600)


@pytest.mark.parametrize("where", ["sharded", "offloaded"])
def test_layers_that_are_not_there_are_left_out(cache, monkeypatch, where):
    """Gathering needs every process, and offloading moves weights while training runs: a thread can have neither."""
    model = adapted(8, 16, 8)
    if where == "sharded":
        monkeypatch.setattr(model[0].lora_a, "device_mesh", None, raising=False)
        monkeypatch.setattr("loradash.cache.reshard", lambda model: None)
    else:
        accelerate = pytest.importorskip("accelerate")
        base = torch.nn.Sequential(torch.nn.Linear(8, 16))
        accelerate.cpu_offload(base, execution_device=torch.device("cpu"))
        model = apply_dash(torch.nn.Sequential(base[0], torch.nn.Linear(16, 8)), DashConfig(r=2, directions=2))
    with pytest.warns(UserWarning, match=r"loradash: 1 of 2 layers are sharded or offloaded .*: 0$"):
        work = cache.start(model)
    assert work.wait(600)
    assert cache.has(model[1].weight_nk()) and not cache.has(model[0].weight_nk())


def test_a_merged_model_is_refused(cache):
    model = adapted(8, 8)
    loradash.merge(model)
    with pytest.raises(ValueError, match=r"unmerge\(model\) before its weights are decomposed; merged: 0"):
        cache.start(model)


SCRIPT = """
import sys, torch
import loradash
open("runs", "a").write("x")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
model = loradash.apply_dash(model, loradash.DashConfig(r=4, directions=4))
cache = loradash.SpectralCache("cache")
print("filled", cache.start(model).wait(600), len(list(cache.folder.glob("*.safetensors"))))
"""
# Modules that would break every import, where the script lies and where it runs.
DECOYS = ("random", "json", "base", "config")


@pytest.mark.slow
@pytest.mark.parametrize("how", ["file", "stdin", "command", "path"])
def test_programs_run_once(tmp_path, how):
    """Scripts without a main guard, from a file, standard input or the command line; modules found as the program finds them."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    script, code, source = tmp_path / "script.py", SCRIPT, None
    # Only the running program's sys.path knows the package, and decoys lie in the working directory.
    if how == "path":
        code = f"import sys; sys.path[:] = {sys.path!r}\n" + SCRIPT
        environment.pop("PYTHONPATH", None)
        for name in DECOYS:
            (tmp_path / f"{name}.py").write_text("raise SystemExit('a decoy was imported')")
        script = tmp_path / "below" / "script.py"
        script.parent.mkdir()
    script.write_text(code)
    command = [sys.executable, str(script)]
    if how == "stdin":
        command, source = [sys.executable, "-"], code
    elif how == "command":
        command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, input=source, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-800:]
    assert "filled True 2" in done.stdout and done.stderr == ""
    assert (tmp_path / "runs").read_text() == "x"


ENDLESS = """
import sys, threading
import loradash.background_process as process
process.SpectralCache = lambda *_: type("Cache", (), {"keep": lambda self, weight: threading.Event().wait()})()
process.serve("folder", 0, sys.stdout)
"""


def test_the_process_ends_with_its_input_in_the_middle_of_a_decomposition():
    data = save({"weight": torch.zeros(2, 3)})
    message = len(data).to_bytes(LENGTH_BYTES, "little") + data
    done = subprocess.run([sys.executable, "-c", ENDLESS], input=message, capture_output=True, timeout=600)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


LONG = """
import sys, time, torch
from loradash import BackgroundDecomposition, SpectralCache
work = BackgroundDecomposition(SpectralCache("cache"), [lambda: torch.randn(2000, 4000)])
while work._worker is None:
    time.sleep(0.01)
print(work._worker.pid, flush=True)
try:
    time.sleep(100)
except KeyboardInterrupt:
    print("interrupted", flush=True)
    time.sleep(100)
"""


@linux
@pytest.mark.slow
@pytest.mark.parametrize("end", ["exit", "SIGTERM", "SIGKILL"])
def test_ends_with_the_program(tmp_path, end):
    """In the middle of a decomposition. Ctrl-C reaches the program alone, which may go on."""
    code = LONG.split("try:")[0] + "time.sleep(2)" if end == "exit" else LONG
    command = [sys.executable, "-c", code]
    program = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, start_new_session=True)
    try:
        pid = int(program.stdout.readline())
        assert alive(pid)
        if end != "exit":
            until(lambda: ignores(pid, signal.SIGINT))
            # A terminal sends it to the whole group.
            os.killpg(program.pid, signal.SIGINT)
            assert program.stdout.readline() == "interrupted\n" and alive(pid)
            program.send_signal(getattr(signal, end))
        program.wait(600)
        until(lambda: not alive(pid))
    finally:
        program.kill()
        program.stdout.close()
