"""Files that are written whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import stat
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[str], None]) -> None:
    """Writes beside `path` and renames: readers see the old file or the new one, never half of one.

    The file gets the permissions that the umask leaves to a new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = f"{path}{secrets.token_hex(8)}.partial"
    descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
    mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    try:
        write(temporary)
        # A writer may have put a file of its own in the place of this one.
        os.chmod(temporary, mode)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def replace_bytes(path: Path, data: bytes) -> None:
    """`replace_file` with these bytes."""

    def write(temporary: str) -> None:
        Path(temporary).write_bytes(data)

    replace_file(path, write)
