"""Builds `loradash_kernels._C`, the compiled part, against the installed PyTorch.

Environment: LORADASH_PURE_PYTHON=1 skips it; LORADASH_REQUIRE_EXTENSION=1 (for releases) turns a missing compiler into an
error; LORADASH_CUDA=0/1 overrides whether CUDA kernels are built (default: CUDA_HOME is found, and PyTorch has CUDA).
TORCH_CUDA_ARCH_LIST chooses architectures, MAX_JOBS bounds the parallel compilations, NVCC_THREADS those inside nvcc.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
# A100, RTX 3090, RTX 4090; later cards compile the PTX.
CUDA_ARCHITECTURES = "8.0;8.6;8.9+PTX"
WARNING = "loradash-kernels: {}; installing without compiled kernels, every call will run the plain PyTorch reference."


def flag(name: str, default: bool) -> bool:
    return os.environ.get(name, str(int(default))).lower() not in ("0", "false", "off", "")


def sources(pattern: str) -> list[str]:
    return sorted(str(p.relative_to(ROOT)) for p in (ROOT / "csrc").rglob(pattern))


def openmp_flags() -> list[str]:
    """at::parallel_for is a header that is serial without OpenMP. PyTorch's Linux builds carry GNU's runtime, which only
    GCC's code calls; nothing is linked here, so that there is one thread pool, PyTorch's."""
    version = subprocess.run([os.environ.get("CXX", "c++"), "--version"], capture_output=True, text=True).stdout
    return ["-fopenmp"] if sys.platform == "linux" and "Free Software Foundation" in version else []


def missing_part(reason: str) -> dict:
    if flag("LORADASH_REQUIRE_EXTENSION", False):
        raise SystemExit(f"loradash-kernels: {reason}, and LORADASH_REQUIRE_EXTENSION is set")
    print(WARNING.format(reason), file=sys.stderr)
    return {}


def extension() -> dict:
    if flag("LORADASH_PURE_PYTHON", False):
        return missing_part("LORADASH_PURE_PYTHON is set")
    if not shutil.which(os.environ.get("CXX", "c++")):
        return missing_part("no C++ compiler was found")
    try:
        import torch
        from torch.utils import cpp_extension
    except ImportError as error:
        raise SystemExit(
            "loradash-kernels compiles against the PyTorch you run, which this build environment lacks.\n"
            "Install PyTorch first, then: pip install --no-build-isolation . "
            "(or set LORADASH_PURE_PYTHON=1 for an install without compiled kernels)"
        ) from error

    cuda = flag("LORADASH_CUDA", cpp_extension.CUDA_HOME is not None and torch.version.cuda is not None)
    if cuda and torch.version.cuda is None:
        raise SystemExit("loradash-kernels: LORADASH_CUDA is set, but this PyTorch is built without CUDA")
    compile_args = {"cxx": ["-O3", "-std=c++20", "-ffp-contract=fast", "-Wno-psabi", *openmp_flags()]}
    # The only host file that needs CUDA's headers.
    files, macros = [f for f in sources("*.cpp") if cuda or f != "csrc/cuda/launch.cpp"], []
    if cuda:
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
        compile_args["nvcc"] = ["-O3", "-std=c++17", "--threads", os.environ.get("NVCC_THREADS", "2")]
        files += sources("*.cu")
        macros = [("LORADASH_WITH_CUDA", "1")]
    module = (cpp_extension.CUDAExtension if cuda else cpp_extension.CppExtension)(
        "loradash_kernels._C",
        files,
        include_dirs=[str(ROOT / "csrc")],
        define_macros=macros,
        extra_compile_args=compile_args,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": cpp_extension.BuildExtension.with_options(use_ninja=True)},
    }


setup(**extension())
