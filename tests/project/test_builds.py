"""What setup.py decides: which CUDA kernels it builds, and the sentence where it builds none. Toolkits here are folders with a
script for nvcc; PyTorch is what the test says it is."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
spec = importlib.util.spec_from_file_location("loradash_setup", ROOT / "setup.py")
build = importlib.util.module_from_spec(spec)
# Dataclasses look their module up.
sys.modules[spec.name] = build
spec.loader.exec_module(build)

AMPERE_TO_HOPPER = ("75", "80", "86", "87", "89", "90")
CUDA_13 = (*AMPERE_TO_HOPPER, "88", "100", "103", "110", "120", "121")
CPU = build.Torch("2.13.0+cpu", None)
CU126 = build.Torch("2.13.0+cu126", "12.6")
VARIABLES = (
    "CUDA_HOME",
    "CUDA_PATH",
    "LORADASH_CUDA",
    "LORADASH_REQUIRE_EXTENSION",
    "LORADASH_PURE_PYTHON",
    "TORCH_CUDA_ARCH_LIST",
    "CC",
)


@pytest.fixture(autouse=True)
def _nobody_asks(monkeypatch):
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def toolkit(tmp_path):
    """Makes a toolkit: a script that answers as nvcc of that version, headers and a library."""

    def make(version="12.8", known=AMPERE_TO_HOPPER, headers=build.HEADERS, library=True, compiles=True, nvcc=True):
        home = tmp_path / f"cuda-{version}"
        for folder in ("bin", "include", "lib64"):
            (home / folder).mkdir(parents=True)
        for name in headers:
            (home / "include" / name).touch()
        if library:
            (home / "lib64" / "libcudart.so").touch()
        if nvcc:
            codes = "\\n".join(f"sm_{code}" for code in known)
            fault = "" if compiles else "echo 'host_config.h:1: #error -- unsupported GNU version!' >&2; exit 1"
            script = f"""#!/bin/sh
