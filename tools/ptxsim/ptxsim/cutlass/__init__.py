"""Build and launch tests/cuda/cutlass_gemm.cu (sm_80) and cutlass_sm90.cu for one configuration."""
import ctypes
import importlib.util
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import ptxsim
from ptxsim.toolchain import _tool

CUDA = Path(__file__).parent


def include_dir():
    """The CUTLASS headers shipped in the nvidia-cutlass wheel, or None."""
    spec = importlib.util.find_spec("cutlass_library")
    if not spec:
        return None
    path = Path(spec.origin).parent / "source" / "include"
    return path if (path / "cutlass" / "cutlass.h").exists() else None


class _Gemm:
    """nvcc twice: the device kernel to PTX, and the host function gemm_params to a shared library."""

    def _build(self, source, defines, arch, flags=(), stub=""):
        text = "".join(f"#define {k} {v}\n" for k, v in defines.items()) + (CUDA / source).read_text()     # nvcc's -D splits at commas
        includes = [str(include_dir()), str(include_dir().parent / "tools" / "util" / "include")]
        self._tmp = tempfile.TemporaryDirectory()
        src, so = Path(self._tmp.name) / "host.cu", Path(self._tmp.name) / "host.so"
        src.write_text("#define HOST_SIDE\n" + text)
        build = [_tool("nvcc"), "-Xcompiler", "-fPIC", "-cudart", "none", f"-arch={arch}", "-std=c++17", *flags, *[f"-I{i}" for i in includes]]
        obj, stub_c = so.with_suffix(".o"), so.with_name("stub.c")
        with ThreadPoolExecutor() as pool:
            ptx = pool.submit(ptxsim.compile_cuda, text, arch=arch, includes=includes, flags=flags)
            subprocess.run([*build, "-c", str(src), "-o", str(obj)], check=True, capture_output=True)
            self.ptx = ptx.result()
        undefined = subprocess.run(["nm", "-u", str(obj)], check=True, capture_output=True, text=True).stdout.split()
        # there is no CUDA runtime here: registration and launch calls are never needed
        stub_c.write_text(stub + "".join(f"void *{n}(void) {{ return 0; }}\n" for n in sorted(set(undefined)) if n.startswith(("__cuda", "cuda"))))
        subprocess.run(["g++", "-shared", "-fPIC", str(obj), "-xc", str(stub_c), "-o", str(so)], check=True, capture_output=True)
        self._host = ctypes.CDLL(str(so), mode=ctypes.RTLD_LOCAL)
        module = ptxsim.load(self.ptx)
        self.kernel = module[next(iter(module))]

    def __call__(self, m, n, k, a, b, c, d, alpha=1.0, beta=0.0, **launch):
        out, grid = ctypes.create_string_buffer(8192), (ctypes.c_int * 5)()
        p = lambda x: ctypes.c_void_p(x.ctypes.data if hasattr(x, "ctypes") else x.data_ptr())  # noqa: E731
        size = self._host.gemm_params(m, n, k, p(a), p(b), p(c), p(d), ctypes.c_float(alpha), ctypes.c_float(beta), out, grid)
        return self.kernel.launch(tuple(grid[:3]), grid[3], [out.raw[:size]], shared=grid[4], buffers=[a, b, c, d], **launch)


class CutlassGemm(_Gemm):
    def __init__(self, element="cutlass::half_t", output="cutlass::half_t", accumulator="float", column_b=True, tile=(128, 128, 32), warp=(64, 64, 32), inst=(16, 8, 16), stages=3, arch="sm_80"):
        shape = lambda t: ",".join(map(str, t))  # noqa: E731
        self.arch = arch
        self._build("gemm.cu", dict(ELEMENT=element, OUTPUT=output, ACCUMULATOR=accumulator, STAGES=stages, TILE=shape(tile), WARP=shape(warp), INSTRUCTION=shape(inst),
                                            LAYOUT_B=f"cutlass::layout::{'Column' if column_b else 'Row'}Major", LDB="k" if column_b else "n"), arch)


# The driver call that fills a tensor map, writing the emulator's encoding (ptxsim/tensormap.py).
ENCODE = r"""
#include <stdint.h>
#include <string.h>
int cuTensorMapEncodeTiled(void* map, int type, uint32_t rank, void* base, const uint64_t* dim, const uint64_t* stride, const uint32_t* box, const uint32_t* estride,
                           int interleave, int swizzle, int promotion, int fill) {
  struct { uint32_t magic; uint8_t rank, type, swizzle, fill, interleave, pad[7]; uint64_t base; uint32_t dim[5], pad2; uint64_t stride[4]; uint16_t box[5]; uint8_t estride[5], rest[33]; } m;
  static const uint8_t types[] = {0, 1, 2, 3, 4, 5, 6, 7, 9, 10, 8, 11, 12};
  memset(&m, 0, sizeof m); m.magic = 0x50414d54; m.rank = rank; m.type = types[type]; m.swizzle = swizzle; m.fill = fill; m.interleave = interleave; m.base = (uint64_t)base;
  for (uint32_t i = 0; i < rank; i++) { m.dim[i] = dim[i]; m.box[i] = box[i]; m.estride[i] = estride[i]; if (i + 1 < rank) m.stride[i] = stride[i]; }
  memcpy(map, &m, 128); return 0;
}
"""


class CutlassSm90Gemm(_Gemm):
    """schedule: '', 'Pingpong' or 'Cooperative' (all warp-specialised)."""

    def __init__(self, element="cutlass::half_t", output="cutlass::half_t", column_b=True, tile=(128, 128, 64), schedule=""):
        self._build("sm90.cu", dict(ELEMENT=element, OUTPUT=output, TILE=",".join(f"_{t}" for t in tile), LAYOUT_B=f"cutlass::layout::{'Column' if column_b else 'Row'}Major",
                                            EPILOGUE="cutlass::epilogue::TmaWarpSpecialized" + ("Cooperative" if schedule == "Cooperative" else ""),
                                            MAINLOOP="cutlass::gemm::KernelTmaWarpSpecialized" + schedule),
                    "sm_90a", ["--expt-relaxed-constexpr", "-DCUTLASS_ENABLE_DIRECT_CUDA_DRIVER_CALL"], ENCODE)
