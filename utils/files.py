"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from utils.options import UsageError


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """A temporary path beside ``path``, renamed to it when the block ends well and removed when it does not."""
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(flag: str, folder: str | Path) -> None:
    """Makes ``folder`` if it is missing and writes to it once, so that a run fails at its start and not at its end.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder, f".writable.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"{flag} {folder}: {error.strerror}", "a folder that can be written to") from None


def sha256(path: str | Path) -> str:
    """The file's SHA-256, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
