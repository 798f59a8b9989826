"""Builds `loradash_kernels._C`, the compiled part, against the installed PyTorch.

Environment:
  LORADASH_PURE_PYTHON=1        leaves the compiled part out
  LORADASH_CUDA=0 or 1          leaves the CUDA kernels out, or insists on them; unset: where a toolkit and PyTorch fit together
  LORADASH_REQUIRE_EXTENSION=1  for releases: whatever would be left out is an error
  TORCH_CUDA_ARCH_LIST          architectures ("8.0;9.0+PTX", "Hopper", "native"); unset: all that nvcc knows of CUDA_ARCHITECTURES
  MAX_JOBS, NVCC_THREADS        bound the parallel compilations, and the threads inside nvcc

CUDA is on where CUDA_HOME (or a toolkit that PyTorch finds) fits the PyTorch of this environment, whether or not a card is
present. What does not fit is said in one sentence, and the build goes on without CUDA; `loradash info` repeats the sentence.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from setuptools import setup

ROOT = Path(__file__).parent
# A100, RTX 3090, RTX 4090, H100, B200, RTX 5090; other cards of a generation run its first code, later ones compile the PTX.
CUDA_ARCHITECTURES = ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (12, 0))
# PyTorch's names of generations in TORCH_CUDA_ARCH_LIST.
GENERATIONS = {
    "Ampere+Tegra": "8.7",
    "Ampere": "8.0;8.6+PTX",
    "Ada": "8.9+PTX",
    "Hopper": "9.0+PTX",
    "Blackwell+Tegra": "11.0",
    "Blackwell": "10.0;10.3;12.0;12.1+PTX",
}
# The kernels use cp.async and ldmatrix of sm_80.
OLDEST_ARCHITECTURE = (8, 0)
# The first nvcc with sm_89 and sm_90; C++17 came with 11.0.
OLDEST_NVCC = (11, 8)
HEADERS = ("cuda_runtime_api.h", "cuda_runtime.h", "cuda_fp16.h", "cuda_bf16.h")
PROBE = "#include <cuda_bf16.h>\n#include <cuda_fp16.h>\n#include <cuda_runtime.h>\n__global__ void probe() {}\n"


class Unfit(Exception):
    """The CUDA kernels cannot be built here. The text says what was found, what was wanted and what to do."""


class NotAsked(Exception):
    """There is no toolkit or no CUDA in PyTorch, and nobody asked for either. The text says so."""


@dataclass(frozen=True)
class Torch:
    """The PyTorch that the kernels are compiled for. cuda, hip: the versions that it was built with, None without."""

    version: str
    cuda: str | None
    hip: str | None = None
    # The toolkit that torch.utils.cpp_extension found: CUDA_HOME, the folder above an nvcc, or /usr/local/cuda.
    toolkit: str | None = None
    # The include folders of the CUDA packages that came with it.
    headers: tuple[Path, ...] = ()
    # Compute capabilities of the cards that it sees.
    cards: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Toolkit:
    home: Path
    version: tuple[int, int]
    # Compute capabilities that nvcc makes code for.
    known: frozenset[tuple[int, int]]
    include: tuple[Path, ...] = ()


def flag(name: str, default: bool) -> bool:
    return os.environ.get(name, str(int(default))).lower() not in ("0", "false", "off", "")


def say(sentence: str) -> None:
    print(f"loradash-kernels: {sentence}", file=sys.stderr)


def fail(sentence: str) -> NoReturn:
    raise SystemExit(f"loradash-kernels: {sentence}")


def dotted(version: tuple[int, int]) -> str:
    return f"{version[0]}.{version[1]}"


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(pattern))


def compiler_problem(compiler: str) -> str | None:
    """Why nothing can be compiled here, or None."""
    if not shutil.which(compiler):
        return f"no C++ compiler was found ({compiler}); install one with C++20 (GCC 10 or newer), or name it in CXX"
    header = Path(sysconfig.get_paths()["include"], "Python.h")
    if not header.is_file():
        return f"{header} is missing; install Python's headers (on Debian and Ubuntu: apt install python3-dev)"
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text("#include <compare>\n#include <vector>\n")
        done = subprocess.run([compiler, "-std=c++20", "-fsyntax-only", source], capture_output=True, text=True)
    if done.returncode:
        return f"{compiler} does not compile C++20 ({first_error(done.stderr)}); install GCC 10 or newer, or name another in CXX"
    return None


def first_error(text: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no message")


def openmp_flags() -> list[str]:
    """at::parallel_for is a header that is serial without OpenMP. PyTorch's Linux builds carry GNU's runtime, which only
    GCC's code calls; nothing is linked here, so that there is one thread pool, PyTorch's."""
    version = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    return ["-fopenmp"] if sys.platform == "linux" and "Free Software Foundation" in version else []


def fitting_toolkit(torch: Torch) -> Toolkit:
    """The toolkit that compiles for this PyTorch. Raises Unfit where one was asked for or found and does not fit."""
    asked = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if torch.cuda is None:
        kind = f"for ROCm {torch.hip}" if torch.hip else "without CUDA"
        found = f"PyTorch {torch.version} is built {kind}"
        if not asked and not flag("LORADASH_CUDA", False):
            raise NotAsked(found)
        wanted = f", so the CUDA toolkit at {asked} is of no use" if asked else ""
        raise Unfit(f"{found}{wanted}; install a CUDA build of PyTorch first (docs/install.md says which)")
    if torch.toolkit is None:
        raise Unfit(
            f"PyTorch {torch.version} is built for CUDA {torch.cuda} and no CUDA toolkit was found; "
            f"install one of CUDA {torch.cuda.split('.')[0]} and name its folder in CUDA_HOME"
        )
    home = _home(Path(torch.toolkit))
    version = _nvcc_version(home, torch)
    if version[0] != int(torch.cuda.split(".")[0]):
        raise Unfit(
            f"nvcc of {home} is {dotted(version)} and PyTorch {torch.version} is built for CUDA {torch.cuda}; "
            f"let CUDA_HOME name a toolkit of CUDA {torch.cuda.split('.')[0]}, or install a PyTorch for CUDA {version[0]}"
        )
    return Toolkit(home, version, _known_to_nvcc(home), _header_folders(home, torch))


def _home(found: Path) -> Path:
    """The toolkit's own folder, where only a link or a script that starts its nvcc was found."""
    if nvcc_of(found).is_file() and not (found / "include" / "cuda_runtime.h").is_file():
        top = re.search(r"TOP=(.+)", _nvcc(found, "--dryrun", "--compile", "-x", "cu", os.devnull))
        if top and (Path(top[1]) / "include").is_dir():
            return Path(top[1]).resolve()
    return found