case "$1" in
--version) echo "Cuda compilation tools, release {version}, V{version}.88";;
--list-gpu-code) printf '{codes}\\n';;
*) {fault or ":"};;
esac
"""
            (home / "bin" / "nvcc").write_text(script)
            (home / "bin" / "nvcc").chmod(0o755)
        return home

    return make


def torch_with(home: Path | None, base=CU126, **changes):
    return build.Torch(**{**vars(base), "toolkit": home and str(home), **changes})


# What is found: PyTorch, the toolkit's peculiarities (None: there is none), environment, and the sentence.
MISFITS = {
    "another major": (
        CU126,
        {"version": "13.0"},
        {},
        r"nvcc of .* is 13\.0 and .*\+cu126 is built for CUDA 12\.6; let CUDA_HOME name",
    ),
    "older major": (
        build.Torch("2.14.1", "13.0"),
        {},
        {},
        r"is 12\.8 and PyTorch 2\.14\.1 is built for CUDA 13\.0; .* for CUDA 12$",
    ),
    "no nvcc": (CU126, {"nvcc": False}, {}, r"has no bin/nvcc; install its compiler of CUDA 12\.6"),
    "no toolkit": (CU126, None, {}, r"no CUDA toolkit was found; install one of CUDA 12"),
    "cpu torch, CUDA_HOME set": (
        CPU,
        {},
        {"CUDA_HOME": "/opt/cuda"},
        r"without CUDA, so the CUDA toolkit at /opt/cuda is of no use",
    ),
    "rocm torch, CUDA_HOME set": (
        build.Torch("2.13", None, "7.2"),
        {},
        {"CUDA_HOME": "/opt/cuda"},
        "is built for ROCm 7.2",
    ),
    "too old": (build.Torch("2.7.1+cu118", "11.8"), {"version": "11.4"}, {}, r"is 11\.4; 11\.8 or newer is needed"),
    "no headers": (
        CU126,
        {"headers": ()},
        {},
        r"has no cuda_runtime_api\.h, .*cuda_bf16\.h; install its development files",
    ),
    "one header": (CU126, {"headers": build.HEADERS[:3]}, {}, r"has no cuda_bf16\.h; install"),
    "no library": (CU126, {"library": False}, {}, r"has no libcudart\.so; install its runtime library"),
    "host compiler": (
        CU126,
        {"compiles": False},
        {},
        r"does not compile an empty kernel \(.*unsupported GNU version!\); name a host",
    ),
    "old architectures": (
        CU126,
        {},
        {"TORCH_CUDA_ARCH_LIST": "7.0;7.5+PTX"},
        r"LIST=7\.0;7\.5\+PTX leaves nothing .* take 8\.0 8\.6 8\.7",
    ),
    "native without a card": (CU126, {}, {"TORCH_CUDA_ARCH_LIST": "native"}, "native leaves nothing"),
    "nvcc of a newer world": (CU126, {"known": ("200",)}, {}, "leaves nothing to compile for; .* take 20.0"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_a_misfit_is_one_sentence(case, toolkit, monkeypatch, capsys):
    base, peculiar, environment, sentence = MISFITS[case]
    torch = torch_with(None if peculiar is None else toolkit(**peculiar), base)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    part = build.cuda_part(torch)
    assert part.toolkit is None and re.search(sentence, part.without), part.without
    said = capsys.readouterr().err
    assert said == f"loradash-kernels: {part.without}. Building without the CUDA kernels\n"
    for name in ("LORADASH_CUDA", "LORADASH_REQUIRE_EXTENSION"):
        with monkeypatch.context() as asked:
            asked.setenv(name, "1")
            with pytest.raises(SystemExit, match=f"{name} is set, so this is an error") as error:
                build.cuda_part(torch)
            assert part.without in str(error.value)


def test_no_cuda_was_asked_for(toolkit, monkeypatch, capsys):
    """A toolkit that only lies there does not concern a PyTorch without CUDA, and LORADASH_CUDA=0 is obeyed."""
    monkeypatch.setenv("LORADASH_REQUIRE_EXTENSION", "1")
    torch = torch_with(toolkit(), CPU)
    assert build.cuda_part(torch).without == "PyTorch 2.13.0+cpu is built without CUDA"
    monkeypatch.setenv("LORADASH_CUDA", "0")
    assert build.cuda_part(torch_with(toolkit("12.9"))).without == "LORADASH_CUDA=0 was set when it was built"
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("LORADASH_CUDA", "1")
    with pytest.raises(SystemExit, match="LORADASH_CUDA is set"):
        build.cuda_part(torch)


def test_what_fits_is_built(toolkit, monkeypatch, capsys):
    home = toolkit("12.8")
    part = build.cuda_part(torch_with(home))
    assert part.toolkit.home == home and part.toolkit.version == (12, 8) and part.without == ""
    assert (
        part.flags[0] == "-gencode=arch=compute_80,code=sm_80"
        and part.flags[-1] == "-gencode=arch=compute_90,code=compute_90"
    )
    assert "for 8.0 8.6 8.9 9.0+PTX, compiled by nvcc 12.8" in capsys.readouterr().err
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.5;8.6")
    assert build.cuda_part(torch_with(home)).flags == ("-gencode=arch=compute_86,code=sm_86",)
    assert "TORCH_CUDA_ARCH_LIST has 7.5, and the kernels need 8.0 or newer: it is left out" in capsys.readouterr().err


def test_headers_of_pytorchs_own_packages_fill_in(toolkit, tmp_path):
    packages = tmp_path / "nvidia" / "cu13" / "include"
    packages.mkdir(parents=True)
    (packages / "cuda_bf16.h").touch()
    home = toolkit(headers=build.HEADERS[:3])
    part = build.cuda_part(torch_with(home, headers=(packages, tmp_path / "nvidia" / "cudnn" / "include")))
    assert part.toolkit.include == (packages,)


def test_a_link_to_nvcc_leads_to_its_toolkit(toolkit, tmp_path):
    """PyTorch takes the folder above the nvcc on the PATH for the toolkit; nvcc itself tells where it is."""
    home, links = toolkit(), tmp_path / "local" / "bin"
    links.mkdir(parents=True)
    script = (
        (home / "bin" / "nvcc").read_text().replace("*) :;;", f"--dryrun) echo '#$ TOP={home}/bin/..' >&2;;\n*) :;;")
    )
    (links / "nvcc").write_text(script)
    (links / "nvcc").chmod(0o755)
    assert build.cuda_part(torch_with(links.parent)).toolkit.home == home


ALL = {(int(code[:-1]), int(code[-1])) for code in CUDA_13}
OLD = {(int(code[:-1]), int(code[-1])) for code in AMPERE_TO_HOPPER}


@pytest.mark.parametrize(
    ("requested", "known", "cards", "chosen", "left_out"),
    [
        (None, ALL, (), ["8.0", "8.6", "8.9", "9.0", "10.0", "12.0+PTX"], []),
        (None, OLD, (), ["8.0", "8.6", "8.9", "9.0+PTX"], []),
        (None, ALL, ((8, 7), (12, 1)), ["8.0", "8.6", "8.7", "8.9", "9.0", "10.0", "12.0", "12.1+PTX"], []),
        (None, OLD, ((12, 0),), ["8.0", "8.6", "8.9", "9.0+PTX"], ["12.0, which will compile the PTX"]),
        (None, OLD, ((7, 5),), ["8.0", "8.6", "8.9", "9.0+PTX"], []),
        ("", OLD, (), ["8.0", "8.6", "8.9", "9.0+PTX"], []),
        ("7.0;7.5;8.0+PTX", ALL, (), ["8.0+PTX"], ["has 7.0, and the kernels need 8.0", "has 7.5"]),
        ("8.0 9.0", ALL, (), ["8.0", "9.0"], []),
        ("8.0,12.0", OLD, (), ["8.0"], ["has 12.0, which this nvcc does not know"]),
        ("9.0a;9.0", ALL, (), ["9.0"], []),
        ("Ampere;Hopper", ALL, (), ["8.0", "8.6+PTX", "9.0+PTX"], []),
        ("Ampere+Tegra", ALL, (), ["8.7"], []),
        ("Turing;8.6", ALL, (), ["8.6"], ["has Turing, which is no compute capability"]),
        ("native", ALL, ((8, 6),), ["8.6"], []),
        ("8.6;rubbish", ALL, (), ["8.6"], ["has rubbish, which is no compute capability"]),
    ],
)
def test_architectures(requested, known, cards, chosen, left_out):
    found, sentences = build.architectures(requested, known, cards)
    assert found == chosen
    assert len(sentences) == len(left_out) and all(part in s for part, s in zip(left_out, sentences, strict=True))


def test_flags_are_nvccs():
    """No PyTorch refuses an architecture that it has not heard of: it sees flags, and adds none."""
    from torch.utils import cpp_extension

    flags = build.architecture_flags(["8.0", "12.1+PTX"])
    assert flags == [
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_121,code=sm_121",
        "-gencode=arch=compute_121,code=compute_121",
    ]
    assert cpp_extension._get_cuda_arch_flags(["-O3", *flags]) == []


@pytest.mark.skipif(shutil.which("c++") is None, reason="there is no C++ compiler")
def test_compilers(tmp_path, monkeypatch):
    assert build.compiler_problem("c++") is None
    assert "no C++ compiler was found (no-such-c++); install one with C++20" in build.compiler_problem("no-such-c++")
    old = tmp_path / "old-c++"
    old.write_text("#!/bin/sh\necho \"error: unrecognized command line option '-std=c++20'\" >&2\nexit 1\n")
    old.chmod(0o755)
    assert "does not compile C++20 (error: unrecognized" in build.compiler_problem(str(old))
    monkeypatch.setattr(build.sysconfig, "get_paths", lambda: {"include": str(tmp_path)})
    assert f"{tmp_path}/Python.h is missing; install Python's headers" in build.compiler_problem("c++")


def test_without_a_compiler(monkeypatch, capsys):
    monkeypatch.setenv("CXX", "no-such-c++")
    assert build.extension() == {}
    assert "no C++ compiler was found" in capsys.readouterr().err
    monkeypatch.setenv("LORADASH_REQUIRE_EXTENSION", "1")
    with pytest.raises(SystemExit, match="LORADASH_REQUIRE_EXTENSION is set, so this is an error"):
        build.extension()


def test_the_sentence_reaches_the_compiled_part(toolkit, monkeypatch):
    """pip shows no output of a build that succeeds, so the compiled part carries the reason."""
    monkeypatch.setattr(build, "installed_torch", lambda *_: torch_with(toolkit("13.0")))
    (module,) = build.extension()["ext_modules"]
    reason = json.loads(dict(module.define_macros)["LORADASH_WITHOUT_CUDA"])
    assert "is 13.0 and PyTorch 2.13.0+cu126 is built for CUDA 12.6" in reason
    assert "csrc/cuda/launch.cpp" not in module.sources and "csrc/bindings/cuda.cpp" in module.sources


@pytest.mark.skipif(not os.path.exists("/usr/local/cuda/bin/nvcc"), reason="there is no toolkit at /usr/local/cuda")
def test_a_real_toolkit():
    """nvcc's own answers are understood, and it compiles the probe for all that is chosen."""
    home = Path("/usr/local/cuda")
    told = subprocess.run([home / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    version = re.search(r"release ([\d.]+)", told)[1]
    part = build.cuda_part(torch_with(home, build.Torch("2.11.0", version)))
    assert part.without == "" and part.toolkit.known >= {(8, 0), (8, 6), (8, 9), (9, 0)}
