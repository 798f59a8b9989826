"""The compiled part for the card at hand: left alone where it is newer than its sources and works here, else built.

    python -m benchmarks.proof.build --capability 9.0 --cuda-check FILE    (or --check: builds nothing)

FILE becomes the program that the sanitizer runs: every kernel from C++, without PyTorch.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

from .doctor import found_program
from .ledger import Row
from .stage import ROOT
from .worker import expect, failed, missing, passed, work

# What examples/triton_check.py ends with where Triton cannot run.
NO_TRITON = 3
PROBE = """
import sys, torch
from loradash_kernels.backends import extension
if extension.missing_reason:
    sys.exit(extension.missing_reason)
compiled = extension.compiled()
print(extension.compiled().__file__)
if {card}:
    if compiled.cuda_architectures is None:
        sys.exit("built without CUDA")
    if not compiled.cuda_runs_on(0):
        sys.exit(f"has code for {{compiled.cuda_architectures}}, which does not run on this card")
"""


def architectures(capability: tuple[int, int]) -> str:
    """What TORCH_CUDA_ARCH_LIST should be: the card's own code, and that for 8.0 where the card can run it, which a card of
    another generation does through the PTX."""
    own = "{}.{}".format(*capability)
    if capability <= (8, 0):
        return own
    return f"8.0;{own}" if capability[0] == 8 else f"8.0+PTX;{own}"


def against(card: bool) -> str | None:
    """Why the compiled part that lies here must be built anew, or None."""
    built = sorted((ROOT / "loradash_kernels").glob("_C*.so"), key=lambda path: path.stat().st_mtime)
    if not built:
        return "there is none"
    sources = [path for path in (ROOT / "csrc").rglob("*") if path.is_file()]
    newer = [path.name for path in sources if path.stat().st_mtime > built[-1].stat().st_mtime]
    if newer:
        return f"{newer[0]} is newer"
    done = subprocess.run([sys.executable, "-c", PROBE.format(card=card)], cwd=ROOT, capture_output=True, text=True)
    # Where PyTorch is not the one that it was built for, the import fails.
    return None if done.returncode == 0 else done.stderr.strip()[-1000:] or f"the import ended with {done.returncode}"


def build(capability: tuple[int, int]) -> Row:
    reason = against(card=True)
    if reason is None:
        return passed("kept: newer than its sources, and it runs on this card")
    print(f"building, for {reason}", flush=True)
    environment = {
        **os.environ,
        # Where the interpreter's folder is not on PATH, its ninja would not be found, and one file built after the other.
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "TORCH_CUDA_ARCH_LIST": architectures(capability),
        "LORADASH_CUDA": "1",
        "LORADASH_REQUIRE_EXTENSION": "1",
        "MAX_JOBS": str(os.cpu_count() or 1),
    }
    argv = [sys.executable, "setup.py", "build_ext", "--inplace"]
    code = subprocess.run(argv, cwd=ROOT, env=environment).returncode
    if code:
        return failed(f"{' '.join(argv[1:])} ended with {code}, see the log")
    still = against(card=True)
    return expect(still is None, still or f"built for {architectures(capability)}")


def build_check(capability: tuple[int, int], out: Path) -> Row:
    """examples/cuda_check for this card, by nvcc alone: every source at once, then the program."""
    nvcc, examples, csrc = found_program("nvcc"), ROOT / "examples", ROOT / "csrc"
    assert nvcc is not None
    sources = [*(csrc / "cuda").rglob("*.cu"), *(csrc / "cuda").rglob("*.cpp")]
    sources += [examples / "cuda_check.cpp", *(examples / "cuda_check").glob("*.cu")]
    options = ["-std=c++20", "-O2", "-lineinfo", "-arch=sm_{}{}".format(*capability), f"-I{csrc}", f"-I{examples}"]
    folder = out.parent / "objects"
    folder.mkdir(parents=True, exist_ok=True)
    objects = [str(folder / f"{number}-{source.stem}.o") for number, source in enumerate(sources)]
    steps = [[nvcc, *options, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
    running = [subprocess.Popen(step, cwd=ROOT) for step in steps]
    codes = [process.wait() for process in running]
    if not any(codes):
        codes.append(subprocess.run([nvcc, *options[:4], *objects, "-o", str(out)], cwd=ROOT).returncode)
    return expect(not any(codes), f"{len(sources)} sources for sm_{capability[0]}{capability[1]}: exit codes {codes}")


def start_triton() -> subprocess.Popen[str]:
    """Triton's checks without a sanitizer, beside nvcc: they compile on one core, and the sanitizer finds them compiled."""
    argv = [sys.executable, str(ROOT / "examples" / "triton_check.py")]
    return subprocess.Popen(argv, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def triton_check(process: subprocess.Popen[str]) -> Row:
    said, _ = process.communicate()
    if process.returncode == NO_TRITON:
        return missing(said.strip()[-1000:])
    return expect(
        process.returncode == 0, said.strip()[-1000:] if process.returncode else said.strip().splitlines()[-1]
    )


def check() -> Row:
    reason = against(card=False)
    return expect(reason is None, reason or "there, newer than its sources, and it can be imported")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--capability", default="8.0")
    parser.add_argument("--check", action="store_true", help="build nothing")
    parser.add_argument("--cuda-check", type=Path)
    options = parser.parse_args()
    if options.check:
        return work([("compiled part", check)])
    major, minor = map(int, options.capability.split("."))
    units = [("compiled part", lambda: build((major, minor)))]
    if options.cuda_check:
        triton = start_triton()
        units.append(("cuda_check", lambda: build_check((major, minor), options.cuda_check)))
        units.append(("triton_check", lambda: triton_check(triton)))
    return work(units)


if __name__ == "__main__":
    sys.exit(main())