def nvcc_of(home: Path) -> Path:
    return home / "bin" / ("nvcc.exe" if sys.platform == "win32" else "nvcc")


def _nvcc(home: Path, *arguments: str) -> str:
    """What nvcc answers. Raises Unfit where it does not run."""
    try:
        done = subprocess.run([nvcc_of(home), *arguments], capture_output=True, text=True)
    except OSError as error:
        raise Unfit(f"{nvcc_of(home)} does not run ({error}); let CUDA_HOME name a whole CUDA toolkit") from error
    if done.returncode:
        said = first_error(done.stderr + done.stdout)
        raise Unfit(f"`{nvcc_of(home)} {' '.join(arguments)}` fails ({said}); let CUDA_HOME name a whole CUDA toolkit")
    return done.stdout + done.stderr


def _nvcc_version(home: Path, torch: Torch) -> tuple[int, int]:
    if not nvcc_of(home).is_file():
        raise Unfit(
            f"the CUDA toolkit at {home} has no bin/nvcc; install its compiler of CUDA {torch.cuda}, "
            "or name a folder that has it in CUDA_HOME"
        )
    found = re.search(r"release (\d+)\.(\d+)", _nvcc(home, "--version"))
    version = (int(found[1]), int(found[2])) if found else (0, 0)
    if version < OLDEST_NVCC:
        raise Unfit(
            f"nvcc of {home} is {dotted(version)}; {dotted(OLDEST_NVCC)} or newer is needed, name one in CUDA_HOME"
        )
    return version


def _known_to_nvcc(home: Path) -> frozenset[tuple[int, int]]:
    codes = re.findall(r"sm_(\d+)(\d)\b", _nvcc(home, "--list-gpu-code"))
    return frozenset((int(major), int(minor)) for major, minor in codes)


