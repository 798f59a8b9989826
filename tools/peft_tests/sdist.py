"""PEFT's sdist: its wheel carries no tests."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

CACHE = Path("runs", "peft-tests")


class NoSdist(Exception):
    """There is no sdist to run. The text says why."""


def installed() -> str:
    """The version of the installed peft. Raises NoSdist where there is none."""
    try:
        return version("peft")
    except PackageNotFoundError:
        raise NoSdist("peft is not installed: pip install 'loradash-kernels[test]'") from None


def unpacked(folder: Path | None = None, cache: Path = CACHE) -> Path:
    """The folder that holds `tests/` of the installed peft's sdist, unpacked and made a package.

    folder: where the sdist lies already; None: it is downloaded into `cache`, where it stays.
    Raises NoSdist where there is none.
    """
    name = f"peft-{installed()}"
    archive = (folder or cache) / f"{name}.tar.gz"
    if not archive.is_file():
        if folder:
            raise NoSdist(f"{archive} is missing: the sdist must be that of the installed peft")
        download(cache, name.removeprefix("peft-"))
    target = cache.resolve() / name
    # A folder that an interrupted run left half done has no such file, which is written last.
    done = target / "tests" / "__init__.py"
    if not done.is_file():
        shutil.rmtree(target, ignore_errors=True)
        with tarfile.open(archive) as tar:
            wanted = [member for member in tar if member.name.startswith(f"{name}/tests/")]
            if not wanted:
                raise NoSdist(f"{archive} carries no tests/")
            tar.extractall(cache, wanted, filter="data")
        done.touch()
    return target


def download(cache: Path, wanted: str) -> None:
    """The sdist of one version of peft, by pip."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    # Without isolation pip asks the build system at hand for the name and version alone, and fetches no other package.
    command += ["--no-build-isolation", "--no-binary", "peft", "--dest", str(cache), f"peft=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoSdist(f"pip found no sdist of peft {wanted}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
