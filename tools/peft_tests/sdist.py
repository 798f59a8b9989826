"""PEFT's sdist: its wheel carries no tests."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import tempfile
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
    if not target.is_dir():
        unpack(archive, target)
    return target


def unpack(archive: Path, target: Path) -> None:
    """tests/ of an sdist into a folder, which is there whole or not at all: others may be doing the same."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder, tarfile.open(archive) as tar:
        wanted = [member for member in tar if member.name.startswith(f"{target.name}/tests/")]
        if not wanted:
            raise NoSdist(f"{archive} carries no tests/")
        tar.extractall(folder, wanted, filter="data")
        made = Path(folder, target.name)
        # They import each other relatively.
        (made / "tests" / "__init__.py").touch()
        try:
            made.rename(target)
        except OSError:
            if not target.is_dir():
                raise


def download(cache: Path, wanted: str) -> None:
    """The sdist of one version of peft, by pip."""
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    # Without isolation pip asks the build system at hand for the name and version alone, and fetches no other package.
    command += ["--no-build-isolation", "--no-binary", "peft", "--dest", str(cache), f"peft=={wanted}"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise NoSdist(f"pip found no sdist of peft {wanted}: {(done.stderr.strip().splitlines() or ['no reason'])[-1]}")