def _header_folders(home: Path, torch: Torch) -> tuple[Path, ...]:
    """Folders to add where a toolkit's own lack headers that PyTorch's CUDA packages have."""
    own = [home / "include", *home.glob("targets/*/include")]
    lacking = [name for name in HEADERS if not any((folder / name).is_file() for folder in own)]
    added = tuple(f for f in torch.headers if any((f / name).is_file() for name in lacking))
    missing = [name for name in lacking if not any((folder / name).is_file() for folder in added)]
    if missing:
        raise Unfit(
            f"the CUDA toolkit at {home} has no {', '.join(missing)}; install its development files "
            "(cuda-toolkit, not cuda-nvcc alone), or name a whole toolkit in CUDA_HOME"
        )
    libraries = (f for folder in ("lib*", "lib/*", "targets/*/lib") for f in home.glob(f"{folder}/libcudart.so*"))
    if sys.platform == "linux" and not any(libraries):
        raise Unfit(f"the CUDA toolkit at {home} has no libcudart.so; install its runtime library (cuda-cudart-dev)")
    return added


def requested_architectures(text: str, cards: Iterable[tuple[int, int]]) -> list[str]:
    """The entries of TORCH_CUDA_ARCH_LIST, names of generations and "native" replaced by what they stand for."""
    entries = []
    for entry in re.split(r"[;,\s]+", text.strip()):
        if entry == "native":
            entries += map(dotted, cards)
        else:
            entries += GENERATIONS.get(entry.removesuffix("+PTX"), entry).split(";")
    return [entry for entry in entries if entry]


def architectures(
    requested: str | None, known: Collection[tuple[int, int]], cards: Collection[tuple[int, int]] = ()
) -> tuple[list[str], list[str]]:
    """What to compile for, and a sentence for each entry that is left out: ["8.0", "9.0+PTX"], [...].

    requested: TORCH_CUDA_ARCH_LIST; known: what this nvcc compiles for; cards: those of this machine. Raises Unfit where
    nothing is left.
    """
    if requested:
        kept, sentences = _requested(requested_architectures(requested, cards), known)
    else:
        mine = {c for c in cards if c >= OLDEST_ARCHITECTURE}
        kept = [dotted(c) for c in sorted({*CUDA_ARCHITECTURES, *mine} & {*known})]
        kept[-1:] = [f"{last}+PTX" for last in kept[-1:]]
        sentences = [
            f"this nvcc does not know the card of this machine, {dotted(c)}, which will compile the PTX"
            for c in mine - {*known}
        ]
    if not kept:
        wanted = " ".join(dotted(n) for n in sorted(known) if n >= OLDEST_ARCHITECTURE)
        raise Unfit(
            f"TORCH_CUDA_ARCH_LIST={requested or ''} leaves nothing to compile for; of what this nvcc knows, these kernels take "
            f"{wanted or 'nothing'}"
        )
    return list(dict.fromkeys(kept)), sentences


def _requested(entries: Iterable[str], known: Collection[tuple[int, int]]) -> tuple[list[str], list[str]]:
    kept, sentences = [], []
    for entry in entries:
        found = re.fullmatch(r"(\d+)\.(\d)[af]?(\+PTX)?", entry)
        number = (int(found[1]), int(found[2])) if found else None
        if not found or number is None:
            problem = "which is no compute capability"
        elif number < OLDEST_ARCHITECTURE:
            problem = f"and the kernels need {dotted(OLDEST_ARCHITECTURE)} or newer"
        elif number not in known:
            problem = "which this nvcc does not know"
        else:
            # The kernels use nothing that is one architecture's alone (9.0a): the plain code runs there and on later cards.
            kept.append(dotted(number) + (found[3] or ""))
            continue
        sentences.append(f"TORCH_CUDA_ARCH_LIST has {entry}, {problem}: it is left out")
    return kept, sentences


def architecture_flags(chosen: Iterable[str]) -> list[str]:
    """nvcc's, made here because each PyTorch refuses in its own way what it has not heard of."""
    flags = []
    for entry in chosen:
        number = entry.removesuffix("+PTX").replace(".", "")
        flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
        if entry.endswith("+PTX"):
            flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return flags


