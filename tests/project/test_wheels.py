"""The scripts behind `make`: which PyTorch a driver gets, and what an interpreter without a network lacks. nvidia-smi and nvcc
are scripts here that say what real ones say."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def tool(name: str):
    spec = importlib.util.spec_from_file_location(f"loradash_{name}", ROOT / "tools" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


wheel_index, offline = tool("wheel_index"), tool("offline")
INDEX = wheel_index.INDEX
# What nvidia-smi says: drivers up to 580 name the CUDA version so, newer ones as the version of their user-mode part.
HEAD = "| NVIDIA-SMI {driver}      Driver Version: {driver}     CUDA Version: {cuda}     |"
NEWER_HEAD = "| NVIDIA-SMI {driver}   KMD Version: {driver}   CUDA UMD Version: {cuda}   |"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Makes a PATH with the nvidia-smi and the nvcc of a machine, or without."""

    def make(cuda=None, cards=(), toolkit=None, head=HEAD):
        tools = {}
        if cuda:
            capabilities = "\\n".join(cards)
            text = head.format(driver="1.2", cuda=cuda)
            tools["nvidia-smi"] = f"[ $# -gt 0 ] && printf '{capabilities}\\n' || echo '{text}'"
        if toolkit:
            tools["nvcc"] = f"echo 'Cuda compilation tools, release {toolkit}, V{toolkit}.1'"
        (tmp_path / "bin").mkdir()
        for name, body in tools.items():
            (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{body}\n")
            (tmp_path / "bin" / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
        monkeypatch.setenv("CUDA_HOME", str(tmp_path))

    return make


def printed() -> tuple[int, str, str]:
    done = subprocess.run([sys.executable, ROOT / "tools" / "wheel_index.py"], capture_output=True, text=True)
    return done.returncode, done.stdout.strip(), done.stderr


@pytest.mark.parametrize(
    ("cuda", "cards", "toolkit", "expected"),
    [
        # RTX 3090 and A100 with drivers of CUDA 12, with and without a toolkit.
        ("12.0", ["8.6"], None, f"torch==2.13.0 --index-url {INDEX}/cu126"),
        ("12.4", ["8.6"], None, f"torch==2.13.0 --index-url {INDEX}/cu126"),
        ("12.8", ["8.0", "8.0"], "12.8", f"torch==2.13.0 --index-url {INDEX}/cu126"),
        # Blackwell needs a wheel of CUDA 12.8, or one of 13.
        ("12.8", ["12.0"], None, f"torch==2.11.0 --index-url {INDEX}/cu128"),
        ("12.9", ["8.6", "12.0"], None, f"torch==2.11.0 --index-url {INDEX}/cu128"),
        ("13.0", ["12.0"], None, "torch==2.13.0"),
        # Drivers of CUDA 13: PyPI's wheel, unless the toolkit is one of CUDA 12.
        ("13.0", ["9.0"], "13.0", "torch==2.13.0"),
        ("13.2", ["8.6"], None, "torch==2.13.0"),
        ("13.0", ["9.0"], "12.8", f"torch==2.13.0 --index-url {INDEX}/cu126"),
        ("13.0", ["10.0"], "12.8", f"torch==2.11.0 --index-url {INDEX}/cu128"),
        ("14.0", [], None, "torch==2.13.0"),
        # A toolkit that is newer than the driver changes nothing.
        ("12.6", ["8.6"], "13.0", f"torch==2.13.0 --index-url {INDEX}/cu126"),
        (None, [], "13.0", f"torch==2.13.0 --index-url {INDEX}/cpu"),
    ],
)
def test_the_driver_decides_for_a_wheel(machine, cuda, cards, toolkit, expected):
    machine(cuda, cards, toolkit)
    assert printed() == (0, expected, "")


@pytest.mark.parametrize(
    ("cuda", "cards", "sentence"),
    [
        ("11.8", ["8.6"], "driver runs CUDA 11.8, .* need 12.0 or newer; install driver 580 or newer"),
        ("12.6", ["12.0"], "a Blackwell and the NVIDIA driver runs CUDA 12.6; install driver 570 or newer"),
    ],
)
def test_a_driver_too_old_is_a_sentence(machine, cuda, cards, sentence):
    machine(cuda, cards)
    code, out, err = printed()
    assert code == 1 and out == "" and re.search(sentence, err)
    assert f"For the CPU alone: pip install torch==2.13.0 --index-url {INDEX}/cpu" in err


def test_newer_drivers_say_it_otherwise(machine):
    machine("13.2", ["9.0"], head=NEWER_HEAD)
    assert wheel_index.driver_version() == (13, 2) and wheel_index.card_capabilities() == [(9, 0)]


def test_a_driver_that_does_not_answer(machine, tmp_path):
    """nvidia-smi without a loaded driver fails, and a toolkit without nvcc has no version."""
    machine()
    (tmp_path / "bin" / "nvidia-smi").write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed'\nexit 9\n")
    (tmp_path / "bin" / "nvidia-smi").chmod(0o755)
    assert printed()[1] == f"torch==2.13.0 --index-url {INDEX}/cpu"
    assert wheel_index.toolkit_version() is None


def test_installing(monkeypatch):
    """The CPU index may be out of reach; one of a CUDA version has no substitute."""
    called = []
    monkeypatch.setattr(wheel_index.subprocess, "call", lambda command: called.append(command[5:]) or 1)
    assert wheel_index.install(["torch==2.13.0", "--index-url", f"{INDEX}/cu126"]) == 1
    assert called == [["torch==2.13.0", "--index-url", f"{INDEX}/cu126"]]
    called.clear()
    wheel_index.install(["torch==2.13.0", "--index-url", f"{INDEX}/cpu"])
    assert called[0][-1] == f"{INDEX}/cpu" and called[1] == ["torch==2.13.0"]


def test_a_pytorch_that_is_there_stays():
    """This interpreter has one: nothing is installed, and nothing is said."""
    command = [sys.executable, ROOT / "tools" / "wheel_index.py", "install"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_what_an_interpreter_lacks():
    everything = {name for names in (*offline.NEEDS.values(), *offline.USES.values()) for name in names}
    there = everything | {*offline.LIBRARY, *offline.BUILD}
    assert offline.report(["test", "bench", "demo"], there.__contains__) == ([], [])
    faults, notes = offline.report(["test"], (there - {"pytest", "rich", "torchao"}).__contains__)
    assert [f.split(" lacks ")[1] for f in faults] == [
        "rich, which loradash-kernels needs",
        "pytest, which make test needs",
    ]
    assert [n.split(" lacks ")[1] for n in notes] == ["torchao: make test leaves out what needs them"]


def test_targets_are_those_of_the_makefile():
    targets = {*re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.M)}
    assert {*offline.NEEDS, *offline.USES} - {"gpu-proof"} <= targets


def test_kernels_that_are_older_than_their_sources(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "loradash_kernels").mkdir()
    source, setup = tmp_path / "csrc" / "a.cpp", tmp_path / "setup.py"
    built = tmp_path / "loradash_kernels" / f"_C{offline.sysconfig.get_config_var('EXT_SUFFIX')}"
    for place, time in ((source, 100), (setup, 100), (built, 200)):
        place.touch()
        os.utime(place, (time, time))
    assert not offline.stale(tmp_path)
    os.utime(source, (300, 300))
    assert offline.stale(tmp_path)
    built.unlink()
    assert offline.stale(tmp_path)


def test_no_extra_moves_pytorch():
    """PyTorch's CUDA builds pin their Triton, and the kernels are compiled against the PyTorch that is there: no bound from above
    on either, and on Triton none that the oldest supported PyTorch does not meet."""
    text = (ROOT / "pyproject.toml").read_text()
    assert {*re.findall(r'"(triton[^";]*)', text)} == {"triton>=3.3"}
    assert {*re.findall(r'"(torch[<>=!~][^";]*)', text)} == {"torch>=2.7"}
