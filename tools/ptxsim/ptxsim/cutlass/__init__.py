"""Builds and launches CUTLASS's own GEMMs, gemm.cu (sm_80) and sm90.cu, for one configuration: a yardstick."""

from __future__ import annotations

import ctypes
import importlib.util
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .. import core, stats, toolchain

HERE = Path(__file__).parent


def include_dir() -> Path | None:
    """The CUTLASS headers shipped in the nvidia-cutlass wheel, or None."""
    spec = importlib.util.find_spec("cutlass_library")
    if not spec or not spec.origin:
        return None
    path = Path(spec.origin).parent / "source" / "include"
    return path if (path / "cutlass" / "cutlass.h").exists() else None


def _pointer(x: Any) -> ctypes.c_void_p:
    return ctypes.c_void_p(x.ctypes.data if hasattr(x, "ctypes") else x.data_ptr())


def _host_library(folder: Path, text: str, options: Sequence[str], stub: str) -> ctypes.CDLL:
    """The host function gemm_params of a source, in a shared library.

    There is no CUDA runtime here, and registration and launch calls are never needed: undefined ones return 0.
    """
    source, built, stubs, library = (str(folder / n) for n in ("host.cu", "host.o", "stub.c", "host.so"))
    Path(source).write_text("#define HOST_SIDE\n" + text)
    subprocess.run([toolchain.tool("nvcc"), *options, "-c", source, "-o", built], check=True, capture_output=True)
    undefined = subprocess.run(["nm", "-u", built], check=True, capture_output=True, text=True).stdout.split()
    calls = sorted({n for n in undefined if n.startswith(("__cuda", "cuda"))})
    Path(stubs).write_text(stub + "".join(f"void *{n}(void) {{ return 0; }}\n" for n in calls))
    command = ["g++", "-shared", "-fPIC", built, "-xc", stubs, "-o", library]
    subprocess.run(command, check=True, capture_output=True)
    return ctypes.CDLL(library, mode=ctypes.RTLD_LOCAL)


class _Gemm:
    """One GEMM: nvcc compiles the device kernel to PTX, and the host function gemm_params to a shared library."""

    def __init__(
        self, source: str, defines: Mapping[str, Any], arch: str, flags: Sequence[str] = (), stub: str = ""
    ) -> None:
        headers = include_dir()
        if headers is None:
            raise FileNotFoundError("CUTLASS's headers were not found: pip install --no-deps nvidia-cutlass")
        # nvcc's -D splits at commas, so the definitions go into the text.
        text = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + (HERE / source).read_text()
        includes = [str(headers), str(headers.parent / "tools" / "util" / "include")]
        options = ["-Xcompiler", "-fPIC", "-cudart", "none", f"-arch={arch}", "-std=c++17", *flags]
        options += [f"-I{i}" for i in includes]
        self._folder = tempfile.TemporaryDirectory()
        with ThreadPoolExecutor() as pool:
            ptx = pool.submit(toolchain.compile_cuda, text, arch=arch, includes=includes, flags=flags)
            self._host = _host_library(Path(self._folder.name), text, options, stub)
            self.ptx = ptx.result()
        module = core.load(self.ptx)
        self.kernel = module[next(iter(module))]

    def __call__(
        self,
        m: int,
        n: int,
        k: int,
        a: Any,
        b: Any,
        c: Any,
        d: Any,
        alpha: float = 1.0,
        beta: float = 0.0,
        **launch: Any,
    ) -> stats.Stats:
        """d = alpha a b + beta c, with a (M, K), b (K, N) or (N, K), c and d (M, N)."""
        params, grid = ctypes.create_string_buffer(8192), (ctypes.c_int * 5)()
        scalars = ctypes.c_float(alpha), ctypes.c_float(beta)
        size = self._host.gemm_params(m, n, k, *map(_pointer, (a, b, c, d)), *scalars, params, grid)
        packed = [params.raw[:size]]
        return self.kernel.launch(tuple(grid[:3]), grid[3], packed, shared=grid[4], buffers=[a, b, c, d], **launch)


def _comma(shape: Sequence[int], prefix: str = "") -> str:
    return ",".join(f"{prefix}{side}" for side in shape)


def _layout(column: bool) -> str:
    return f"cutlass::layout::{'Column' if column else 'Row'}Major"


class CutlassGemm(_Gemm):
    """CUTLASS's sm_80 GEMM of one tile, in `stages` stages of cp.async."""

    def __init__(
        self,
        element: str = "cutlass::half_t",
        output: str = "cutlass::half_t",
        accumulator: str = "float",
        column_b: bool = True,
        tile: Sequence[int] = (128, 128, 32),
        warp: Sequence[int] = (64, 64, 32),
        inst: Sequence[int] = (16, 8, 16),
        stages: int = 3,
        arch: str = "sm_80",
    ) -> None:
        self.arch = arch
        defines = {
            "ELEMENT": element,
            "OUTPUT": output,
            "ACCUMULATOR": accumulator,
            "STAGES": stages,
            "TILE": _comma(tile),
            "WARP": _comma(warp),
            "INSTRUCTION": _comma(inst),
            "LAYOUT_B": _layout(column_b),
            "LDB": "k" if column_b else "n",
        }
        super().__init__("gemm.cu", defines, arch)


class CutlassSm90Gemm(_Gemm):
    """CUTLASS's sm_90 GEMM of one tile. schedule: "", "Pingpong" or "Cooperative" (all warp-specialised)."""

    def __init__(
        self,
        element: str = "cutlass::half_t",
        output: str = "cutlass::half_t",
        column_b: bool = True,
        tile: Sequence[int] = (128, 128, 64),
        schedule: str = "",
    ) -> None:
        cooperative = "Cooperative" if schedule == "Cooperative" else ""
        defines = {
            "ELEMENT": element,
            "OUTPUT": output,
            "TILE": _comma(tile, "_"),
            "LAYOUT_B": _layout(column_b),
            "EPILOGUE": "cutlass::epilogue::TmaWarpSpecialized" + cooperative,
            "MAINLOOP": "cutlass::gemm::KernelTmaWarpSpecialized" + schedule,
        }
        flags = ["--expt-relaxed-constexpr", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL"]
        super().__init__("sm90.cu", defines, "sm_90a", flags, (HERE / "encode.c").read_text())