def probe(toolkit: Toolkit, flags: list[str]) -> None:
    """Compiles nothing much, for every architecture: the host compiler fits nvcc, and the headers fit both. Raises Unfit."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cu")
        source.write_text(PROBE)
        host = ["-ccbin", os.environ["CC"]] if os.environ.get("CC") else []
        command = [
            "-std=c++17",
            *host,
            *flags,
            *(f"-I{f}" for f in toolkit.include),
            "-c",
            str(source),
            "-o",
            f"{source}.o",
        ]
        done = subprocess.run([nvcc_of(toolkit.home), *command], capture_output=True, text=True)
    if done.returncode:
        raise Unfit(
            f"nvcc {dotted(toolkit.version)} of {toolkit.home} does not compile an empty kernel ({first_error(done.stderr + done.stdout)}); "
            "name a host compiler that it takes in CC and CXX, or another toolkit in CUDA_HOME"
        )


@dataclass(frozen=True)
class CudaPart:
    """How the CUDA kernels are compiled, or the sentence that says why they are not."""

    toolkit: Toolkit | None = None
    flags: tuple[str, ...] = ()
    without: str = ""


def cuda_part(torch: Torch) -> CudaPart:
    """Decides about the CUDA kernels. Exits where they were asked for, or required, and cannot be built."""
    if not flag("LORADASH_CUDA", True):
        return CudaPart(without="LORADASH_CUDA=0 was set when it was built")
    try:
        toolkit = fitting_toolkit(torch)
        chosen, sentences = architectures(os.environ.get("TORCH_CUDA_ARCH_LIST"), toolkit.known, torch.cards)
        flags = architecture_flags(chosen)
        probe(toolkit, flags)
    except NotAsked as reason:
        return CudaPart(without=str(reason))
    except Unfit as reason:
        for name in ("LORADASH_CUDA", "LORADASH_REQUIRE_EXTENSION"):
            if flag(name, False):
                fail(f"{reason}. {name} is set, so this is an error")
        say(f"{reason}. Building without the CUDA kernels")
        return CudaPart(without=str(reason))
    for sentence in sentences:
        say(sentence)
    say(f"CUDA kernels for {' '.join(chosen)}, compiled by nvcc {dotted(toolkit.version)} of {toolkit.home}")
    return CudaPart(toolkit, tuple(flags))


def installed_torch(torch: Any, cpp_extension: Any) -> Torch:
    headers = sorted((Path(torch.__file__).parents[1] / "nvidia").glob("*/include"))
    cards = range(torch.cuda.device_count()) if torch.version.cuda else ()
    capabilities = sorted({torch.cuda.get_device_capability(index) for index in cards})
    version, toolkit = torch.version, cpp_extension.CUDA_HOME
    return Torch(torch.__version__, version.cuda, version.hip, toolkit, tuple(headers), tuple(capabilities))


def missing_part(reason: str) -> dict[str, Any]:
    if flag("LORADASH_REQUIRE_EXTENSION", False):
        fail(f"{reason}. LORADASH_REQUIRE_EXTENSION is set, so this is an error")
    say(f"{reason}. Installing without compiled kernels: calls on the CPU will run the plain PyTorch reference")
    return {}


def extension() -> dict[str, Any]:
    if flag("LORADASH_PURE_PYTHON", False):
        return missing_part("LORADASH_PURE_PYTHON is set")
    if problem := compiler_problem(os.environ.get("CXX", "c++")):
        return missing_part(problem)
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError:
        fail(
            "the kernels are compiled against the PyTorch you run, which this build environment lacks.\n"
            "Install PyTorch first, then: pip install --no-build-isolation . "
            "(or set LORADASH_PURE_PYTHON=1 for an install without compiled kernels)"
        )
    cuda = cuda_part(installed_torch(torch, cpp_extension))
    compile_args = {"cxx": ["-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-psabi", *openmp_flags()]}
    # The only host file that needs CUDA's headers.
    files = [f for f in sources("*.cpp") if cuda.toolkit or f != "csrc/cuda/launch.cpp"]
    include = [str(ROOT / "csrc")]
    if cuda.toolkit:
        # Where a folder of links was found, PyTorch too must look in the toolkit itself.
        cpp_extension.CUDA_HOME = str(cuda.toolkit.home)
        compile_args["nvcc"] = ["-O3", "-std=c++17", "--threads", os.environ.get("NVCC_THREADS", "2"), *cuda.flags]
        files += sources("*.cu")
        include += map(str, cuda.toolkit.include)
        macros = [("LORADASH_WITH_CUDA", "1")]
    else:
        macros = [("LORADASH_WITHOUT_CUDA", json.dumps(cuda.without))]
    module = (cpp_extension.CUDAExtension if cuda.toolkit else cpp_extension.CppExtension)(
        "loradash_kernels._C", files, include_dirs=include, define_macros=macros, extra_compile_args=compile_args
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


if __name__ == "__main__":
    setup(**extension())
